"""Count the launches and bytes of one training step on a GPU, without a GPU.

    python -m gpu_proof.step MODEL BATCH ARCH    # prints JSON
    python -m gpu_proof.step                     # prints the numbers of mae_fast.bench.predict.STEPS

A step runs on FakeTensors of a CUDA device. Our ops run the CUDA kernels that the dispatcher would choose on a GPU.
Their Triton launches are recorded instead of executed. torch's ops are recorded as the minimum of their CUDA kernels:
one launch that reads each operand and writes each result once. Each row has the group of a launch: "gemm" for library
calls, "attention" for that of libraries and ours, "elementwise" for everything else.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_proof.fake_device import fake_device
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

import mae_fast
from mae_fast.bench.predict import BATCH, STEPS, Counts
from mae_fast.ops import triton_common
from mae_fast.ops.adamw import triton_kernels
from mae_fast.ops.bf16_weight_cache import working_copy
from mae_fast.training import nonfinite, optim
from mae_fast.training.distributed import DistContext

CLASSIFIER = " classifier"  # suffix of a model's letter: fine-tune its classifier instead of pre-training
MODELS = {"B": "mae_vit_base_patch16", "L": "mae_vit_large_patch16", "H": "mae_vit_huge_patch14"}
GEMM = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "convolution", "convolution_backward")
# Ops that read a value on the host, and therefore wait for the GPU.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal")
NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
OVERWRITTEN = ("zero_", "fill_", "copy_", "uniform_", "normal_", "_foreach_copy_", "_foreach_zero_")


def size(x: Tensor) -> int:
    """The size of ``x`` in bytes. Expanded dimensions count once."""
    distinct = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        distinct *= length if stride or not length else 1
    return distinct * x.element_size()


def patches_only(a: dict[str, Any]) -> int:
    """Kernels with one patch per row read only these patches of the images."""
    rows = a["out_ptr"] if "out_ptr" in a else a["pred_ptr"]
    return rows.numel() * a["images_ptr"].element_size() - size(a["images_ptr"])


def tables(columns: Any, options: Any = ()) -> triton_kernels.Tables:
    """Like ``triton_kernels.tables``, for tensors without addresses. ``addresses.columns`` are the tensors."""
    count = sum(-(-x.numel() // triton_kernels.CHUNK) for x in columns[0])
    addresses = columns[0][0].new_empty(len(columns) + 2, len(columns[0]), dtype=torch.int64)
    addresses.columns = columns
    numbers = addresses.new_empty(len(options), len(columns[0]), dtype=torch.float64)
    return triton_kernels.Tables(addresses, numbers, addresses.new_empty(count, 2, dtype=torch.int32))


def sizes(a: dict[str, Any], *columns: int) -> int:
    """Bytes of the tensors in these columns of a table of addresses."""
    return sum(size(x) for column in columns for x in a["addresses_ptr"].columns[column])


def queries_left_out(a: dict[str, Any]) -> int:
    """The queries of tokens without an output are not read from the packed projection."""
    return 0 if a["Q"] is None else -size(a["qkv_ptr"]) * (a["T"] - a["Q"]) // (3 * a["T"])


def tokens_left_out(a: dict[str, Any]) -> int:
    """The tokens of x that the sum skips are not read."""
    return 0 if a["skipped"] is None else -size(a["x_ptr"]) * a["skipped"] // a["tokens"]


def read_again(*names: str) -> Callable[[dict[str, Any]], int]:
    """Bytes of tensors that a kernel both writes and reads."""
    return lambda a: sum(size(a[name]) for name in names if a[name] is not None)


# Corrections to "each tensor counts once": negative if a kernel reads only a part of it, positive if it also writes it.
# gpu_proof/interpreter_cases.py checks the accesses of the kernels.
PARTS: dict[str, Callable[[dict[str, Any]], int]] = {
    "_gather_patches_fwd_kernel": patches_only,
    "_masked_loss_fwd_kernel": patches_only,
    "_masked_loss_bwd_kernel": patches_only,
    "_attention_fwd_kernel": queries_left_out,
    "_attention_one_tile_bwd_kernel": lambda a: read_again("partial_ptr")(a) + queries_left_out(a),
    "_attention_tiles_bwd_kernel": lambda a: read_again("partial_ptr", "average_ptr")(a) + queries_left_out(a),
    "_add_layer_norm_fwd_kernel": tokens_left_out,
    "_add_layer_norm_bwd_kernel": read_again("partial_ptr"),
    "_bias_gelu_bwd_kernel": read_again("partial_ptr"),
    "_squares_kernel": lambda a: sizes(a, 0),
    "_count_steps_kernel": lambda a: sizes(a, 5, 5),
    # Reads param, grad, exp_avg and exp_avg_sq, writes all but grad, and the copy.
    "_adamw_steps_kernel": lambda a: sizes(a, 0, 0, 1, 2, 2, 3, 3, *[4] * a["HAS_COPY"]),
}


@dataclass(frozen=True)
class Launch:
    group: str  # "gemm", "attention" or "elementwise"
    name: str
    shape: str  # shape of the largest tensor
    bytes: int


class Recorder(TorchDispatchMode):
    """Records the launches of all ops in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.synchronising: list[str] = []
        self.from_host: list[str] = []  # copies from host memory, which a replayed CUDA graph would read again
        # Op of this or another package -> place of the registration of its CUDA kernel, or "no CUDA kernel".
        self.answers: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, (namespace, name) = kwargs or {}, func._schema.name.split("::")
        if namespace not in ("aten", "prim", "profiler"):  # our ops, or those of libraries in Python
            return self._opened(func, func._schema.name, args, kwargs)
        if name in SYNCHRONISING:
            self.synchronising.append(str(func))
        out = func(*args, **kwargs)
        if namespace == "aten":
            self._torchs(func, name, args, kwargs, out)
        return out

    def _opened(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        place = re.search(r"^CUDA: registered at (\S+)", torch._C._dispatch_dump(name), re.M)
        self.answers[name] = place.group(1) if place else "no CUDA kernel"
        if place and ".py:" not in place.group(1):  # compiled: one launch; only its results are mocked
            out = func(*args, **kwargs)
            self._add("elementwise", name, [*tree_leaves((args, kwargs)), *tree_leaves(out)])
            return out
        key = "CUDA" if place else "CompositeExplicitAutograd"
        with self:
            return func.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *args, **kwargs)

    def _torchs(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.device.type == "cpu" for x in written) and any(x.is_cuda for x in read):
            self.synchronising.append(str(func))
        if any(x.device.type == "cpu" for x in read) and any(x.is_cuda for x in written) and "copy" in name:
            self.from_host.append(str(func))
        mutable = func._schema.is_mutable
        if name in NOTHING or not (read or written) or (not mutable and _views(read, written)):
            return
        if "attention" in name:
            group = "attention"
            written = [x for x in written if x.dtype not in (torch.int64, torch.uint64)]  # without the seeds
        else:
            group = "gemm" if name in GEMM else "elementwise"
        if mutable:  # it changes arguments; ``out`` is these arguments or nothing
            changed = [
                x
                for i, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
                for x in tree_leaves(args[i] if i < len(args) else kwargs[argument.name])
            ]
            written, overwritten = changed, name in OVERWRITTEN
            read = [x for x in read if not (overwritten and any(x is y for y in changed))]
        elif name.startswith("new_") or name.endswith("_like"):
            read = []
        elif name in ("gather", "index_select", "embedding", "index"):
            read = [x for x in read if not x.is_floating_point()] + written  # it reads as much as it writes
        if any(x.numel() for x in written):  # without written values there is no launch
            self._add(group, name, [*read, *written], func)

    def _add(self, group: str, name: str, tensors: list[Any], func: Any = None, extra: int = 0) -> None:
        tensors = [x for x in tensors if isinstance(x, Tensor)]
        largest = max(tensors, key=size)
        dtypes = ">".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in (tensors[0], tensors[-1])))
        label = f"{dtypes} {list(largest.shape)}"
        self.launches.append(Launch(group, name, label, sum(map(size, tensors)) + extra))

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Replaces JITFunction.run."""
        bound = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        tensors = {name: x for name, x in bound.items() if isinstance(x, Tensor)}
        assert all(x.is_cuda for x in tensors.values()), f"{kernel.__name__} is given tensors of the host"
        extra = PARTS[kernel.__name__](bound) if kernel.__name__ in PARTS else 0
        group = "attention" if "attention" in kernel.__name__ else "elementwise"
        self._add(group, kernel.__name__, list(tensors.values()), extra=extra)


def _views(read: list[Tensor], written: list[Tensor]) -> bool:
    """Whether all results are views of operands (helpers of ``reshape``, casts to the same dtype)."""
    storages = {x.untyped_storage()._cdata for x in read}
    return all(x.untyped_storage()._cdata in storages for x in written)


@contextmanager
def recorded():
    """Context that yields a Recorder of all ops and Triton launches in it."""
    recorder = Recorder()
    # Counters are zeroed only once, before the first step.
    zeros = mock.patch.object(triton_common, "_zeros", lambda x, count: x.new_empty(count, dtype=torch.int32))
    launch = mock.patch.object(JITFunction, "run", lambda kernel, *a, **k: recorder.launch(kernel, *a, **k))
    with launch, zeros, mock.patch.object(triton_kernels, "tables", tables), recorder:
        yield recorder


@contextmanager
def accept_fake_tensors():
    """Let AdamW's kernels accept FakeTensors, although they have no addresses."""

    def fits(device: torch.device, *tensors: Tensor) -> bool:
        return all(x.device == device and x.dtype == torch.float32 and x.is_contiguous() for x in tensors)

    norm = mock.patch.object(nonfinite, "_fits_kernel", lambda grads: fits(grads[0].device, *grads))
    with norm, mock.patch.object(optim, "_fits_gpu", fits):
        yield


