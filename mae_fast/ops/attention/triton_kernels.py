"""Attention of short sequences in Triton, forward and backward, on the packed projection.

One program computes one head of one image, in tiles of queries and keys. Only one tile of scores exists at a time. If
all tokens fit in one tile, the backward pass recomputes the softmax and takes five matrix products. Otherwise it
computes the gradients of all queries, then those of all keys and values, with seven matrix products. No kernel
adds atomically, so the same input gives the same bits.

Shapes: N images, T tokens (the last Q are queries), H heads of d values. Sums and softmax are fp32, with exponentials
to base 2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import GROUP, column_sums, counters, num_counters
from . import reference

MAX_HEAD_DIM = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}  # larger ones spill registers
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _load(ptr, start, stride_t, stride_d, T, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load ROWS tokens from ``start`` on, [ROWS, BLOCK_D]; zeros beyond T and HEAD_DIM."""
    row, col = start + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    valid = (row < T)[:, None] & (col < HEAD_DIM)[None, :]
    return tl.load(ptr + row[:, None] * stride_t + col[None, :] * stride_d, mask=valid, other=0)


@triton.jit
def _store(ptr, x, start, stride_t, T, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    row, col = start + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    valid = (row < T)[:, None] & (col < HEAD_DIM)[None, :]
    tl.store(ptr + row[:, None] * stride_t + col[None, :], x.to(ptr.dtype.element_ty), mask=valid)


@triton.jit
def _product(a, b):
    """a @ b in fp32. fp32 operands are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(q, k, start, T, scale, COLS: tl.constexpr):
    """Logits to base 2 of queries q and keys k, the first of them token ``start``; -inf for keys beyond T."""
    s = _product(q, tl.trans(k)) * scale
    return tl.where((start + tl.arange(0, COLS) < T)[None, :], s, float("-inf"))


@triton.jit
def _add_keys(q, largest, total, acc, k_ptr, v_ptr, start, stride_t, stride_d, T, scale,
              COLS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One step of the online softmax: update the largest logit, the sum of exponentials and the weighted values."""
    k = _load(k_ptr, start, stride_t, stride_d, T, COLS, HEAD_DIM, BLOCK_D)
    v = _load(v_ptr, start, stride_t, stride_d, T, COLS, HEAD_DIM, BLOCK_D)
    s = _scores(q, k, start, T, scale, COLS)
    new = tl.maximum(largest, tl.max(s, axis=1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(largest - new)
    acc = acc * shrink[:, None] + _product(p.to(v.dtype), v)
    return new, total * shrink + tl.sum(p, axis=1), acc


@triton.jit
def _attend(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start, stride_t, stride_d, T, Q, scale,
            ROWS: tl.constexpr, COLS: tl.constexpr,
            H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write the output of ROWS queries and, if ``lse_ptr`` is given, their log-sum-exp."""
    q = _load(q_ptr, start, stride_t, stride_d, Q, ROWS, HEAD_DIM, BLOCK_D)
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for j in range(tl.cdiv(T, COLS)):
        largest, total, acc = _add_keys(
            q, largest, total, acc, k_ptr, v_ptr, j * COLS, stride_t, stride_d, T, scale, COLS, HEAD_DIM, BLOCK_D
        )
    _store(out_ptr, acc / total[:, None], start, H * HEAD_DIM, Q, ROWS, HEAD_DIM, BLOCK_D)
    if lse_ptr is not None:
        row = start + tl.arange(0, ROWS)
        tl.store(lse_ptr + row, largest + tl.log2(total), mask=row < Q)


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr,  # [N, T, 3, H, d], [N, Q, H, d], [N, H, Q] or None
    stride_n, stride_t, stride_d, T, Q, scale,  # Q is None if all tokens are queries
    ROWS: tl.constexpr, COLS: tl.constexpr,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    q_ptr = qkv_ptr + n.to(tl.int64) * stride_n + h * HEAD_DIM * stride_d
    k_ptr, v_ptr = q_ptr + H * HEAD_DIM * stride_d, q_ptr + 2 * H * HEAD_DIM * stride_d
    queries = T
    if Q is not None:
        queries = Q
        q_ptr += (T - Q) * stride_t
    out_ptr += n.to(tl.int64) * queries * (H * HEAD_DIM) + h * HEAD_DIM
    if lse_ptr is not None:
        lse_ptr += tl.program_id(0).to(tl.int64) * queries
    for i in range(tl.cdiv(queries, ROWS)):
        _attend(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, i * ROWS, stride_t, stride_d, T, queries, scale,
                ROWS, COLS, H, HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def _attention_one_tile_bwd_kernel(
    qkv_ptr, grad_ptr, dqkv_ptr, dbias_ptr,  # [N, T, 3, H, d], [N, Q, H, d], as qkv, [3, H, d] or None
    partial_ptr, counters_ptr,  # [N, H, 3, d], [H, 1 + groups of images]
    stride_n, stride_t, stride_d, grad_stride_n, grad_stride_t, grad_stride_d, T, Q, scale,
    ROWS: tl.constexpr, H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward pass for a single tile. It recomputes the softmax and reads no result of the forward pass."""
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    qkv_ptr += n.to(tl.int64) * stride_n + h * HEAD_DIM * stride_d
    grad_ptr += n.to(tl.int64) * grad_stride_n + h * HEAD_DIM * grad_stride_d
    out = dqkv_ptr + n.to(tl.int64) * T * (3 * H * HEAD_DIM) + h * HEAD_DIM
    queries, q_ptr, dq_ptr = T, qkv_ptr, out
    if Q is not None:
        queries, q_ptr, dq_ptr = Q, qkv_ptr + (T - Q) * stride_t, out + (T - Q) * (3 * H * HEAD_DIM)
        _store_zeros(out, T - Q, ROWS, H, HEAD_DIM, BLOCK_D)
    q = _load(q_ptr, 0, stride_t, stride_d, queries, ROWS, HEAD_DIM, BLOCK_D)
    k = _load(qkv_ptr + H * HEAD_DIM * stride_d, 0, stride_t, stride_d, T, ROWS, HEAD_DIM, BLOCK_D)
    v = _load(qkv_ptr + 2 * H * HEAD_DIM * stride_d, 0, stride_t, stride_d, T, ROWS, HEAD_DIM, BLOCK_D)
    grad = _load(grad_ptr, 0, grad_stride_t, grad_stride_d, queries, ROWS, HEAD_DIM, BLOCK_D)
    s = _scores(q, k, 0, T, scale, ROWS)
    p = tl.exp2(s - tl.max(s, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    dp = _product(grad, tl.trans(v))
    ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(q.dtype)
    dv = _product(tl.trans(p.to(q.dtype)), grad)
    natural = scale * LN_2  # 1 / sqrt(d)
    dq = _product(ds, k) * natural
    dk = _product(tl.trans(ds), q) * natural
    _store(dq_ptr, dq, 0, 3 * H * HEAD_DIM, queries, ROWS, HEAD_DIM, BLOCK_D)
    _store(out + H * HEAD_DIM, dk, 0, 3 * H * HEAD_DIM, T, ROWS, HEAD_DIM, BLOCK_D)
    _store(out + 2 * H * HEAD_DIM, dv, 0, 3 * H * HEAD_DIM, T, ROWS, HEAD_DIM, BLOCK_D)
    if dbias_ptr is not None:
        _sum_bias(dbias_ptr, partial_ptr, counters_ptr, tl.sum(dq, axis=0), tl.sum(grad.to(tl.float32), axis=0),
                  H, HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def _store_zeros(dqkv_ptr, tokens, ROWS: tl.constexpr, H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write zeros as the gradients of queries without an output."""
    for i in range(tl.cdiv(tokens, ROWS)):
        zeros = tl.zeros([ROWS, BLOCK_D], tl.float32)
        _store(dqkv_ptr, zeros, i * ROWS, 3 * H * HEAD_DIM, tokens, ROWS, HEAD_DIM, BLOCK_D)


@triton.jit
def _sum_bias(dbias_ptr, partial_ptr, counters_ptr, dq, grad,
              H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Compute the gradient of the bias of q, k and v from the sums over tokens of dq and of the output's gradient.

    Adding one vector to all keys does not change the softmax, so the gradient of k's bias is 0. The attention weights
    of a query add up to 1, so dv and the output's gradient have the same sum over tokens.
    """
    n, h, count = tl.program_id(0) // H, tl.program_id(0) % H, tl.num_programs(0) // H
    col = tl.arange(0, BLOCK_D)
    partial_ptr += h * (3 * HEAD_DIM)
    ptr = partial_ptr + n * (3 * H * HEAD_DIM) + col
    tl.store(ptr, dq, mask=col < HEAD_DIM)
    tl.store(ptr + HEAD_DIM, tl.zeros_like(dq), mask=col < HEAD_DIM)
    tl.store(ptr + 2 * HEAD_DIM, grad, mask=col < HEAD_DIM)
    dbias_ptr += h * HEAD_DIM
    column_sums(partial_ptr, counters_ptr + h * (1 + tl.cdiv(count, GROUP)),
                dbias_ptr, dbias_ptr + H * HEAD_DIM, dbias_ptr + 2 * H * HEAD_DIM,
                n, count, 3 * H * HEAD_DIM, HEAD_DIM, tl.float32, 4 * BLOCK_D)  # fmt: skip


@triton.jit
def _add_keys_bwd(dq, q, grad, lse, average, start, qkv_ptr, stride_t, stride_d, T, scale,
                  COLS: tl.constexpr, H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Add the contribution of COLS keys to the gradient of queries."""
    k = _load(qkv_ptr + H * HEAD_DIM * stride_d, start, stride_t, stride_d, T, COLS, HEAD_DIM, BLOCK_D)
    v = _load(qkv_ptr + 2 * H * HEAD_DIM * stride_d, start, stride_t, stride_d, T, COLS, HEAD_DIM, BLOCK_D)
    p = tl.exp2(_scores(q, k, start, T, scale, COLS) - lse[:, None])
    ds = p * (_product(grad, tl.trans(v)) - average[:, None])
    return dq + _product(ds.to(q.dtype), k)


@triton.jit
def _queries_bwd(start, q_ptr, qkv_ptr, grad_ptr, out_ptr, lse_ptr, average_ptr, dq_ptr,
                 stride_t, stride_d, grad_stride_t, grad_stride_d, T, Q, scale,
                 ROWS: tl.constexpr, COLS: tl.constexpr,
                 H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write the gradients of ROWS queries and, for each query, the mean of dp weighted by p.

    Returns:
        The sums over queries of dq and of the output's gradient, [BLOCK_D] each. Queries beyond Q add 0.
    """
    q = _load(q_ptr, start, stride_t, stride_d, Q, ROWS, HEAD_DIM, BLOCK_D)
    grad = _load(grad_ptr, start, grad_stride_t, grad_stride_d, Q, ROWS, HEAD_DIM, BLOCK_D)
    out = _load(out_ptr, start, H * HEAD_DIM, 1, Q, ROWS, HEAD_DIM, BLOCK_D)
    row = start + tl.arange(0, ROWS)
    average = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)  # the mean of dp, weighted by p
    tl.store(average_ptr + row, average, mask=row < Q)
    lse = tl.load(lse_ptr + row, mask=row < Q, other=0)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for j in range(tl.cdiv(T, COLS)):
        dq = _add_keys_bwd(dq, q, grad, lse, average, j * COLS, qkv_ptr, stride_t, stride_d, T, scale,
                           COLS, H, HEAD_DIM, BLOCK_D)  # fmt: skip
    dq *= scale * LN_2
    _store(dq_ptr, dq, start, 3 * H * HEAD_DIM, Q, ROWS, HEAD_DIM, BLOCK_D)
    return tl.sum(dq, axis=0), tl.sum(grad.to(tl.float32), axis=0)


@triton.jit
def _add_queries_bwd(dk, dv, k, v, start, q_ptr, grad_ptr, lse_ptr, average_ptr,
                     stride_t, stride_d, grad_stride_t, grad_stride_d, Q, scale,
                     ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Add the contribution of ROWS queries to the gradients of keys and values. Scores are [keys, queries]."""
    q = _load(q_ptr, start, stride_t, stride_d, Q, ROWS, HEAD_DIM, BLOCK_D)
    grad = _load(grad_ptr, start, grad_stride_t, grad_stride_d, Q, ROWS, HEAD_DIM, BLOCK_D)
    row = start + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + row, mask=row < Q, other=0)
    average = tl.load(average_ptr + row, mask=row < Q, other=0)
    p = tl.exp2(_product(k, tl.trans(q)) * scale - lse[None, :])
    dv += _product(p.to(q.dtype), grad)
    ds = p * (_product(v, tl.trans(grad)) - average[None, :])
    dk += _product(ds.to(q.dtype), q)
    return dk, dv


@triton.jit
def _keys_bwd(start, q_ptr, qkv_ptr, grad_ptr, lse_ptr, average_ptr, dqkv_ptr,
              stride_t, stride_d, grad_stride_t, grad_stride_d, T, Q, scale,
              ROWS: tl.constexpr, COLS: tl.constexpr,
              H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write the gradients of ROWS keys and values. Rows beyond T hold undefined values and are not written."""
    width = H * HEAD_DIM
    k = _load(qkv_ptr + width * stride_d, start, stride_t, stride_d, T, ROWS, HEAD_DIM, BLOCK_D)
    v = _load(qkv_ptr + 2 * width * stride_d, start, stride_t, stride_d, T, ROWS, HEAD_DIM, BLOCK_D)
    dk, dv = tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(tl.cdiv(Q, COLS)):
        dk, dv = _add_queries_bwd(dk, dv, k, v, i * COLS, q_ptr, grad_ptr, lse_ptr, average_ptr,
                                  stride_t, stride_d, grad_stride_t, grad_stride_d, Q, scale,
                                  COLS, HEAD_DIM, BLOCK_D)  # fmt: skip
    dk *= scale * LN_2
    _store(dqkv_ptr + width, dk, start, 3 * width, T, ROWS, HEAD_DIM, BLOCK_D)
    _store(dqkv_ptr + 2 * width, dv, start, 3 * width, T, ROWS, HEAD_DIM, BLOCK_D)


@triton.jit
def _attention_tiles_bwd_kernel(
    qkv_ptr, grad_ptr, out_ptr, lse_ptr,  # [N, T, 3, H, d], [N, Q, H, d] twice, [N, H, Q]
    average_ptr, dqkv_ptr, dbias_ptr,  # [N, H, Q], as qkv, [3, H, d] or None
    partial_ptr, counters_ptr,  # [N, H, 3, d], [H, 1 + groups of images]
    stride_n, stride_t, stride_d, grad_stride_n, grad_stride_t, grad_stride_d, T, Q, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward pass for several tiles: first the gradients of all queries, then those of all keys and values."""
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    width = H * HEAD_DIM
    qkv_ptr += n.to(tl.int64) * stride_n + h * HEAD_DIM * stride_d
    grad_ptr += n.to(tl.int64) * grad_stride_n + h * HEAD_DIM * grad_stride_d
    dqkv_ptr += n.to(tl.int64) * T * (3 * width) + h * HEAD_DIM
    queries, q_ptr, dq_ptr = T, qkv_ptr, dqkv_ptr
    if Q is not None:
        queries, q_ptr, dq_ptr = Q, qkv_ptr + (T - Q) * stride_t, dqkv_ptr + (T - Q) * (3 * width)
        _store_zeros(dqkv_ptr, T - Q, ROWS, H, HEAD_DIM, BLOCK_D)
    out_ptr += n.to(tl.int64) * queries * width + h * HEAD_DIM
    lse_ptr += tl.program_id(0).to(tl.int64) * queries
    average_ptr += tl.program_id(0).to(tl.int64) * queries
    sum_q, sum_grad = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.cdiv(queries, ROWS)):
        dq, grad = _queries_bwd(i * ROWS, q_ptr, qkv_ptr, grad_ptr, out_ptr, lse_ptr, average_ptr, dq_ptr,
                                stride_t, stride_d, grad_stride_t, grad_stride_d, T, queries, scale,
                                ROWS, COLS, H, HEAD_DIM, BLOCK_D)  # fmt: skip
        sum_q, sum_grad = sum_q + dq, sum_grad + grad
    if dbias_ptr is not None:
        _sum_bias(dbias_ptr, partial_ptr, counters_ptr, sum_q, sum_grad, H, HEAD_DIM, BLOCK_D)
    tl.debug_barrier()  # wait until all averages are written
    for j in range(tl.cdiv(T, ROWS)):
        _keys_bwd(j * ROWS, q_ptr, qkv_ptr, grad_ptr, lse_ptr, average_ptr, dqkv_ptr,
                  stride_t, stride_d, grad_stride_t, grad_stride_d, T, queries, scale,
                  ROWS, COLS, H, HEAD_DIM, BLOCK_D)  # fmt: skip


def fits(qkv: Tensor, num_heads: int, tokens: int) -> bool:
    """Whether these kernels can compute the attention of ``qkv`` [N, T, 3*H*d] in sequences of ``tokens``."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    return tokens > 0 and 0 < head_dim <= MAX_HEAD_DIM.get(qkv.dtype, 0) and qkv.shape[0] > 0


def _shape(qkv: Tensor, num_heads: int) -> dict[str, int]:
    head_dim = qkv.shape[2] // (3 * num_heads)
    return {"H": num_heads, "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}


def _tiles(qkv: Tensor, num_heads: int) -> dict[str, int]:
    """Queries and keys per tile, without prefetching. These sizes spill no registers on sm_80 and sm_90."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    if qkv.dtype == torch.float32:
        rows, cols = (32, 32) if head_dim <= 32 else (16, 16)
    else:
        rows, cols = (64, 32) if head_dim <= 64 else (32, 32)
    return {"ROWS": rows, "COLS": cols, "num_stages": 1}


def needs_lse(qkv: Tensor, num_heads: int) -> bool:
    """Whether the backward pass reads the output and the log-sum-exp. It does if there are several tiles."""
    return qkv.shape[1] > _tiles(qkv, num_heads)["ROWS"]


def _scale(qkv: Tensor, num_heads: int) -> float:
    """The factor of the logits to base 2, log2(e) / sqrt(d)."""
    return math.log2(math.e) / math.sqrt(qkv.shape[2] // (3 * num_heads))


def attention_forward(
    qkv: Tensor,  # [N, T, 3*H*d]
    bias: Tensor | None,  # already added to qkv
    num_heads: int,
    save_lse: bool,
    first_query: int = 0,
) -> tuple[Tensor, Tensor]:  # [N, Q, H*d], [N, H, Q] or empty
    if not fits(qkv, num_heads, qkv.shape[1]):
        return reference.attention_reference(qkv, bias, num_heads, save_lse, first_query)
    n, t, width = qkv.shape
    queries = t - first_query
    out = qkv.new_empty((n, queries, width // 3))
    lse = qkv.new_empty((n, num_heads, queries) if save_lse else 0, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _attention_fwd_kernel[(n * num_heads,)](
            qkv, out, lse if save_lse else None, *qkv.stride(), t, queries if first_query else None,
            _scale(qkv, num_heads),
            **_tiles(qkv, num_heads), **_shape(qkv, num_heads),
        )  # fmt: skip
    return out, lse


def attention_backward(
    grad: Tensor,  # [N, Q, H*d]
    qkv: Tensor,  # [N, T, 3*H*d]
    out: Tensor,  # [N, Q, H*d]
    lse: Tensor,  # [N, H, Q] or empty
    bias: Tensor | None,  # [3*H*d]
    num_heads: int,
    first_query: int = 0,
) -> tuple[Tensor, Tensor]:  # gradients of qkv and bias (empty without bias)
    n, t, width = qkv.shape
    one_tile = not needs_lse(qkv, num_heads)
    if not fits(qkv, num_heads, t) or not (one_tile or lse.numel()):
        return reference.attention_backward_reference(grad, qkv, out, lse, bias, num_heads, first_query)
    dqkv = qkv.new_empty((n, t, width))
    sums: tuple[Tensor | None, ...] = (None, None, None)
    if bias is not None:
        partial = qkv.new_empty((n, width), dtype=torch.float32)
        sums = (bias.new_empty(width), partial, counters(qkv, num_heads * num_counters(n)))
    with torch.cuda.device_of(qkv):
        strides, scale, shape = (*qkv.stride(), *grad.stride()), _scale(qkv, num_heads), _shape(qkv, num_heads)
        tokens = t, t - first_query if first_query else None
        if one_tile:
            rows = max(16, triton.next_power_of_2(t))
            _attention_one_tile_bwd_kernel[(n * num_heads,)](
                qkv, grad, dqkv, *sums, *strides, *tokens, scale, ROWS=rows, **shape
            )
        else:
            average = torch.empty_like(lse)
            _attention_tiles_bwd_kernel[(n * num_heads,)](
                qkv, grad, out, lse, average, dqkv, *sums, *strides, *tokens, scale,
                **_tiles(qkv, num_heads), **shape,
            )  # fmt: skip
    dbias = sums[0]
    return dqkv, qkv.new_empty(0) if dbias is None else dbias
