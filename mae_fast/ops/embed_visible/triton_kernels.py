"""The two halves of ``embed_visible`` around its matrix product, and their gradients, in Triton.

Shapes: N images, C channels, patches of p x q pixels, P = C*p*q values per patch (channel slowest), L patches, K
visible, D encoder width. The kernels raise no error on an index outside 0..L-1: it gives NaN, and reads nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..patches import image_size, may_have_missing
from ..triton_common import acc_dtype, element, grid, image_strides, is_missing, standardised, tile


@triton.jit
def _gather_patches_fwd_kernel(
    images_ptr, ids_ptr, mean_ptr, std_ptr,
    out_ptr,  # [N*K, P]
    rows, K, L, columns, stride_n, stride_c, stride_h, stride_w,  # columns: patches in a row of the image's grid
    nodata,  # None: only NaN is missing
    p: tl.constexpr, q: tl.constexpr, P: tl.constexpr,
    STANDARDISE: tl.constexpr, MISSING: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [c, p, q]
    in_bounds = (row < rows)[:, None] & (col < P)[None, :]
    patch = tl.load(ids_ptr + row, mask=row < rows, other=-1)
    valid = ((patch >= 0) & (patch < L))[:, None] & in_bounds
    patch = patch.to(tl.int32)
    corner = (row // K).to(tl.int64) * stride_n + patch // columns * p * stride_h + patch % columns * q * stride_w
    channel = col // (p * q)
    pixel = channel * stride_c + col // q % p * stride_h + col % q * stride_w
    x = tl.load(images_ptr + corner[:, None] + pixel[None, :], mask=valid, other=0)
    channel = tl.where(col < P, channel, 0)[None, :]
    value = standardised(x, mean_ptr, std_ptr, channel, STANDARDISE, ACC_DTYPE)
    if MISSING:
        value = tl.where(is_missing(x, nodata), 0, value)  # the mean, standardised
    value = tl.where(valid, value, float("nan"))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * P + col[None, :], value, mask=in_bounds)


@triton.jit
def _gather_patches_bwd_kernel(
    dout_ptr, ids_ptr,  # [N*K, P], [N*K]
    dimages_ptr,  # [N, C, H, W], contiguous
    rows, K, L, columns, stride_n, stride_c, stride_h,
    p: tl.constexpr, q: tl.constexpr, P: tl.constexpr,
    ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program sums all rows of an image patch, so repeated ids need no atomics.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # n * L + l
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_bounds = (row < rows)[:, None] & (col < P)[None, :]
    n, patch = row // L, row % L
    dx = tl.zeros([BLOCK_R, BLOCK_C], ACC_DTYPE)
    for k in range(K):
        named = tl.load(ids_ptr + n.to(tl.int64) * K + k, mask=row < rows, other=-1) == patch
        source = (n.to(tl.int64) * K + k)[:, None] * P + col[None, :]
        dx += tl.load(dout_ptr + source, mask=named[:, None] & in_bounds, other=0).to(ACC_DTYPE)
    corner = n.to(tl.int64) * stride_n + patch // columns * p * stride_h + patch % columns * q
    pixel = col // (p * q) * stride_c + col // q % p * stride_h + col % q
    tl.store(dimages_ptr + corner[:, None] + pixel[None, :], dx, mask=in_bounds)


@triton.jit
def _add_positions_fwd_kernel(
    x_ptr, ids_ptr, pos_ptr, cls_ptr,  # [N*K, D], [N*K], [1+L, D], [D]
    out_ptr,  # [N*(1+K), D]
    rows, K, L,
    D: tl.constexpr, FIRST: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_bounds = (row < rows)[:, None] & (col < D)[None, :]
    n, k = row // (1 + K), row % (1 + K) - 1  # k < 0: the class token
    source = (row - n - 1).to(tl.int64)  # n * K + k
    visible = (k >= 0) & (row < rows)
    patch = tl.load(ids_ptr + source, mask=visible, other=-1)
    valid = (k < 0) | ((patch >= 0) & (patch < L))
    x = tl.load(x_ptr + source[:, None] * D + col[None, :], mask=visible[:, None] & in_bounds, other=0).to(ACC_DTYPE)
    cls = tl.load(cls_ptr + col, mask=col < D, other=0).to(ACC_DTYPE)
    pos = tl.load(pos_ptr + (1 + patch)[:, None] * D + col[None, :], mask=valid[:, None] & in_bounds, other=0).to(
        ACC_DTYPE
    )
    first = (cls[None, :] + pos).to(FIRST).to(ACC_DTYPE)  # rounded to its own dtype, as in eager torch
    out = tl.where(visible[:, None], x + pos, first)
    out = tl.where(valid[:, None], out, float("nan"))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * D + col[None, :], out, mask=in_bounds)


@triton.jit
def _add_positions_bwd_kernel(
    dout_ptr,  # [N*(1+K), D]
    dx_ptr,  # [N*K, D]
    rows, K,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_bounds = (row < rows)[:, None] & (col < D)[None, :]
    source = (row + row // K + 1).to(tl.int64)  # skip the class tokens of this image and the previous ones
    dx = tl.load(dout_ptr + source[:, None] * D + col[None, :], mask=in_bounds)
    tl.store(dx_ptr + row.to(tl.int64)[:, None] * D + col[None, :], dx, mask=in_bounds)


def gather_patches_forward(
    images: Tensor,  # standardised [N, C, H, W] or raw [N, H, W, C]
    ids: Tensor,  # [N, K]
    patch_h: int,
    patch_w: int,
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
    nodata: float | None,
    dtype: torch.dtype,
) -> Tensor:  # [N, K, P]
    channels, height, width = image_size(images, mean is not None)
    (n, k), values, columns = ids.shape, channels * patch_h * patch_w, width // patch_w
    out = images.new_empty((n, k, values), dtype=dtype)
    if out.numel():
        block = tile(values)
        with torch.cuda.device_of(images):
            _gather_patches_fwd_kernel[grid(n * k, values, block)](
                images, ids.contiguous(), mean, std, out,
                n * k, k, height // patch_h * columns, columns, *image_strides(images, mean is not None), nodata,
                p=patch_h, q=patch_w, P=values,
                STANDARDISE=mean is not None, MISSING=may_have_missing(images, mean, nodata),
                ACC_DTYPE=acc_dtype(images.dtype if mean is None else mean.dtype), **block,
            )  # fmt: skip
    return out


def gather_patches_backward(
    grad: Tensor,  # [N, K, P]
    ids: Tensor,  # [N, K]
    size: list[int],  # of the images, [N, C, H, W]
    patch_h: int,
    patch_w: int,
    dtype: torch.dtype,
) -> Tensor:  # [N, C, H, W]
    n, channels, height, width = size
    values, columns = channels * patch_h * patch_w, width // patch_w
    patches = height // patch_h * columns
    grad_images = grad.new_empty(size, dtype=dtype)
    if grad_images.numel():
        block = tile(values)
        with torch.cuda.device_of(grad):
            _gather_patches_bwd_kernel[grid(n * patches, values, block)](
                grad.contiguous(), ids.contiguous(), grad_images,
                n * patches, ids.shape[1], patches, columns, channels * height * width, height * width, width,
                p=patch_h, q=patch_w, P=values, ACC_DTYPE=acc_dtype(grad.dtype, dtype), **block,
            )  # fmt: skip
    return grad_images


def add_positions_forward(
    x: Tensor,  # [N, K, D]
    ids: Tensor,  # [N, K]
    pos: Tensor,  # [1, 1+L, D]
    cls: Tensor,  # [1, 1, D]
) -> Tensor:  # [N, 1+K, D]
    n, k, width = x.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, pos.dtype), cls.dtype)
    out = x.new_empty((n, 1 + k, width), dtype=dtype)
    if out.numel():
        block = tile(width)
        with torch.cuda.device_of(x):
            _add_positions_fwd_kernel[grid(n * (1 + k), width, block)](
                x.contiguous(), ids.contiguous(), pos.contiguous(), cls.contiguous(), out,
                n * (1 + k), k, pos.shape[1] - 1, D=width,
                FIRST=element(torch.promote_types(pos.dtype, cls.dtype)), ACC_DTYPE=acc_dtype(dtype), **block,
            )  # fmt: skip
    return out


def add_positions_backward(
    grad: Tensor,  # [N, 1+K, D]
    ids: Tensor,  # [N, K]
    pos: Tensor,  # [1, 1+L, D]
    cls: Tensor,  # [1, 1, D]
    x_dtype: torch.dtype,
    needs_pos: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of x [N, K, D], pos (empty unless needed), cls
    n, tokens, width = grad.shape
    k, grad = tokens - 1, grad.contiguous()
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    grad_x = grad.new_empty((n, k, width), dtype=x_dtype)
    if grad_x.numel():
        block = tile(width)
        with torch.cuda.device_of(grad):
            _add_positions_bwd_kernel[grid(n * k, width, block)](grad, grad_x, n * k, k, D=width, **block)
    grad_cls = grad[:, :1].sum(0, keepdim=True, dtype=accumulate)
    grad_pos = grad.new_zeros(pos.shape if needs_pos else (0,), dtype=accumulate)
    if needs_pos:  # only for a trained table; by torch, whose index_add_ has a deterministic mode
        grad_pos[:, :1] = grad_cls
        grad_pos[0].index_add_(0, ids.reshape(-1) + 1, grad[:, 1:].reshape(-1, width).to(accumulate))
    return grad_x, grad_pos.to(pos.dtype), grad_cls.to(cls.dtype)
