"""Residual addition and layer norm in one pass.

Shapes: D values in the last dimension, the statistics' own; R rows of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import forbid_double_backward
from .._native import has_native
from . import reference

torch.library.define(
    "mae_fast::add_layer_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> (Tensor sum, Tensor normed, Tensor stats)",
)
torch.library.define(
    "mae_fast::add_layer_norm_backward",
    "(Tensor? grad_sum, Tensor grad, Tensor sum, Tensor stats, Tensor weight, ScalarType low)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)

# Who answers where: any device -> eager reference; CPU -> csrc/cpu/add_layer_norm.cpp registers itself.
torch.library.impl("mae_fast::add_layer_norm", "default", reference.add_layer_norm_reference)
torch.library.impl("mae_fast::add_layer_norm_backward", "default", reference.add_layer_norm_backward_reference)


@torch.library.register_fake("mae_fast::add_layer_norm")
def _(x, residual, weight, bias, eps, dtype):  # type: ignore[no-untyped-def]
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    stats = x.new_empty((2, rows), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape, dtype=dtype), stats


@torch.library.register_fake("mae_fast::add_layer_norm_backward")
def _(grad_sum, grad, sum, stats, weight, low):  # type: ignore[no-untyped-def]
    dlow = sum.new_empty(sum.shape if low != sum.dtype else 0, dtype=low)
    return sum.new_empty(sum.shape), dlow, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, *_ = inputs
    ctx.low = None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else output[0], output[2], weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_sum: Tensor | None, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    total, stats, weight = ctx.saved_tensors
    if grad is None:  # nobody used the normalised sum
        return grad_sum, None if grad_sum is None or ctx.low is None else grad_sum.to(ctx.low), None, None, None, None
    dx, dlow, dweight, dbias = torch.ops.mae_fast.add_layer_norm_backward(
        grad_sum if ctx.low else None, grad, total, stats, weight, ctx.low or total.dtype
    )
    dresidual = None if ctx.low is None else dlow if ctx.low != total.dtype else dx
    return dx, dresidual, dweight, dbias, None, None


torch.library.register_autograd("mae_fast::add_layer_norm", _backward, setup_context=_save)
forbid_double_backward("add_layer_norm_backward")


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Same values as

        x = x + residual                                                    # in the wider dtype of the two
        x, F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)

    with the statistics and all that follows them in fp32 (fp64 for fp64 input), rounded once.

    Args:
        x: [..., D], floating, any strides.
        residual: [..., D], or ``None``: ``x`` itself is returned and normalised.
        weight, bias: [D].
        eps: added to the variance, inside the root.
        dtype: of the normalised sum; ``None``: the sum's own.

    Returns:
        The sum and the normalised sum, [..., D] both.

    Raises:
        ValueError: on shapes that do not fit.
    """
    fits = x.ndim and weight.shape == bias.shape == x.shape[-1:] and (residual is None or residual.shape == x.shape)
    if not fits:
        raise ValueError(
            "add_layer_norm: x and residual must be [..., D], weight and bias [D], got "
            f"{list(x.shape)}, {None if residual is None else list(residual.shape)}, {list(weight.shape)} "
            f"and {list(bias.shape)}"
        )
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = dtype or wide
    if x.device.type != "cpu" or not has_native("add_layer_norm", "CPU"):
        x = x if residual is None else x + residual
        return x, F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)
    # What no kernel is made for is added or rounded by torch: kernels have all in one dtype, or half types with an
    # fp32 sum.
    out = dtype if wide == torch.float32 and dtype.itemsize == 2 else wide
    if residual is not None and (x.dtype != wide or residual.dtype not in (wide, out)):
        x, residual = x + residual, None
    total, normed, _ = torch.ops.mae_fast.add_layer_norm(x, residual, weight, bias, eps, out)
    return x if residual is None else total, normed.to(dtype)
