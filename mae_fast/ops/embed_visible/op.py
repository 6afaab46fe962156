"""Patch embedding of the visible patches only.

Equals: standardise, embed all patches, add positions, gather the visible ones, class token.

Shapes: N images, C channels, patches of p x q pixels, L patches, K of them visible, D encoder width.
A row is one patch in the order of the convolution weight, [c, p, q], so that the embedding is one matrix product.
"""

from typing import Any

import torch
from torch import Tensor

from ..autocast import autocast_dtype
from ..autograd import forbid_double_backward, needs_torch_ops
from ..linear import linear
from ..native import HAS_TRITON
from ..patches import check_images, check_tensor, image_size
from . import reference

torch.library.define(
    "mae_fast::gather_patches",
    "(Tensor images, Tensor ids, int patch_h, int patch_w, Tensor? mean, Tensor? std, float? nodata, "
    "ScalarType dtype) -> Tensor",
)
torch.library.define(
    "mae_fast::gather_patches_backward",
    "(Tensor grad, Tensor ids, SymInt[] size, int patch_h, int patch_w, ScalarType dtype) -> Tensor",
)
torch.library.define("mae_fast::add_positions", "(Tensor x, Tensor ids, Tensor pos, Tensor cls) -> Tensor")
torch.library.define(
    "mae_fast::add_positions_backward",
    "(Tensor grad, Tensor ids, Tensor pos, Tensor cls, ScalarType x_dtype, bool needs_pos) -> (Tensor, Tensor, Tensor)",
)

# Any device: eager reference. CPU: csrc/cpu/embed_visible.cpp registers itself. CUDA: Triton.
torch.library.impl("mae_fast::gather_patches", "default", reference.gather_patches_reference)
torch.library.impl("mae_fast::gather_patches_backward", "default", reference.gather_patches_backward_reference)
torch.library.impl("mae_fast::add_positions", "default", reference.add_positions_reference)
torch.library.impl("mae_fast::add_positions_backward", "default", reference.add_positions_backward_reference)
if HAS_TRITON:
    from . import triton_kernels

    torch.library.impl("mae_fast::gather_patches", "CUDA", triton_kernels.gather_patches_forward)
    torch.library.impl("mae_fast::gather_patches_backward", "CUDA", triton_kernels.gather_patches_backward)
    torch.library.impl("mae_fast::add_positions", "CUDA", triton_kernels.add_positions_forward)
    torch.library.impl("mae_fast::add_positions_backward", "CUDA", triton_kernels.add_positions_backward)


@torch.library.register_fake("mae_fast::gather_patches")
def _(images, ids, patch_h, patch_w, mean, std, nodata, dtype):  # type: ignore[no-untyped-def]
    channels, *_ = image_size(images, mean is not None)
    return images.new_empty((*ids.shape, channels * patch_h * patch_w), dtype=dtype)


@torch.library.register_fake("mae_fast::gather_patches_backward")
def _(grad, ids, size, patch_h, patch_w, dtype):  # type: ignore[no-untyped-def]
    return grad.new_empty(size, dtype=dtype)


@torch.library.register_fake("mae_fast::add_positions")
def _(x, ids, pos, cls):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(torch.promote_types(x.dtype, pos.dtype), cls.dtype)
    return x.new_empty((x.shape[0], x.shape[1] + 1, x.shape[2]), dtype=dtype)


@torch.library.register_fake("mae_fast::add_positions_backward")
def _(grad, ids, pos, cls, x_dtype, needs_pos):  # type: ignore[no-untyped-def]
    n, tokens, width = grad.shape
    grad_pos = pos.new_empty(pos.shape if needs_pos else (0,))
    return grad.new_empty((n, tokens - 1, width), dtype=x_dtype), grad_pos, cls.new_empty(cls.shape)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, patch_h, patch_w, *_ = inputs
    ctx.save_for_backward(ids)
    ctx.patch, ctx.size, ctx.dtype = (patch_h, patch_w), images.shape, images.dtype


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_images = None
    if ctx.needs_input_grad[0]:
        (ids,) = ctx.saved_tensors
        grad_images = torch.ops.mae_fast.gather_patches_backward(grad, ids, ctx.size, *ctx.patch, ctx.dtype)
    return grad_images, *(None,) * 7


