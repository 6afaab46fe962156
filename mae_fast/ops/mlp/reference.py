"""Specification of the bf16 MLP of a transformer block and its gradients, in eager torch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mlp_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, save: bool
) -> tuple[Tensor, Tensor]:  # [M, D], [H, D], [H], [O, H], [O]
    h = F.linear(x, weight1)
    out = F.linear(F.gelu(h + bias1.to(h.dtype)), weight2, bias2.to(h.dtype))
    return out, h if save else h.new_empty(0)


def mlp_backward_reference(
    grad: Tensor, x: Tensor, h: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, ...]:  # [M, O], [M, D], [M, H]
    pre = h.float() + bias1.float()
    dh = torch.ops.aten.gelu_backward((grad @ weight2).float(), pre)
    grad, x = grad.float(), x.float()
    return (dh.to(h.dtype) @ weight1, dh.t() @ x, dh.sum(0), grad.t() @ F.gelu(pre), grad.sum(0))
