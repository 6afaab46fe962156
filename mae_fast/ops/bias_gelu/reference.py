"""Specification of ``bias_gelu`` and of its gradient, in eager torch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _pre_activation(x: Tensor, bias: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) + bias.to(dtype)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:  # [..., W], [W]
    return F.gelu(_pre_activation(x, bias)).to(x.dtype)


def bias_gelu_backward_reference(
    grad: Tensor, x: Tensor, bias: Tensor, with_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x`` and ``bias``; with ``with_value`` also the value itself, else an empty tensor."""
    h = _pre_activation(x, bias)
    cdf, pdf = torch.special.ndtr(h), (h.square() * -0.5).exp() / math.sqrt(2 * math.pi)
    dx = grad.to(h.dtype) * (cdf + h * pdf)
    dbias = dx.reshape(-1, bias.shape[0]).sum(0) if bias.shape[0] else torch.zeros_like(bias)
    value = bias_gelu_reference(x, bias) if with_value else x.new_empty(0)
    return dx.to(x.dtype, copy=True), dbias.to(bias.dtype, copy=True), value
