"""Memory of this process: settings of the C allocator, resident memory and free memory.

Linux clears each page that it gives to a process. A training step frees and allocates the same tensors again and again,
so it is faster when glibc keeps freed memory. Importing ``mae_fast`` changes no setting. The command line and our
training loop call these functions; call one of them in your own training loop.
"""

import ctypes
import re
from pathlib import Path
from typing import Literal

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_LARGEST_THRESHOLD = 32 << 20  # glibc's upper limit


def raise_mmap_threshold() -> None:
    """Let glibc serve allocations of up to 32 MiB from its heap, and trim the heap only above 64 MiB of free memory.

    glibc does this by itself after a process has freed a block of that size. This function allocates and frees such a
    block, without touching its pages. Settings of the user (``mallopt``, ``MALLOC_MMAP_THRESHOLD_``) take precedence.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.free(libc.malloc(_LARGEST_THRESHOLD - 8192))


def disable_malloc_trim() -> None:
    """Let glibc keep up to 2 GiB of freed memory for later allocations. Includes ``raise_mmap_threshold``.

    Tensors larger than 32 MiB are still mapped one by one and unmapped when freed. Without glibc, this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resident(what: Literal["VmHWM", "VmRSS"]) -> int:
    """Resident bytes of this process: the peak (VmHWM) or the current value (VmRSS).

    ``getrusage`` is not used, because its peak may be that of the parent process.
    """
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still allocate without swapping, within the limit of its container."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    assert found
    free = int(found[1]) * 1024
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit, or "max"
        return free
    return min(free, limit - used + int(pages["inactive_file"]))