def problem(
    model: str, batch: int, image_size: int = 224, predict_ratio: float = 1.0
) -> tuple[Any, tuple[Tensor, Tensor], Callable[[Any, Tensor, Tensor], Tensor]]:
    """Our model, its inputs, and the loss function of the model and of its reference, on the current device."""
    images = torch.empty(batch, 3, image_size, image_size)
    if model.endswith(CLASSIFIER):
        name = MODELS[model.removesuffix(CLASSIFIER)].removeprefix("mae_")
        with mock.patch.object(torch.nn.init, "trunc_normal_"):  # needs values
            vit = getattr(mae_fast, name)(num_classes=1000, global_pool=True)
        targets = torch.empty(batch, 1000)
        return vit, (images, targets), lambda vit, images, targets: F.cross_entropy(vit(images).float(), targets)
    mae = getattr(mae_fast, MODELS[model])(norm_pix_loss=True, img_size=image_size)

    def loss(mae: Any, images: Tensor, noise: Tensor) -> Tensor:
        # Return only the loss of the reference. A returned prediction would add a gradient of zeros.
        if hasattr(mae, "loss"):
            return mae.loss(images, 0.75, noise, predict_ratio=predict_ratio)
        return mae(images, 0.75, noise)[0]

    return mae, (images, torch.empty(batch, mae.patch_embed.num_patches)), loss


