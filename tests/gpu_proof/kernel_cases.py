"""Tests of properties that only the GPU kernels have, such as NaN for an index out of range.

``gpu_proof.interpreted`` and ``gpu_proof.on_device`` run the kernels on CPU tensors.
"""

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from op_cases import compare, permutations, randn
from torch.nn import functional as F

import mae_fast.ops.decoder_tokens
import mae_fast.ops.embed_visible  # noqa: F401
from mae_fast.ops import triton_common
from mae_fast.ops.add_layer_norm.triton_kernels import _block
from mae_fast.ops.bias_gelu import bias_gelu
from mae_fast.ops.masked_loss.triton_kernels import MAX_VALUES
from mae_fast.ops.triton_common import counters

OUTSIDE = (-1, -40, 16, 2**31, 2**32 + 3, -(2**63), 2**63 - 1)
ops = torch.ops.mae_fast


@pytest.mark.parametrize("bad", OUTSIDE)
def test_gather_of_an_unknown_patch_is_nan(bad):
    images, ids = randn(2, 3, 16, 16, seed=1, dtype=torch.float32), permutations(2, 16, 0)[:, :4]
    ids[1, 2] = bad
    rows = ops.gather_patches(images, ids, 4, 4, None, None, None, torch.float32)
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


@pytest.mark.parametrize("count", [0, 3, 12])
def test_fewer_mask_tokens_stay_inside_their_buffer(count):
    x, token, pos = (randn(*shape, seed=1, dtype=torch.float32) for shape in ((2, 5, 8), (1, 1, 8), (1, 17, 8)))
    out = ops.decoder_tokens(x, token, permutations(2, 16, 0), pos, False, count)
    assert out.shape == (2, 5 + count, 8)
    assert out.isfinite().all()


@pytest.mark.parametrize("bad", OUTSIDE)
def test_loss_of_an_unknown_patch_is_nan(bad):
    images, pred = randn(2, 3, 16, 16, seed=1, dtype=torch.float32), randn(2, 4, 48, seed=2, dtype=torch.float32)
    mask, ids = torch.ones(2, 4), permutations(2, 16, 0)[:, :4]
    ids[1, 2] = bad
    arguments = (images, pred, mask, ids)
    loss, stats = ops.masked_loss(*arguments, 4, 4, True, None, None, None)
    assert loss.isnan()
    assert stats.isnan().any(-1).sum() == 1
    ops.masked_loss_backward(torch.tensor(1.0), *arguments, loss, stats, 4, 4, True, None, None, None, False)


@pytest.mark.parametrize("bad", OUTSIDE)
def test_an_unknown_patch_is_not_a_patch_without_data(bad):
    """Missing pixels are ignored in the loss and replaced by the mean for the encoder. Unknown patches give NaN."""
    images, ids = torch.randn(2, 16, 16, 3), permutations(2, 16, 0)[:, :4]
    images[0, :4] = float("nan")
    ids[1, 2] = bad
    rows = ops.gather_patches(images, ids, 4, 4, torch.zeros(3), torch.ones(3), None, torch.float32)
    assert rows[1, 2].isnan().all()
    assert rows.isnan().sum() == rows[1, 2].numel()
    stats = (torch.zeros(3), torch.ones(3), None)
    loss, _ = ops.masked_loss(images, torch.randn(2, 4, 48), torch.ones(2, 4), ids, 4, 4, True, *stats)
    assert loss.isnan()


def test_patches_too_large_for_registers_go_to_eager_torch():
    images, values = randn(1, 3, 60, 60, seed=1, dtype=torch.float32), 3 * 60 * 60
    assert values > MAX_VALUES
    pred = randn(1, 1, values, seed=2, dtype=torch.float32).requires_grad_()
    loss = ops.masked_loss(images, pred, torch.ones(1, 1), None, 60, 60, True, None, None, None)[0]
    loss.backward()
    target = images.permute(0, 2, 3, 1).reshape(1, 1, -1)
    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
    torch.testing.assert_close(loss, (pred - target).square().mean())
    torch.testing.assert_close(pred.grad, 2 * (pred.detach() - target) / values)


def test_large_tiles():
    """A patch of 8192 values, the maximum per program, and a width of more columns than a tile."""
    images, pred = randn(1, 8, 32, 32, seed=1, dtype=torch.float32), randn(1, 1, 8192, seed=2, dtype=torch.float32)
    loss, _ = ops.masked_loss(images, pred, torch.ones(1, 1), None, 32, 32, False, None, None, None)
    torch.testing.assert_close(loss, (pred[0, 0] - images[0].permute(1, 2, 0).reshape(-1)).square().mean())


# --- exact GELU from one exponential ---

EVERY_16_BITS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
BANDS = (0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 16.0)


