"""The contender of a GPU benchmark: its losses, step time, memory and launches, in a worker process.

Between its turns it holds its weights and the optimizer's state only, and the memory of a captured graph.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mae_fast.bench.case import Case
from mae_fast.bench.contenders import IMAGE_SIZE, MODELS
from mae_fast.bench.worker import Contender, release_memory
from mae_fast.models.flops import Sizes, train_flops
from mae_fast.models.sizes import MAE_ALIASES, MAE_CONFIGS

GATE_STEPS = 14  # the last of them are replays: a graph is captured after 11
TOP_KERNELS = 40


@dataclass(frozen=True)
class Plan:
    """One model at one batch size and its contenders.

    Attributes:
        seconds: that it may take.
        steps: in a turn.
    """

    model: str
    batch: int
    contenders: tuple[str, ...]
    seconds: float
    device: str = "cuda"
    steps: int = 10

    @property
    def case(self) -> Case:
        return Case("train", self.model, self.batch, "bf16", IMAGE_SIZE[self.model], device=self.device)

    def __str__(self) -> str:
        best = ", max-autotune" if any(name.endswith("max-autotune") for name in self.contenders) else ""
        return f"train {self.model} batch {self.batch} bf16{best}"


@dataclass
class GpuContender(Contender):
    """A contender that compares more losses, and measures the GPU's memory and launches of a step."""

    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cpu":
            torch.set_num_threads(1)  # the models of a dry run are so small that threads mostly wait for each other

    def losses(self) -> list[float]:
        """Build, compile and capture the step; the losses of the first steps."""
        fp32 = self.name == "truth"
        self.step = self.build("reference" if fp32 else self.name, bf16=not fp32)
        losses = [float(self.step()) for _ in range(GATE_STEPS)]  # at once: a graph of torch.compile overwrites them
        release_memory()
        return losses

    def memory(self) -> int | None:
        """Bytes that this process reserves on the GPU at the peak of a step, caches and graphs included."""
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self._seconds(1)
        peak = torch.cuda.max_memory_reserved()
        release_memory()
        return peak

    def launches(self) -> dict[str, Any] | None:
        """Launches by the host, kernels and their milliseconds in one step, and the longest kernels."""
        if self.device != "cuda":
            return None
        self.step()  # not the first after memory was released
        return count_launches(trace(self.step))


def trace(call: Callable[[], object], count: int = 1) -> list[dict[str, Any]]:
    """What the profiler sees of ``count`` calls on a GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events: list[dict[str, Any]] = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return events


def count_launches(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Launches, kernels and their milliseconds in a trace, and the longest kernels."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        raise RuntimeError("the profiler saw no kernels")
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "Launch" in e["name"]]
    us: Counter[str] = Counter()
    for kernel in kernels:
        us[kernel["name"]] += kernel["dur"]
    times = Counter(kernel["name"] for kernel in kernels)
    longest = [{"kernel": name[:100], "count": times[name], "ms": t / 1e3} for name, t in us.most_common(TOP_KERNELS)]
    return {"launches": len(calls), "kernels": len(kernels), "kernel ms": us.total() / 1e3, "longest": longest}


def model_flops(model: str) -> float:
    """Of one image in a training step: the numerator of MFU."""
    return train_flops(Sizes.of_config(MAE_CONFIGS[MAE_ALIASES[MODELS[model]]])).total
