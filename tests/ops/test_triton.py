"""The Triton kernels without a GPU: their values in Triton's interpreter, and their compiled machine code."""

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from gpu_proof import budget
from gpu_proof.budget import BF16, FP32, UINT8, UINT16, Case
from gpu_proof.compiled import Launch, launches

import mae_fast
from mae_fast.ops import registry
from mae_fast.ops.native import has_kernel

TESTS = Path(__file__).parents[1]
OPS = tuple(op.name for op in registry.ops() if op.has_triton_kernels)
# A subset of the tests of the C++ kernels that takes the interpreter about a minute.
CHOSEN = (
    "(values_and_gradients and (contiguous or (torch.bfloat16 and (permuted or strided)))) "
    "or (gather_is_exact and strided) or add_positions_is_exact or only_requested or repeated or weights or constant "
    "or (exact_in_mixed_dtypes and not torch.float16 and not torch.float64) or unshuffle "
    "or (raw_images and norm and torch.bfloat16) or (gather_of_raw and strided and torch.bfloat16) "
    "or nan_predictions or test_mixed_dtypes or residual_bias or far_tails"
)
# CPU kernels raise an error on a bad index. GPU kernels only avoid accesses outside the buffers.
EVERY = "not out_of_range and not checks_its_own and not compiles"
CASE_FILES = [str(TESTS / f"gpu_proof/{name}_cases.py") for name in ("interpreter", "kernel")]
ATTENTION = (
    "_attention_fwd_kernel",
    "_attention_one_tile_bwd_kernel",
    "_attention_tiles_bwd_kernel",
)  # limited by matrix products
OWN = "interpreter only"
RUNS = {**{op: [f"test_{op}.py"] for op in OPS}, OWN: CASE_FILES}


@pytest.fixture(scope="module", autouse=True)
def interpreted(pytestconfig, request):
    """Run pytest with the Triton kernels in place of the C++ kernels, in one process per entry of RUNS, in parallel."""
    asked_for = {item.name for item in request.session.items}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "gpu_proof.interpreted", "-p", "no:cacheprovider"]
    chosen = CHOSEN
    if pytestconfig.getoption("exhaustive"):
        chosen, command = EVERY, [*command, "--exhaustive"]
    chosen_of = {**dict.fromkeys(RUNS, chosen), OWN: ""}
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = {
        name: subprocess.Popen([*command, "-k", chosen_of[name], *files], cwd=TESTS / "ops", env=env, **pipes)
        for name, files in RUNS.items()
        if f"test_values_in_the_interpreter[{name}]" in asked_for
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@triton.jit
def _centre_kernel(x_ptr, y_ptr, step: tl.constexpr, COUNT: tl.constexpr):
    i = step * tl.arange(0, COUNT)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x - tl.sum(x) / COUNT)


def test_spills_and_narrow_accesses_are_detected():
    x = torch.empty(16384, device="meta")
    with launches(90) as log:
        _centre_kernel[(1,)](x, x, 1, COUNT=1024)
        _centre_kernel[(1,)](x, x, 3, COUNT=1024)
        _centre_kernel[(1,)](x, x, 1, COUNT=8192, num_warps=1)  # 256 values per thread, which has 255 registers
    lean, strided, greedy = log
    assert (lean.local_bytes, lean.widest("LDG"), lean.widest("STG")) == (0, 128, 128)
    assert (strided.widest("LDG"), strided.widest("STG")) == (32, 32)
    assert greedy.local_bytes > 0


