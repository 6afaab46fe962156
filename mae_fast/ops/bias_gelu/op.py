"""A linear layer's bias and the exact GELU after it, in one pass, recomputed in the backward.

Equals: bias and exact GELU.

Shapes: W values in the last dimension.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import forbid_double_backward, needs_torch_ops
from ..native import HAS_TRITON
from ..patches import check_tensor
from . import reference

torch.library.define("mae_fast::bias_gelu", "(Tensor x, Tensor bias) -> Tensor")
torch.library.define(
    "mae_fast::bias_gelu_backward", "(Tensor grad, Tensor x, Tensor bias, bool with_value) -> (Tensor, Tensor, Tensor)"
)

# Any device: eager reference. CPU: csrc/cpu/bias_gelu.cpp registers itself. CUDA: Triton.
torch.library.impl("mae_fast::bias_gelu", "default", reference.bias_gelu_reference)
torch.library.impl("mae_fast::bias_gelu_backward", "default", reference.bias_gelu_backward_reference)
if HAS_TRITON:
    from . import triton_kernels

    torch.library.impl("mae_fast::bias_gelu", "CUDA", triton_kernels.bias_gelu_forward)
    torch.library.impl("mae_fast::bias_gelu_backward", "CUDA", triton_kernels.bias_gelu_backward)


@torch.library.register_fake("mae_fast::bias_gelu")
def _(x, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.register_fake("mae_fast::bias_gelu_backward")
def _(grad, x, bias, with_value):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), bias.new_empty(bias.shape), x.new_empty(x.shape if with_value else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.mae_fast.bias_gelu_backward(grad, *ctx.saved_tensors, False)[:2]  # type: ignore[no-any-return]


torch.library.register_autograd("mae_fast::bias_gelu", _backward, setup_context=_save)
forbid_double_backward("bias_gelu_backward")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Same value as

        h = x + bias
        h * (1 + erf(h / sqrt(2))) / 2

    computed in fp32 (fp64 for fp64 input) and rounded once. The backward recomputes h and the erf, and sums the
    gradient of ``bias`` in the same pass.

    Args:
        x: [..., W], floating, any strides.
        bias: [W], floating.

    Returns:
        [..., W], contiguous, in the dtype of ``x``.

    Raises:
        ValueError: on mismatched shapes.
    """
    check_tensor("bias_gelu: x", x)
    if not x.ndim or bias.ndim != 1 or x.shape[-1] != bias.shape[0]:
        raise ValueError(f"bias_gelu: bias must be [W] for x [..., W], got {list(bias.shape)} and {list(x.shape)}")
    op = reference.bias_gelu_reference if needs_torch_ops() else torch.ops.mae_fast.bias_gelu
    out: Tensor = op(x, bias)
    return out
