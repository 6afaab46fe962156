"""Double backward through a fused op is an error, never a wrong number."""

from typing import Any

import torch


def forbid_double_backward(op: str) -> None:
    """Make ``mae_fast::<op>``, itself a backward, raise when something differentiates through it."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"mae_fast::{op} has no derivative: double backward is not supported by the fused MAE ops")

    torch.library.register_autograd(f"mae_fast::{op}", backward)
