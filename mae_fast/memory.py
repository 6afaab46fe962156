"""The memory of this process: settings of the C allocator, and how much is resident.

Linux clears each page that a process gets from it. A training step frees and allocates the same tensors again and
again, so it is faster when glibc keeps freed memory. Importing ``mae_fast`` changes no setting: the command line and
the training loop call these functions. Call one of them in your own training loop.
"""

import ctypes
import re
from pathlib import Path
from typing import Literal

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_LARGEST_THRESHOLD = 32 << 20  # glibc's upper limit


def raise_mmap_threshold() -> None:
    """Let glibc serve allocations of up to 32 MiB from its heap, and shrink the heap only from 64 MiB on.

    glibc does this by itself after a process has freed a block of that size, so this function allocates and frees one,
    without touching it. Settings of the user (``mallopt``, ``MALLOC_MMAP_THRESHOLD_``) stay as they are.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.free(libc.malloc(_LARGEST_THRESHOLD - 8192))


def disable_malloc_trim() -> None:
    """Let glibc keep up to 2 GiB of freed memory for later allocations; what ``raise_mmap_threshold`` does, too.

    Tensors larger than 32 MiB are still mapped one by one and unmapped when freed. Other C libraries than glibc are
    left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resident(what: Literal["VmHWM", "VmRSS"]) -> int:
    """Bytes of this process in memory: the peak (VmHWM) or now (VmRSS). The peak that ``getrusage`` reports may be that
    of the parent process."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can have without swapping, within the limit of its container."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    assert found
    free = int(found[1]) * 1024
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit, or "max"
        return free
    return min(free, limit - used + int(pages["inactive_file"]))
