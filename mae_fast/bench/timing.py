"""The one way in which this package times things: contenders interleaved, medians, ratio by ratio."""

import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleave(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender's calls, one call of each a round, after ``warmup`` rounds that are not counted.

    Neighbours on the machine then slow all contenders alike, and the ratio of two of them is taken round by round.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(warmup + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if round_number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], rival: str, ours: str) -> float:
    """Median over the rounds of the rival's time over ours: above 1, ours is faster."""
    return statistics.median(a / b for a, b in zip(times[rival], times[ours], strict=True))


def graphed(call: Callable[[], object], repeats: int = 1) -> Callable[[], None]:
    """``call``, ``repeats`` times over, captured as a CUDA graph: a function that replays it and waits for its end."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, tunes and fills caches, none of which a capture allows
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def peak_memory(step: Callable[[], object], keeping: Callable[[], object]) -> dict[str, int]:
    """Bytes of a training step on a CPU, of this process: ``peak`` in all, and ``above`` what stays between steps.

    ``keeping`` is the same step, but gradients stay allocated from one call to the next. Weights, gradients and the
    optimiser's state are then there before the second call, and ``above`` is what comes on top of them; gradients that
    the step itself frees would count as room. ``peak`` is of ``step`` as it is timed: it frees the gradients at its
    start, before anything can reach the peak, so that one process serves both.
    """
    keeping()
    before = _settled()
    keeping()
    above = _resident("VmHWM") - before
    _settled()
    step()
    return {"peak": _resident("VmHWM"), "above": above}


def _settled() -> int:
    """Give freed memory back, have Linux start the peak anew, and return what is resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def machine() -> dict[str, Any]:
    """What a figure has to be read with."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
