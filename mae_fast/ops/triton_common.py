"""Helpers of the Triton kernels: tile shapes, accumulation dtypes, standardised pixels, sums of columns.

A fixed number of programs sums over rows, each over rows of its own, and a second launch adds the partial sums. Without
atomics, the same input gives the same bits on the same GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MULTIPROCESSORS = 132  # of an H100, for tensors without a device


def acc_dtype(*dtypes: torch.dtype) -> Any:
    """Accumulation dtype of a kernel: fp64 if one of ``dtypes`` is, else fp32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def element(dtype: torch.dtype) -> Any:
    """``dtype`` in Triton."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def tile(width: int, per_thread: int = 8) -> dict[str, int]:
    """``BLOCK_R`` rows by ``BLOCK_C`` columns for a kernel over rows of ``width`` contiguous values.

    ``per_thread`` values for each thread of the default four warps. Eight are one 128-bit access in 16-bit types. The
    columns divide ``width`` where a reasonable power of two does, so that no lane idles.
    """
    divisor = width & -width
    columns = min(divisor if divisor >= 64 else triton.next_power_of_2(width), 256)
    return {"BLOCK_R": max(1, 128 * per_thread // columns), "BLOCK_C": columns}


def grid(rows: int, width: int, block: dict[str, int]) -> tuple[int, int]:
    """Programs that cover ``rows`` x ``width`` values with tiles of ``block``."""
    return triton.cdiv(rows, block["BLOCK_R"]), triton.cdiv(width, block["BLOCK_C"])


def image_strides(images: Tensor) -> tuple[int, int, int, int]:
    """Element strides (n, c, h, w) of a batch, floating [N, C, H, W] or uint8 [N, H, W, C]."""
    n, *rest = images.stride()
    c, h, w = (rest[2], rest[0], rest[1]) if images.dtype == torch.uint8 else rest
    return n, c, h, w


@triton.jit
def load_row(ptr, col, in_row, ROWS: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """Values ``col`` of one row, for each of ROWS rows, [ROWS, BLOCK_C]; 0 where not ``in_row``.

    Every thread loads the values that it needs. A row loaded once would pass through shared memory and barriers.
    """
    offsets = col[None, :] + tl.zeros([ROWS, 1], tl.int32)
    return tl.load(ptr + offsets, mask=in_row[None, :], other=0).to(ACC_DTYPE)


@triton.jit
def divide(x, y):
    """x / y, correctly rounded. Triton's ``/`` is not for fp32, and ``div_rn`` does not support fp64."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def standardised(x, mean_ptr, std_ptr, channel, valid, STANDARDISE: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """Pixels ``x`` as numbers of type ACC_DTYPE, bytes standardised as torch rounds it, NaN where not ``valid``."""
    value = x.to(ACC_DTYPE)
    if STANDARDISE:
        mean = tl.load(mean_ptr + channel).to(ACC_DTYPE)
        std = tl.load(std_ptr + channel).to(ACC_DTYPE)
        value = divide(divide(value, tl.full(value.shape, 255, ACC_DTYPE)) - mean, std)
    return tl.where(valid, value, float("nan"))


def programs(x: Tensor, tiles: int, at_once: int) -> int:
    """Number of programs that share ``tiles``, at most ``at_once`` per multiprocessor, so that all run at once."""
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS
    return min(tiles, count * at_once)


@triton.jit
def _column_sums_kernel(
    partial_ptr,  # [count, sums, D]
    first_ptr, second_ptr, third_ptr,  # [D] each; None if there are fewer sums
    count,
    D: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    which, sums = tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = col < D
    total = tl.zeros([BLOCK_R, BLOCK_C], ACC_DTYPE)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        offsets = (row * sums + which)[:, None] * D + col[None, :]
        total += tl.load(partial_ptr + offsets, mask=(row < count)[:, None] & in_row[None, :], other=0)
    result = tl.sum(total, axis=0)
    tl.store(first_ptr + col, result, mask=in_row & (which == 0))
    if second_ptr is not None:
        tl.store(second_ptr + col, result, mask=in_row & (which == 1))
    if third_ptr is not None:
        tl.store(third_ptr + col, result, mask=in_row & (which == 2))


def column_sums(partial: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """``partial.sum(0).unbind()``, each in its dtype, for partial [count, sums, D] with at most three sums."""
    count, sums, width = partial.shape
    out = [partial.new_empty(width, dtype=dtype) for dtype in dtypes]
    _column_sums_kernel[(triton.cdiv(width, 32), sums)](
        partial, *out, *(None,) * (3 - sums), count,
        D=width, ACC_DTYPE=acc_dtype(partial.dtype), BLOCK_R=128, BLOCK_C=32, num_warps=8,
    )  # fmt: skip
    return out
