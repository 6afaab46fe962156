"""Tests that need the interpreter: the checks of memory.py, and the bytes that the Triton kernels move.

tests/ops/test_triton.py runs them in a separate process.

Shapes: N images, L patches, K kept, R removed, P values per patch, D encoder width, E decoder width.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_proof import memory
from op_cases import permutations, randn

from mae_fast.ops import registry, triton_common
from mae_fast.ops.native import has_kernel
from mae_fast.ops.triton_common import column_sums, num_counters

ops = torch.ops.mae_fast
FP32, FP64, BF16, UINT8 = torch.float32, torch.float64, torch.bfloat16, torch.uint8


@triton.jit
def _shift_kernel(x_ptr, y_ptr, by, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(y_ptr + i, tl.load(x_ptr + i + by))


def test_accesses_outside_of_tensors_are_detected():
    x, y = torch.arange(8.0), torch.empty(6)
    with pytest.raises(Exception, match=r"load of 4 bytes .* outside every tensor"):
        _shift_kernel[(1,)](x, y, 1, COUNT=8)
    with pytest.raises(Exception, match=r"store of 4 bytes .* outside every tensor"):
        _shift_kernel[(1,)](x, y, 0, COUNT=8)
    _shift_kernel[(1,)](x, y, 4, COUNT=4)
    assert torch.equal(y[:4], x[4:])


@triton.jit
def _copy_kernel(x_ptr, y_ptr, read_from, write_to, step, COUNT: tl.constexpr):
    """Each program copies COUNT values: y[write_to + step * program + i] = x[read_from + COUNT * program + i]."""
    i = tl.arange(0, COUNT)
    x = tl.load(x_ptr + read_from + COUNT * tl.program_id(0) + i)
    tl.store(y_ptr + write_to + step * tl.program_id(0) + i, x)


def test_races_are_detected():
    x = torch.arange(32.0)
    with pytest.raises(Exception, match="program 1 writes what is written by program 0 at byte 28 of y_ptr"):
        _copy_kernel[(4,)](x, torch.empty(32), 0, 0, 7, COUNT=8)
    with pytest.raises(Exception, match="program 1 reads what is written by program 0 at byte 32 of x_ptr"):
        _copy_kernel[(2,)](x, x, 0, 8, 8, COUNT=8)
    with pytest.raises(Exception, match="program 1 writes what is read by program 0 at byte 0 of x_ptr"):
        _copy_kernel[(2,)](x, x, 0, 24, -24, COUNT=8)
    _copy_kernel[(4,)](x, x, 0, 0, 8, COUNT=8)  # in place, without races


@triton.jit
def _lanes_kernel(y_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(y_ptr + i // 2, i)


@triton.jit
def _atomic_kernel(y_ptr, COUNT: tl.constexpr):
    tl.atomic_add(y_ptr + tl.arange(0, COUNT), 1)


def test_lanes_that_write_one_address_and_other_atomics_are_detected():
    with pytest.raises(Exception, match="two lanes of program 0 write one address"):
        _lanes_kernel[(1,)](torch.zeros(8), COUNT=8)
    with pytest.raises(Exception, match="the only atomic that is traced is an integer addition"):
        _atomic_kernel[(1,)](torch.zeros(8), COUNT=8)


@triton.jit
def _meet_kernel(x_ptr, y_ptr, counter_ptr, STORE_FIRST: tl.constexpr, ONE_COUNTER: tl.constexpr):
    """Programs increment a counter. The last one adds up the values that the others stored."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if STORE_FIRST:
        tl.store(y_ptr + program, tl.load(x_ptr + program))
    met = tl.atomic_add(counter_ptr + (0 if ONE_COUNTER else program), 1, sem="acq_rel", scope="gpu")
    if not STORE_FIRST:
        tl.store(y_ptr + program, tl.load(x_ptr + program))
    if met == programs - 1 or (not ONE_COUNTER and program == programs - 1):
        total = tl.sum(tl.load(y_ptr + tl.arange(0, 4)), axis=0)
        tl.store(y_ptr, total)
        tl.store(counter_ptr, 0)


