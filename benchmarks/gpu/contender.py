"""The contender of a GPU benchmark: its losses, step time, memory and launches, in a worker process.

Between its turns, it only keeps weights, optimizer state, and the memory of a captured graph.
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

GATE_STEPS = 14  # the last steps are replays, because a graph is captured after 11 steps
TOP_KERNELS = 40


@dataclass(frozen=True)
class Plan:
    """One model at one batch size and its contenders.

    Attributes:
        seconds: time limit.
        steps: steps in a turn.
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
    """A contender that compares more losses, and measures GPU memory and launches of a step."""

    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cpu":
            torch.set_num_threads(1)  # threads of the tiny models of a dry run mostly wait for each other

    def losses(self) -> list[float]:
        """Build, compile and capture the step. Returns the losses of the first steps."""
        fp32 = self.name == "truth"
        self.step = self.build("reference" if fp32 else self.name, bf16=not fp32)
        # Convert each loss immediately: the next replay of a CUDA graph overwrites it.
        losses = [float(self.step()) for _ in range(GATE_STEPS)]
        release_memory()
        return losses

    def memory(self) -> int | None:
        """The peak bytes that a step reserves on the GPU, including caches and graphs."""
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self._seconds(1)
        peak = torch.cuda.max_memory_reserved()
        release_memory()
        return peak

    def launches(self) -> dict[str, Any] | None:
        """The launches, the kernels and their milliseconds in one step, and the longest kernels."""
        if self.device != "cuda":
            return None
        self.step()  # the first step after ``release_memory`` allocates again
        return count_launches(trace(self.step))


def trace(call: Callable[[], object], count: int = 1) -> list[dict[str, Any]]:
    """The profiler events of ``count`` calls on a GPU."""
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
    """The launches, the kernels and their milliseconds in a trace, and the longest kernels."""
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
    """FLOPs per image of a training step, for MFU."""
    return train_flops(Sizes.of_config(MAE_CONFIGS[MAE_ALIASES[MODELS[model]]])).total