def _save_positions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, pos, cls = inputs
    ctx.save_for_backward(ids, pos, cls)
    ctx.x_dtype = x.dtype


def _positions_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, pos, cls = ctx.saved_tensors
    needs_x, _, needs_pos, needs_cls = ctx.needs_input_grad
    grad_x, grad_pos, grad_cls = torch.ops.mae_fast.add_positions_backward(grad, ids, pos, cls, ctx.x_dtype, needs_pos)
    return grad_x if needs_x else None, None, grad_pos if needs_pos else None, grad_cls if needs_cls else None


torch.library.register_autograd("mae_fast::gather_patches", _gather_backward, setup_context=_save_gather)
torch.library.register_autograd("mae_fast::add_positions", _positions_backward, setup_context=_save_positions)
forbid_double_backward("gather_patches_backward")
forbid_double_backward("add_positions_backward")


def embed_visible(
    images: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    cls: Tensor,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    nodata: float | None = None,
) -> Tensor:
    """Same value as

        x = conv2d(images, weight, bias, stride=(p, q)).flatten(2).transpose(1, 2) + pos[:, 1:]   # [N, L, D]
        x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, D))                                   # [N, K, D]
        torch.cat([(cls + pos[:, :1]).expand(N, -1, -1), x], dim=1)                               # [N, 1+K, D]

    without embedding the patches that are not in ``ids_keep``.

    Args:
        images: standardised, floating [N, C, H, W]; or raw pixels [N, H, W, C] with ``mean`` and ``std``, of dtype
            uint8, uint16, int16, float16 or float32.
        ids_keep: [N, K] int64, the visible patches of each image, in the order of the output.
        weight: [D, C, p, q], the convolution's weight; ``bias``: [D] or None.
        pos: [1, 1+L, D], position table with the class token's row first; ``cls``: [1, 1, D].
        mean, std: [C], for raw pixels only; for uint8 as fractions of 255, else in the units of the pixels.
        nodata: raw value that marks missing pixels, in addition to NaN. The mean replaces missing pixels.

    Returns:
        [N, 1+K, D] in the wider of the dtypes of the matrix product (that of autocast if it is on) and of ``pos``.

    Raises:
        ValueError: on mismatched shapes.
        IndexError: from the CPU kernel on an index outside 0..L-1.
    """
    width, channels, p, q = weight.shape
    num_patches = check_images("embed_visible", images, (p, q), mean, std, nodata)
    check_tensor("embed_visible: ids_keep", ids_keep)
    if ids_keep.ndim != 2 or ids_keep.shape[0] != images.shape[0] or ids_keep.dtype != torch.int64:
        raise ValueError(
            f"embed_visible: ids_keep must be int64 [N, K] with N = {images.shape[0]}, "
            f"got {ids_keep.dtype} {list(ids_keep.shape)}"
        )
    got_channels, *_ = image_size(images, mean is not None)
    if got_channels != channels:
        raise ValueError(
            f"embed_visible: weight {list(weight.shape)} needs {channels} channels, images have {got_channels}"
        )
    if pos.shape != (1, 1 + num_patches, width) or cls.shape != (1, 1, width):
        raise ValueError(
            f"embed_visible: pos must be [1, {1 + num_patches}, {width}] and cls [1, 1, {width}] for images "
            f"{list(images.shape)}, got {list(pos.shape)} and {list(cls.shape)}"
        )
    dtype = autocast_dtype(images.device.type) or weight.dtype
    by_torch = needs_torch_ops()
    gather = reference.gather_patches_reference if by_torch else torch.ops.mae_fast.gather_patches
    add = reference.add_positions_reference if by_torch else torch.ops.mae_fast.add_positions
    rows = gather(images, ids_keep, p, q, mean, std, nodata, dtype)  # [N, K, C*p*q]
    x = linear(rows, weight, bias)  # [N, K, D]
    tokens: Tensor = add(x, ids_keep, pos, cls)
    return tokens
