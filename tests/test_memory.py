"""The C heap of this process, and what it takes."""

import ctypes
import os
import subprocess
import sys

import pytest

MAPPED = """
import ctypes, sys
import torch
__import__(sys.argv[1])
class Info(ctypes.Structure):  # glibc's struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
before = info().hblks
held = torch.empty(30 << 20, dtype=torch.uint8)
print(info().hblks - before)
"""


def mapped(module: str, **environment: str) -> int:
    """How many tensors of one of 30 MiB are pages of their own, which nobody else will take, after an import."""
    words = [sys.executable, "-c", MAPPED, module]
    env = os.environ | environment
    return int(subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 or newer")
def test_who_uses_the_ops_takes_freed_memory_again():
    assert mapped("mae_fast.models.mae") == 0
    assert mapped("mae_fast.models.mae", MALLOC_MMAP_THRESHOLD_="1000000") == 1  # the user's own word


def test_the_most_is_not_that_of_the_process_that_started_this_one():
    read = "import resource; from mae_fast.memory import resident; print(resident('VmRSS'), resident('VmHWM'), "
    read += "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    start = (
        f"import subprocess, sys; large = b'x' * 2**30; subprocess.run([sys.executable, '-c', {read!r}], check=True)"
    )
    found = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    now, most, inherited = map(int, found.stdout.split())
    assert 2**25 < now <= most < 2**30 < inherited
