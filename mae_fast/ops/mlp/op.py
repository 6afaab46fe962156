"""The two linear layers of a transformer block and the GELU between them.

Equals: linear, GELU, linear, a few rows at a time.

Shapes: M rows (all leading dimensions), D values in, H hidden, O out.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autocast import autocast_dtype
from ..autograd import differentiable_once
from ..bf16_weight_cache import working_copy
from ..bias_gelu import bias_gelu
from ..linear.op import in_bf16, linear
from ..native import has_kernel
from ..patches import check_tensor
from . import reference

torch.library.define(
    "mae_fast::mlp",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, bool save) -> (Tensor, Tensor)",
)
torch.library.define(
    "mae_fast::mlp_backward",
    "(Tensor grad, Tensor x, Tensor h, Tensor weight1, Tensor bias1, Tensor weight2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

# Any device: eager reference. CPU: csrc/cpu/mlp.cpp registers itself.
torch.library.impl("mae_fast::mlp", "default", reference.mlp_reference)
torch.library.impl("mae_fast::mlp_backward", "default", reference.mlp_backward_reference)


@torch.library.register_fake("mae_fast::mlp")
def _(x, weight1, bias1, weight2, bias2, save):  # type: ignore[no-untyped-def]
    panels = (len(weight1) + 63) // 64 if save else 0
    return x.new_empty((len(x), len(weight2))), x.new_empty((panels, len(x), 64))


@torch.library.register_fake("mae_fast::mlp_backward")
def _(grad, x, h, weight1, bias1, weight2):  # type: ignore[no-untyped-def]
    parameters = (weight1.shape, bias1.shape, weight2.shape, weight2.shape[:1])
    return x.new_empty(x.shape), *(x.new_empty(shape, dtype=torch.float32) for shape in parameters)


CHUNK = 2**21  # hidden values per chunk: they stay in the cache between the two products


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        copy1, copy2, added = working_copy(weight1, x.dtype), working_copy(weight2, x.dtype), bias2.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype == torch.bfloat16:
            out, h = torch.ops.mae_fast.mlp(rows, copy1, bias1, copy2, added, any(ctx.needs_input_grad))
        else:
            h, out = rows.new_empty(len(rows), len(copy1)), rows.new_empty(len(rows), len(copy2))
            for part in _chunks(h):
                torch.mm(rows[part], copy1.t(), out=h[part])
                torch.addmm(added, bias_gelu(h[part], bias1), copy2.t(), out=out[part])
        ctx.save_for_backward(x, h, bias1, copy1, copy2)
        out = out.view(*x.shape[:-1], len(copy2))
        return out  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, h, bias1, copy1, copy2 = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if x.dtype == torch.bfloat16:
            dx, *gradients = torch.ops.mae_fast.mlp_backward(grad, rows, h, copy1, bias1, copy2)
            return dx.view(x.shape), *gradients
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            # torch.autograd.grad(..., is_grads_batched=True) does not support out=.
            dh, dbias1, hidden = torch.ops.mae_fast.bias_gelu_backward(grad @ copy2, h, bias1, True)
            return (dh @ copy1).view(x.shape), dh.t() @ rows, dbias1, grad.t() @ hidden, grad.sum(0)
        dx, dbias2 = torch.empty_like(rows), grad.sum(0)
        dweight1, dbias1, dweight2 = torch.empty_like(copy1), torch.zeros_like(bias1), torch.empty_like(copy2)
        for i, part in enumerate(_chunks(h)):
            dh, dbias, hidden = torch.ops.mae_fast.bias_gelu_backward(grad[part] @ copy2, h[part], bias1, True)
            torch.mm(dh, copy1, out=dx[part])
            dweight1.addmm_(dh.t(), rows[part], beta=min(i, 1))
            dweight2.addmm_(grad[part].t(), hidden, beta=min(i, 1))
            dbias1 += dbias
        return dx.view(x.shape), dweight1, dbias1, dweight2, dbias2


def _chunks(h: Tensor) -> Iterator[slice]:
    """Split the rows of ``h`` [M, H] into equal chunks of at most ``CHUNK`` values."""
    count = max(1, -(-h.numel() // CHUNK))
    bounds = [len(h) * i // count for i in range(count + 1)]
    return (slice(a, b) for a, b in pairwise(bounds))


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Same value as

        F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    On a CPU, the op processes chunks of rows, so that the hidden values are still in the cache when they are used. It
    saves x and the first product for the backward; autograd would save twice as many hidden values. Under bf16 autocast
    it is one kernel (csrc/cpu/mlp.cpp), if D, H and O are even. The kernel uses the stored copies of the weights and
    sums their gradients in fp32, as ``mae_fast.ops.linear`` does.

    Args:
        x: [..., D].
        weight1, bias1: [H, D] and [H].
        weight2, bias2: [O, H] and [O] or ``None``.

    Returns:
        [..., O].

    Raises:
        RuntimeError: from torch, on mismatched shapes.
    """
    check_tensor("mlp: x", x)
    if not has_kernel("bias_gelu", x.device.type):
        return linear(F.gelu(linear(x, weight1, bias1)), weight2, bias2)
    if x.device.type != "cpu" or bias2 is None:
        return linear(bias_gelu(linear(x, weight1), bias1), weight2, bias2)
    parameters = (weight1, bias1, weight2, bias2)
    if in_bf16(x, *parameters):
        # The kernel reads pairs of values.
        x, fits = x.to(torch.bfloat16), not any(n % 2 for n in (*weight1.shape, len(weight2)))
    else:
        is_uncast = autocast_dtype("cpu") is None or x.dtype == torch.float64  # autocast does not cast fp64
        fits = is_uncast and x.dtype in (torch.float32, torch.float64) and all(p.dtype == x.dtype for p in parameters)
    if torch.compiler.is_compiling() or not fits:
        return linear(bias_gelu(linear(x, weight1), bias1), weight2, bias2)
    out: Tensor = _Mlp.apply(x, *parameters)
    return out
