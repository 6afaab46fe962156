"""The allocator settings and the memory of this process."""

import ctypes
import os
import subprocess
import sys

import pytest

from mae_fast.memory import free_memory

MAPPED = """
import ctypes
import torch
class Info(ctypes.Structure):  # glibc's struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
{first}
before = info().hblks
held = torch.empty(30 << 20, dtype=torch.uint8)
print(info().hblks - before)
"""
GLIBC = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")


def is_mapped(first: str, **environment: str) -> bool:
    """Whether a tensor of 30 MiB is mapped separately, and unmapped when freed, after the statement ``first``."""
    words = [sys.executable, "-c", MAPPED.format(first=first)]
    env = os.environ | environment
    return bool(int(subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout))


@GLIBC
def test_both_settings_allocate_tensors_on_the_heap():
    assert is_mapped("")
    assert not is_mapped("from mae_fast.memory import raise_mmap_threshold as f; f()")
    assert not is_mapped("from mae_fast.memory import disable_malloc_trim as f; f()")


@GLIBC
def test_raising_the_threshold_respects_the_setting_of_the_user():
    assert is_mapped("from mae_fast.memory import raise_mmap_threshold as f; f()", MALLOC_MMAP_THRESHOLD_="1000000")


@GLIBC
def test_command_line_raises_the_mmap_threshold():
    run = "import sys; from mae_fast.cli import main; sys.argv = ['mae-fast', '--version']; sys.stdout = sys.stderr; "
    assert not is_mapped(run + "main(); sys.stdout = sys.__stdout__")


def test_peak_excludes_the_parent_process():
    read = "import resource; from mae_fast.memory import resident; print(resident('VmRSS'), resident('VmHWM'), "
    read += "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    start = (
        f"import subprocess, sys; large = b'x' * 2**30; subprocess.run([sys.executable, '-c', {read!r}], check=True)"
    )
    found = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    now, most, inherited = map(int, found.stdout.split())
    assert 2**22 < now <= most < 2**30 < inherited


def test_free_memory_is_within_the_limit_of_the_container(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:   500 kB\n")

    def free():
        return free_memory(tmp_path / "meminfo", tmp_path)

    assert free() == 500 * 1024
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000\nactive_file 7\n")
    for limit, expected in (("max", 500 * 1024), ("400000", 150000), ("40000000", 500 * 1024)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free() == expected
