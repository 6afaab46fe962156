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

CHUNK = 2**21  # hidden values per chunk: they stay in the cache between the two products


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        copy1, copy2, added = working_copy(weight1, x.dtype), working_copy(weight2, x.dtype), bias2.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        h, out = rows.new_empty(len(rows), len(copy1)), rows.new_empty(len(rows), len(copy2))
        for part in _chunks(h):
            torch.mm(rows[part], copy1.t(), out=h[part])
            torch.addmm(added, bias_gelu(h[part], bias1), copy2.t(), out=out[part])
        ctx.save_for_backward(x, h, bias1, copy1, copy2)
        ctx.dtype = weight1.dtype  # of the gradients
        return out.view(*x.shape[:-1], len(copy2))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, h, bias1, copy1, copy2 = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            # torch.autograd.grad(..., is_grads_batched=True) has no out=.
            dh, dbias1, hidden = torch.ops.mae_fast.bias_gelu_backward(grad @ copy2, h, bias1, True)
            dweight1, _ = _gradients(dh, rows, ctx.dtype)
            return (dh @ copy1).view(x.shape), dweight1, dbias1, *_gradients(grad, hidden, ctx.dtype)
        dx = torch.empty_like(rows)
        sums: tuple[Tensor, ...] = ()
        for part in _chunks(h):
            dhidden = grad[part] @ copy2
            dh, dbias1, hidden = torch.ops.mae_fast.bias_gelu_backward(dhidden, h[part], bias1, True)
            torch.mm(dh, copy1, out=dx[part])
            if not sums:
                sums = (*_gradients(dh, rows[part], ctx.dtype), dbias1, *_gradients(grad[part], hidden, ctx.dtype))
            else:
                _add_gradients(dh, rows[part], sums[0], sums[1])
                sums[2].add_(dbias1)
                _add_gradients(grad[part], hidden, sums[3], sums[4])
        dweight1, _, dbias1, dweight2, dbias2 = sums  # bias_gelu_backward has already computed dbias1
        return dx.view(x.shape), dweight1, dbias1, dweight2, dbias2


def _gradients(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of weight [O, K] and bias [O], for grad [M, O] and x [M, K]."""
    if grad.dtype == dtype:
        return grad.t() @ x, grad.sum(0)
    return torch.ops.mae_fast.linear_gradients(grad, x)  # type: ignore[no-any-return]


def _add_gradients(grad: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    if grad.dtype == dweight.dtype:
        dweight.addmm_(grad.t(), x)
        dbias.add_(grad.sum(0))
    else:
        torch.ops.mae_fast.add_linear_gradients(grad, x, dweight, dbias)


def _chunks(h: Tensor) -> Iterator[slice]:
    """Split the rows of ``h`` [M, H] into equal chunks of at most ``CHUNK`` values."""
    count = max(1, -(-h.numel() // CHUNK))
    bounds = [len(h) * i // count for i in range(count + 1)]
    return (slice(a, b) for a, b in pairwise(bounds))


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Same value as

        F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    A CPU processes chunks of rows, so that the hidden values are still in the cache when they are used. It saves x and
    the first product for the backward, half of the hidden values that autograd saves. Under bf16 autocast it uses the
    stored copies of the weights and sums their gradients in fp32, as ``mae_fast.ops.linear`` does.

    Args:
        x: [..., D].
        weight1, bias1: [H, D] and [H].
        weight2, bias2: [O, H] and [O] or ``None``.

    Returns:
        [..., O].

    Raises:
        RuntimeError: torch's own, on shapes that do not fit.
    """
    check_tensor("mlp: x", x)
    if not has_kernel("bias_gelu", x.device.type):
        return linear(F.gelu(linear(x, weight1, bias1)), weight2, bias2)
    if x.device.type != "cpu" or bias2 is None:
        return linear(bias_gelu(linear(x, weight1), bias1), weight2, bias2)
    parameters = (weight1, bias1, weight2, bias2)
    if in_bf16(x, *parameters):
        x, fits = x.to(torch.bfloat16), True
    else:
        as_it_is = autocast_dtype("cpu") is None or x.dtype == torch.float64  # autocast does not cast it
        fits = as_it_is and x.dtype in (torch.float32, torch.float64) and all(p.dtype == x.dtype for p in parameters)
    if torch.compiler.is_compiling() or not fits:
        return linear(bias_gelu(linear(x, weight1), bias1), weight2, bias2)
    out: Tensor = _Mlp.apply(x, *parameters)
    return out
