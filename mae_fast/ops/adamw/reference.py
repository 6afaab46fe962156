"""Specification of the ops, in eager torch."""

import math

import torch
from torch import Tensor


def adamw_step_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> Tensor:
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, size, value=-lr / (1 - beta1**step))
    if copy is not None:
        copy.copy_(param)
    return grad.to(torch.float64).square().sum()


def gradient_norm_reference(grads: list[Tensor], max_norm: float | None) -> tuple[Tensor, Tensor, Tensor]:
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    scale = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp(min=1)
    return norm, (~norm.isfinite()).to(norm.dtype), scale


def adamw_steps_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    steps: list[Tensor],
    lr: list[float],
    beta1: list[float],
    beta2: list[float],
    eps: list[float],
    weight_decay: list[float],
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    is_finite = found_inf is None or not found_inf
    options = zip(lr, beta1, beta2, eps, weight_decay, strict=True)
    for i, (param, grad, step, of_one) in enumerate(zip(params, grads, steps, options, strict=True)):
        copy = copies[i] if copies else None
        if is_finite:
            step += 1
            scaled = grad if grad_scale is None else grad / grad_scale
            adamw_step_reference(param, scaled, exp_avgs[i], exp_avg_sqs[i], copy, *of_one, int(step))
        elif copy is not None:
            copy.copy_(param)
