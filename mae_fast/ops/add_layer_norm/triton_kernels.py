"""``add_layer_norm`` and its gradient in Triton. Shapes: R rows of D values."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import acc_dtype, column_sums, divide, programs
from . import reference

MAX_WIDTH = 8192  # a program holds whole rows in registers; eager torch takes wider ones
WARPS = 20  # per multiprocessor: the most that fit at up to 96 registers a thread


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, residual_bias_ptr, weight_ptr, bias_ptr,  # [R, D] twice, [D]; None: not given
    sum_ptr, normed_ptr, stats_ptr,  # [R, D] twice, [2, R]
    rows, tokens, skipped,  # `tokens` of an image in x, and how many of them the sum leaves out; None: none
    D: tl.constexpr, EPS: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    in_row = col < D
    in_bounds = (row < rows)[:, None] & in_row[None, :]
    offsets = row.to(tl.int64)[:, None] * D + col[None, :]
    x_row = row.to(tl.int64)
    if skipped is not None:
        x_row += (row // (tokens - skipped) + 1) * skipped
    total = tl.load(x_ptr + x_row[:, None] * D + col[None, :], mask=in_bounds, other=0).to(ACC_DTYPE)
    if residual_ptr is not None:
        added = tl.load(residual_ptr + offsets, mask=in_bounds, other=0).to(ACC_DTYPE)
        if residual_bias_ptr is not None:
            added += tl.load(residual_bias_ptr + col, mask=in_row, other=0).to(ACC_DTYPE)[None, :]
        rounded = (total + added).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, rounded, mask=in_bounds)
        total = rounded.to(ACC_DTYPE)  # normalise the rounded sum
    width = tl.full([BLOCK_R], D, ACC_DTYPE)
    mean = divide(tl.sum(total, axis=1), width)  # exact for a constant row, so that its deviation is 0
    centered = tl.where(in_row[None, :], total - mean[:, None], 0)
    rstd = 1 / tl.sqrt(divide(tl.sum(centered * centered, axis=1), width) + EPS)
    weight = tl.load(weight_ptr + col, mask=in_row, other=0).to(ACC_DTYPE)
    bias = tl.load(bias_ptr + col, mask=in_row, other=0).to(ACC_DTYPE)
    normed = centered * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offsets, normed, mask=in_bounds)
    tl.store(stats_ptr + row, mean, mask=row < rows)
    tl.store(stats_ptr + rows + row, rstd, mask=row < rows)


@triton.jit
def _add_layer_norm_bwd_kernel(
    dsum_ptr, dnormed_ptr, sum_ptr, stats_ptr, weight_ptr,  # [R, D] thrice, [2, R], [D]; None: no gradient of the sum
    dx_ptr, dresidual_ptr, partial_ptr,  # [R, D] twice, [programs, 2 or 3, D]; None: a residual of dx's dtype
    rows, tokens, skipped,  # of dx, which is 0 for the first `skipped` tokens of an image; None: for none
    D: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_C)
    in_row = col < D
    weight = tl.load(weight_ptr + col, mask=in_row, other=0).to(ACC_DTYPE)[None, :]
    dweight = tl.zeros([BLOCK_R, BLOCK_C], ACC_DTYPE)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], ACC_DTYPE)
    dresidual_bias = tl.zeros([BLOCK_R, BLOCK_C], ACC_DTYPE)
    sum_rows = rows
    if skipped is not None:
        sum_rows -= rows // tokens * skipped
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        in_rows = row < rows
        dx_offsets = row.to(tl.int64)[:, None] * D + col[None, :]
        in_dx = in_rows[:, None] & in_row[None, :]
        if skipped is not None:
            in_rows = in_rows & (row % tokens >= skipped)
            row -= (row // tokens + 1) * skipped
        in_bounds = in_rows[:, None] & in_row[None, :]
        offsets = row.to(tl.int64)[:, None] * D + col[None, :]
        dy = tl.load(dnormed_ptr + offsets, mask=in_bounds, other=0).to(ACC_DTYPE)
        total = tl.load(sum_ptr + offsets, mask=in_bounds, other=0).to(ACC_DTYPE)
        mean = tl.load(stats_ptr + row, mask=in_rows, other=0)[:, None]
        rstd = tl.load(stats_ptr + sum_rows + row, mask=in_rows, other=0)[:, None]
        normed = (total - mean) * rstd
        g = dy * weight  # 0 past the last column and row, so that they add nothing to the sums
        c = tl.sum(g, axis=1)[:, None] / D
        cn = tl.sum(g * normed, axis=1)[:, None] / D
        dx = rstd * (g - c - normed * cn)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + offsets, mask=in_bounds, other=0).to(ACC_DTYPE)
        tl.store(dx_ptr + dx_offsets, dx, mask=in_dx)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, dx, mask=in_bounds)
        dweight += dy * normed
        dbias += dy
        if HAS_RESIDUAL_BIAS:
            dresidual_bias += dx
    partial = partial_ptr + tl.program_id(0) * ((2 + HAS_RESIDUAL_BIAS) * D) + col
    tl.store(partial, tl.sum(dweight, axis=0), mask=in_row)
    tl.store(partial + D, tl.sum(dbias, axis=0), mask=in_row)
    if HAS_RESIDUAL_BIAS:
        tl.store(partial + 2 * D, tl.sum(dresidual_bias, axis=0), mask=in_row)


def _block(width: int, per_thread: int) -> dict[str, Any]:
    """Whole rows, ``per_thread`` values a thread, at least four warps."""
    columns = triton.next_power_of_2(width)
    warps = min(16, max(4, columns // (32 * per_thread)))
    return {"BLOCK_R": max(1, 32 * per_thread * warps // columns), "BLOCK_C": columns, "num_warps": warps}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def add_layer_norm_forward(
    x: Tensor,  # [..., D] or [..., T, D]
    residual: Tensor | None,  # [..., D] or [..., R, D], for the last R tokens of x
    residual_bias: Tensor | None,  # [D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # sum and normed [..., D], stats [2, R]: mean, 1 / deviation
    shape, width = x.shape if residual is None else residual.shape, x.shape[-1]
    if not shape.numel() or width > MAX_WIDTH:
        return reference.add_layer_norm_reference(x, residual, residual_bias, weight, bias, eps, dtype)
    rows, block = shape.numel() // width, _block(width, 16)
    skips = (x.shape[-2], x.shape[-2] - shape[-2]) if shape != x.shape else (None, None)
    total = x.new_empty(0 if residual is None else shape)
    normed = x.new_empty(shape, dtype=dtype)
    stats = x.new_empty((2, rows), dtype=torch.promote_types(x.dtype, torch.float32))
    with torch.cuda.device_of(x):
        _add_layer_norm_fwd_kernel[(triton.cdiv(rows, block["BLOCK_R"]),)](
            x.contiguous(), _contiguous(residual), _contiguous(residual_bias), weight.contiguous(), bias.contiguous(),
            total, normed, stats, rows, *skips, D=width, EPS=eps, ACC_DTYPE=acc_dtype(x.dtype), **block,
        )  # fmt: skip
    return total, normed, stats


def add_layer_norm_backward(
    grad_sum: Tensor | None,  # [..., D]
    grad: Tensor,  # [..., D]
    total: Tensor,  # [..., D]
    stats: Tensor,  # [2, R]
    weight: Tensor,  # [D]
    residual_bias: Tensor | None,  # [D]
    residual_dtype: torch.dtype,
    skipped: int = 0,  # tokens of x before the first one of the sum
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # of x, residual (empty if as x), weight, bias, residual bias
    width = weight.shape[0]
    if not total.numel() or width > MAX_WIDTH:
        return reference.add_layer_norm_backward_reference(
            grad_sum, grad, total, stats, weight, residual_bias, residual_dtype, skipped
        )
    dx = total.new_empty((*total.shape[:-2], total.shape[-2] + skipped, width) if skipped else total.shape)
    skips = (dx.shape[-2], skipped) if skipped else (None, None)
    rows, block = dx.numel() // width, _block(width, 8)
    dresidual = total.new_empty(total.shape if residual_dtype != total.dtype else 0, dtype=residual_dtype)
    dtypes = [weight.dtype, weight.dtype, *(() if residual_bias is None else (residual_bias.dtype,))]
    count = programs(total, triton.cdiv(rows, block["BLOCK_R"]), max(1, WARPS // block["num_warps"]))
    partial = stats.new_empty((count, len(dtypes), width))
    with torch.cuda.device_of(total):
        _add_layer_norm_bwd_kernel[(count,)](
            _contiguous(grad_sum), grad.contiguous(), total.contiguous(), stats.contiguous(), weight.contiguous(),
            dx, dresidual if dresidual.numel() else None, partial, rows, *skips,
            D=width, HAS_RESIDUAL_BIAS=residual_bias is not None, ACC_DTYPE=acc_dtype(stats.dtype), **block,
        )  # fmt: skip
        dweight, dbias, *dresidual_bias = column_sums(partial, *dtypes)
    return dx, dresidual, dweight, dbias, dresidual_bias[0] if dresidual_bias else weight.new_empty(0)
