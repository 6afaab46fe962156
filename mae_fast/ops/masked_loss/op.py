"""Mean squared error over the removed patches, straight from the image.

Equals: patchify, standardise patches, square, masked mean.

Shapes: N images, C channels, patches of p x q pixels, P = p * q * C values per patch (channel fastest), L patches,
R predicted patches per image (all L, or those in ``ids``).
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import forbid_double_backward, needs_torch_ops
from ..native import HAS_TRITON
from ..patches import check_images, image_size, may_have_missing, patch_sides
from . import reference

torch.library.define(
    "mae_fast::masked_loss",
    "(Tensor images, Tensor pred, Tensor mask, Tensor? ids, int patch_h, int patch_w, bool norm_pix, "
    "Tensor? mean, Tensor? std, float? nodata) -> (Tensor loss, Tensor stats)",
)
torch.library.define(
    "mae_fast::masked_loss_backward",
    "(Tensor grad, Tensor images, Tensor pred, Tensor mask, Tensor? ids, Tensor loss, Tensor stats, int patch_h, "
    "int patch_w, bool norm_pix, Tensor? mean, Tensor? std, float? nodata, bool needs_images) -> "
    "(Tensor, Tensor, Tensor)",
)

# Any device: eager reference. CPU: csrc/cpu/masked_loss.cpp registers itself. CUDA: Triton.
torch.library.impl("mae_fast::masked_loss", "default", reference.masked_loss_reference)
torch.library.impl("mae_fast::masked_loss_backward", "default", reference.masked_loss_backward_reference)
if HAS_TRITON:
    from . import triton_kernels

    torch.library.impl("mae_fast::masked_loss", "CUDA", triton_kernels.masked_loss_forward)
    torch.library.impl("mae_fast::masked_loss_backward", "CUDA", triton_kernels.masked_loss_backward)


def _wide(images: Tensor, pred: Tensor, mean: Tensor | None) -> torch.dtype:
    """fp64 if any floating input is fp64, else fp32."""
    values = images if mean is None else mean
    return torch.promote_types(torch.promote_types(values.dtype, pred.dtype), torch.float32)


@torch.library.register_fake("mae_fast::masked_loss")
def _(images, pred, mask, ids, patch_h, patch_w, norm_pix, mean, std, nodata):  # type: ignore[no-untyped-def]
    dtype, width = _wide(images, pred, mean), 4 if may_have_missing(images, mean, nodata) else 3
    return pred.new_empty((), dtype=dtype), pred.new_empty((*pred.shape[:2], width), dtype=dtype)


@torch.library.register_fake("mae_fast::masked_loss_backward")
def _(grad, images, pred, mask, ids, loss, stats, patch_h, patch_w, norm_pix, mean, std, nodata, needs_images):  # type: ignore[no-untyped-def]
    grad_images = images.new_empty(images.shape if needs_images else (0,))
    return pred.new_empty(pred.shape), mask.new_empty(mask.shape), grad_images


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    images, pred, mask, ids, patch_h, patch_w, norm_pix, mean, std, nodata = inputs
    _, stats = output  # not the loss: callers divide it in place
    ctx.save_for_backward(images, pred, mask, ids, stats, mean, std)
    ctx.patch, ctx.norm_pix, ctx.nodata = (patch_h, patch_w), norm_pix, nodata
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)  # zeros for ``stats``


def _backward(ctx: Any, grad: Tensor | None, _grad_stats: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    images, pred, mask, ids, stats, mean, std = ctx.saved_tensors
    needs_images, needs_pred, needs_mask, *_ = ctx.needs_input_grad
    loss = grad  # a placeholder: only the gradient of the mask uses the loss
    if needs_mask:
        counted = mask * (stats[..., 3] > 0) if stats.shape[2] == 4 else mask
        loss = (stats[..., 2] * counted).sum() / counted.sum(dtype=stats.dtype)
    grad_pred, grad_mask, grad_images = torch.ops.mae_fast.masked_loss_backward(
        grad, images, pred, mask, ids, loss, stats, *ctx.patch, ctx.norm_pix, mean, std, ctx.nodata, needs_images
    )
    return (
        grad_images if needs_images else None,
        grad_pred if needs_pred else None,
        grad_mask if needs_mask else None,
        *(None,) * 7,
    )


torch.library.register_autograd("mae_fast::masked_loss", _backward, setup_context=_save)
forbid_double_backward("masked_loss_backward")


def masked_loss(
    images: Tensor,
    pred: Tensor,
    mask: Tensor,
    *,
    patch: int | tuple[int, int],
    norm_pix: bool = False,
    ids: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    nodata: float | None = None,
) -> Tensor:
    """Same value as

        target = patchify(images, patch)                     # [N, L, P]; with ids: their rows, [N, R, P]
        if norm_pix:                                         # unbiased variance over a patch
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(-1)               # [N, R]
        (loss * mask).sum() / mask.sum()

    without storing ``target``, in fp32 (fp64 if an input is fp64). If no patch is removed, this is 0 / 0 = NaN.

    Missing pixels of raw images are ignored: means, variances and errors are those of the other values of a patch. A
    patch without other values is left out of both sums.

    Args:
        images: standardised, floating [N, C, H, W]; or raw pixels [N, H, W, C] with ``mean`` and ``std``, of dtype
            uint8, uint16, int16, float16 or float32.
        pred: [N, R, P], channel fastest.
        mask: [N, R], 1 where a patch was removed and 0 where it was kept; other weights are allowed.
        patch: side of a patch in pixels, or (height, width).
        ids: [N, R] int64, the patch of each row of ``pred``; None: all L in row-major order.
        mean, std: [C], for raw pixels only; for uint8 as fractions of 255, else in the units of the pixels.
        nodata: raw value that marks missing pixels, in addition to NaN.

    Returns:
        The loss, a scalar of fp32 or fp64.

    Raises:
        ValueError: on mismatched shapes.
        IndexError: from the CPU kernel on an index outside 0..L-1.
    """
    p, q = patch_sides(patch)
    num_patches = check_images("masked_loss", images, (p, q), mean, std, nodata)
    n, rows, values = images.shape[0], num_patches, p * q * image_size(images, mean is not None)[0]
    if ids is not None:
        if ids.ndim != 2 or ids.shape[0] != n or ids.dtype != torch.int64:
            raise ValueError(f"masked_loss: ids must be int64 [{n}, R], got {ids.dtype} {list(ids.shape)}")
        rows = ids.shape[1]
    if pred.shape != (n, rows, values) or mask.shape != (n, rows):
        raise ValueError(
            f"masked_loss: pred must be [N, R, P] = [{n}, {rows}, {values}] and mask [{n}, {rows}], "
            f"got {list(pred.shape)} and {list(mask.shape)}"
        )
    op = reference.masked_loss_reference if needs_torch_ops() else torch.ops.mae_fast.masked_loss
    loss: Tensor
    loss, _ = op(images, pred, mask, ids, p, q, norm_pix, mean, std, nodata)
    return loss
