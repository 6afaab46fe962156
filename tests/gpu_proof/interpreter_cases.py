"""What only the interpreter can show of the Triton kernels. Run by tests/ops/test_triton.py in a process of its own."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_proof.interpreted import OPS
from op_cases import permutations, randn

from mae_fast.ops.decoder_tokens import triton_kernels as decoder_tokens
from mae_fast.ops.embed_visible import triton_kernels as embed_visible
from mae_fast.ops.masked_loss import triton_kernels as masked_loss

OUTSIDE = (-1, 16, 2**31, 2**32 + 3, -(2**63), 2**63 - 1)


@triton.jit
def _shift_kernel(x_ptr, y_ptr, by, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(y_ptr + i, tl.load(x_ptr + i + by))


def test_the_guard_sees_an_access_outside():
    x, y = torch.arange(8.0), torch.empty(6)
    with pytest.raises(Exception, match=r"load of 4 bytes .* outside every tensor"):
        _shift_kernel[(1,)](x, y, 1, COUNT=8)
    with pytest.raises(Exception, match=r"store of 4 bytes .* outside every tensor"):
        _shift_kernel[(1,)](x, y, 0, COUNT=8)
    _shift_kernel[(1,)](x, y, 4, COUNT=4)
    assert torch.equal(y[:4], x[4:])


@triton.jit
def _sum_kernel(x_ptr, y_ptr, z_ptr, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(z_ptr + i, tl.load(x_ptr + i).to(tl.float32) + tl.load(y_ptr + i).to(tl.float32))


def test_bf16_rounds_as_torch_does():
    every = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)
    other = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    ours = torch.empty_like(every)
    _sum_kernel[(64,)](every, other, ours, COUNT=1024)
    assert torch.equal(ours.nan_to_num(nan=7), (every + other).nan_to_num(nan=7))


def test_the_kernels_answer():
    """Not the references: their registration for the CPU is what the other tests of this process rest on."""
    for ops in OPS.values():
        for op in (*ops, *(f"{op}_backward" for op in ops)):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mae_fast::{op}", "CPU"), op


@pytest.mark.parametrize("bad", OUTSIDE)
def test_gather_of_an_unknown_patch_is_nan(bad):
    images, ids = randn(2, 3, 16, 16, seed=1, dtype=torch.float32), permutations(2, 16, 0)[:, :4]
    ids[1, 2] = bad
    rows = embed_visible.gather_patches_forward(images, ids, 4, 4, None, None, torch.float32)
    assert rows[1, 2].isnan().all()
    assert rows.isnan().sum() == rows[1, 2].numel()
    grad = embed_visible.gather_patches_backward(rows.nan_to_num(), ids, [2, 3, 16, 16], 4, 4, torch.float32)
    assert grad.isfinite().all()


@pytest.mark.parametrize("bad", OUTSIDE)
def test_position_of_an_unknown_patch_is_nan(bad):
    x, pos, cls = (randn(*shape, seed=1, dtype=torch.float32) for shape in ((2, 4, 8), (1, 17, 8), (1, 1, 8)))
    ids = permutations(2, 16, 0)[:, :4]
    ids[1, 2] = bad
    out = embed_visible.add_positions_forward(x, ids, pos, cls)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 8


@pytest.mark.parametrize("bad", OUTSIDE)
def test_token_of_an_unknown_place_is_nan(bad):
    x, token, pos = (randn(*shape, seed=1, dtype=torch.float32) for shape in ((2, 5, 8), (1, 1, 8), (1, 17, 8)))
    ids = permutations(2, 16, 0)
    ids[1, 2] = bad
    out = decoder_tokens.decoder_tokens_forward(x, token, ids, pos)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 8
    f32 = torch.float32
    decoder_tokens.decoder_tokens_backward(out.nan_to_num(), ids, 4, f32, f32, f32, True)  # the guard is the test


@pytest.mark.parametrize("bad", OUTSIDE)
def test_loss_of_an_unknown_patch_is_nan(bad):
    images, pred = randn(2, 3, 16, 16, seed=1, dtype=torch.float32), randn(2, 4, 48, seed=2, dtype=torch.float32)
    mask, ids = torch.ones(2, 4), permutations(2, 16, 0)[:, :4]
    ids[1, 2] = bad
    arguments = (images, pred, mask, ids)
    loss, stats = masked_loss.masked_loss_forward(*arguments, 4, 4, True, None, None)
    assert loss.isnan()
    assert stats.isnan().any(-1).sum() == 1
    masked_loss.masked_loss_backward(torch.tensor(1.0), *arguments, loss, stats, 4, 4, True, None, None, False)


def test_patches_too_large_for_registers_go_to_eager_torch():
    images, values = randn(1, 3, 60, 60, seed=1, dtype=torch.float32), 3 * 60 * 60
    assert values > masked_loss.MAX_VALUES
    pred = randn(1, 1, values, seed=2, dtype=torch.float32).requires_grad_()
    loss = torch.ops.mae_fast.masked_loss(images, pred, torch.ones(1, 1), None, 60, 60, True, None, None)[0]
    loss.backward()
    target = images.permute(0, 2, 3, 1).reshape(1, 1, -1)
    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
    torch.testing.assert_close(loss, (pred - target).square().mean())
    torch.testing.assert_close(pred.grad, 2 * (pred.detach() - target) / values)


def test_large_tiles():
    """A patch of 8192 values, the most that one program takes, and a width past one tile's columns."""
    images, pred = randn(1, 8, 32, 32, seed=1, dtype=torch.float32), randn(1, 1, 8192, seed=2, dtype=torch.float32)
    loss, _ = masked_loss.masked_loss_forward(images, pred, torch.ones(1, 1), None, 32, 32, False, None, None)
    torch.testing.assert_close(loss, (pred[0, 0] - images[0].permute(1, 2, 0).reshape(-1)).square().mean())