def count(model: str, batch: int, arch: int, image_size: int = 224, predict_ratio: float = 1.0) -> dict[str, Any]:
    """Count the second training step: forward and backward, and the optimizer's update with the gradients' norm."""
    with fake_device(arch):
        with torch.device("cuda"):
            made, inputs, loss = problem(model, batch, image_size, predict_ratio)
            one = torch.ones(())  # the gradient of the loss, which is an input in Inductor's plan, too
        optimizer = optim.adamw(made, 1e-4, 0.05, working_dtype=torch.bfloat16)
        guard = nonfinite.NonFiniteGuard(made, optimizer, Path(), 0, DistContext(torch.device("cuda")), lambda: None)
        for _ in range(2):
            optimizer.zero_grad()
            with recorded() as step:
                with torch.autocast("cuda", torch.bfloat16):
                    value = loss(made, *inputs)
                value.backward(one)
            with recorded() as update, accept_fake_tensors():
                guard.update()
    copies = [working_copy(p, torch.bfloat16) for p in made.parameters() if p.requires_grad]
    return {
        "step": _table(step.launches),
        "optimiser": _table(update.launches),
        "copies": sum(map(size, copies)),  # bytes that the optimizer's update writes to replace autocast's casts
        "answers": step.answers | update.answers,
        "synchronising": step.synchronising + update.synchronising,
        "from_host": step.from_host,
    }


def _table(launches: list[Launch]) -> list[dict[str, Any]]:
    """A row per kind of launch with its number, sorted by decreasing bytes."""
    rows = [{**asdict(launch), "launches": n} for launch, n in Counter(launches).items()]
    return sorted(rows, key=lambda row: -row["bytes"] * row["launches"])


def totals(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Launches and bytes by group."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        total = found.setdefault(row["group"], {"launches": 0, "bytes": 0})
        total["launches"] += row["launches"]
        total["bytes"] += row["launches"] * row["bytes"]
    return found


def parts(counted: dict[str, Any]) -> Counts:
    """Launches and bytes of the parts that ``mae_fast.bench.predict`` distinguishes."""
    rows = [(_part(row), row) for row in counted["step"]] + [("AdamW", row) for row in counted["optimiser"]]
    found = dict.fromkeys(("products", "attention", "GELU", "layer norm", "other", "AdamW"), (0, 0.0))
    for part, row in rows:
        launches, moved = found[part]
        found[part] = launches + row["launches"], moved + row["launches"] * row["bytes"]
    return found


def _part(row: dict[str, Any]) -> str:
    if row["group"] != "elementwise":
        return {"gemm": "products"}.get(row["group"], row["group"])
    kernels = {"_bias_gelu": "GELU", "_add_layer_norm": "layer norm"}
    return next((part for name, part in kernels.items() if row["name"].startswith(name)), "other")


def steps() -> None:
    """Print the entries of ``mae_fast.bench.predict.STEPS``."""
    for name in STEPS:
        print(f'    "{name}": {{')
        for part, (launches, moved) in parts(count(name.removeprefix("ViT-")[0], BATCH, 90)).items():
            print(f'        "{part}": ({launches}, {moved / 1e9:.2f}e9),')
        print("    },")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        numbers = [float(word) if "." in word else int(word) for word in sys.argv[2:]]
        print(json.dumps(count(sys.argv[1], *numbers)))
    else:
        steps()
