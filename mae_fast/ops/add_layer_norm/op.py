"""Residual addition and layer norm in one pass.

Equals: residual addition, layer norm, autocast's rounding.

Shapes: R rows (all leading dimensions) of D values. Each row is normalised.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import differentiable_once, forbid_double_backward
from ..native import HAS_TRITON, has_kernel
from ..patches import check_tensor
from . import reference

torch.library.define(
    "mae_fast::add_layer_norm",
    "(Tensor x, Tensor? residual, Tensor? residual_bias, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> (Tensor sum, Tensor normed, Tensor stats)",
)
torch.library.define(
    "mae_fast::add_layer_norm_backward",
    "(Tensor? grad_sum, Tensor grad, Tensor sum, Tensor stats, Tensor weight, Tensor? residual_bias, "
    "ScalarType residual_dtype, SymInt skipped=0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

# Any device: eager reference. CPU: csrc/cpu/add_layer_norm.cpp registers itself (without
# `residual_bias`). CUDA: Triton.
torch.library.impl("mae_fast::add_layer_norm", "default", reference.add_layer_norm_reference)
torch.library.impl("mae_fast::add_layer_norm_backward", "default", reference.add_layer_norm_backward_reference)
if HAS_TRITON:
    from . import triton_kernels

    torch.library.impl("mae_fast::add_layer_norm", "CUDA", triton_kernels.add_layer_norm_forward)
    torch.library.impl("mae_fast::add_layer_norm_backward", "CUDA", triton_kernels.add_layer_norm_backward)


@torch.library.register_fake("mae_fast::add_layer_norm")
def _(x, residual, residual_bias, weight, bias, eps, dtype):  # type: ignore[no-untyped-def]
    shape, rows = x.shape if residual is None else residual.shape, 1
    for size in shape[:-1]:
        rows *= size
    stats = x.new_empty((2, rows), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(0 if residual is None else shape), x.new_empty(shape, dtype=dtype), stats


@torch.library.register_fake("mae_fast::add_layer_norm_backward")
def _(grad_sum, grad, sum, stats, weight, residual_bias, residual_dtype, skipped=0):  # type: ignore[no-untyped-def]
    dresidual = sum.new_empty(sum.shape if residual_dtype != sum.dtype else 0, dtype=residual_dtype)
    dresidual_bias = weight.new_empty(0) if residual_bias is None else residual_bias.new_empty(residual_bias.shape)
    dweight, dbias = (weight.new_empty(weight.shape) for _ in range(2))
    dx = sum.new_empty((*sum.shape[:-2], sum.shape[-2] + skipped, sum.shape[-1]) if skipped else sum.shape)
    return dx, dresidual, dweight, dbias, dresidual_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, residual_bias, weight, *_ = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.skipped = _skipped(x, residual)
    ctx.save_for_backward(x if residual is None else output[0], output[2], weight, residual_bias)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_sum: Tensor | None, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    total, stats, weight, residual_bias = ctx.saved_tensors
    if ctx.residual_dtype is None:
        grad_sum = None  # the sum is an empty tensor
    if grad is None:  # the normalised sum was not used
        if grad_sum is None:
            return (None,) * 7
        rows = grad_sum.to(stats.dtype).reshape(stats.shape[1], *weight.shape)
        dresidual_bias = None if residual_bias is None else rows.sum(0).to(residual_bias.dtype)
        return (
            F.pad(grad_sum, (0, 0, ctx.skipped, 0)),
            grad_sum.to(ctx.residual_dtype),
            dresidual_bias,
            None,
            None,
            None,
            None,
        )
    dx, dresidual, dweight, dbias, dresidual_bias = torch.ops.mae_fast.add_layer_norm_backward(
        grad_sum, grad, total, stats, weight, residual_bias, ctx.residual_dtype or total.dtype, ctx.skipped
    )
    if ctx.residual_dtype == total.dtype:
        dresidual = dx[..., ctx.skipped :, :] if ctx.skipped else dx
    return (
        dx,
        None if ctx.residual_dtype is None else dresidual,
        None if residual_bias is None else dresidual_bias,
        dweight,
        dbias,
        None,
        None,
    )


torch.library.register_autograd("mae_fast::add_layer_norm", _backward, setup_context=_save)
forbid_double_backward("add_layer_norm_backward")


class _LayerNormPassthrough(torch.autograd.Function):
    """Return ``x`` and its layer norm. The backward sums the gradients of both results in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        _, normed, stats = torch.ops.mae_fast.add_layer_norm(x, None, None, weight, bias, eps, dtype)
        ctx.save_for_backward(x, stats, weight)
        ctx.set_materialize_grads(False)
        return x.view_as(x), normed

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_x: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, stats, weight = ctx.saved_tensors
        if grad is None:  # the norm was not used
            return grad_x, None, None, None, None
        dx, _, dweight, dbias, _ = torch.ops.mae_fast.add_layer_norm_backward(
            grad_x, grad, x, stats, weight, None, x.dtype
        )
        return dx, dweight, dbias, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    residual_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same values as

        x = x + (residual + residual_bias)                                  # in the wider dtype of x and residual
        x, F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)

    with the statistics and the normalisation in fp32 (fp64 for fp64 input), rounded once. On a GPU the backward of the
    layer norm also sums the gradient of ``residual_bias``, in the same pass.

    ``x`` may have more tokens than ``residual``. Then only the last R tokens of ``x`` are used, ``x[..., T - R:, :]``,
    without a copy.

    Args:
        x: [..., D] or [..., T, D], floating, any strides.
        residual: [..., D] or [..., R, D]. ``None``: ``x`` itself is returned and normalised.
        weight, bias: [D].
        eps: added to the variance, inside the root.
        dtype: the dtype of the normalised sum; ``None``: that of the sum.
        residual_bias: [D], added to ``residual``: the bias of the linear layer that computed it.

    Returns:
        The sum and the normalised sum, both of the shape of ``residual``, or of ``x`` without one.

    Raises:
        ValueError: on mismatched shapes.
    """
    check_tensor("add_layer_norm: x", x)
    _check(x, residual, weight, bias, residual_bias)
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = dtype or sum_dtype
    has_op = has_kernel("add_layer_norm", x.device.type)
    if residual_bias is not None and not (has_op and x.is_cuda):
        assert residual is not None
        residual, residual_bias = (residual + residual_bias).to(sum_dtype), None
    if not has_op:
        x = x if residual is None else _last(x, residual) + residual
        return x, F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)
    out = dtype
    if x.is_cuda:
        x = x.to(sum_dtype)
    else:
        # The kernel supports a single dtype, or 16-bit types with an fp32 sum. torch adds all other combinations.
        out = dtype if sum_dtype == torch.float32 and dtype.itemsize == 2 else sum_dtype
        if residual is not None and (x.dtype != sum_dtype or residual.dtype not in (sum_dtype, out)):
            x, residual = _last(x, residual) + residual, None
    if residual is None and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x, normed = _LayerNormPassthrough.apply(x, weight, bias, eps, out)
        return x, normed.to(dtype)
    total, normed, _ = torch.ops.mae_fast.add_layer_norm(x, residual, residual_bias, weight, bias, eps, out)
    return x if residual is None else total, normed.to(dtype)


def _skipped(x: Tensor, residual: Tensor | None) -> int:
    """The number of leading tokens of ``x`` without a residual."""
    return 0 if residual is None or x.ndim < 2 else x.shape[-2] - residual.shape[-2]


def _last(x: Tensor, residual: Tensor) -> Tensor:
    """The last tokens of ``x``, those that have a residual."""
    skipped = _skipped(x, residual)
    return x[..., skipped:, :] if skipped else x


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, residual_bias: Tensor | None) -> None:
    fits = x.ndim and weight.shape == bias.shape == x.shape[-1:]
    if residual is not None and residual.shape != x.shape:
        same_but_tokens = (*residual.shape[:-2], *residual.shape[-1:]) == (*x.shape[:-2], *x.shape[-1:])
        fits = fits and min(x.ndim, residual.ndim) > 1 and same_but_tokens and residual.shape[-2] < x.shape[-2]
    if not fits:
        raise ValueError(
            "add_layer_norm: x must be [..., T, D], residual [..., R, D] with R <= T, weight and bias [D], got "
            f"{list(x.shape)}, {None if residual is None else list(residual.shape)}, {list(weight.shape)} "
            f"and {list(bias.shape)}"
        )
    if residual_bias is not None and (residual is None or residual_bias.shape != weight.shape):
        got = list(residual_bias.shape)
        raise ValueError(f"add_layer_norm: residual_bias must be [{weight.numel()}] and needs a residual, got {got}")
