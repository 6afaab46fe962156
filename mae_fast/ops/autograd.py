"""Decide when the public ops must use torch's own ops, and raise an error on double backward.

The kernels have one derivative: the backward pass of ordinary autograd. ``torch.func`` transforms, forward-mode AD and
exports get the same values from the references instead, which consist of torch's own ops.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad

NO_DOUBLE_BACKWARD = (
    "double backward is not supported by the fused MAE ops: nest torch.func.grad, or use ReferenceMAE.of(model) or "
    "ReferenceViT.of(model) of mae_fast.models.reference; both compute with torch's own ops"
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records the ops; ``torch.onnx.export`` uses one of them."""
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def needs_torch_ops() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jvp, ...), forward-mode AD, or an export is active."""
    # Does not call is_exporting(), because every op of every block runs this.
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler._is_exporting_flag
        or torch._C._get_tracing_state() is not None
    )


def forbid_double_backward(op: str) -> None:
    """Make ``mae_fast::<op>``, the backward of an op, raise an error when it is differentiated."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"mae_fast::{op} has no derivative: {NO_DOUBLE_BACKWARD}")

    torch.library.register_autograd(f"mae_fast::{op}", backward)


class _NoDoubleBackward(torch.autograd.Function):
    """Return the first ``count`` tensors. Differentiating them raises an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> tuple[Any, ...]:
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an ``autograd.Function``: differentiating its results raises an error.

    torch's ``once_differentiable`` disconnects the results from the inputs. ``torch.autograd.grad`` then reports that
    the inputs are not used, instead of the reason.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return _NoDoubleBackward.apply(len(results), *results, *grads, *ctx.saved_tensors)

    return checked
