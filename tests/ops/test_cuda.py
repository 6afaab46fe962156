"""The machine code of the CUDA C++ kernels; on a GPU, also the tests of all ops with the CUDA and Triton kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mae_fast.ops.native import has_native
from mae_fast.ops.registry import ops

TESTS = Path(__file__).parents[1]
CUDA_FILES = {path.stem for path in (TESTS.parent / "csrc" / "cuda").glob("*.cu")}
OPS = [op.name for op in ops() if op.has_triton_kernels or op.name in CUDA_FILES]


@pytest.mark.skipif(not has_native("random_masking", "CUDA"), reason="built without CUDA kernels")
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
def test_machine_code(arch, budget_table):
    """All instances exist for both architectures, use no local memory, and leave room for other blocks."""
    pytest.importorskip("triton")  # its tools read the machine code
    from gpu_proof import budget

    kernels = budget.extension(arch)
    sizes = ((128, 2), (256, 4), (512, 8))
    instances = ["rank_row<{}, 256>", *(f"sort_row<{{}}, {threads}, {items}>" for threads, items in sizes)]
    assert kernels.keys() == {name.format(dtype) for name in instances for dtype in ("float", "double")}
    for name, launch in kernels.items():
        assert launch.local_bytes == 0, f"{name} spills {launch.local_bytes} bytes"
        assert launch.shared_bytes <= 48 * 1024, f"{name}: {launch}"
        assert launch.registers <= 96, f"{name}: {launch}"
        # Loads are single values of noise, which may have any strides. Stores are an int64 rank and an fp32 mask value.
        assert launch.widest("LDG") == (64 if "double" in name else 32), f"{name}: {launch}"
        assert launch.widest("STG") == 64, f"{name}: {launch}"
    found = {f"{name} sm_{arch}": budget.row(arch, launch) for name, launch in kernels.items()}
    budget_table.update(found)
    if budget.committed()["made_by"]["cuda"] != budget.toolkit():
        pytest.skip("budget.json is of another CUDA")
    assert not budget.changes(found, f"sm_{arch}"), "run `make budget` to record them"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("file", [*(f"test_{op}.py" for op in OPS), "../gpu_proof/kernel_cases.py"])
def test_values_on_the_device(file):
    """Run one file of the ops' tests with the GPU kernels in place of the C++ kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_proof.on_device", "-p", "no:cacheprovider"]
    command += ["--exhaustive"]
    # CPU kernels raise an error on a bad index. GPU kernels only avoid accesses outside the buffers.
    command += ["-m", "not native", "-k", "not out_of_range and not checks_its_own and not compiles", file]
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    result = subprocess.run(command, cwd=TESTS / "ops", env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(result.stdout.strip().splitlines()[-1].split()[0]) >= 20, result.stdout
