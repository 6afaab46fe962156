"""What holds for the GPU's kernels only. Run with ``gpu_proof.interpreted`` or ``gpu_proof.on_device``, which have them
answer for CPU tensors: an index outside its range reads and writes nothing outside the buffers and gives NaN."""

import pytest
import torch
from op_cases import permutations, randn

import mae_fast.ops.decoder_tokens
import mae_fast.ops.embed_visible  # noqa: F401
from mae_fast.ops.masked_loss.triton_kernels import MAX_VALUES

OUTSIDE = (-1, -40, 16, 2**31, 2**32 + 3, -(2**63), 2**63 - 1)
ops = torch.ops.mae_fast


@pytest.mark.parametrize("bad", OUTSIDE)
def test_gather_of_an_unknown_patch_is_nan(bad):
    images, ids = randn(2, 3, 16, 16, seed=1, dtype=torch.float32), permutations(2, 16, 0)[:, :4]
    ids[1, 2] = bad
    rows = ops.gather_patches(images, ids, 4, 4, None, None, torch.float32)
    assert rows[1, 2].isnan().all()
    assert rows.isnan().sum() == rows[1, 2].numel()
    grad = ops.gather_patches_backward(rows.nan_to_num(), ids, [2, 3, 16, 16], 4, 4, torch.float32)
    assert grad.isfinite().all()


@pytest.mark.parametrize("bad", OUTSIDE)
def test_position_of_an_unknown_patch_is_nan(bad):
    x, pos, cls = (randn(*shape, seed=1, dtype=torch.float32) for shape in ((2, 4, 8), (1, 17, 8), (1, 1, 8)))
    ids = permutations(2, 16, 0)[:, :4]
    ids[1, 2] = bad
    out = ops.add_positions(x, ids, pos, cls)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 8


@pytest.mark.parametrize("bad", OUTSIDE)
def test_token_of_an_unknown_place_is_nan(bad):
    x, token, pos = (randn(*shape, seed=1, dtype=torch.float32) for shape in ((2, 5, 8), (1, 1, 8), (1, 17, 8)))
    ids = permutations(2, 16, 0)
    ids[1, 2] = bad
    out = ops.decoder_tokens(x, token, ids, pos)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 8
    f32 = torch.float32
    ops.decoder_tokens_backward(out.nan_to_num(), ids, 4, f32, f32, f32, True)  # the guard is the test


@pytest.mark.parametrize("bad", OUTSIDE)
def test_loss_of_an_unknown_patch_is_nan(bad):
    images, pred = randn(2, 3, 16, 16, seed=1, dtype=torch.float32), randn(2, 4, 48, seed=2, dtype=torch.float32)
    mask, ids = torch.ones(2, 4), permutations(2, 16, 0)[:, :4]
    ids[1, 2] = bad
    arguments = (images, pred, mask, ids)
    loss, stats = ops.masked_loss(*arguments, 4, 4, True, None, None)
    assert loss.isnan()
    assert stats.isnan().any(-1).sum() == 1
    ops.masked_loss_backward(torch.tensor(1.0), *arguments, loss, stats, 4, 4, True, None, None, False)


def test_patches_too_large_for_registers_go_to_eager_torch():
    images, values = randn(1, 3, 60, 60, seed=1, dtype=torch.float32), 3 * 60 * 60
    assert values > MAX_VALUES
    pred = randn(1, 1, values, seed=2, dtype=torch.float32).requires_grad_()
    loss = ops.masked_loss(images, pred, torch.ones(1, 1), None, 60, 60, True, None, None)[0]
    loss.backward()
    target = images.permute(0, 2, 3, 1).reshape(1, 1, -1)
    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
    torch.testing.assert_close(loss, (pred - target).square().mean())
    torch.testing.assert_close(pred.grad, 2 * (pred.detach() - target) / values)


def test_large_tiles():
    """A patch of 8192 values, the most that one program takes, and a width past one tile's columns."""
    images, pred = randn(1, 8, 32, 32, seed=1, dtype=torch.float32), randn(1, 1, 8192, seed=2, dtype=torch.float32)
    loss, _ = ops.masked_loss(images, pred, torch.ones(1, 1), None, 32, 32, False, None, None)
    torch.testing.assert_close(loss, (pred[0, 0] - images[0].permute(1, 2, 0).reshape(-1)).square().mean())
