"""Specification of ``masked_loss`` and of its gradient, in eager torch."""

import torch
from torch import Tensor

from ..patches import patchify, standardise, unpatchify

EPS = 1e-6  # added to the variance, as published


def _targets(
    images: Tensor, ids: Tensor | None, patch_h: int, patch_w: int, mean: Tensor | None, std: Tensor | None
) -> Tensor:  # [N, R, P]
    target = patchify(standardise(images, mean, std), (patch_h, patch_w))
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    return target if ids is None else target.gather(1, ids[:, :, None].expand(-1, -1, target.shape[2]))


def masked_loss_reference(
    images: Tensor,  # [N, C, H, W] floating or [N, H, W, C] uint8
    pred: Tensor,  # [N, R, P]
    mask: Tensor,  # [N, R]
    ids: Tensor | None,  # [N, R], which patches the rows predict; None: all L in order
    patch_h: int,
    patch_w: int,
    norm_pix: bool,
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
) -> tuple[Tensor, Tensor]:  # loss [], stats [N, R, 3]: mean and 1/std of each target, loss of each patch
    target = _targets(images, ids, patch_h, patch_w, mean, std)
    centre, scale = torch.zeros_like(target[..., :1]), torch.ones_like(target[..., :1])
    if norm_pix:
        centre = target.mean(-1, keepdim=True)
        scale = (target.var(-1, keepdim=True) + EPS).rsqrt()
    per_patch = (pred - (target - centre) * scale).square().mean(-1, keepdim=True)
    weights = mask.to(per_patch.dtype)
    loss = (per_patch[..., 0] * weights).sum() / weights.sum()
    return loss, torch.cat([centre.to(per_patch.dtype), scale.to(per_patch.dtype), per_patch], dim=-1)


def masked_loss_backward_reference(
    grad: Tensor,  # []
    images: Tensor,
    pred: Tensor,
    mask: Tensor,
    ids: Tensor | None,
    loss: Tensor,  # []
    stats: Tensor,  # [N, R, 3]
    patch_h: int,
    patch_w: int,
    norm_pix: bool,
    mean: Tensor | None,
    std: Tensor | None,
    needs_images: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # of pred [N, R, P], mask [N, R], images (empty unless needed)
    target = _targets(images, ids, patch_h, patch_w, mean, std)
    centre, scale, per_patch = torch.split(stats, 1, dim=-1)
    standard = (target - centre) * scale
    weights = mask.to(stats.dtype)
    share = grad / weights.sum()
    grad_mask = share * (per_patch[..., 0] - loss)
    grad_pred = (share * 2 / pred.shape[2] * weights)[..., None] * (pred - standard)
    grad_images = images.new_empty(0)
    if needs_images:
        grad_target = -grad_pred
        if norm_pix:  # through the mean and the unbiased variance
            along = (grad_target * standard).sum(-1, keepdim=True) / (pred.shape[2] - 1)
            grad_target = scale * (grad_target - grad_target.mean(-1, keepdim=True) - standard * along)
        height, width = images.shape[2:]
        grid = (height // patch_h, width // patch_w)
        if ids is not None:
            rows = grad_target.new_zeros(pred.shape[0], grid[0] * grid[1], pred.shape[2])
            grad_target = rows.scatter_add(1, ids[:, :, None].expand_as(grad_target), grad_target)
        grad_images = unpatchify(grad_target, (patch_h, patch_w), grid).to(images.dtype).contiguous()
    return grad_pred.to(pred.dtype), grad_mask.to(mask.dtype), grad_images
