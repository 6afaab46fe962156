"""Double backward through a fused op raises an error instead of giving a wrong gradient."""

from typing import Any

import torch


def forbid_double_backward(op: str) -> None:
    """Make ``mae_fast::<op>``, itself a backward, raise when it is differentiated."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"mae_fast::{op} has no derivative: double backward is not supported by the fused MAE ops")

    torch.library.register_autograd(f"mae_fast::{op}", backward)
