"""When the public ops compute with torch's own ops, and the error of a double backward.

The kernels have one derivative: the backward pass of ordinary autograd. ``torch.func`` transforms, forward-mode AD and
exports get the same values from the references instead, which consist of torch's own ops.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad

NO_DOUBLE_BACKWARD = (
    "double backward is not supported by the fused MAE ops: take torch.func.grad of torch.func.grad, or a model of "
    "mae_fast.models.reference (ReferenceMAE.of(model), ReferenceViT.of(model)); both compute with torch's own ops"
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records the ops; ``torch.onnx.export`` uses one of them."""
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def needs_torch_ops() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jvp, ...), forward-mode AD, or an export is active."""
    # Written out, not ``is_exporting()``: every op of every block asks.
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler._is_exporting_flag
        or torch._C._get_tracing_state() is not None
    )


def forbid_double_backward(op: str) -> None:
    """Make ``mae_fast::<op>``, itself a backward, raise when it is differentiated."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"mae_fast::{op} has no derivative: {NO_DOUBLE_BACKWARD}")

    torch.library.register_autograd(f"mae_fast::{op}", backward)


class _NoDoubleBackward(torch.autograd.Function):
    """The first ``count`` tensors as they are. Their derivative is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> tuple[Any, ...]:
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``backward`` of an ``autograd.Function``; to differentiate its results raises an error.

    Results of torch's ``once_differentiable`` are not connected to the inputs, so ``torch.autograd.grad`` with respect
    to an input calls them unused.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return _NoDoubleBackward.apply(len(results), *results, *grads, *ctx.saved_tensors)

    return checked
