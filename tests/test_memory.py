"""The C heap of this process, and what it takes."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
if sys.argv[1] != "nothing":
    __import__(sys.argv[1], fromlist=["x"])
def step():
    copies = [torch.ones(3 << 20) for _ in range(4)]  # 12 MiB each
for i in range(8):
    if i == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(module: str, **environment: str) -> int:
    """Pages that five steps get anew."""
    words = [sys.executable, "-c", FAULTS, module]
    return int(subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_who_uses_the_ops_takes_freed_memory_again():
    each_anew = 5 * (48 << 20) // 4096
    assert faults("nothing") > each_anew / 2
    assert faults("mae_fast.models.mae") < each_anew / 100
    assert faults("mae_fast.models.mae", MALLOC_MMAP_THRESHOLD_="1000000") > each_anew / 2  # the user's own word


def test_the_most_is_not_that_of_the_process_that_started_this_one():
    read = "import resource; from mae_fast.memory import resident; print(resident('VmRSS'), resident('VmHWM'), "
    read += "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    start = (
        f"import subprocess, sys; large = b'x' * 2**30; subprocess.run([sys.executable, '-c', {read!r}], check=True)"
    )
    found = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    now, most, inherited = map(int, found.stdout.split())
    assert 2**25 < now <= most < 2**30 < inherited
