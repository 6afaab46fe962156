"""Specification of a bf16 linear layer and its gradients, in eager torch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_product_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [M, K], [O, K], [O]
    return F.linear(x, weight, bias)


def linear_input_gradient_reference(grad: Tensor, weight: Tensor) -> Tensor:  # [M, O], [O, K]
    return grad @ weight


def linear_gradients_reference(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # [M, O], [M, K]
    grad = grad.to(torch.float32)
    return grad.t() @ x.to(torch.float32), grad.sum(0)