@triton.jit
def _copy_rows_kernel(x_ptr, y_ptr, W, WIDE: tl.constexpr, BLOCK_R: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if WIDE:
        row = row.to(tl.int64)
    offsets = row[:, None] * W + tl.arange(0, 128)[None, :]
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


def test_offsets_that_overflow_are_detected():
    x = torch.empty(16384, device="meta")
    with launches(90) as log:
        for rows in (1, 4):
            _copy_rows_kernel[(1,)](x, x, 160, WIDE=False, BLOCK_R=rows)
            _copy_rows_kernel[(1,)](x, x, 160, WIDE=True, BLOCK_R=rows)
    assert [launch.narrow for launch in log] == [{"offsets"}, frozenset()] * 2


NORMAL = [
    (90, "B", BF16, UINT8),
    (90, "B", FP32, FP32),
    (80, "L", BF16, FP32),
    (90, "H", BF16, FP32),
    (80, "L", BF16, None),
    (90, "B", FP32, None),
]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("exhaustive")
        metafunc.parametrize("case", budget.CASES if every else [Case(*c) for c in NORMAL], ids=str)


def widest(case: Case) -> dict[str, tuple[int, int]]:
    """Bits of the widest load and the widest store, for kernels where not both are 128.

    Patches of 14 x 14 pixels limit them: a patch of 16-bit values is a multiple of 8 bytes, but not of 16, and a row of
    14 pixels is 56 or 28 bytes.
    """
    huge = case.model == "H"
    row = 64 if huge and case.dtype == BF16 else 128
    pixels = (64 if case.dtype == FP32 else 32) if huge else 128  # stores one row of pixels of a patch
    return {
        "_gather_patches_fwd_kernel": (64 if huge and case.images == FP32 else 128, row),
        "_gather_patches_bwd_kernel": (row, pixels),
        "_masked_loss_fwd_kernel": (row, 32),  # three numbers per patch
        "_masked_loss_bwd_kernel": (row, row),
        "_weighted_mean_kernel": (128, 32),  # one number
        "_squares_kernel": (128, 32),  # one number
        "_norm_kernel": (32, 32),  # one number per program
        "_count_steps_kernel": (64, 32),  # a few numbers per parameter
    }


# Instructions per value. With tl.erf, GELU took 40 and 47. With idle lanes, the norm took 45 and 29.
MOST_INSTRUCTIONS = {"_bias_gelu_fwd_kernel": 24, "_bias_gelu_bwd_kernel": 29}
# 28: the norm in the last block also computes the row indices of fewer tokens.
MOST_INSTRUCTIONS |= {"_add_layer_norm_fwd_kernel": 28, "_add_layer_norm_bwd_kernel": 22}


def most_barriers(case: Case, launch: Launch) -> int:
    """Barriers per tile. The forward exchanges the statistics to store them. In the backward, two warps share a row of
    1280 values."""
    if launch.kernel == "_add_layer_norm_fwd_kernel":
        return 3
    return 3 if case.model == "H" and launch.kernel == "_add_layer_norm_bwd_kernel" else 0


# 32-bit products that stay small: offsets in an image, the partial sums of a program, and (layer norm) numbers of rows.
NARROW = {"_attention_tiles_bwd_kernel": 2, "_bias_gelu_bwd_kernel": 2, "_masked_loss_bwd_kernel": 1}
NARROW |= dict.fromkeys(("_gather_patches_fwd_kernel", "_gather_patches_bwd_kernel"), 1)
NARROW |= dict.fromkeys(("_add_layer_norm_fwd_kernel", "_add_layer_norm_bwd_kernel"), 1)


def rules(case: Case, name: str, launch: Launch) -> None:
    """No spills, 64-bit offsets of rows, half the occupancy by registers, and 128-bit accesses if rows allow them."""
    assert launch.local_bytes == 0, f"{name} spills {launch.local_bytes} bytes"
    assert len(launch.narrow) <= NARROW.get(launch.kernel, 0), f"{name}: 32-bit offsets {launch.narrow}, see NARROW"
    # Layer norm keeps whole rows in the registers of one or two warps, and its backward three sums over rows.
    large = {"_add_layer_norm_fwd_kernel": 96, "_add_layer_norm_bwd_kernel": 255}
    large |= {"_adamw_steps_kernel": 80, **dict.fromkeys(ATTENTION, 255)}
    if case.images == UINT16:  # with a nodata value
        large["_masked_loss_bwd_kernel"] = 72
    most = large.get(launch.kernel, 64)
    assert launch.registers <= most, f"{name} takes {launch.registers} registers per thread"
    assert (launch.accesses["MMA"] > 0) == (launch.kernel in ATTENTION and case.dtype == BF16), name
    if launch.kernel in MOST_INSTRUCTIONS:
        found = budget.of_loop(launch)
        assert found["instructions"] <= MOST_INSTRUCTIONS[launch.kernel], name
        assert found["barriers"] <= most_barriers(case, launch), name
    load, store = widest(case).get(launch.kernel, (128, 128))
    assert launch.widest("STG") == store, f"{name}: the widest store has {launch.widest('STG')} bits, see widest()"
    assert launch.widest("LDG") >= load, f"{name}: the widest load has {launch.widest('LDG')} bits, see widest()"


def kernels_of(case: Case) -> int:
    if case.images:
        return 4
    by_library = case.model == "H" and case.dtype == FP32  # attention of the encoder's heads of 80
    of_update = 4 * (case.model == "B")
    # Norm, attention and mlp of encoder and decoder; norm and attention of the decoder's last block.
    return 5 + 2 * (2 + 2 + 2) + 2 + 2 - 2 * by_library + of_update


def test_machine_code(case, budget_table):
    kernels = budget.compiled(case)
    assert len(kernels) == kernels_of(case), "is kernels_of up to date?"
    for name, launch in kernels.items():
        rules(case, name, launch)
    if case.images == FP32:
        assert kernels["_gather_patches_fwd_kernel"].widest("LDG") == (64 if case.model == "H" else 128)
    elif case.images == UINT8 and case.model != "H":  # a pixel row of a patch is 48 bytes
        assert kernels["_masked_loss_fwd_kernel"].accesses["LDG.8"] == 0
    found = {f"{name} {case}": budget.row(case.arch, launch) for name, launch in kernels.items()}
    budget_table.update(found)
    if budget.committed()["made_by"]["triton"] != triton.__version__:
        pytest.skip("budget.json is of another Triton")
    assert not budget.changes(found, case), "run `make budget` to record them"


def test_the_budget_has_every_case():
    names = budget.committed()["rows"]
    for case in budget.CASES:
        assert sum(name.endswith(f" {case}") for name in names) == kernels_of(case), case


def test_every_kernel_has_a_budget():
    folder = Path(mae_fast.__file__).parent / "ops"
    files = list(folder.glob("*/triton_kernels.py"))
    files.append(folder / "triton_common.py")
    kernels = {name for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M)}
    assert kernels == {name.split()[0] for name in budget.committed()["rows"] if name.startswith("_")}


