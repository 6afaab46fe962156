"""Specification of the gradients of a linear layer's weight and bias, in eager torch."""

import torch
from torch import Tensor


def linear_gradients_reference(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # [M, O], [M, K]
    grad = grad.to(torch.float32)
    return grad.t() @ x.to(torch.float32), grad.sum(0)


def add_linear_gradients_reference(grad: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    for total, part in zip((dweight, dbias), linear_gradients_reference(grad, x), strict=True):
        total += part
