"""Specification of the two halves of ``embed_visible`` and of their gradients, in eager torch."""

import torch
from torch import Tensor

from ..patches import may_have_missing, standardise


def gather_patches_reference(
    images: Tensor,  # standardised [N, C, H, W] or raw [N, H, W, C]
    ids: Tensor,  # [N, K]
    patch_h: int,
    patch_w: int,
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
    nodata: float | None,
    dtype: torch.dtype,
) -> Tensor:  # [N, K, C*p*q]
    chw = standardise(images, mean, std, nodata)
    if may_have_missing(images, mean, nodata):
        chw = chw.masked_fill(chw.isnan(), 0)
    n, c, height, width = chw.shape
    h, w = height // patch_h, width // patch_w
    rows = chw.reshape(n, c, h, patch_h, w, patch_w).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, c * patch_h * patch_w)
    return rows.gather(1, ids[:, :, None].expand(-1, -1, rows.shape[2])).to(dtype)


def gather_patches_backward_reference(
    grad: Tensor,  # [N, K, C*p*q]
    ids: Tensor,  # [N, K]
    size: list[int],  # of the images, [N, C, H, W]
    patch_h: int,
    patch_w: int,
    dtype: torch.dtype,
) -> Tensor:  # [N, C, H, W]
    n, c, height, width = size
    h, w = height // patch_h, width // patch_w
    rows = grad.new_zeros(n, h * w, grad.shape[2])
    rows.scatter_add_(1, ids[:, :, None].expand_as(grad), grad)
    folded = rows.reshape(n, h, w, c, patch_h, patch_w).permute(0, 3, 1, 4, 2, 5)
    return folded.reshape(n, c, height, width).to(dtype, memory_format=torch.contiguous_format, copy=True)


def add_positions_reference(
    x: Tensor,  # [N, K, D]
    ids: Tensor,  # [N, K]
    pos: Tensor,  # [1, 1+L, D]
    cls: Tensor,  # [1, 1, D]
) -> Tensor:  # [N, 1+K, D]
    dtype = torch.promote_types(torch.promote_types(x.dtype, pos.dtype), cls.dtype)
    visible = x + pos[0, 1:][ids]
    first = (cls + pos[:, :1]).expand(x.shape[0], -1, -1)
    return torch.cat([first.to(dtype), visible.to(dtype)], dim=1)


def add_positions_backward_reference(
    grad: Tensor,  # [N, 1+K, D]
    ids: Tensor,  # [N, K]
    pos: Tensor,  # [1, 1+L, D]
    cls: Tensor,  # [1, 1, D]
    x_dtype: torch.dtype,
    needs_pos: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of x [N, K, D], pos (empty unless needed), cls
    acc_dtype = torch.promote_types(grad.dtype, torch.float32)
    grad_cls = grad[:, :1].sum(0, keepdim=True, dtype=acc_dtype)
    grad_pos = grad.new_zeros(pos.shape if needs_pos else (0,), dtype=acc_dtype)
    if needs_pos:
        grad_pos[:, :1] = grad_cls
        grad_pos[0].index_add_(0, ids.reshape(-1) + 1, grad[:, 1:].reshape(-1, grad.shape[2]).to(acc_dtype))
    grad_x = grad[:, 1:].to(x_dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_x, grad_pos.to(pos.dtype), grad_cls.to(cls.dtype, copy=True)
