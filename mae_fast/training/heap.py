"""The C heap of a training process."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_THRESHOLD = 32 << 20  # glibc takes no larger one


def keep_freed_memory() -> None:
    """Have glibc keep what CPU tensors free for the next ones, instead of unmapping it, process-wide.

    Activations and gradients are freed and allocated again at every step; Linux otherwise clears and maps their pages
    each time. Larger tensors than 32 MiB are mapped one by one all the same, and freed at once. Another C library than
    glibc keeps its own ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