def test_counters_order_accesses():
    x, y, counter = torch.arange(4.0), torch.empty(4), torch.zeros(4, dtype=torch.int32)
    _meet_kernel[(4,)](x, y, counter, STORE_FIRST=True, ONE_COUNTER=True)
    assert y[0] == 6
    assert not counter.any()
    with pytest.raises(Exception, match="program 3 reads what is written by program 0 at byte 0 of y_ptr"):
        _meet_kernel[(4,)](x, y, counter, STORE_FIRST=False, ONE_COUNTER=True)
    with pytest.raises(Exception, match="program 3 reads what is written by program 0 at byte 0 of y_ptr"):
        _meet_kernel[(4,)](x, y, counter.zero_(), STORE_FIRST=True, ONE_COUNTER=False)


def test_unwritten_bytes_are_detected():
    """In results of the launcher, in its temporary tensors, and in tensors that it passes to no kernel."""

    def copy(x: torch.Tensor, programs: int, scratch: int = 0) -> torch.Tensor:
        out, _ = torch.empty_like(x), x.new_empty(scratch)
        _copy_kernel[(programs,)](x, out, 0, 0, 8, COUNT=8)
        return out

    x = torch.arange(32.0)
    assert torch.equal(memory.traced(copy)(x, 4), x)
    with pytest.raises(RuntimeError, match=r"32 of 128 bytes are left unwritten, the first at 96.*y_ptr of _copy_ker"):
        memory.traced(copy)(x, 3)
    with pytest.raises(RuntimeError, match=r"12 of 12 bytes are left unwritten.*given to no kernel"):
        memory.traced(copy)(x, 4, scratch=3)


def test_moved_bytes_are_counted():
    x, y = torch.arange(32.0), torch.empty(32)
    memory.launches.clear()
    _copy_kernel[(4,)](x, y, 0, 0, 8, COUNT=8)
    _shift_kernel[(1,)](x, y, 0, COUNT=8)
    assert [launch.moved() for launch in memory.launches] == [256, 64]

    memory.launches.clear()
    _rows_kernel[(4,)](x, y, COUNT=8)  # each program reads all four rows to write its own
    assert memory.launches[0].moved() == 4 * 128 + 128
    assert memory.launches[0].moved(cached=("x_ptr",)) == 128 + 128


@triton.jit
def _rows_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    total = tl.zeros([COUNT], tl.float32)
    for row in range(tl.num_programs(0)):
        total += tl.load(x_ptr + row * COUNT + i)
        total += tl.load(x_ptr + row * COUNT + i)  # repeated reads by the same program do not count
    tl.store(y_ptr + tl.program_id(0) * COUNT + i, total)


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


@triton.jit
def _sums_kernel(
    partial_ptr, counters_ptr, first_ptr, second_ptr, third_ptr, stride, width, REVERSED: tl.constexpr
):  # fmt: skip
    """The rows of ``partial_ptr`` are already written."""
    program, count = tl.program_id(0), tl.num_programs(0)
    if REVERSED:
        program = count - 1 - program
    column_sums(partial_ptr, counters_ptr, first_ptr, second_ptr, third_ptr, program, count, stride, width,
                tl.float32, 32)  # fmt: skip


def _sums(partial, dtypes, zeros, order):
    count, sums, width = partial.shape
    out = [torch.full((width,), float("nan"), dtype=dtype) for dtype in dtypes]
    rows = partial.reshape(count, sums * width).clone()
    _sums_kernel[(count,)](rows, zeros, *out, *(None,) * (3 - sums), sums * width, width, REVERSED=order)
    return out


@pytest.mark.parametrize(
    ("count", "dtypes"),
    [(1, (FP32,)), (15, (FP32,)), (16, (FP32, BF16)), (17, (FP32,) * 3), (40, (FP32, BF16)), (290, (FP32, FP32, FP64))],
    ids=str,
)
def test_column_sums(count, dtypes):
    """With one group, several groups, and groups of groups. The counters are reset."""
    partial = randn(count, len(dtypes), 45, seed=count, dtype=torch.float32)
    zeros = torch.zeros(num_counters(count), dtype=torch.int32)
    found = _sums(partial, dtypes, zeros, False)
    for x, exact, dtype in zip(found, partial.double().sum(0), dtypes, strict=True):
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(x.double(), exact, rtol=limit, atol=limit)
    assert not zeros.any()
    again = _sums(partial, dtypes, zeros, False)
    other_order = _sums(partial, dtypes, zeros, True)  # other programs finish last
    assert all(map(torch.equal, found, again))
    assert all(map(torch.equal, found, other_order))


