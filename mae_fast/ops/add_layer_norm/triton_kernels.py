"""``add_layer_norm`` and its gradient in Triton. Shapes: R rows of D values, cut into PIECES tiles of BLOCK_C columns.

One warp holds a whole row where D is small enough, so that no sum over a row needs shared memory or a barrier.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import acc_dtype, column_sums, counters, divide, num_counters, programs
from . import reference

MAX_WIDTH = 8192  # a program holds whole rows in registers; eager torch computes wider ones
WARPS = 8  # of the backward kernel per multiprocessor: the maximum at 255 registers per thread


@triton.jit
def _columns(i, BLOCK_C: tl.constexpr):
    return i * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _append(tiles, tile):
    return tiles + (tile,)  # noqa: RUF005


@triton.jit
def _load(ptr, row, in_rows, D: tl.constexpr, PIECES: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows of D values as a tuple of PIECES tiles [BLOCK_R, BLOCK_C]; 0 past the last row and column."""
    tiles = ()
    for i in tl.static_range(PIECES):
        col = _columns(i, BLOCK_C)
        in_bounds = in_rows[:, None] & (col < D)[None, :]
        tiles = _append(tiles, tl.load(ptr + row[:, None] * D + col[None, :], mask=in_bounds, other=0))
    return tiles


