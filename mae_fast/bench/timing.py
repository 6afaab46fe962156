"""Timing with interleaved calls and ratios per round; and the machine, versions and code of a measurement."""

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
    """The seconds of each contender's calls, one call per round, after ``warmup`` rounds that do not count.

    Other load on the machine then affects all contenders of a round alike, so that their ratio in a round is reliable.
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
    """The median over all rounds of the time of ``other`` / the time of ``ours``. Above 1, ``ours`` is faster."""
    return statistics.median(a / b for a, b in zip(times[other], times[ours], strict=True))


def graphed(call: Callable[[], object], repeats: int = 1) -> Callable[[], None]:
    """Capture ``repeats`` calls as a CUDA graph. Returns a function that replays it and synchronizes."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compile, tune and fill caches, because none of this is allowed during capture
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
    """The memory of a step in bytes, of this process or of the GPU.

    Args:
        step: the timed step. It frees gradients at its start.
        keeping: the same step, but gradients stay allocated between calls. Weights, gradients and optimizer state are
            then allocated before the second call, so its peak shows what the step needs above them.

    Returns:
        ``peak``: the peak of ``step``. ``above``: the part above weights, gradients and optimizer state.
    """
    keeping()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        keeping()
        peak = torch.cuda.max_memory_allocated()
        step()
        return {"peak": peak, "above": peak - before}
    before = _trim_memory()
    keeping()
    above = resident("VmHWM") - before
    _trim_memory()
    step()
    return {"peak": resident("VmHWM"), "above": above}


def _trim_memory() -> int:
    """Give freed memory back to the system and reset the recorded peak. Returns the resident bytes."""
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
# The files on which a measurement may depend. It does not depend on the command line, tables and plots.
TIMED = ("__init__.py", "memory.py", "reference.py", "models", "ops", "targets", "training", "bench/contenders.py")


def versions() -> dict[str, str | None]:
    """The versions of the timed packages; None for a package that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """``git describe`` of the package's repository, or the version of the package if it is not in a repository."""
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
    """A hash of the timed code, including uncommitted changes, and of the compiled kernels."""
    package = Path(__file__).parents[1]
    files = [package / name for name in TIMED]
    files = [file for path in files for file in ([path] if path.is_file() else path.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in sorted([*files, *package.glob("*.so")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
