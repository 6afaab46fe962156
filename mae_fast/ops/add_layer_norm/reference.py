"""Specification of ``add_layer_norm`` and of its gradient, in eager torch."""

import torch
from torch import Tensor


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # mean and 1 / std, [..., 1]
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return mean, (var + eps).rsqrt()


def add_layer_norm_reference(
    x: Tensor,  # [..., D] or [..., T, D], and of the sum's dtype
    residual: Tensor | None,  # [..., D] or [..., R, D], for the last R tokens of x
    residual_bias: Tensor | None,  # [D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (empty without ``residual``), the normalised sum, and stats [2, rows]: mean and 1 / std."""
    total, acc_dtype = x, torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        added = residual.to(acc_dtype)
        skipped = x.shape[-2] - residual.shape[-2] if x.ndim > 1 else 0
        x = x[..., skipped:, :] if skipped else x
        total = (x + (added if residual_bias is None else added + residual_bias.to(acc_dtype))).to(x.dtype)
    mean, rstd = _statistics(total.to(acc_dtype), eps)
    out = (total.to(acc_dtype) - mean) * rstd * weight.to(acc_dtype) + bias.to(acc_dtype)
    stats = torch.stack([mean.flatten(), rstd.flatten()])
    return x.new_empty(0) if residual is None else total, out.to(dtype, copy=True), stats


def add_layer_norm_backward_reference(
    grad_sum: Tensor | None,  # [..., D]
    grad: Tensor,  # [..., D]
    total: Tensor,  # [..., D]
    stats: Tensor,  # [2, rows]
    weight: Tensor,  # [D]
    residual_bias: Tensor | None,  # [D]
    residual_dtype: torch.dtype,
    skipped: int = 0,  # tokens of x before the first one of the sum
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual (empty if it has the sum's dtype), weight, bias, residual bias (empty if not given)."""
    acc_dtype, rows, width = stats.dtype, stats.shape[1], weight.shape[0]
    mean, rstd = (s.reshape(*total.shape[:-1], 1) for s in stats)
    dy, normed = grad.to(acc_dtype), (total.to(acc_dtype) - mean) * rstd
    g = dy * weight.to(acc_dtype)
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    if grad_sum is not None:
        dx = dx + grad_sum.to(acc_dtype)
    dweight, dbias, dresidual_bias = (d.reshape(rows, width).sum(0) for d in (dy * normed, dy, dx))
    dresidual_bias = weight.new_empty(0) if residual_bias is None else dresidual_bias.to(residual_bias.dtype)
    dresidual = dx.to(residual_dtype) if residual_dtype != total.dtype else dx.new_empty(0, dtype=residual_dtype)
    dx = torch.nn.functional.pad(dx, (0, 0, skipped, 0)) if skipped else dx
    return dx.to(total.dtype), dresidual, dweight.to(weight.dtype), dbias.to(weight.dtype), dresidual_bias
