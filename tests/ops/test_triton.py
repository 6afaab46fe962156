"""The Triton kernels without a GPU: what they compute, by Triton's interpreter, and what they compile to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from gpu_proof.compiled import Launch, launches

from mae_fast.ops.decoder_tokens import triton_kernels as decoder_tokens
from mae_fast.ops.embed_visible import triton_kernels as embed_visible
from mae_fast.ops.masked_loss import triton_kernels as masked_loss

TESTS = Path(__file__).parents[1]
OPS = ("embed_visible", "decoder_tokens", "masked_loss")
# Of the cases that hold the C++ kernels, as many as the interpreter gets through in a minute.
CHOSEN = (
    "(values_and_gradients and (contiguous or (permuted and torch.bfloat16))) or (gather_is_exact and strided) "
    "or (exact_in_mixed_dtypes and not torch.float16 and not torch.float64) or add_positions_is_exact "
    "or only_requested or repeated or weights or constant or (uint8_images and norm and torch.bfloat16) or unshuffle"
)
RUNS = {op: ["-k", CHOSEN, f"test_{op}.py"] for op in OPS}
RUNS["indices outside"] = [str(TESTS / f"gpu_proof/{name}_cases.py") for name in ("interpreter", "kernel")]


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """pytest with the Triton kernels in the place of the C++ ones, a process for each of RUNS, all at once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_proof.interpreted", "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = {
        name: subprocess.Popen([*command, *arguments], cwd=TESTS / "ops", env=env, **pipes)
        for name, arguments in RUNS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


MODELS = {"B": (16, 768), "L": (16, 1024), "H": (14, 1280)}  # patch side, width; the decoder's is 512
FP32, BF16, UINT8, INT64 = torch.float32, torch.bfloat16, torch.uint8, torch.int64


def compiled(model: str, arch: int, dtype: torch.dtype, images: torch.dtype) -> dict[str, Launch]:
    """Every kernel of a training step at batch 256, 224 pixels, mask 0.75; parameters in fp32, activations in dtype."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    (p, d), n, e = MODELS[model], 256, 512
    length, values = (224 // p) ** 2, 3 * p * p
    k = length // 4
    ids_keep, ids_removed, ids_restore = (tensor(n, count, dtype=INT64) for count in (k, length - k, length))
    pixels = tensor(n, 224, 224, 3, dtype=images) if images == UINT8 else tensor(n, 3, 224, 224, dtype=images)
    stats = (tensor(3, dtype=FP32),) * 2 if images == UINT8 else (None, None)
    tables = tensor(1, 1 + length, d, dtype=FP32), tensor(1, 1, d, dtype=FP32)
    with launches(arch) as log:
        embed_visible.gather_patches_forward(pixels, ids_keep, p, p, *stats, dtype)
        embed_visible.gather_patches_backward(tensor(n, k, values), ids_keep, [n, 3, 224, 224], p, p, dtype)
        embed_visible.add_positions_forward(tensor(n, k, d), ids_keep, *tables)
        embed_visible.add_positions_backward(tensor(n, 1 + k, d, dtype=FP32), ids_keep, *tables, dtype, False)
        token, pos = tensor(1, 1, e, dtype=FP32), tensor(1, 1 + length, e, dtype=FP32)
        decoder_tokens.decoder_tokens_forward(tensor(n, 1 + k, e), token, ids_restore, pos)
        grad = tensor(n, 1 + length, e, dtype=FP32)
        decoder_tokens.decoder_tokens_backward(grad, ids_restore, k, dtype, FP32, FP32, False)
        fixed = (pixels, tensor(n, length - k, values), tensor(n, length - k, dtype=FP32), ids_removed)
        loss, saved = masked_loss.masked_loss_forward(*fixed, p, p, True, *stats)
        scalar = tensor(dtype=FP32)
        masked_loss.masked_loss_backward(scalar, *fixed, loss, saved, p, p, True, *stats, False)
    assert len(log) == 9
    return {launch.kernel: launch for launch in log}


@pytest.mark.parametrize(
    ("arch", "model", "dtype", "images"),
    [
        (80, "B", BF16, UINT8),
        (90, "B", BF16, UINT8),
        (90, "B", BF16, FP32),
        (90, "B", FP32, FP32),
        (80, "L", BF16, FP32),
        (90, "L", BF16, UINT8),
        (80, "H", FP32, UINT8),
        (90, "H", BF16, FP32),
    ],
    ids=str,
)
def test_machine_code(arch, model, dtype, images):
    """No spills, registers for half the occupancy or more, 128-bit accesses wherever the rows allow them."""
    kernels = compiled(model, arch, dtype, images)
    for name, launch in kernels.items():
        assert launch.local_bytes == 0, f"{name} spills {launch.local_bytes} bytes"
        assert launch.registers <= 64, f"{name} takes {launch.registers} registers a thread"
    for name in ("_add_positions_fwd", "_add_positions_bwd", "_decoder_tokens_fwd", "_decoder_tokens_bwd"):
        name += "_kernel"
        assert (kernels[name].widest("LDG"), kernels[name].widest("STG")) == (128, 128), name
    # A row of 3 * 14 * 14 values in 16 bits is a multiple of 8 bytes only, and so is ViT-H's widest access then.
    bits = 64 if model == "H" and dtype == BF16 else 128
    assert kernels["_gather_patches_fwd_kernel"].widest("STG") == bits
    assert kernels["_masked_loss_bwd_kernel"].widest("STG") == bits
    assert kernels["_masked_loss_bwd_kernel"].widest("LDG") >= bits
    assert kernels["_masked_loss_fwd_kernel"].widest("LDG") >= bits
    if images == FP32:
        assert kernels["_gather_patches_fwd_kernel"].widest("LDG") == (64 if model == "H" else 128)
    elif model != "H":  # a pixel row of a patch is 48 bytes
        assert kernels["_masked_loss_fwd_kernel"].accesses["LDG.8"] == 0


def test_the_dispatcher_knows_them():
    """On CUDA the Triton kernels answer, not the eager references."""
    for op in ("gather_patches", "add_positions", "decoder_tokens", "masked_loss"):
        for name in (f"mae_fast::{op}", f"mae_fast::{op}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


@pytest.mark.parametrize("run", RUNS)
def test_values_in_the_interpreter(interpreted, run):
    output, _ = interpreted[run].communicate(timeout=1200)
    assert interpreted[run].returncode == 0, output[-3000:]
    assert int(output.strip().splitlines()[-1].split()[0]) >= 20, output  # so many passed
