"""Measures our training step and its kernels on one GPU, without torch.compile.

The rows are measured one by one in a worker process, which is restarted after a GPU error. The most informative rows
come first: the kernels of a ViT-B step with their predicted times, then attention, then the ops.
"""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.contender import count_launches, model_flops, trace
from benchmarks.gpu.report import Report
from benchmarks.ops.problems import problems
from mae_fast.bench.contenders import build, images, noise
from mae_fast.bench.predict import BATCH, GPUS, predicted_seconds
from mae_fast.bench.worker import GRAPH_STEPS, Unavailable, Worker, release_memory
from mae_fast.ops.attention import attention

LIMIT = 45  # seconds per row, in which Triton compiles its kernels
BF16 = torch.bfloat16
LABELS = {"base": "ViT-B/16", "large": "ViT-L/16", "huge": "ViT-H/14"}
LIBRARIES = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NEVER_MEASURED = ("add_layer_norm", "bias_gelu", "attention", "mlp", "linear")
# Words in kernel names, by part of the step as in ``mae_fast.bench.predict``. The first match counts.
WORDS = {
    "GELU": ("bias_gelu",),
    "layer norm": ("layer_norm",),
    "attention": ("attention", "flash", "fmha"),
    "AdamW": ("adam", "multi_tensor", "foreach", "_squares_kernel", "_norm_kernel", "_count_steps_kernel"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
}


class Row(NamedTuple):
    """A measurement: ``section`` is a list in the results and a method of ``Measurer``, with arguments ``args``."""

    section: str
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return " ".join((self.section, *map(str, self.args)))


def rows(ops: list[str], dry_run: bool) -> list[Row]:
    """All measurements, the most informative ones first."""
    if dry_run:
        shapes, steps, layers = [(2, 2, 10, 16)], [("tiny", 4, "eager")], [(64, 32, 96)]
    else:
        shapes = [(256, 12, 50, 64), (256, 16, 197, 32)]
        steps = [("base", 256, "eager"), ("base", 256, "CUDA graph"), ("large", 128, "eager"), ("huge", 64, "eager")]
        steps += [("base", n, "CUDA graph") for n in (512, 64, 128, 1024)]
        steps += [("large", 128, "CUDA graph"), ("huge", 64, "CUDA graph")]
        sides = ((256 * 50, 768), (256 * 197, 512))
        layers = [(m, i * w, o * w) for m, w in sides for i, o in ((1, 3), (1, 1), (1, 4), (4, 1))]
        layers += [(256 * 49, 768, 768), (256 * 50, 768, 512), (256 * 147, 512, 768)]
    backends = ("triton", "sdpa", *LIBRARIES, "xformers")
    attentions = [Row("attention", (*shape, backend)) for shape in shapes for backend in backends]
    found = [Row("step", step) for step in steps[:2]] + attentions + [Row("op", (name,)) for name in ops]
    found += [Row("ceiling", (what,)) for what in ("copy", "product")] + [Row("step", step) for step in steps[2:4]]
    return found + [Row("linear", layer) for layer in layers] + [Row("step", step) for step in steps[4:]]


def run(report: Report, dry_run: bool) -> None:
    """Measure the rows in order, until the time limit."""
    worker: Worker | None = Worker("kernels", Measurer, dry_run, deadline=report.deadline)
    try:
        ops = worker.ask("ops")
    except Unavailable as error:
        return report.note_missing(error.kind, "kernels", str(error))
    for row in rows(ops, dry_run):
        if report.left < 2:
            report.note_missing("left out", str(row), "time limit reached")
            continue
        worker = worker or Worker("kernels", Measurer, dry_run)
        worker.deadline = report.within(LIMIT)
        try:
            found = worker.ask(row.section, *row.args)
        except Unavailable as error:
            report.note_missing(error.kind, str(row), str(error))
            if not worker.process.is_alive() or error.kind == "left out" or "CUDA error" in str(error):
                worker.deadline = 0.0  # kill it immediately
                worker.close()
                worker = None  # the next row starts a new worker
        else:
            report.add(row.section, found)
            report.log(f"{row}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float)))
    if worker:
        worker.close()


class Measurer:
    """Measures rows in a worker process. Each section is a method."""

    name = "kernels"  # ``serve`` then reports a missing package as skipped

    def __init__(self, dry_run: bool) -> None:
        self.device = torch.device("cpu" if dry_run else "cuda")
        if dry_run:
            torch.set_num_threads(1)  # at tiny sizes, threads mostly wait for each other
        self.problems = {str(p): p for p in (problems(1, 1) if dry_run else problems())}

    def ops(self) -> list[str]:
        """The ops in bf16. Ops that were never measured on a GPU come first."""
        found = sorted(self.problems.values(), key=lambda p: p.op not in NEVER_MEASURED)
        return [str(p) for p in found if p.dtype == "bf16" or p.op == "random_masking"]

    def step(self, model: str, batch: int, execution: str) -> dict[str, Any]:
        """A training step in bf16: time, memory, MFU, and its kernels with their predicted times."""
        x, masks = images(model, batch).to(self.device), noise(model, batch).to(self.device)
        step = build("mae_fast" + f" {execution}" * (execution != "eager"), model, x, True, noise=masks)
        for _ in range(GRAPH_STEPS if execution != "eager" else 2):
            step()
        ms = self.median_ms(step, 12)
        found: dict[str, Any] = {"model": model, "batch": batch, "execution": execution, "ms": ms}
        found["images/s"] = 1e3 * batch / ms
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            events = trace(step)
            found |= count_launches(events) | {"memory": torch.cuda.max_memory_reserved()}
            found |= beside_prediction(model, batch, ms, events)
        del step
        gc.collect()
        release_memory()
        return found

    def attention(self, n: int, heads: int, tokens: int, size: int, backend: str) -> dict[str, Any]:
        """Attention of one layer: forward, forward and backward, and the relative error of the output against fp32."""
        if self.device.type == "cpu" and backend != "sdpa":
            raise ImportError("the only backend on a CPU is sdpa")
        shape = n, tokens, 3 * heads * size
        qkv = torch.randn(shape, dtype=BF16, device=self.device).requires_grad_()
        grad = torch.randn(n, tokens, heads * size, dtype=BF16, device=self.device)
        with torch.no_grad():
            exact = attention(qkv.float(), heads, backend="sdpa")
        run = partial(attention, qkv, heads, backend="sdpa" if backend in LIBRARIES else backend)
        with sdpa_kernel(LIBRARIES[backend]) if backend in LIBRARIES else nullcontext():
            with torch.no_grad():
                error = ((run().float() - exact).norm() / exact.norm()).item()
                forward = self.kernel_ms(run)
            both = self.kernel_ms(lambda: torch.autograd.grad(run(), qkv, grad))
        flops = 4 * n * heads * tokens**2 * size
        found = {"shape": [n, heads, tokens, size], "backend": backend, "error": error, "forward ms": forward}
        return found | {"both ms": both, "TFLOP/s": 3.5 * flops / both / 1e9}

    def op(self, name: str) -> dict[str, Any]:
        """An op with the shapes of a training step, forward and backward, after a comparison with eager torch."""
        problem = self.problems[name]
        problem.compare({"eager": problem.call(problem.eager)(), "mae_fast": problem.call(problem.ours)()})
        ms = {name: self.kernel_ms(problem.call(f)) for name, f in (("eager", problem.eager), ("ours", problem.ours))}
        found = {"op": name, "ms": ms["ours"], "eager ms": ms["eager"], "vs eager": ms["eager"] / ms["ours"]}
        return found | {"GB/s": problem.bytes_moved / ms["ours"] / 1e6}

    def ceiling(self, what: str) -> dict[str, Any]:
        """A large copy or matrix product, as an upper bound of the rates of the other rows."""
        large = self.device.type == "cuda"
        if what == "copy":
            x = torch.zeros(2 ** (30 if large else 20), dtype=torch.uint8, device=self.device)
            y = torch.empty_like(x)
            ms = self.median_ms(lambda: y.copy_(x), 20)
            return {"ceiling": what, "ms": ms, "GB/s": 2 * x.numel() / ms / 1e6}
        side = 8192 if large else 256
        a, b = (torch.randn(side, side, dtype=BF16, device=self.device) for _ in range(2))
        ms = self.median_ms(lambda: a @ b, 20)
        return {"ceiling": what, "ms": ms, "TFLOP/s": 2 * side**3 / ms / 1e9}

    def linear(self, rows: int, inputs: int, outputs: int) -> dict[str, Any]:
        """The three products of a linear layer: forward, gradient of the input, gradient of the weight in fp32."""
        sizes = ((rows, inputs), (outputs, inputs), (rows, outputs))
        x, w, g = (torch.randn(size, dtype=BF16, device=self.device) for size in sizes)
        wide = {"out_dtype": torch.float32} if self.device.type == "cuda" else {}
        calls: dict[str, Callable[[], Tensor]] = {
            "forward": lambda: F.linear(x, w),
            "input gradient": lambda: g @ w,
            "weight gradient": lambda: torch.mm(g.t(), x, **wide),  # type: ignore[call-overload]
        }
        found: dict[str, Any] = {"rows": rows, "inputs": inputs, "outputs": outputs}
        for name, call in calls.items():
            ms = self.median_ms(call, 20)
            found |= {f"{name} ms": ms, f"{name} TFLOP/s": 2 * rows * inputs * outputs / ms / 1e9}
        return found

    def median_ms(self, call: Callable[[], object], count: int) -> float:
        """The median milliseconds of a call, after three warm-up calls. On a GPU, timed with events."""
        if self.device.type == "cpu":
            return statistics.median(_seconds(call) for _ in range(3)) * 1e3
        for _ in range(3):
            call()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))

    def kernel_ms(self, call: Callable[[], object], count: int = 10) -> float:
        """The milliseconds of the kernels of a call, without gaps between launches."""
        if self.device.type == "cpu":
            return self.median_ms(call, count)
        for _ in range(3):
            call()
        return float(count_launches(trace(call, count))["kernel ms"] / count)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def beside_prediction(model: str, batch: int, ms: float, events: list[dict[str, Any]]) -> dict[str, Any]:
    """The milliseconds of kernels by part; on a known GPU, also the predicted ones and MFU."""
    by_part: Counter[str] = Counter()
    for name, us in kernel_times(events):
        by_part[part_of(name)] += us
    found: dict[str, Any] = {"ms by part": {part: us / 1e3 for part, us in by_part.most_common()}}
    gpu = next((gpu for gpu in GPUS.values() if gpu.name == torch.cuda.get_device_name()), None)
    if gpu is None:
        return found
    predicted = {part: s * 1e3 * batch / BATCH for part, s in predicted_seconds(LABELS[model], gpu).items()}
    found |= {"predicted ms by part": predicted, "predicted ms": sum(predicted.values())}
    return found | {"MFU": batch * model_flops(model) / ms * 1e3 / gpu.peak}


def kernel_times(events: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    return ((event["name"], event["dur"]) for event in events if event.get("cat") == "kernel")


def part_of(kernel: str) -> str:
    """The part of the step that a kernel belongs to, by its name."""
    low = kernel.lower()
    return next((part for part, words in WORDS.items() if any(word in low for word in words)), "other")