def test_occupancy():
    """Values of CUDA's occupancy calculator, limited by registers, by shared memory, by warps and by blocks."""
    for arch, registers, shared, warps, expected in [
        (80, 32, 0, 8, 1.0),
        (80, 33, 0, 8, 0.75),
        (80, 65, 0, 4, 0.4375),
        (80, 65, 0, 8, 0.375),
        (80, 255, 0, 8, 0.125),
        (80, 32, 48 * 1024, 8, 0.375),
        (90, 32, 48 * 1024, 8, 0.5),
        (80, 32, 0, 1, 0.5),
    ]:
        launch = Launch("", (), warps, shared, registers, 0, Counter())
        assert budget.occupancy(arch, launch) == expected, launch


def test_triton_kernels_are_registered_for_cuda():
    for op in OPS:
        launchers = importlib.import_module(f"mae_fast.ops.{op}.triton_kernels")
        found = [name for name in vars(launchers) if re.match("[a-z].*_(for|back)ward$", name)]
        assert found, op
        for name in found:
            assert has_kernel(name.removesuffix("_forward"), "cuda"), name


@pytest.mark.parametrize("run", RUNS)
def test_values_in_the_interpreter(interpreted, run, pytestconfig):
    output, _ = interpreted[run].communicate(timeout=3600)
    if pytestconfig.getoption("exhaustive"):
        print(f"\n{run}", *re.findall(r"\w.* of the least|\d+ passed.*", output), sep="\n")
    assert interpreted[run].returncode == 0, output[-3000:]
    assert int(output.strip().splitlines()[-1].split()[0]) >= 10, output  # so many passed
