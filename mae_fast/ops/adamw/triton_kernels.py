"""Triton kernels of AdamW. One launch updates all parameters, of any shapes.

Shapes: T tensors. The host sends their addresses and sizes to the GPU as one table. One program processes one chunk of
one tensor. Unaligned tensors and the last chunk of a tensor use masked accesses.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import divide, programs

CHUNK = 8192  # values per program
BLOCK = 1024  # values per iteration: each thread loads four, 128 bits
NORM_PROGRAMS = 8  # per multiprocessor
ALIGNED = 16  # bytes


class Tables(NamedTuple):
    """The kernels' tables of T tensors, on the GPU."""

    addresses: Tensor  # int64 [columns + 2, T]: the columns' addresses, the number of values, whether all are aligned
    options: Tensor  # fp64 [options, T]
    chunks: Tensor  # int32 [chunks, 2]: index of the tensor, index of the chunk within it


def tables(columns: Sequence[Sequence[Tensor]], options: Sequence[Sequence[float]] = ()) -> Tables:
    """Build the tables of ``columns``, each a list of T tensors, and copy them to the GPU asynchronously.

    ``options`` are lists of T numbers.
    """
    counts, device = tuple(x.numel() for x in columns[0]), columns[0][0].device
    addresses = np.array([[x.data_ptr() for x in column] for column in columns], np.int64)
    aligned = (addresses[:5] % ALIGNED == 0).all(0)  # the sixth column holds scalars
    rows = np.concatenate([addresses, [counts], [aligned]]).astype(np.int64)
    values = np.array(options, np.float64).reshape(-1, len(counts))
    sent = _send(np.concatenate([rows, values.view(np.int64)]), device)
    return Tables(sent[: len(rows)], sent[len(rows) :].view(torch.float64), _chunks(counts, device))


@lru_cache(maxsize=8)
def _chunks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    of_each = [triton.cdiv(count, CHUNK) for count in counts]
    which = np.repeat(np.arange(len(counts)), of_each)
    number = np.concatenate([np.arange(0), *(np.arange(n) for n in of_each)])
    return _send(np.stack([which, number], axis=1).astype(np.int32), device)


def _send(values: Any, device: torch.device) -> Tensor:
    made = torch.from_numpy(values)
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


