"""Specification of ``add_layer_norm`` and of its gradient, in eager torch."""

import torch
from torch import Tensor


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # mean and 1 / deviation, [..., 1]
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return mean, (var + eps).rsqrt()


def add_layer_norm_reference(
    x: Tensor,  # [..., D], and of the sum's dtype
    residual: Tensor | None,  # [..., D]
    shift: Tensor | None,  # [D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (empty without ``residual``), the normalised sum, and [2, rows]: mean and 1 / deviation."""
    total, wide_dtype = x, torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        added = residual.to(wide_dtype)
        total = (x + (added if shift is None else added + shift.to(wide_dtype))).to(x.dtype)
    wide = total.to(wide_dtype)
    mean, rstd = _statistics(wide, eps)
    out = (wide - mean) * rstd * weight.to(wide.dtype) + bias.to(wide.dtype)
    stats = torch.stack([mean.flatten(), rstd.flatten()])
    return x.new_empty(0) if residual is None else total, out.to(dtype, copy=True), stats


def add_layer_norm_backward_reference(
    grad_sum: Tensor | None,  # [..., D]
    grad: Tensor,  # [..., D]
    total: Tensor,  # [..., D]
    stats: Tensor,  # [2, rows]
    weight: Tensor,  # [D]
    shift: Tensor | None,  # [D]
    low: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, of a residual of dtype ``low`` (empty if that is the sum's own), of weight, bias and shift
    (empty where there is none)."""
    wide, rows, width = stats.dtype, stats.shape[1], weight.shape[0]
    mean, rstd = (s.reshape(*total.shape[:-1], 1) for s in stats)
    dy, normed = grad.to(wide), (total.to(wide) - mean) * rstd
    g = dy * weight.to(wide)
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    if grad_sum is not None:
        dx = dx + grad_sum.to(wide)
    dweight, dbias, dshift = (d.reshape(rows, width).sum(0) for d in (dy * normed, dy, dx))
    dshift = weight.new_empty(0) if shift is None else dshift.to(shift.dtype)
    dlow = dx.to(low) if low != total.dtype else dx.new_empty(0, dtype=low)
    return dx.to(total.dtype), dlow, dweight.to(weight.dtype), dbias.to(weight.dtype), dshift
