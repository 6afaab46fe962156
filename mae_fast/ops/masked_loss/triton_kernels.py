"""``masked_loss`` and its gradient in Triton.

Shapes: N images, C channels, patches of p x q pixels, P = p*q*C values per patch (channel fastest), L patches, R of
them predicted. The kernels raise no error on an index outside 0..L-1: it makes the loss NaN, and reads nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..patches import image_size, may_have_missing
from ..triton_common import acc_dtype, grid, image_strides, is_missing, standardised, tile
from . import reference

EPS = tl.constexpr(reference.EPS)
MAX_VALUES = 8192  # per patch: a program holds whole patches in registers; eager torch computes larger ones


@triton.jit
def _target(
    images_ptr, ids_ptr, mean_ptr, std_ptr, row, col, rows, R, L, columns, stride_n, stride_c, stride_h, stride_w,
    nodata,
    p: tl.constexpr, q: tl.constexpr, C: tl.constexpr, P: tl.constexpr, HAS_IDS: tl.constexpr,
    INTERLEAVED: tl.constexpr, STANDARDISE: tl.constexpr, MISSING: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Values ``col`` (ordered [p, q, c]) of the targets of the predictions ``row``, and a mask of the known values.

    Targets are NaN for invalid indices and 0 where a value is missing.
    """
    n = row // R
    patch = tl.load(ids_ptr + row, mask=row < rows, other=-1) if HAS_IDS else row - n * R
    valid = (patch >= 0) & (patch < L) & (row < rows)
    patch = patch.to(tl.int32)
    corner = n.to(tl.int64) * stride_n + patch // columns * p * stride_h + patch % columns * q * stride_w
    channel = col % C
    if INTERLEAVED:  # [H, W, C]: the values of a row of pixels are contiguous
        pixel = col // (C * q) * stride_h + col % (C * q)
    else:
        pixel = col // (C * q) * stride_h + col // C % q * stride_w + channel * stride_c
    valid = valid[:, None] & (col < P)[None, :]
    x = tl.load(images_ptr + corner[:, None] + pixel[None, :], mask=valid, other=0)
    value = standardised(x, mean_ptr, std_ptr, channel[None, :], STANDARDISE, ACC_DTYPE)
    known = (col < P)[None, :]
    if MISSING:
        missing = is_missing(x, nodata) & valid
        value, known = tl.where(missing, 0, value), known & ~missing
    return tl.where(valid, value, float("nan")), known


