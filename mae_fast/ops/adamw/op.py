"""AdamW steps, bf16 copies of the weights and the gradients' norm.

On a CPU, ``adamw_step`` does all three in one pass over one parameter. On a GPU, ``gradient_norm`` runs first, because
the norm decides whether the step is taken. Then ``adamw_steps`` updates all parameters in one launch.

Equals: torch's fused AdamW, bf16 copies of the weights, the gradients' norm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import HAS_TRITON
from . import reference

torch.library.define(
    "mae_fast::adamw_step",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? copy, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step) -> Tensor",
)

torch.library.define(
    "mae_fast::adamw_steps",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, "
    "Tensor(e!)[] steps, float[] lr, float[] beta1, float[] beta2, float[] eps, float[] weight_decay, "
    "Tensor? found_inf, Tensor? grad_scale) -> ()",
)
torch.library.define(
    "mae_fast::gradient_norm", "(Tensor[] grads, float? max_norm) -> (Tensor norm, Tensor found_inf, Tensor grad_scale)"
)

# Any device: eager reference. CPU: csrc/cpu/adamw.cpp registers itself. CUDA: Triton.
torch.library.impl("mae_fast::adamw_step", "default", reference.adamw_step_reference)
torch.library.impl("mae_fast::adamw_steps", "default", reference.adamw_steps_reference)
torch.library.impl("mae_fast::gradient_norm", "default", reference.gradient_norm_reference)
if HAS_TRITON:
    from . import triton_kernels

    torch.library.impl("mae_fast::adamw_steps", "CUDA", triton_kernels.adamw_steps_forward)
    torch.library.impl("mae_fast::gradient_norm", "CUDA", triton_kernels.gradient_norm_forward)


@torch.library.register_fake("mae_fast::adamw_step")
def _(param, grad, exp_avg, exp_avg_sq, copy, lr, beta1, beta2, eps, weight_decay, step):  # type: ignore[no-untyped-def]
    return param.new_empty((), dtype=torch.float64)


@torch.library.register_fake("mae_fast::adamw_steps")
def _(params, grads, exp_avgs, exp_avg_sqs, copies, steps, *options):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("mae_fast::gradient_norm")
def _(grads, max_norm):  # type: ignore[no-untyped-def]
    return tuple(grads[0].new_empty(()) for _ in range(3))


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
    """Update one parameter in place by AdamW (Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019):

        param      = (1 - lr * weight_decay) * param
        exp_avg    = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
        param      = param - lr * (exp_avg / (1 - beta1^step)) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
        copy       = param

    The op has no gradient. The order of the summation does not depend on the number of threads.

    Args:
        param, grad, exp_avg, exp_avg_sq: contiguous, of the same shape, all fp32 or all fp64.
        copy: contiguous, bf16, of the same shape; rounded to nearest even. ``None``: no copy.
        step: the number of this step, counted from 1.

    Returns:
        The sum of the squares of ``grad``, fp64 scalar.

    Raises:
        ValueError: on mismatched shapes, dtypes or strides, and on ``step`` below 1.
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
    torch.autograd.graph.increment_version(written)  # the dispatcher does not do this for custom ops
    return squares


def gradient_norm(grads: Sequence[Tensor], max_norm: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The L2 norm of all gradients, and two values derived from it for ``adamw_steps`` and torch's fused optimizers:

        norm       = torch.cat([grad.flatten() for grad in grads]).norm()
        found_inf  = (~norm.isfinite()).float()
        grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)      # 1 without max_norm

    Args:
        grads: at least one; contiguous fp32 tensors on one device, of any shapes.
        max_norm: the norm to which larger gradients are clipped.

    Returns:
        The three values, fp32 scalars on that device. The call does not wait for a GPU.

    Raises:
        ValueError: if ``grads`` is empty, or a gradient is not contiguous, not fp32, or on another device.
    """
    if not grads:
        raise ValueError("gradient_norm: grads must contain at least one gradient, got none")
    for grad in grads:
        _check("grads", grad, torch.float32, grad.shape, "gradient_norm")
    _check_device("gradient_norm", grads)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.mae_fast.gradient_norm(list(grads), max_norm)
    return found


def adamw_steps(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    weight_decay: Sequence[float],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Apply ``adamw_step`` to T parameters, in place. Same as

        if found_inf is None or not found_inf:
            for each parameter:
                step += 1
                adamw_step(param, grad / grad_scale, exp_avg, exp_avg_sq, copy, step=step, ...)

    A skipped step still copies the unchanged parameters to ``copies``. The call does not wait for a GPU.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: T contiguous fp32 tensors each; ``grads[i]``, ``exp_avgs[i]`` and
            ``exp_avg_sqs[i]`` have the shape of ``params[i]``.
        copies: T contiguous bf16 tensors of the same shapes, or an empty list.
        steps: T fp32 scalars, the steps taken so far.
        lr, beta1, beta2, eps, weight_decay: T numbers each.
        found_inf, grad_scale: fp32 scalars, as ``gradient_norm`` returns them.

    Raises:
        ValueError: on mismatched list lengths, shapes, dtypes, strides or devices.
    """
    options = (lr, beta1, beta2, eps, weight_decay)
    lists = [grads, exp_avgs, exp_avg_sqs, steps, *options, *([copies] if copies else [])]
    if any(len(x) != len(params) for x in lists):
        raise ValueError(f"adamw_steps: all lists must be as long as params, {len(params)}")
    if not params:
        return
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        for name, x in (("params", param), ("grads", grad), ("exp_avgs", exp_avg), ("exp_avg_sqs", exp_avg_sq)):
            _check(name, x, torch.float32, param.shape, "adamw_steps")
        _check("steps", step, torch.float32, torch.Size(), "adamw_steps")
    for param, copy in zip(params, copies, strict=bool(copies)):
        _check("copies", copy, torch.bfloat16, param.shape, "adamw_steps")
    scalars = [x for x in (found_inf, grad_scale) if x is not None]
    for x in scalars:
        _check("found_inf and grad_scale", x, torch.float32, torch.Size(), "adamw_steps")
    _check_device("adamw_steps", [*params, *grads, *exp_avgs, *exp_avg_sqs, *copies, *steps, *scalars])
    tensors = [list(x) for x in (params, grads, exp_avgs, exp_avg_sqs, copies, steps)]
    with torch.no_grad():
        torch.ops.mae_fast.adamw_steps(*tensors, *(list(x) for x in options), found_inf, grad_scale)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *copies, *steps])


def _check_device(op: str, tensors: Sequence[Tensor]) -> None:
    if len(devices := {x.device for x in tensors}) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: torch.Size, op: str = "adamw_step") -> None:
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        strides = "" if x.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{op}: {name} must be contiguous {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}{strides}"
        )
