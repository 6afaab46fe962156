"""The memory of this process: its C heap, and how much of it there is."""

import ctypes
import re
from pathlib import Path
from typing import Literal

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_THRESHOLD = 32 << 20  # glibc takes no larger one


def raise_mmap_threshold() -> None:
    """Have glibc take tensors of up to 32 MiB from its heap, and give back the heap's end only from 64 MiB on.

    That is what it does by itself once a process has freed a tensor of that size; so one is freed, which nobody has
    touched. Else copies of weights and gradients that are made and freed in each step may get new pages each time,
    which Linux clears. A user's own settings (``mallopt``, ``MALLOC_MMAP_THRESHOLD_``) stay as they are.
    """
    torch.empty(_LARGEST_THRESHOLD - 8192, dtype=torch.uint8, device="cpu")


def disable_malloc_trim() -> None:
    """Have glibc keep what CPU tensors free for the next ones, instead of unmapping it, process-wide.

    Activations and gradients are freed and allocated again at every step; Linux otherwise clears and maps their pages
    each time. Larger tensors than 32 MiB are mapped one by one all the same, and freed at once. Another C library than
    glibc keeps its own ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resident(what: Literal["VmHWM", "VmRSS"]) -> int:
    """Bytes of this process in memory, at most so far or now. (What ``getrusage`` calls the most may be that of the
    process which started this one.)"""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
