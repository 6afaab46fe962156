"""Specification of ``masked_loss`` and of its gradient, in eager torch."""

import torch
from torch import Tensor

from ..patches import may_have_missing, patchify, standardise, unpatchify

EPS = 1e-6  # added to the variance, as in the official implementation


def _targets(
    images: Tensor,
    ids: Tensor | None,
    patch_h: int,
    patch_w: int,
    mean: Tensor | None,
    std: Tensor | None,
    nodata: float | None,
) -> Tensor:  # [N, R, P]; missing values are NaN
    target = patchify(standardise(images, mean, std, nodata), (patch_h, patch_w))
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    return target if ids is None else target.gather(1, ids[:, :, None].expand(-1, -1, target.shape[2]))


def masked_loss_reference(
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
) -> tuple[Tensor, Tensor]:  # loss [], stats [N, R, 3]: mean and 1/std of each target, loss of each patch
    # If values may be missing, stats are [N, R, 4]: the fourth is the number of known values of each target.
    target = _targets(images, ids, patch_h, patch_w, mean, std, nodata)
    if may_have_missing(images, mean, nodata):
        return _loss_of_known(pred, mask, target, norm_pix)
    return loss_of_targets(target, pred, mask, norm_pix)


def loss_of_targets(target: Tensor, pred: Tensor, mask: Tensor, norm_pix: bool) -> tuple[Tensor, Tensor]:
    """The loss [] of predictions [N, R, P] for given targets [N, R, P], and stats [N, R, 3]."""
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    centre, scale = torch.zeros_like(target[..., :1]), torch.ones_like(target[..., :1])
    if norm_pix:
        centre = target.mean(-1, keepdim=True)
        scale = (target.var(-1, keepdim=True) + EPS).rsqrt()
    per_patch = (pred - (target - centre) * scale).square().mean(-1, keepdim=True)
    weights = mask.to(per_patch.dtype)
    loss = (per_patch[..., 0] * weights).sum() / weights.sum()
    return loss, torch.cat([centre.to(per_patch.dtype), scale.to(per_patch.dtype), per_patch], dim=-1)


def _loss_of_known(pred: Tensor, mask: Tensor, target: Tensor, norm_pix: bool) -> tuple[Tensor, Tensor]:
    """The loss over the known values of the target, those that are not NaN. A patch without any has weight 0."""
    known = ~target.isnan()
    values, count = target.masked_fill(~known, 0), known.sum(-1, keepdim=True).to(target.dtype)
    centre, scale = torch.zeros_like(count), torch.ones_like(count)
    if norm_pix:
        centre = values.sum(-1, keepdim=True) / count.clamp(min=1)
        squares = ((values - centre) * known).square().sum(-1, keepdim=True)
        scale = (squares / (count - 1).clamp(min=1) + EPS).rsqrt()
    error = (pred - (values - centre) * scale).masked_fill(~known, 0)
    per_patch = error.square().sum(-1, keepdim=True) / count.clamp(min=1)
    weights = mask.to(per_patch.dtype) * (count[..., 0] > 0)
    loss = (per_patch[..., 0] * weights).sum() / weights.sum()
    return loss, torch.cat([x.to(per_patch.dtype) for x in (centre, scale, per_patch, count)], dim=-1)


def masked_loss_backward_reference(
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
    target = _targets(images, ids, patch_h, patch_w, mean, std, nodata)
    centre, scale, per_patch, *rest = torch.split(stats, 1, dim=-1)
    standard = (target - centre) * scale
    weights, count = mask.to(stats.dtype), torch.full_like(mask, pred.shape[2], dtype=stats.dtype)
    if rest:
        count = rest[0][..., 0]
        weights = weights * (count > 0)
    share = grad / weights.sum()
    grad_mask = share * (per_patch[..., 0] - loss) * (count > 0)
    grad_pred = (share * 2 / count.clamp(min=1) * weights)[..., None] * (pred - standard)
    if rest:
        grad_pred = grad_pred.masked_fill(target.isnan(), 0)
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