@triton.jit
def _pointer(addresses_ptr, tensor, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    pointer = tl.load(addresses_ptr + tensor).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _add_squares(total, addresses_ptr, tensor, start, end, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Add the squares of a chunk to ``total`` [BLOCK]. WHOLE: the chunk is full and aligned."""
    grad_ptr = _pointer(addresses_ptr, tensor, tl.float32, WHOLE)
    for first in range(start, end, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + offsets) if WHOLE else tl.load(grad_ptr + offsets, mask=offsets < end, other=0)
        total += grad * grad
    return total


@triton.jit
def _squares_kernel(
    addresses_ptr,  # int64 [3, T]: gradients, their sizes, whether they are aligned
    chunks_ptr,  # int32 [count, 2]
    partial_ptr,  # fp32 [programs]
    T, count,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(tl.program_id(0), count, tl.num_programs(0)):
        tensor = tl.load(chunks_ptr + 2 * chunk)
        start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
        size, is_aligned = tl.load(addresses_ptr + T + tensor), tl.load(addresses_ptr + 2 * T + tensor)
        if (start + CHUNK <= size) & (is_aligned != 0):
            total = _add_squares(total, addresses_ptr, tensor, start, start + CHUNK, True, BLOCK)
        else:
            total = _add_squares(total, addresses_ptr, tensor, start, tl.minimum(start + CHUNK, size), False, BLOCK)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _norm_kernel(
    partial_ptr,  # fp32 [count]
    norm_ptr, found_inf_ptr, grad_scale_ptr,  # fp32 scalars
    max_norm, count,
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offsets, mask=offsets < count, other=0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total)).to(tl.float32)
    tl.store(norm_ptr, norm)
    tl.store(found_inf_ptr, tl.where(norm < float("inf"), 0.0, 1.0))  # 1 for NaN, too
    grad_scale = 1.0
    if CLIP:
        grad_scale = tl.maximum(divide(norm + 1e-6, max_norm), 1.0)
    tl.store(grad_scale_ptr, grad_scale)


def gradient_norm_forward(grads: list[Tensor], max_norm: float | None) -> tuple[Tensor, Tensor, Tensor]:
    norm, found_inf, grad_scale = (grads[0].new_empty(()) for _ in range(3))
    addresses, _, chunks = tables([grads])
    partial = norm.new_empty(max(1, programs(norm, len(chunks), NORM_PROGRAMS)))
    with torch.cuda.device_of(norm):
        _squares_kernel[(len(partial),)](
            addresses, chunks, partial, len(grads), len(chunks), CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8
        )
        _norm_kernel[(1,)](
            partial, norm, found_inf, grad_scale, max_norm or 0.0, len(partial), CLIP=max_norm is not None, BLOCK=1024
        )
    return norm, found_inf, grad_scale


@triton.jit
def _power(base, exponent):
    """``base`` to the power of an integer ``exponent`` up to 2^24, the limit of an fp32 step count."""
    result = base * 0 + 1
    for _ in range(25):
        result = tl.where(exponent % 2 == 1, result * base, result)
        base, exponent = base * base, exponent // 2
    return result


@triton.jit
def _count_steps_kernel(
    addresses_ptr,  # int64 [8, T]: column 5 points to the step counts
    options_ptr,  # fp64 [5, T]: lr, beta1, beta2, eps, weight_decay
    coefficients_ptr,  # fp32 [7, T]
    found_inf_ptr,  # fp32 scalar or None
    T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Increment the step counts and compute the coefficients of the step, in fp64, as 1 - beta^step cancels."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tensor < T
    step_ptr = tl.load(addresses_ptr + 5 * T + tensor, mask=valid, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=valid, other=0) + 1
    if found_inf_ptr is None or tl.load(found_inf_ptr) == 0:
        tl.store(step_ptr, step, mask=valid)

    option_ptr = options_ptr + tensor
    lr = tl.load(option_ptr, mask=valid, other=0)
    beta1 = tl.load(option_ptr + T, mask=valid, other=0)
    beta2 = tl.load(option_ptr + 2 * T, mask=valid, other=0)
    eps = tl.load(option_ptr + 3 * T, mask=valid, other=0)
    decay = tl.load(option_ptr + 4 * T, mask=valid, other=0)
    correction1 = 1 - _power(beta1, step.to(tl.int32))
    correction2 = 1 - _power(beta2, step.to(tl.int32))

    # In the order in which _adamw_steps_kernel reads them.
    to_ptr = coefficients_ptr + tensor
    tl.store(to_ptr, (1 - lr * decay).to(tl.float32), mask=valid)
    # Like torch.lerp: exp_avg + (1 - beta1) (grad - exp_avg), or grad - beta1 (grad - exp_avg) if beta1 <= 0.5.
    tl.store(to_ptr + T, tl.where(beta1 <= 0.5, -beta1, 1 - beta1).to(tl.float32), mask=valid)
    tl.store(to_ptr + 2 * T, beta2.to(tl.float32), mask=valid)
    tl.store(to_ptr + 3 * T, (1 - beta2).to(tl.float32), mask=valid)
    tl.store(to_ptr + 4 * T, (1 / tl.sqrt(correction2)).to(tl.float32), mask=valid)
    tl.store(to_ptr + 5 * T, eps.to(tl.float32), mask=valid)
    tl.store(to_ptr + 6 * T, (lr / correction1).to(tl.float32), mask=valid)


@triton.jit
def _update_chunk(
    addresses_ptr, coefficients_ptr, found_inf_ptr, grad_scale_ptr, tensor, start, end, T,
    HAS_COPY: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the values from ``start`` to ``end`` of a tensor. WHOLE: these are full BLOCKs of aligned tensors."""
    param_ptr = _pointer(addresses_ptr, tensor, tl.float32, WHOLE)
    grad_ptr = _pointer(addresses_ptr + T, tensor, tl.float32, WHOLE)
    exp_avg_ptr = _pointer(addresses_ptr + 2 * T, tensor, tl.float32, WHOLE)
    exp_avg_sq_ptr = _pointer(addresses_ptr + 3 * T, tensor, tl.float32, WHOLE)
    copy_ptr = _pointer(addresses_ptr + 4 * T, tensor, tl.bfloat16, WHOLE)
    coefficient_ptr = coefficients_ptr + tensor
    keep, weight1 = tl.load(coefficient_ptr), tl.load(coefficient_ptr + T)
    beta2, weight2 = tl.load(coefficient_ptr + 2 * T), tl.load(coefficient_ptr + 3 * T)
    correction2, eps = tl.load(coefficient_ptr + 4 * T), tl.load(coefficient_ptr + 5 * T)
    rate = tl.load(coefficient_ptr + 6 * T)
    is_finite = True if found_inf_ptr is None else tl.load(found_inf_ptr) == 0
    for first in range(start, end, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        valid = None if WHOLE else offsets < end
        param = tl.load(param_ptr + offsets, mask=valid)
        if is_finite:
            grad = tl.load(grad_ptr + offsets, mask=valid)
            exp_avg = tl.load(exp_avg_ptr + offsets, mask=valid)
            exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=valid)
            if grad_scale_ptr is not None:
                grad = divide(grad, tl.load(grad_scale_ptr))
            exp_avg = tl.where(weight1 > 0, exp_avg, grad) + (grad - exp_avg) * weight1
            exp_avg_sq = exp_avg_sq * beta2 + grad * weight2 * grad  # grad * grad would overflow sooner
            size = tl.sqrt_rn(exp_avg_sq) * correction2 + eps
            param = param * keep - divide(exp_avg, size) * rate
            tl.store(param_ptr + offsets, param, mask=valid)
            tl.store(exp_avg_ptr + offsets, exp_avg, mask=valid)
            tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=valid)
        if HAS_COPY:  # in a skipped step, too: the copy may be of older weights
            tl.store(copy_ptr + offsets, param.to(tl.bfloat16), mask=valid)


@triton.jit
def _adamw_steps_kernel(
    addresses_ptr,  # int64 [8, T]: param, grad, exp_avg, exp_avg_sq, copy, step, size, whether they are aligned
    chunks_ptr,  # int32 [chunks, 2]
    coefficients_ptr,  # fp32 [7, T]
    found_inf_ptr, grad_scale_ptr,  # fp32 scalars or None
    T,
    HAS_COPY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    size, is_aligned = tl.load(addresses_ptr + 6 * T + tensor), tl.load(addresses_ptr + 7 * T + tensor)
    if (start + CHUNK <= size) & (is_aligned != 0):
        _update_chunk(
            addresses_ptr, coefficients_ptr, found_inf_ptr, grad_scale_ptr, tensor, start, start + CHUNK, T,
            HAS_COPY, True, BLOCK,
        )  # fmt: skip
    else:
        _update_chunk(
            addresses_ptr, coefficients_ptr, found_inf_ptr, grad_scale_ptr, tensor, start,
            tl.minimum(start + CHUNK, size), T, HAS_COPY, False, BLOCK,
        )  # fmt: skip


def adamw_steps_forward(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    steps: list[Tensor],
    lr: list[float],
    beta1: list[float],
    beta2: list[float],
    eps: list[float],
    weight_decay: list[float],
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    columns = (params, grads, exp_avgs, exp_avg_sqs, copies or params, steps)
    addresses, options, chunks = tables(columns, (lr, beta1, beta2, eps, weight_decay))
    count = len(params)
    coefficients = params[0].new_empty(7, count)
    with torch.cuda.device_of(coefficients):
        _count_steps_kernel[(triton.cdiv(count, 128),)](addresses, options, coefficients, found_inf, count, BLOCK=128)
        if len(chunks):
            _adamw_steps_kernel[(len(chunks),)](
                addresses, chunks, coefficients, found_inf, grad_scale, count,
                HAS_COPY=bool(copies), CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
