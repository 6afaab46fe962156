"""Timing: interleaved calls, ratios taken round by round; and the machine, versions and code of a measurement."""

import ctypes
import gc
import hashlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..memory import resident


def interleave(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender's calls, one call per round, after ``warmup`` uncounted rounds.

    Other work on the machine then slows all contenders alike, and their ratio is taken round by round.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(warmup + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if round_number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], other: str, ours: str) -> float:
    """The median over the rounds of the other's time over ours; above 1, ours is faster."""
    return statistics.median(a / b for a, b in zip(times[other], times[ours], strict=True))


def graphed(call: Callable[[], object], repeats: int = 1) -> Callable[[], None]:
    """Capture ``repeats`` calls as a CUDA graph; a function that replays it and waits for its end."""
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
    """Bytes of a step, of this process or of the GPU: ``peak`` in all, and ``above`` what stays between steps.

    ``keeping`` is the same step, but gradients stay allocated from one call to the next. Weights, gradients and the
    optimiser's state are then there before the second call, and ``above`` is what comes on top of them; gradients that
    the step itself frees would count as room. ``peak`` is of ``step`` as it is timed: it frees the gradients at its
    start, before anything can reach the peak, so that one process serves both.
    """
    keeping()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        keeping()
        peak = torch.cuda.max_memory_allocated()
        step()
        return {"peak": peak, "above": peak - before}
    before = _settled()
    keeping()
    above = resident("VmHWM") - before
    _settled()
    step()
    return {"peak": resident("VmHWM"), "above": above}


def _settled() -> int:
    """Return freed memory to the system, reset the peak, and return the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def machine() -> dict[str, Any]:
    """The machine and the software of a measurement."""
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


PACKAGES = ("torch", "triton", "xformers", "timm", "transformers", "numpy")
# The files that a figure may depend on: not those of the command line, tables and pictures.
TIMED = ("__init__.py", "memory.py", "reference.py", "models", "ops", "targets", "training", "bench/contenders.py")


def versions() -> dict[str, str | None]:
    """Versions of the packages that are timed; None if one is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """``git describe`` of the repository that tracks the package; else the version of the package."""
    package = Path(__file__).parents[1]
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty"]
    try:
        tracked = ["git", "-C", str(package.parent), "ls-files", "--error-unmatch", "mae_fast/__init__.py"]
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        from .. import __version__

        return __version__


def code() -> str:
    """Twelve digits that identify the timed code, committed or not, and the compiled kernels."""
    package = Path(__file__).parents[1]
    files = [package / name for name in TIMED]
    files = [file for path in files for file in ([path] if path.is_file() else path.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in sorted([*files, *package.glob("*.so")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