@triton.jit
def _masked_loss_fwd_kernel(
    images_ptr, pred_ptr, mask_ptr, ids_ptr, mean_ptr, std_ptr,  # pred [N*R, P], mask [N*R]
    stats_ptr, partial_ptr,  # [N*R, 3 or 4], [2, programs]: weighted loss and weight of a program's patches
    rows, R, L, columns, stride_n, stride_c, stride_h, stride_w, nodata,
    p: tl.constexpr, q: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    HAS_IDS: tl.constexpr, INTERLEAVED: tl.constexpr, NORM_PIX: tl.constexpr, STANDARDISE: tl.constexpr,
    MISSING: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    in_rows, in_row = row < rows, (col < P)[None, :]
    # Load before the sums, so that both loads overlap.
    pred = tl.load(pred_ptr + row.to(tl.int64)[:, None] * P + col[None, :], mask=in_rows[:, None] & in_row, other=0)
    weight = tl.load(mask_ptr + row, mask=in_rows, other=0).to(ACC_DTYPE)
    target, known = _target(
        images_ptr, ids_ptr, mean_ptr, std_ptr, row, col, rows, R, L, columns, stride_n, stride_c, stride_h, stride_w,
        nodata, p, q, C, P, HAS_IDS, INTERLEAVED, STANDARDISE, MISSING, ACC_DTYPE,
    )  # fmt: skip
    stat = stats_ptr + (4 if MISSING else 3) * row.to(tl.int64)
    count, degrees = tl.full([BLOCK_R], P, ACC_DTYPE), tl.full([BLOCK_R], P - 1, ACC_DTYPE)  # 0 / 0 if P = 1
    if MISSING:
        count = tl.sum(known.to(ACC_DTYPE), axis=1)
        tl.store(stat + 3, count, mask=in_rows)
        weight = tl.where(count > 0, weight, 0)  # a patch without data has weight 0
        count, degrees = tl.maximum(count, 1), tl.maximum(count - 1, 1)
    centre, scale = tl.zeros([BLOCK_R], ACC_DTYPE), tl.full([BLOCK_R], 1, ACC_DTYPE)
    if NORM_PIX:
        centre = tl.sum(tl.where(known, target, 0), axis=1) / count
        centered = tl.where(known, target - centre[:, None], 0)
        scale = 1 / tl.sqrt(tl.sum(centered * centered, axis=1) / degrees + EPS)
    error = tl.where(known, pred.to(ACC_DTYPE) - (target - centre[:, None]) * scale[:, None], 0)
    loss = tl.sum(error * error, axis=1) / count
    tl.store(stat, centre, mask=in_rows)
    tl.store(stat + 1, scale, mask=in_rows)
    tl.store(stat + 2, loss, mask=in_rows)
    partial = partial_ptr + tl.program_id(0)
    tl.store(partial, tl.sum(tl.where(in_rows, loss * weight, 0), axis=0))
    tl.store(partial + tl.num_programs(0), tl.sum(weight, axis=0))


@triton.jit
def _weighted_mean_kernel(
    partial_ptr,  # [2, count]
    loss_ptr,  # []
    count,
    ACC_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    value, weight = tl.zeros([BLOCK], ACC_DTYPE), tl.zeros([BLOCK], ACC_DTYPE)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value += tl.load(partial_ptr + i, mask=i < count, other=0)
        weight += tl.load(partial_ptr + count + i, mask=i < count, other=0)
    tl.store(loss_ptr, tl.sum(value, axis=0) / tl.sum(weight, axis=0))  # 0 / 0 if nothing is removed


@triton.jit
def _masked_loss_bwd_kernel(
    dloss_ptr, images_ptr, pred_ptr, mask_ptr, ids_ptr, mean_ptr, std_ptr, loss_ptr, stats_ptr,
    total_ptr,  # []: sum of the mask, without patches that have no data
    dpred_ptr, dmask_ptr,  # [N*R, P], [N*R]
    rows, R, L, columns, stride_n, stride_c, stride_h, stride_w, nodata,
    p: tl.constexpr, q: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    HAS_IDS: tl.constexpr, INTERLEAVED: tl.constexpr, STANDARDISE: tl.constexpr, MISSING: tl.constexpr,
    ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * BLOCK_C
    row, col = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), first + tl.arange(0, BLOCK_C)
    in_rows, in_bounds = row < rows, (row < rows)[:, None] & (col < P)[None, :]
    offsets = row.to(tl.int64)[:, None] * P + col[None, :]
    pred = tl.load(pred_ptr + offsets, mask=in_bounds, other=0).to(ACC_DTYPE)
    target, known = _target(
        images_ptr, ids_ptr, mean_ptr, std_ptr, row, col, rows, R, L, columns, stride_n, stride_c, stride_h, stride_w,
        nodata, p, q, C, P, HAS_IDS, INTERLEAVED, STANDARDISE, MISSING, ACC_DTYPE,
    )  # fmt: skip
    stat = stats_ptr + (4 if MISSING else 3) * row.to(tl.int64)
    centre = tl.load(stat, mask=in_rows, other=0)
    scale = tl.load(stat + 1, mask=in_rows, other=0)
    weight = tl.load(mask_ptr + row, mask=in_rows, other=0).to(ACC_DTYPE)
    share = tl.load(dloss_ptr).to(ACC_DTYPE) / tl.load(total_ptr)
    count = tl.full([BLOCK_R], P, ACC_DTYPE)
    if MISSING:
        count = tl.load(stat + 3, mask=in_rows, other=1)
    dpred = (share * 2 / tl.maximum(count, 1) * weight)[:, None] * (pred - (target - centre[:, None]) * scale[:, None])
    tl.store(dpred_ptr + offsets, tl.where(known, dpred, 0), mask=in_bounds)
    dmask = share * (tl.load(stat + 2, mask=in_rows, other=0) - tl.load(loss_ptr))
    dmask = tl.where(count > 0, dmask, 0)
    tl.store(dmask_ptr + row, dmask, mask=in_rows & (first == 0))


def _sizes(
    images: Tensor,
    pred: Tensor,
    ids: Tensor | None,
    patch_h: int,
    patch_w: int,
    mean: Tensor | None,
    nodata: float | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernels' sizes and strides, and their compile-time constants."""
    raw = mean is not None
    (n, r, values), (channels, height, width) = pred.shape, image_size(images, raw)
    columns = width // patch_w
    strides = image_strides(images, raw)
    sizes = (n * r, r, height // patch_h * columns, columns, *strides, nodata)
    constants = {
        "p": patch_h,
        "q": patch_w,
        "C": channels,
        "P": values,
        "HAS_IDS": ids is not None,
        "INTERLEAVED": strides[1] == 1 and strides[3] == channels,
        "STANDARDISE": raw,
        "MISSING": may_have_missing(images, mean, nodata),
        "ACC_DTYPE": acc_dtype(images.dtype if mean is None else mean.dtype, pred.dtype),
    }
    return sizes, constants


def masked_loss_forward(
    images: Tensor,  # standardised [N, C, H, W] or raw [N, H, W, C]
    pred: Tensor,  # [N, R, P]
    mask: Tensor,  # [N, R]
    ids: Tensor | None,  # [N, R], which patches the rows predict; None: all L in order
    patch_h: int,
    patch_w: int,
    norm_pix: bool,
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
    nodata: float | None,
) -> tuple[Tensor, Tensor]:  # loss [], stats [N, R, 3 or 4], see the reference
    if pred.shape[2] > MAX_VALUES:
        return reference.masked_loss_reference(images, pred, mask, ids, patch_h, patch_w, norm_pix, mean, std, nodata)
    sizes, constants = _sizes(images, pred, ids, patch_h, patch_w, mean, nodata)
    dtype = torch.float64 if constants["ACC_DTYPE"] == tl.float64 else torch.float32
    columns = triton.next_power_of_2(pred.shape[2])
    constants |= {"BLOCK_R": max(1, 1024 // columns), "BLOCK_C": columns, "num_warps": min(16, max(4, columns // 512))}
    programs = triton.cdiv(sizes[0], constants["BLOCK_R"])
    loss, stats = (
        pred.new_empty((), dtype=dtype),
        pred.new_empty((*pred.shape[:2], 4 if constants["MISSING"] else 3), dtype=dtype),
    )
    partial = pred.new_empty((2, programs), dtype=dtype)
    with torch.cuda.device_of(pred):
        if programs:
            _masked_loss_fwd_kernel[(programs,)](
                images, pred.contiguous(), mask.contiguous(), None if ids is None else ids.contiguous(), mean, std,
                stats, partial, *sizes, NORM_PIX=norm_pix, **constants,
            )  # fmt: skip
        _weighted_mean_kernel[(1,)](partial, loss, programs, ACC_DTYPE=constants["ACC_DTYPE"], BLOCK=8192, num_warps=16)
    return loss, stats


def masked_loss_backward(
    grad: Tensor,  # []
    images: Tensor,
    pred: Tensor,
    mask: Tensor,
    ids: Tensor | None,
    loss: Tensor,  # []
    stats: Tensor,  # [N, R, 3 or 4]
    patch_h: int,
    patch_w: int,
    norm_pix: bool,
    mean: Tensor | None,
    std: Tensor | None,
    nodata: float | None,
    needs_images: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of pred [N, R, P], mask [N, R], images (empty unless needed)
    if needs_images:  # training does not need it
        return reference.masked_loss_backward_reference(
            grad, images, pred, mask, ids, loss, stats, patch_h, patch_w, norm_pix, mean, std, nodata, needs_images
        )
    sizes, constants = _sizes(images, pred, ids, patch_h, patch_w, mean, nodata)
    block = tile(pred.shape[2])
    counted = mask * (stats[..., 3] > 0) if constants["MISSING"] else mask
    grad_pred, grad_mask = pred.new_empty(pred.shape), mask.new_empty(mask.shape)
    if pred.numel():
        with torch.cuda.device_of(pred):
            _masked_loss_bwd_kernel[grid(sizes[0], pred.shape[2], block)](
                grad, images, pred.contiguous(), mask.contiguous(), None if ids is None else ids.contiguous(),
                mean, std, loss, stats.contiguous(), counted.sum(dtype=stats.dtype),
                grad_pred, grad_mask, *sizes, **constants, **block,
            )  # fmt: skip
    return grad_pred, grad_mask, images.new_empty(0)