@triton.jit
def _row_sums(tiles, PIECES: tl.constexpr):
    total = tiles[0]
    for i in tl.static_range(1, PIECES):
        total += tiles[i]
    return tl.sum(total, axis=1)


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, residual_bias_ptr, weight_ptr, bias_ptr,  # two [R, D], three [D]; None: not given
    sum_ptr, normed_ptr, stats_ptr,  # two [R, D], [2, R]
    rows, tokens, skipped,  # per image: tokens of x, and how many of the first ones the sum skips; None: all are summed
    D: tl.constexpr, EPS: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr, PIECES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows, row64, every = row < rows, row.to(tl.int64), tl.zeros([BLOCK_R], tl.int32)
    x_row = row64
    if skipped is not None:
        x_row += (row // (tokens - skipped) + 1) * skipped
    total = _load(x_ptr, x_row, in_rows, D, PIECES, BLOCK_C)
    if residual_ptr is not None:
        residual = _load(residual_ptr, row64, in_rows, D, PIECES, BLOCK_C)
        if residual_bias_ptr is not None:
            residual_bias = _load(residual_bias_ptr, every, every == 0, D, PIECES, BLOCK_C)
        x, total = total, ()
        for i in tl.static_range(PIECES):
            added = residual[i].to(ACC_DTYPE)
            if residual_bias_ptr is not None:
                added += residual_bias[i].to(ACC_DTYPE)
            rounded = (x[i].to(ACC_DTYPE) + added).to(sum_ptr.dtype.element_ty)
            in_bounds = in_rows[:, None] & (_columns(i, BLOCK_C) < D)[None, :]
            tl.store(sum_ptr + row64[:, None] * D + _columns(i, BLOCK_C)[None, :], rounded, mask=in_bounds)
            total = _append(total, rounded)  # normalise the rounded sum
    wide = ()
    for i in tl.static_range(PIECES):
        wide = _append(wide, total[i].to(ACC_DTYPE))
    width = tl.full([BLOCK_R], D, ACC_DTYPE)
    mean = divide(_row_sums(wide, PIECES), width)  # exact for a constant row, so that its std is 0
    centered, squares = (), ()
    for i in tl.static_range(PIECES):
        difference = tl.where((_columns(i, BLOCK_C) < D)[None, :], wide[i] - mean[:, None], 0)
        centered, squares = _append(centered, difference), _append(squares, difference * difference)
    rstd = 1 / tl.sqrt(divide(_row_sums(squares, PIECES), width) + EPS)
    weight = _load(weight_ptr, every, every == 0, D, PIECES, BLOCK_C)
    bias = _load(bias_ptr, every, every == 0, D, PIECES, BLOCK_C)
    for i in tl.static_range(PIECES):
        normed = centered[i] * rstd[:, None] * weight[i].to(ACC_DTYPE) + bias[i].to(ACC_DTYPE)
        in_bounds = in_rows[:, None] & (_columns(i, BLOCK_C) < D)[None, :]
        tl.store(normed_ptr + row64[:, None] * D + _columns(i, BLOCK_C)[None, :], normed, mask=in_bounds)
    tl.store(stats_ptr + row, mean, mask=in_rows)
    tl.store(stats_ptr + rows + row, rstd, mask=in_rows)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _store_sums(partial_ptr, dweight, dbias, dresidual_bias, HAS_RESIDUAL_BIAS: tl.constexpr,
                D: tl.constexpr, PIECES: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Sum two or three tuples of tiles over rows, and store the sums as this program's row of ``partial_ptr``."""
    partial_ptr += tl.program_id(0) * ((2 + HAS_RESIDUAL_BIAS) * D)
    shape: tl.constexpr = dweight[0].shape
    for i in tl.static_range(PIECES):
        col = _columns(i, BLOCK_C)
        # Store whole tiles with one valid row, so that threads need not exchange the sums.
        ptrs = tl.broadcast_to(partial_ptr + col[None, :], shape)
        valid = (tl.arange(0, shape[0]) == 0)[:, None] & (col < D)[None, :]
        if HAS_RESIDUAL_BIAS:
            one, two, three = tl.reduce((dweight[i], dbias[i], dresidual_bias[i]), 0, _add_three, keep_dims=True)
            tl.store(ptrs + 2 * D, three, mask=valid)
        else:
            one, two = tl.reduce((dweight[i], dbias[i]), 0, _add_two, keep_dims=True)
        tl.store(ptrs, one, mask=valid)
        tl.store(ptrs + D, two, mask=valid)


@triton.jit
def _add_layer_norm_bwd_kernel(
    dsum_ptr, dnormed_ptr, sum_ptr, stats_ptr, weight_ptr,  # three [R, D], [2, R], [D]; None: no gradient of the sum
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dresidual_bias_ptr,  # two [R, D], three [D]; None: not needed
    partial_ptr, counters_ptr,  # [programs, 2 or 3, D], [1 + groups of programs]
    rows, tokens, skipped,  # of dx: rows, tokens per image, and how many of the first ones get 0; None: none
    D: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, PIECES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row_of_tile, every = tl.arange(0, BLOCK_R), tl.zeros([BLOCK_R], tl.int32)
    zero = tl.zeros([BLOCK_R, BLOCK_C], ACC_DTYPE)
    dweight, dbias, dresidual_bias = (zero,) * PIECES, (zero,) * PIECES, (zero,) * PIECES
    sum_rows = rows
    if skipped is not None:
        sum_rows -= rows // tokens * skipped
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tile * BLOCK_R + row_of_tile
        in_dx, dx_row = row < rows, row.to(tl.int64)
        in_rows, row64 = in_dx, dx_row
        if skipped is not None:
            in_rows = in_dx & (row % tokens >= skipped)
            row -= (row // tokens + 1) * skipped
            row64 = row.to(tl.int64)
        # All loads before the sums, so that they overlap.
        dy = _load(dnormed_ptr, row64, in_rows, D, PIECES, BLOCK_C)
        total = _load(sum_ptr, row64, in_rows, D, PIECES, BLOCK_C)
        if dsum_ptr is not None:
            dsum = _load(dsum_ptr, row64, in_rows, D, PIECES, BLOCK_C)
        mean = tl.load(stats_ptr + row[:, None], mask=in_rows[:, None], other=0)
        rstd = tl.load(stats_ptr + sum_rows + row[:, None], mask=in_rows[:, None], other=0)
        weight = _load(weight_ptr, every, every == 0, D, PIECES, BLOCK_C)
        # dy and g are 0 past the last column and row, and add nothing to the sums.
        sum_g, sum_gn, g, normed = zero, zero, (), ()
        for i in tl.static_range(PIECES):
            g_i = dy[i].to(ACC_DTYPE) * weight[i].to(ACC_DTYPE)
            normed_i = (total[i].to(ACC_DTYPE) - mean) * rstd
            sum_g, sum_gn = sum_g + g_i, sum_gn + g_i * normed_i
            g, normed = _append(g, g_i), _append(normed, normed_i)
        c, cn = tl.reduce((sum_g, sum_gn), 1, _add_two, keep_dims=True)
        c, cn = c / D, cn / D
        new_dweight, new_dbias, new_dresidual_bias = (), (), ()
        for i in tl.static_range(PIECES):
            dx = rstd * (g[i] - c - normed[i] * cn)
            if dsum_ptr is not None:
                dx += dsum[i].to(ACC_DTYPE)
            col, in_row = _columns(i, BLOCK_C)[None, :], (_columns(i, BLOCK_C) < D)[None, :]
            tl.store(dx_ptr + dx_row[:, None] * D + col, dx, mask=in_dx[:, None] & in_row)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + row64[:, None] * D + col, dx, mask=in_rows[:, None] & in_row)
            dy_i = dy[i].to(ACC_DTYPE)
            new_dweight = _append(new_dweight, dweight[i] + dy_i * normed[i])
            new_dbias = _append(new_dbias, dbias[i] + dy_i)
            new_dresidual_bias = _append(new_dresidual_bias, dresidual_bias[i] + dx)
        dweight, dbias, dresidual_bias = new_dweight, new_dbias, new_dresidual_bias
    _store_sums(partial_ptr, dweight, dbias, dresidual_bias, dresidual_bias_ptr is not None, D, PIECES, BLOCK_C)
    column_sums(partial_ptr, counters_ptr, dweight_ptr, dbias_ptr, dresidual_bias_ptr,
                tl.program_id(0), tl.num_programs(0), (2 + (dresidual_bias_ptr is not None)) * D, D,
                ACC_DTYPE, 512)  # fmt: skip


def _block(width: int, most: int, *dtypes: torch.dtype) -> dict[str, Any]:
    """Tiles for rows of ``width`` values, with at most ``most`` values in a thread.

    A thread loads 16 bytes of the widest of ``dtypes`` at a time, and the same number of values of the other dtypes.
    Otherwise threads would exchange values. One warp processes one row, or several rows where lanes would idle. Several
    warps share a wide row.
    """
    vector = 16 // max(dtype.itemsize for dtype in dtypes)
    rows, warps, columns = 4, 4, 32 * vector
    while vector * triton.cdiv(width, columns) > most and warps < 16:  # several warps per row
        rows, warps, columns = max(1, rows // 2), warps if rows > 1 else 2 * warps, 2 * columns

    def idle(columns: int) -> bool:  # more than one lane in nine
        return 8 * (-(-width // columns) * columns) > 9 * width

    while columns > 8 * vector and idle(columns) and vector * triton.cdiv(width, columns // 2) <= most:
        rows, columns = 2 * rows, columns // 2  # several rows per warp
    return {"BLOCK_R": rows, "PIECES": triton.cdiv(width, columns), "BLOCK_C": columns, "num_warps": warps}


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
) -> tuple[Tensor, Tensor, Tensor]:  # sum and normed [..., D], stats [2, R]: mean, 1 / std
    shape, width = x.shape if residual is None else residual.shape, x.shape[-1]
    if not shape.numel() or width > MAX_WIDTH:
        return reference.add_layer_norm_reference(x, residual, residual_bias, weight, bias, eps, dtype)
    dtypes = (x.dtype, dtype) if residual is None else (x.dtype, residual.dtype, dtype)
    rows, block = shape.numel() // width, _block(width, 40, *dtypes)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # of x, residual (empty if x's dtype), weight, bias, residual bias
    width = weight.shape[0]
    if not total.numel() or width > MAX_WIDTH:
        return reference.add_layer_norm_backward_reference(
            grad_sum, grad, total, stats, weight, residual_bias, residual_dtype, skipped
        )
    dtypes = (total.dtype, grad.dtype, residual_dtype)
    dx = total.new_empty((*total.shape[:-2], total.shape[-2] + skipped, width) if skipped else total.shape)
    skips = (dx.shape[-2], skipped) if skipped else (None, None)
    rows, block = dx.numel() // width, _block(width, 32, *dtypes)
    dresidual = total.new_empty(total.shape if residual_dtype != total.dtype else 0, dtype=residual_dtype)
    dweight, dbias = weight.new_empty(width), weight.new_empty(width)
    dresidual_bias = weight.new_empty(0) if residual_bias is None else residual_bias.new_empty(width)
    count = programs(total, triton.cdiv(rows, block["BLOCK_R"]), max(1, WARPS // block["num_warps"]))
    partial = stats.new_empty((count, 2 if residual_bias is None else 3, width))
    with torch.cuda.device_of(total):
        _add_layer_norm_bwd_kernel[(count,)](
            _contiguous(grad_sum), grad.contiguous(), total.contiguous(), stats.contiguous(), weight.contiguous(),
            dx, dresidual if dresidual.numel() else None, dweight, dbias,
            None if residual_bias is None else dresidual_bias, partial, counters(total, num_counters(count)),
            rows, *skips, D=width, ACC_DTYPE=acc_dtype(stats.dtype), **block,
        )  # fmt: skip
    return dx, dresidual, dweight, dbias, dresidual_bias
