"""One AdamW step on one parameter, its bf16 copy and the gradient's norm, in one pass over memory.

Equals: torch's fused AdamW, bf16 copies of the weights, the gradients' norm.
"""

import torch
from torch import Tensor

from . import reference

torch.library.define(
    "mae_fast::adamw_step",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? copy, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step) -> Tensor",
)

# Any device: eager reference. CPU: csrc/cpu/adamw.cpp registers itself.
torch.library.impl("mae_fast::adamw_step", "default", reference.adamw_step_reference)


@torch.library.register_fake("mae_fast::adamw_step")
def _(param, grad, exp_avg, exp_avg_sq, copy, lr, beta1, beta2, eps, weight_decay, step):  # type: ignore[no-untyped-def]
    return param.new_empty((), dtype=torch.float64)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> Tensor:
    """AdamW (Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019), written in place:

        param      = (1 - lr * weight_decay) * param
        exp_avg    = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
        param      = param - lr * (exp_avg / (1 - beta1^step)) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
        copy       = param

    No gradient flows through it. The sum is taken in an order that does not depend on the number of threads.

    Args:
        param, grad, exp_avg, exp_avg_sq: contiguous, of one shape, all fp32 or all fp64.
        copy: contiguous, bf16, of the same shape; rounded to nearest even. None: no copy.
        step: the number of this step, from 1.

    Returns:
        The sum of the squares of ``grad``, fp64 scalar.

    Raises:
        ValueError: on shapes, dtypes or strides that do not fit, and on ``step`` below 1.
    """
    if param.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"adamw_step: param must be float32 or float64, got {param.dtype}")
    written = [param, exp_avg, exp_avg_sq]
    for name, x in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check(name, x, param.dtype, param.shape)
    if copy is not None:
        _check("copy", copy, torch.bfloat16, param.shape)
        written.append(copy)
    if step < 1:
        raise ValueError(f"adamw_step: step must be at least 1, got {step}")
    with torch.no_grad():
        squares: Tensor = torch.ops.mae_fast.adamw_step(
            param, grad, exp_avg, exp_avg_sq, copy, lr, beta1, beta2, eps, weight_decay, step
        )
    torch.autograd.graph.increment_version(written)  # the dispatcher does not do it for custom ops
    return squares


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        strides = "" if x.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"adamw_step: {name} must be contiguous {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}{strides}"
        )