def _dense(dtype):
    """Finite values up to 16 of both signs, more of them near 0. For 16-bit dtypes, all values."""
    if dtype.itemsize == 2:
        every = EVERY_16_BITS.view(dtype)
        return every[every.abs() < 16]
    line = torch.linspace(0, 16, 20001, dtype=torch.float64)
    tiny = 10.0 ** torch.linspace(-37, 0, 2001, dtype=torch.float64)
    return torch.cat([line, -line, tiny, -tiny]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gelu_is_as_good_as_eager_in_every_band(dtype):
    """The accuracy holds in each band of input magnitudes and for each sign, so also for small values."""
    h = _dense(dtype)
    for low, high in pairwise(BANDS):
        for sign in (h >= 0, h < 0):
            x = h[(h.abs() >= low) & (h.abs() < high) & sign]
            made = {"x": x[:, None].contiguous(), "bias": torch.zeros(1, dtype=dtype)}
            compare(bias_gelu, lambda x, bias: F.gelu(x + bias), made, {"x"}, dtype)


def test_gelu_keeps_relative_accuracy_in_the_far_tail():
    """Eager torch returns 0 or a rounding error there. The derivative is small near its sign change."""
    h = torch.cat(
        [torch.linspace(-13, -1e-3, 20001, dtype=torch.float64), -(10.0 ** torch.linspace(-37, -3, 500).double())]
    )
    x = h.float()[:, None].contiguous()
    cdf = torch.special.erfc(x.double() * -(0.5**0.5)) / 2  # ndtr is 0 below -8
    exact, slope = x.double() * cdf, cdf + x.double() * x.double().square().mul(-0.5).exp() * 0.3989422804014327
    limit = torch.where(x < -2, 6e-5, 1e-6)
    assert ((bias_gelu(x, torch.zeros(1)) - exact).abs() <= limit * exact.abs()).all()
    dx, *_ = ops.bias_gelu_backward(torch.ones_like(x), x, torch.zeros(1), False)
    away = (x + 0.7518).abs() > 0.1
    assert ((dx - slope).abs() <= torch.where(x < -4, 1e-5, 2e-6) * slope.abs())[away].all()
    assert (dx - slope).abs().max() < 3e-7


def test_gelu_of_infinity_and_nan_equals_eager():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[inf, -inf, nan, 3e38, -3e38, 100.0, -100.0, 0.0, -0.0]])
    zero = torch.zeros(9)
    value = bias_gelu(x, zero).nan_to_num(nan=7, posinf=inf)
    assert torch.equal(value, torch.tensor([[inf, 7, 7, 3e38, 0, 100, 0, 0, 0]]))
    dx, *_ = ops.bias_gelu_backward(torch.ones_like(x), x, zero, False)
    assert torch.equal(dx.nan_to_num(nan=7), torch.tensor([[7, 7, 7, 1, 0, 1, 0, 0.5, 0.5]]))


# --- counters of sums of columns ---

FP32, FP64, BF16 = (torch.float32,), (torch.float64,), (torch.bfloat16,)


def test_counters_of_streams_and_graphs(monkeypatch):
    """Launches on a stream share counters. Each launch in a CUDA graph has its own counters, or new zeros."""
    monkeypatch.setattr(triton_common, "_counters", {})
    monkeypatch.setattr(triton_common._Counters, "SIZE", 3 * 2**13 + 10)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    x = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), new_zeros=torch.zeros)
    capturing, stream = False, 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream))

    def span(count):
        taken = counters(x, count)
        assert not taken.any()
        assert len(taken) >= count
        return range(taken.data_ptr(), taken.data_ptr() + 4 * count)

    def apart(*spans):
        return all(a.stop <= b.start or b.stop <= a.start for a in spans for b in spans if a is not b)

    capturing = True
    counters(x, 5)
    assert not triton_common._counters  # no permanent allocation during a capture
    capturing = False
    first = span(100)
    assert span(50).start == first.start
    stream = 2
    second = span(2**13)
    capturing = True
    captured = [span(100), span(100), span(2**13)]
    assert apart(first, second, *captured)
    memory = triton_common._counters[x.device].memory
    inside = range(memory.data_ptr(), memory.data_ptr() + 4 * len(memory))
    assert [span.start in inside for span in (first, second, *captured)] == [True, True, True, True, False]
    capturing, stream = False, 3
    assert span(10).start not in inside  # graphs have left too few counters for a third stream
    stream = 1
    assert span(2**13 + 1).start not in inside


# --- tiles of layer norm ---


@pytest.mark.parametrize("width", [192, 384, 512, 640, 768, 1024, 1152, 1280, 1536, 2048, 3072, 4096, 8192])
@pytest.mark.parametrize("dtypes", [FP32 + BF16, BF16, FP64], ids=str)
@pytest.mark.parametrize("most", [32, 40])
def test_tiles_of_rows(width, dtypes, most):
    """Each thread accesses 128 bits at a time, with at most ``most`` values. The model's dtypes have no idle lanes."""
    block = _block(width, most, *dtypes)
    vector = block["BLOCK_R"] * block["BLOCK_C"] // (32 * block["num_warps"])
    assert vector == 16 // max(dtype.itemsize for dtype in dtypes)
    assert vector * block["PIECES"] <= most
    assert width <= block["PIECES"] * block["BLOCK_C"] <= (1.34 if len(dtypes) == 1 or width == 1152 else 1) * width


@pytest.mark.parametrize(("width", "dtype"), [(192, torch.float32), (768, torch.bfloat16), (1280, torch.float32),
                                              (2048, torch.float32)], ids=str)  # fmt: skip
def test_layer_norm_of_several_pieces_and_warps(monkeypatch, width, dtype):
    monkeypatch.setattr(triton_common, "MULTIPROCESSORS", 1)
    made = {"x": randn(11, width, seed=1) * 2 + 1, "residual": randn(11, width, seed=2)}
    made |= {"weight": randn(width, seed=3), "bias": randn(width, seed=4), "residual_bias": randn(width, seed=5)}
    made = {name: x.to(dtype) for name, x in made.items()}

    def ours(x, residual, weight, bias, residual_bias):
        total, normed, _ = ops.add_layer_norm(x, residual, residual_bias, weight, bias, 1e-6, x.dtype)
        return torch.stack([total, normed])

    def eager(x, residual, weight, bias, residual_bias):
        total = x + (residual + residual_bias)
        return torch.stack([total, F.layer_norm(total, weight.shape, weight, bias, 1e-6)])

    compare(ours, eager, made, set(made), dtype)
