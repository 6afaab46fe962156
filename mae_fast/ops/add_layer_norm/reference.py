"""Specification of ``add_layer_norm`` and of its gradient, in eager torch."""

import torch
from torch import Tensor


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # mean and 1 / deviation, [..., 1]
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return mean, (var + eps).rsqrt()


def add_layer_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (empty without ``residual``), the normalised sum, and [2, rows]: mean and 1 / deviation."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    mean, rstd = _statistics(wide, eps)
    out = (wide - mean) * rstd * weight.to(wide.dtype) + bias.to(wide.dtype)
    stats = torch.stack([mean.flatten(), rstd.flatten()])
    return x.new_empty(0) if residual is None else total, out.to(dtype, copy=True), stats


def add_layer_norm_backward_reference(
    grad_sum: Tensor | None, grad: Tensor, total: Tensor, stats: Tensor, weight: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, of a residual of dtype ``low`` (empty if that is the sum's own), of weight and bias."""
    wide, width = stats.dtype, weight.shape[0]
    mean, rstd = (s.reshape(*total.shape[:-1], 1) for s in stats)
    dy, normed = grad.to(wide), (total.to(wide) - mean) * rstd
    g = dy * weight.to(wide)
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    if grad_sum is not None:
        dx = dx + grad_sum.to(wide)
    dweight, dbias = ((d.reshape(-1, width).sum(0) if width else d.new_zeros(0)) for d in (dy * normed, dy))
    dlow = dx.to(low) if low != total.dtype else dx.new_empty(0, dtype=low)
    return dx.to(total.dtype), dlow, dweight.to(weight.dtype), dbias.to(weight.dtype)
