"""``add_layer_norm`` and its gradient in Triton. Shapes: R rows of D values.

Column sums are those of a fixed number of programs, each of its own rows, and a second launch sums these. No atomics:
the same input gives the same bits on the same GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import _divide, wide
from . import reference

MAX_WIDTH = 8192  # a program holds whole rows in registers; wider ones are left to eager torch
WARPS = 20  # of a multiprocessor at once: what its registers hold at up to 96 a thread
MULTIPROCESSORS = 132  # an H100's, where no device says


def programs(x: Tensor, tiles: int, at_once: int) -> int:
    """How many programs share ``tiles``, ``at_once`` on a multiprocessor: all of them run from the start."""
    known = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS
    return min(tiles, known * at_once)


@triton.jit
def _column_sums_kernel(
    partial_ptr,  # [count, sums, D]
    first_ptr, second_ptr, third_ptr,  # [D] each; None where there are fewer sums
    count,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    which, sums = tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = col < D
    total = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        place = (row * sums + which)[:, None] * D + col[None, :]
        total += tl.load(partial_ptr + place, mask=(row < count)[:, None] & in_row[None, :], other=0)
    result = tl.sum(total, axis=0)
    tl.store(first_ptr + col, result, mask=in_row & (which == 0))
    if second_ptr is not None:
        tl.store(second_ptr + col, result, mask=in_row & (which == 1))
    if third_ptr is not None:
        tl.store(third_ptr + col, result, mask=in_row & (which == 2))


def column_sums(partial: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """``partial.sum(0).unbind()``, each in its dtype, for partial [count, sums, D] with at most three sums."""
    count, sums, width = partial.shape
    out = [partial.new_empty(width, dtype=dtype) for dtype in dtypes]
    _column_sums_kernel[(triton.cdiv(width, 32), sums)](
        partial, *out, *(None,) * (3 - sums), count, D=width, WIDE=wide(partial.dtype), BLOCK_R=128, BLOCK_C=32,
        num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, shift_ptr, weight_ptr, bias_ptr,  # [R, D] twice, [D]; None: no residual, no shift
    sum_ptr, normed_ptr, stats_ptr,  # [R, D] twice, [2, R]
    rows,
    D: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    in_row = col < D
    inside = (row < rows)[:, None] & in_row[None, :]
    place = row.to(tl.int64)[:, None] * D + col[None, :]
    total = tl.load(x_ptr + place, mask=inside, other=0).to(WIDE)
    if residual_ptr is not None:
        added = tl.load(residual_ptr + place, mask=inside, other=0).to(WIDE)
        if shift_ptr is not None:
            added += tl.load(shift_ptr + col, mask=in_row, other=0).to(WIDE)[None, :]
        rounded = (total + added).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, rounded, mask=inside)
        total = rounded.to(WIDE)  # what is normalised is the sum as it was rounded
    width = tl.full([BLOCK_R], D, WIDE)
    mean = _divide(tl.sum(total, axis=1), width)  # exact for a constant row, so that its deviation is 0
    off = tl.where(in_row[None, :], total - mean[:, None], 0)
    rstd = 1 / tl.sqrt(_divide(tl.sum(off * off, axis=1), width) + EPS)
    weight = tl.load(weight_ptr + col, mask=in_row, other=0).to(WIDE)
    bias = tl.load(bias_ptr + col, mask=in_row, other=0).to(WIDE)
    normed = off * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + place, normed, mask=inside)
    tl.store(stats_ptr + row, mean, mask=row < rows)
    tl.store(stats_ptr + rows + row, rstd, mask=row < rows)


@triton.jit
def _add_layer_norm_bwd_kernel(
    dsum_ptr, dnormed_ptr, sum_ptr, stats_ptr, weight_ptr,  # [R, D] thrice, [2, R], [D]; None: no gradient of the sum
    dx_ptr, dlow_ptr, partial_ptr,  # [R, D] twice, [programs, 2 or 3, D]; None: a residual of dx's dtype
    rows,
    D: tl.constexpr, HAS_SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_C)
    in_row = col < D
    weight = tl.load(weight_ptr + col, mask=in_row, other=0).to(WIDE)[None, :]
    dweight = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    dshift = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        in_rows = row < rows
        inside = in_rows[:, None] & in_row[None, :]
        place = row.to(tl.int64)[:, None] * D + col[None, :]
        dy = tl.load(dnormed_ptr + place, mask=inside, other=0).to(WIDE)
        total = tl.load(sum_ptr + place, mask=inside, other=0).to(WIDE)
        mean = tl.load(stats_ptr + row, mask=in_rows, other=0)[:, None]
        rstd = tl.load(stats_ptr + rows + row, mask=in_rows, other=0)[:, None]
        normed = (total - mean) * rstd
        g = dy * weight  # 0 past the last column and row: nothing of theirs is in the sums
        c = tl.sum(g, axis=1)[:, None] / D
        cn = tl.sum(g * normed, axis=1)[:, None] / D
        dx = rstd * (g - c - normed * cn)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + place, mask=inside, other=0).to(WIDE)
        tl.store(dx_ptr + place, dx, mask=inside)
        if dlow_ptr is not None:
            tl.store(dlow_ptr + place, dx, mask=inside)
        dweight += dy * normed
        dbias += dy
        if HAS_SHIFT:
            dshift += dx
    partial = partial_ptr + tl.program_id(0) * ((2 + HAS_SHIFT) * D) + col
    tl.store(partial, tl.sum(dweight, axis=0), mask=in_row)
    tl.store(partial + D, tl.sum(dbias, axis=0), mask=in_row)
    if HAS_SHIFT:
        tl.store(partial + 2 * D, tl.sum(dshift, axis=0), mask=in_row)


def _block(width: int, per_thread: int) -> dict[str, Any]:
    """Whole rows, ``per_thread`` values a thread, at least four warps."""
    columns = triton.next_power_of_2(width)
    warps = min(16, max(4, columns // (32 * per_thread)))
    return {"BLOCK_R": max(1, 32 * per_thread * warps // columns), "BLOCK_C": columns, "num_warps": warps}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def add_layer_norm_forward(
    x: Tensor,  # [..., D]
    residual: Tensor | None,  # [..., D]
    shift: Tensor | None,  # [D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # sum and normed [..., D], stats [2, R]: mean, 1 / deviation
    width = x.shape[-1]
    if not x.numel() or width > MAX_WIDTH:
        return reference.add_layer_norm_reference(x, residual, shift, weight, bias, eps, dtype)
    rows, block = x.numel() // width, _block(width, 16)
    total = x.new_empty(0 if residual is None else x.shape)
    normed = x.new_empty(x.shape, dtype=dtype)
    stats = x.new_empty((2, rows), dtype=torch.promote_types(x.dtype, torch.float32))
    with torch.cuda.device_of(x):
        _add_layer_norm_fwd_kernel[(triton.cdiv(rows, block["BLOCK_R"]),)](
            x.contiguous(), _contiguous(residual), _contiguous(shift), weight.contiguous(), bias.contiguous(),
            total, normed, stats, rows, D=width, EPS=eps, WIDE=wide(x.dtype), **block,
        )  # fmt: skip
    return total, normed, stats


def add_layer_norm_backward(
    grad_sum: Tensor | None,  # [..., D]
    grad: Tensor,  # [..., D]
    total: Tensor,  # [..., D]
    stats: Tensor,  # [2, R]
    weight: Tensor,  # [D]
    shift: Tensor | None,  # [D]
    low: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # of x, residual (empty if as x), weight, bias, shift (or empty)
    width = weight.shape[0]
    if not total.numel() or width > MAX_WIDTH:
        return reference.add_layer_norm_backward_reference(grad_sum, grad, total, stats, weight, shift, low)
    rows, block = total.numel() // width, _block(width, 8)
    dx = total.new_empty(total.shape)
    dlow = total.new_empty(total.shape if low != total.dtype else 0, dtype=low)
    dtypes = [weight.dtype, weight.dtype, *(() if shift is None else (shift.dtype,))]
    count = programs(total, triton.cdiv(rows, block["BLOCK_R"]), max(1, WARPS // block["num_warps"]))
    partial = stats.new_empty((count, len(dtypes), width))
    with torch.cuda.device_of(total):
        _add_layer_norm_bwd_kernel[(count,)](
            _contiguous(grad_sum), grad.contiguous(), total.contiguous(), stats.contiguous(), weight.contiguous(),
            dx, dlow if dlow.numel() else None, partial, rows,
            D=width, HAS_SHIFT=shift is not None, WIDE=wide(stats.dtype), **block,
        )  # fmt: skip
        dweight, dbias, *dshift = column_sums(partial, *dtypes)
    return dx, dlow, dweight, dbias, dshift[0] if dshift else weight.new_empty(0)
