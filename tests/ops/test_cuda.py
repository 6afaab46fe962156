"""CUDA C++ kernels: what they compiled to; and on a GPU, all CUDA and Triton kernels under the ops' own tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mae_fast
from mae_fast.ops._native import has_native

TESTS = Path(__file__).parents[1]
OPS = ("random_masking", "embed_visible", "decoder_tokens", "masked_loss")


@pytest.mark.skipif(not has_native("random_masking", "CUDA"), reason="built without CUDA kernels")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code(arch):
    """Every instance is there for both architectures, uses no local memory, and leaves room for other blocks."""
    cuobjdump = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    library = Path(mae_fast.__file__).with_name("_C.abi3.so")
    command = [cuobjdump, "-arch", arch, "-res-usage", library]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = dict(re.findall(r"Function (\w+):\n\s*(REG:.*)", usage))
    for dtype in "fd":
        sizes = ((128, 2), (256, 4), (512, 8))
        for instance in (f"rank_rowI{dtype}E", *(f"sort_rowI{dtype}Li{t}ELi{i}E" for t, i in sizes)):
            assert sum(instance in name for name in kernels) == 1, instance
    for name, line in kernels.items():
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills: {line}"
        assert used["SHARED"] <= 48 * 1024, f"{name}: {line}"
        assert used["REG"] <= 96, f"{name}: {line}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("file", [*(f"test_{op}.py" for op in OPS), "../gpu_proof/kernel_cases.py"])
def test_values_on_the_device(file):
    """A whole file of the ops' tests, with the GPU's kernels in the place of the C++ ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_proof.on_device", "-p", "no:cacheprovider"]
    # A CPU kernel names a bad index; a GPU kernel only stays inside its buffers.
    command += ["-k", "not out_of_range and not checks_its_own and not compiles", file]
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    result = subprocess.run(command, cwd=TESTS / "ops", env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(result.stdout.strip().splitlines()[-1].split()[0]) >= 20, result.stdout
