"""A linear layer under bf16 autocast, with the gradients of its weight and bias in fp32.

Equals: autocast's cast, product, gradients in fp32.

Shapes: M rows (all leading dimensions), K inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autocast import autocast_dtype
from ..autograd import differentiable_once, needs_torch_ops
from ..bf16_weight_cache import working_copy
from ..native import has_amx, has_matrix_unit, has_native
from ..patches import check_tensor
from . import reference

torch.library.define("mae_fast::linear_product", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.define("mae_fast::linear_input_gradient", "(Tensor grad, Tensor weight) -> Tensor")
torch.library.define("mae_fast::linear_gradients", "(Tensor grad, Tensor x) -> (Tensor, Tensor)")

# Any device: eager reference. CPU: csrc/cpu/linear.cpp registers itself.
torch.library.impl("mae_fast::linear_product", "default", reference.linear_product_reference)
torch.library.impl("mae_fast::linear_input_gradient", "default", reference.linear_input_gradient_reference)
torch.library.impl("mae_fast::linear_gradients", "default", reference.linear_gradients_reference)


@torch.library.register_fake("mae_fast::linear_product")
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("mae_fast::linear_input_gradient")
def _(grad, weight):  # type: ignore[no-untyped-def]
    return grad.new_empty((grad.shape[0], weight.shape[1]))


@torch.library.register_fake("mae_fast::linear_gradients")
def _(grad, x):  # type: ignore[no-untyped-def]
    o, k = grad.shape[1], x.shape[1]
    return x.new_empty((o, k), dtype=torch.float32), x.new_empty(o, dtype=torch.float32)


def _by_torch(weight: Tensor, dim: int) -> bool:
    """Whether torch computes a product that sums over ``dim`` of ``weight``. The C++ kernel reads pairs of values."""
    return weight.is_cuda or has_amx() or weight.shape[dim] % 2 == 1 or not weight.numel()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] and weight [O, K], both bf16, -> [..., O]."""
    if _by_torch(weight, dim=1):
        return F.linear(x, weight, bias)
    rows = torch.ops.mae_fast.linear_product(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], len(weight))  # type: ignore[no-any-return]


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [M, O] and weight [O, K], both bf16, -> [M, K]."""
    if _by_torch(weight, dim=0):
        return grad @ weight
    return torch.ops.mae_fast.linear_input_gradient(grad, weight)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bias_gradient: bool) -> Tensor:
        bf16_copy = working_copy(weight, x.dtype).flatten(1)
        ctx.save_for_backward(x, bf16_copy)
        ctx.shape, ctx.bias_gradient = weight.shape, bias_gradient
        return _product(x, bf16_copy, None if bias is None else working_copy(bias, x.dtype))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bf16_copy = ctx.saved_tensors
        needs_bias = ctx.bias_gradient and ctx.needs_input_grad[2]
        grad, dx, dweight, dbias = grad.reshape(-1, grad.shape[-1]), None, None, None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(grad, bf16_copy).reshape(x.shape)
        if grad.is_cuda:  # cuBLAS accumulates in fp32 and can return fp32
            if ctx.needs_input_grad[1]:
                dweight = torch.mm(grad.t(), x.reshape(-1, x.shape[-1]), out_dtype=torch.float32)
            if needs_bias:
                dbias = grad.sum(0, dtype=torch.float32)
        elif ctx.needs_input_grad[1] or needs_bias:
            dweight, dbias = torch.ops.mae_fast.linear_gradients(grad, x.reshape(-1, x.shape[-1]))
        dweight = None if dweight is None or not ctx.needs_input_grad[1] else dweight.view(ctx.shape)
        return dx, dweight, dbias if needs_bias else None, None


def in_bf16(x: Tensor, *parameters: Tensor) -> bool:
    """Whether a layer uses bf16 copies of its fp32 ``parameters``: bf16 autocast is on and the device supports it."""
    return (
        not torch.compiler.is_compiling()
        and not needs_torch_ops()
        and autocast_dtype(x.device.type) == torch.bfloat16
        and x.dtype != torch.float64  # autocast does not cast it
        and all(p.dtype == torch.float32 for p in parameters)
        and (x.is_cuda or (x.device.type == "cpu" and has_native("linear_gradients", "CPU") and has_matrix_unit()))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, bias_gradient: bool = True) -> Tensor:
    """Same value as ``torch.nn.functional.linear(x, weight.flatten(1), bias)``, on every device and in every dtype.

    Under bf16 autocast, with fp32 weights, on a GPU or on a CPU with bf16 matrix products, it uses the bf16 copy of the
    weight that ``mae_fast.training.optim.AdamW`` stores, if there is one. The gradients of ``weight`` and ``bias`` are
    summed in fp32 and stay fp32. Eager autocast rounds them to bf16.

    Args:
        x: [..., K].
        weight: [O, K], or [O, ...] with K values each, such as a convolution's weight.
        bias: [O] or ``None``.
        bias_gradient: False if the gradient of ``bias`` is computed elsewhere.

    Returns:
        [..., O].

    Raises:
        RuntimeError: from torch, on mismatched shapes.
    """
    check_tensor("linear: x", x)
    if in_bf16(x, weight, *(() if bias is None else (bias,))):
        out: Tensor = _Linear.apply(x.to(torch.bfloat16), weight, bias, bias_gradient)
        return out
    return F.linear(x, weight.flatten(1), bias if bias is None or bias_gradient else bias.detach())
