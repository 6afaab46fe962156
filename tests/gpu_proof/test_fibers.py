"""The CUDA C++ kernels compiled as host C++ with fibers as threads, under ASan and UBSan: values and bounds."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from op_cases import randn
from torch import Tensor

from mae_fast.ops.random_masking.reference import random_masking_reference

SOURCE = (Path(__file__).parents[2] / "csrc/cuda/random_masking.cu").read_text()
STOOD_IN_FOR = (
    "cub/block/block_radix_sort.cuh",
    "cuda_runtime.h",
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/stable/accelerator.h",
    "torch/csrc/stable/library.h",
    "torch/csrc/stable/macros.h",
    "torch/csrc/stable/ops.h",
    "torch/csrc/stable/tensor.h",
    "torch/headeronly/core/ScalarType.h",
)
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def build(folder: Path, source: str, sanitizers: str) -> Path:
    """Compile the .cu ``source`` as a host program. Only its launches are rewritten."""
    launch = r"(\w+(?:<[\w, ]*>)?)<<<([^;]*?)>>>\("
    source, count = re.subn(launch, r"fibers::launch(\2, [](auto... a) { \1(a...); }, ", source)
    assert count == 4
    headers = folder / "include"
    for name in STOOD_IN_FOR:
        (headers / name).parent.mkdir(parents=True, exist_ok=True)
        (headers / name).write_text('#include "fibers.h"\n')
    # Beside the folder of the header that it includes by "../random_masking.h".
    (folder / "cuda.cpp").write_text(source.replace('"../', '"'))
    include = [f"-I{path}" for path in (headers, Path(__file__).parent, Path(__file__).parents[2] / "csrc")]
    command = ["g++", "-std=c++20", "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", *include]
    subprocess.run([*command, folder / "cuda.cpp", "-o", folder / "program"], check=True)
    return folder / "program"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fibers"), SOURCE, "address,undefined")


def ranked(program: Path, noise: Tensor, num_keep: int, order: int = 0, mistake: int = 0) -> Sequence[Tensor]:
    """``random_masking`` by the program. Raises ``RuntimeError`` with its message if it fails."""
    (n, length), k = noise.shape, num_keep
    count = 1 + (n - 1) * noise.stride(0) + (length - 1) * noise.stride(1) if noise.numel() else 0
    storage = noise.as_strided((count,), (1,))
    arguments = (noise.element_size(), n, length, *noise.stride(), k, order, mistake)
    result = subprocess.run(
        [program, *map(str, arguments)], input=storage.numpy().tobytes(), capture_output=True, timeout=120
    )
    if result.returncode:
        raise RuntimeError(result.stderr.decode())
    shapes, left, out = ((n, k), (n, length - k), (n, length), (n, length)), bytearray(result.stdout), []
    for shape, dtype in zip(shapes, (torch.int64,) * 3 + (torch.float32,), strict=True):
        size = shape[0] * shape[1] * dtype.itemsize
        part, left = left[:size], left[size:]
        out.append(torch.frombuffer(part, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype))
    assert not left
    return out


def draw(n: int, length: int, dtype: torch.dtype) -> Tensor:
    """Noise with ties, both zeros, infinities and NaNs."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 0.25], dtype=dtype)
    noise = randn(n, length, seed=1, dtype=dtype)
    noise[:, ::5] = special[torch.arange(noise[:, ::5].numel()).reshape(n, -1) % len(special)]
    return noise


def same(ours: Sequence[Tensor], noise: Tensor, num_keep: int) -> bool:
    return all(map(torch.equal, ours, random_masking_reference(noise, num_keep)))


def exhaustive(*values):
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Sizes around the limits between kernels: 256, 1024, 4096.
@pytest.mark.parametrize(
    "length", [1, 196, 257, 1025, 4097, *exhaustive(2, 31, 129, 255, 256, 1023, 1024, 4095, 4096, 4353)]
)
def test_equals_the_reference(program, length, dtype):
    noise = draw(2, length, dtype)
    for order, num_keep in enumerate((length // 4, length if length % 2 else 0)):
        assert same(ranked(program, noise, num_keep, order), noise, num_keep)


@pytest.mark.parametrize("length", [300, *exhaustive(100, 5000)])
def test_strides(program, length):
    for noise in (draw(3, 2 * length, torch.float32)[:, ::2], draw(length, 3, torch.float64).t()):
        assert same(ranked(program, noise, length // 4), noise, length // 4)


def test_nothing_to_mask(program):
    for shape in ((0, 7), (3, 0), (0, 0)):
        assert [tuple(x.shape) for x in ranked(program, torch.empty(shape), 0)] == [(shape[0], 0), shape, shape, shape]


# Mistakes in the source, which can be enabled one by one: writing, reading and ranking past the end of a row; either
# barrier missing; a barrier that one thread misses.
MISTAKES = (
    ("if (rank < L)", "if (rank < L + (fibers::mistake == 1))"),
    ("l < L ? noise", "l < L + (fibers::mistake == 2) ? noise"),
    ("if (l < ranking.L)", "if (l < ranking.L + (fibers::mistake == 3))"),
    (
        "    __syncthreads();\n    for",
        "    if (fibers::mistake != 4 && (fibers::mistake != 6 || l != 7)) __syncthreads();\n    for",
    ),
    ("    __syncthreads();\n  }", "    if (fibers::mistake != 5) __syncthreads();\n  }"),
)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    source = SOURCE
    for right, wrong in MISTAKES:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    return build(tmp_path_factory.mktemp("mistaken"), source, "address")


@pytest.mark.exhaustive
def test_each_mistake_can_be_enabled_alone(mistaken):
    for length in (255, 5000):
        noise = draw(1, length, torch.float32)
        assert same(ranked(mistaken, noise, 7), noise, 7)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mistake", "length"), [(1, 255), (2, 255), (3, 5000)])
def test_an_access_outside_is_detected(mistaken, mistake, length):
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        ranked(mistaken, draw(1, length, torch.float32), 7, mistake=mistake)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mistake", [4, 5])
def test_a_missing_barrier_is_detected(mistaken, mistake):
    assert SOURCE.count("__syncthreads()") == 2
    noise = draw(1, 5000, torch.float32)
    assert not all(same(ranked(mistaken, noise, 1250, order, mistake), noise, 1250) for order in (0, 1))


@pytest.mark.exhaustive
def test_a_barrier_that_one_thread_misses_is_detected(mistaken):
    with pytest.raises(RuntimeError, match="not every thread reaches the same barrier"):
        ranked(mistaken, draw(1, 5000, torch.float32), 1250, mistake=6)
