"""Count the launches and bytes of a training step of the reference model under torch.compile, without a GPU.

    python -m gpu_proof.inductor MODEL BATCH ARCH      # prints JSON, takes minutes

``torch.compile`` compiles the model on FakeTensors of a CUDA device, up to the point where Inductor would pass its
kernels to Triton. Launches are counted in the generated code. Bytes are counted by Inductor's ``count_bytes``: each
buffer of a kernel once, or only the part that the kernel reads.
"""

import json
import re
import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
from gpu_proof.compiled import launches
from gpu_proof.fake_device import fake_device
from gpu_proof.step import CLASSIFIER, GEMM, problem
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering

from mae_fast.models.reference import ReferenceMAE, ReferenceViT


class _Planned(Exception):
    """Stops the compilation after Inductor has generated its code."""


def _group(node: Any) -> tuple[str, str]:
    """The group (as in ``gpu_proof.step``) and the name of a node of Inductor's schedule."""
    if type(node).__name__ != "ExternKernelSchedulerNode":
        return "elementwise", type(node).__name__
    called = getattr(node.node, "op_overload", None) or getattr(node.node, "python_kernel_name", None)
    name = str(called or type(node.node).__name__)
    if "attention" in name:
        return "attention", name
    return "gemm" if any(word in GEMM for word in re.split(r"\W", name)) else "elementwise", name


def plan(model: str, batch: int, arch: int) -> dict[str, Any]:
    """Launches and bytes of one forward and backward pass, by group and by name."""
    moved: Counter[tuple[str, str]] = Counter()
    launched: Counter[tuple[str, str]] = Counter()

    def stop(graph: GraphLowering) -> None:
        code, _ = graph.codegen()
        text = code.value
        called = text[text.index("class Runner") :] if "class Runner" in text else text[text.index("def call(") :]
        launched["elementwise", "Triton"] += len(re.findall(r"triton_\w+\.run\(", called))
        for external, aten in re.findall(r"extern_kernels\.(\w+)\(|torch\.ops\.aten\.(\w+)\.\w+\(", called):
            name = external or aten
            group = "gemm" if name in GEMM else "attention" if "attention" in name else "elementwise"
            launched[group, name] += 1
        for node, words in graph.count_bytes()[1]:
            moved[_group(node)] += 4 * words
        raise _Planned

    def inner_compile(module: Any, inputs: Any, **options: Any) -> Any:
        try:
            compile_fx.compile_fx_inner(module, inputs, **options)
        except Exception as error:  # the exception may be wrapped
            seen: BaseException | None = error
            while seen is not None and not isinstance(seen, _Planned):
                seen = seen.__cause__ or seen.__context__
            if seen is None:
                raise

        def run(arguments: Any) -> Any:
            with torch.no_grad():
                return module(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(module: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(module, inputs, inner_compile=inner_compile)

    # Constant folding would compute values.
    patches = {"compile_threads": 1, "fx_graph_cache": False, "joint_graph_constant_folding": False}
    with (
        launches(arch),
        fake_device(arch),
        mock.patch.object(GraphLowering, "_compile_to_module", stop),
        config.patch(patches),
    ):
        # Tensors are created on the device, as FakeTensors cannot be moved in place.
        with torch.device("cuda"), mock.patch.object(torch.nn.Module, "to", lambda module, *_: module):
            ours, inputs, loss = problem(model, batch)
            reference = (ReferenceViT if model.endswith(CLASSIFIER) else ReferenceMAE).of(ours)
        compiled = torch.compile(lambda *inputs: loss(reference, *inputs), backend=backend)
        with torch.autocast("cuda", torch.bfloat16):
            value = compiled(*inputs)
        value.backward()
    return {
        "model": model,
        "batch": batch,
        "arch": arch,
        "torch": torch.__version__,
        "totals": {
            group: {what: _sum(counts, group) for what, counts in (("launches", launched), ("bytes", moved))}
            for group in ("gemm", "attention", "elementwise")
        },
        "launches": {name: n for (_, name), n in launched.most_common()},
        "bytes": {name: n for (_, name), n in moved.most_common() if n},
    }


def _sum(counts: Counter[tuple[str, str]], wanted: str) -> int:
    return sum(n for (group, _), n in counts.items() if group == wanted)


if __name__ == "__main__":
    print(json.dumps(plan(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), indent=2))