def test_the_triton_kernels_are_registered_for_the_cpu():
    """The other tests of this process rely on it, as the references would pass, too."""
    names = [schema for op in registry.ops() for schema in op.schemas if has_kernel(schema, "cuda")]
    assert len(names) > 10
    for name in names:
        assert has_kernel(name, "cpu"), name


def size(*tensors: torch.Tensor | None) -> int:
    """The total size of ``tensors`` in bytes."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


# Tensors that many programs read and that fit in the L2 cache, counted once per launch. At batch size 256, a launch of
# ViT-H has less than 2 MB of them. The L2 cache of an A100 has 40 MB.
CACHED = ("ids_ptr", "ids_restore_ptr", "mask_ptr", "stats_ptr", "pos_ptr", "cls_ptr", "mask_token_ptr")
CACHED += ("mean_ptr", "std_ptr", "dloss_ptr", "loss_ptr", "total_ptr", "weight_ptr", "bias_ptr", "residual_bias_ptr")
N, SIDE, L, K, P, D, E = 2, 96, 36, 9, 768, 768, 512  # ViT-B/16 on small images
FEWER = 7  # mask tokens of the decoder with a predict ratio


def _images(dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None, float | None]]:
    """Images in the layout of ``dtype`` with mean, std and nodata. fp16 and integers are raw pixels."""
    if dtype != FP32:
        nodata = None if dtype == UINT8 else 7.0
        return torch.zeros(N, SIDE, SIDE, 3, dtype=dtype), (torch.zeros(3), torch.ones(3), nodata)
    return randn(N, 3, SIDE, SIDE, seed=1, dtype=dtype), (None, None, None)


def _gather(dtype, images):
    pixels, stats = _images(images)
    ids = permutations(N, L, 0)[:, :K]
    out = ops.gather_patches(pixels, ids, 16, 16, *stats, dtype)
    return size(ids, *stats[:2], out) + N * K * P * pixels.element_size()  # only pixels of visible patches


def _gather_backward(dtype, images):
    grad, ids = randn(N, K, P, seed=1, dtype=dtype), permutations(N, L, 0)[:, :K]
    return size(grad, ids, ops.gather_patches_backward(grad, ids, [N, 3, SIDE, SIDE], 16, 16, dtype))


def _positions(dtype, images):
    x, pos, cls = randn(N, K, D, seed=1, dtype=dtype), randn(1, 1 + L, D, seed=2, dtype=FP32), torch.zeros(1, 1, D)
    ids = permutations(N, L, 0)[:, :K]
    rows = 1 + ids.unique().numel()  # rows of the table for visible patches and the class token
    return size(x, ids, cls, ops.add_positions(x, ids, pos, cls)) + rows * size(pos[:, 0])


def _positions_backward(dtype, images):
    grad, pos, cls = randn(N, 1 + K, D, seed=1, dtype=FP32), torch.zeros(1, 1 + L, D), torch.zeros(1, 1, D)
    dx, *_ = ops.add_positions_backward(grad, permutations(N, L, 0)[:, :K], pos, cls, dtype, False)
    return size(grad[:, 1:], dx)  # torch sums the gradient of the class token


def _tokens(dtype, images):
    x, token, pos = randn(N, 1 + K, E, seed=1, dtype=dtype), torch.zeros(1, 1, E), torch.zeros(1, 1 + L, E)
    ids = permutations(N, L, 0)
    return size(x, token, pos, ids, ops.decoder_tokens(x, token, ids, pos))


def _tokens_backward(dtype, images):
    grad, ids = randn(N, 1 + L, E, seed=1, dtype=FP32), permutations(N, L, 0)
    dx, dtoken, _ = ops.decoder_tokens_backward(grad, ids, K, dtype, FP32, FP32, False)
    return size(grad, ids, dx, dtoken)


def _tokens_last(dtype, images):
    x, token, pos = randn(N, 1 + K, E, seed=1, dtype=dtype), torch.zeros(1, 1, E), torch.zeros(1, 1 + L, E)
    ids = permutations(N, L, 0)
    return size(x, token, pos, ids, ops.decoder_tokens(x, token, ids, pos, False))


def _tokens_last_backward(dtype, images):
    grad, ids = randn(N, 1 + L, E, seed=1, dtype=FP32), permutations(N, L, 0)
    dx, dtoken, _ = ops.decoder_tokens_backward(grad, ids, K, dtype, FP32, FP32, False, False)
    return size(grad, dx, dtoken)  # no index is read


def _fewer_tokens(dtype, images):
    x, token, pos = randn(N, 1 + K, E, seed=1, dtype=dtype), torch.zeros(1, 1, E), torch.zeros(1, 1 + L, E)
    ids = permutations(N, L, 0)
    rows = 1 + len((ids < K + FEWER).any(0).nonzero())  # rows of the table for the written tokens
    return size(x, token, ids, ops.decoder_tokens(x, token, ids, pos, False, FEWER)) + rows * size(pos[:, 0])


def _fewer_tokens_backward(dtype, images):
    grad, ids = randn(N, 1 + K + FEWER, E, seed=1, dtype=FP32), permutations(N, L, 0)
    dx, dtoken, _ = ops.decoder_tokens_backward(grad, ids, K, dtype, FP32, FP32, False, False)
    return size(grad, dx, dtoken)  # no index is read


def _loss(dtype, images):
    return _losses(dtype, images)[0]


def _loss_backward(dtype, images):
    return _losses(dtype, images, backward=True)[1]


def _losses(dtype, images, backward=False):
    (pixels, stats), ids = _images(images), permutations(N, L, 0)[:, K:]
    pred, mask = randn(N, L - K, P, seed=2, dtype=dtype), torch.ones(N, L - K)
    loss, saved = ops.masked_loss(pixels, pred, mask, ids, 16, 16, True, *stats)
    read = size(pred, mask, ids, *stats[:2]) + N * (L - K) * P * pixels.element_size()  # only pixels of removed patches
    if not backward:
        return read + size(loss, saved), 0
    dpred, dmask, _ = ops.masked_loss_backward(
        torch.ones(()), pixels, pred, mask, ids, loss, saved, 16, 16, True, *stats, False
    )
    return 0, read + size(loss, saved, dpred, dmask)


ROWS = (
    97  # shared by four programs: about 24 each, like the rows of the encoder at batch 256 for 528 programs of an H100
)


def _norm_inputs(dtype):
    x, residual, parameter = randn(ROWS, D, seed=1, dtype=FP32), randn(ROWS, D, seed=2, dtype=dtype), torch.ones(D)
    return (x, residual, parameter, parameter.clone(), parameter.clone()), (1e-6, dtype)


def _norm(dtype, images):
    inputs, options = _norm_inputs(dtype)
    return size(*inputs, *ops.add_layer_norm(*inputs, *options))


def _norm_backward(dtype, images):
    (dsum, _, residual_bias, weight, _), (_, dtype) = _norm_inputs(dtype)
    dnormed, total, stats = randn(ROWS, D, seed=3, dtype=dtype), randn(ROWS, D, seed=4, dtype=FP32), torch.ones(2, ROWS)
    grads = ops.add_layer_norm_backward(dsum, dnormed, total, stats, weight, residual_bias, dtype)
    return size(dsum, dnormed, total, stats, weight, *grads)


def _norm_of_fewer_tokens(dtype, images):
    x, residual = randn(2, 50, D, seed=1, dtype=FP32), randn(2, 37, D, seed=2, dtype=dtype)
    parameters = [torch.ones(D) for _ in range(3)]
    return size(x[:, 13:], residual, *parameters, *ops.add_layer_norm(x, residual, *parameters, 1e-6, dtype))


def _norm_of_fewer_tokens_backward(dtype, images):
    dnormed, weight, bias = randn(2, 37, D, seed=1, dtype=dtype), torch.ones(D), torch.ones(D)
    dsum, total, stats = randn(2, 37, D, seed=2, dtype=FP32), randn(2, 37, D, seed=3, dtype=FP32), torch.ones(2, 74)
    grads = ops.add_layer_norm_backward(dsum, dnormed, total, stats, weight, bias, dtype, 13)
    return size(dsum, dnormed, total, stats, weight, *grads)


def _gelu(dtype, images):
    x, bias = randn(ROWS, 4 * D, seed=1, dtype=dtype), torch.ones(4 * D)
    return size(x, bias, ops.bias_gelu(x, bias))


def _gelu_backward(dtype, images):
    x, dout = (randn(ROWS, 4 * D, seed=seed, dtype=dtype) for seed in (1, 2))
    bias = torch.ones(4 * D)
    return size(dout, x, bias, *ops.bias_gelu_backward(dout, x, bias, False))


def _attention(dtype, images):
    qkv = randn(N, 197, 3 * 2 * 32, seed=1, dtype=dtype)
    return size(qkv, *ops.attention(qkv, None, 2, True))


def _attention_backward(dtype, images):
    qkv, bias = randn(N, 197, 3 * 2 * 32, seed=1, dtype=dtype), torch.ones(3 * 2 * 32)
    out, lse = ops.attention(qkv, None, 2, True)
    grad = torch.ones_like(out)
    memory.launches.clear()
    return size(grad, qkv, out, lse, *ops.attention_backward(grad, qkv, out, lse, bias, 2))


PARAMETERS = [(3, 8192), (5000,), (768,), (8192,)]


def _gradient_norm(dtype, images):
    grads = [randn(*shape, seed=1, dtype=FP32) for shape in PARAMETERS]
    return size(*grads, *ops.gradient_norm(grads, 1.0))


def _adamw_steps(dtype, images):
    param, grad, exp_avg, exp_avg_sq, copy = ([torch.ones(shape) for shape in PARAMETERS] for _ in range(5))
    copy = [x.to(dtype) for x in copy]
    steps = [torch.zeros(()) for _ in PARAMETERS]
    ops.adamw_steps(param, grad, exp_avg, exp_avg_sq, copy, steps, *[[0.5] * len(steps)] * 5, torch.zeros(()), None)
    return size(*grad, *copy) + 2 * size(*param, *exp_avg, *exp_avg_sq, *steps)


def _attention_of_last_queries(dtype, images):
    qkv = randn(N, 197, 3 * 2 * 32, seed=1, dtype=dtype)
    return size(qkv[:, 50:, :64], qkv[:, :, 64:], *ops.attention(qkv, None, 2, True, 50))


def _attention_of_last_queries_backward(dtype, images):
    qkv, bias = randn(N, 197, 3 * 2 * 32, seed=1, dtype=dtype), torch.ones(3 * 2 * 32)
    out, lse = ops.attention(qkv, None, 2, True, 50)
    grad = torch.ones_like(out)
    memory.launches.clear()
    grads = ops.attention_backward(grad, qkv, out, lse, bias, 2, 50)
    return size(grad, qkv[:, 50:, :64], qkv[:, :, 64:], out, lse, *grads)


KINDS = (FP32, UINT8, torch.uint16, torch.float16)
FROM_IMAGES = [(run, BF16, images) for run in (_gather, _loss, _loss_backward) for images in KINDS]
OTHERS = [_gather_backward, _positions, _positions_backward, _tokens, _tokens_backward]
OTHERS += [_gradient_norm, _adamw_steps]
OTHERS += [_norm, _norm_backward, _gelu, _gelu_backward, _attention, _attention_backward]
LAST_BLOCK = [_tokens_last, _tokens_last_backward, _norm_of_fewer_tokens, _norm_of_fewer_tokens_backward]
LAST_BLOCK += [_attention_of_last_queries, _attention_of_last_queries_backward]
LAST_BLOCK += [_fewer_tokens, _fewer_tokens_backward]


@pytest.mark.parametrize(
    ("run", "dtype", "images"),
    [*FROM_IMAGES, *((run, BF16, None) for run in OTHERS + LAST_BLOCK)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_bytes_moved(run, dtype, images, monkeypatch):
    """At most 1.1 times the size of the op's inputs and outputs, plus the tensors between its launches."""
    monkeypatch.setattr(triton_common, "MULTIPROCESSORS", 1)
    least = run(dtype, images)
    moved = sum(launch.moved(CACHED) for launch in memory.launches)
    print(f"{run.__name__[1:]} {dtype} {images}: {moved} bytes, {moved / least:.3f} of the least")
    assert least <= moved <= 1.1 * least, {launch.kernel: launch.moved(CACHED) for launch in memory.launches}
