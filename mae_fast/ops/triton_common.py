"""What the ops' Triton kernels share: tile shapes, accumulation types, standardised pixels, sums of columns.

A sum over rows is that of a fixed number of programs, each over rows of its own, and a second launch adds these up. No
atomics: the same input gives the same bits on the same GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MULTIPROCESSORS = 132  # an H100's, where no device says


def wide(*dtypes: torch.dtype) -> Any:
    """Accumulation type of a kernel: fp64 where one of ``dtypes`` is, else fp32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def element(dtype: torch.dtype) -> Any:
    """Triton's name of ``dtype``."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def tile(width: int) -> dict[str, int]:
    """``BLOCK_R`` rows by ``BLOCK_C`` columns for a kernel over rows of ``width`` contiguous values.

    1024 values for the default four warps, eight a thread: one 128-bit access in 16-bit types. The columns divide
    ``width`` where a reasonable power of two does, so that no lane idles.
    """
    divisor = width & -width
    columns = min(divisor if divisor >= 64 else triton.next_power_of_2(width), 256)
    return {"BLOCK_R": max(1, 1024 // columns), "BLOCK_C": columns}


def grid(rows: int, width: int, block: dict[str, int]) -> tuple[int, int]:
    """Programs that cover ``rows`` x ``width`` values with tiles of ``block``."""
    return triton.cdiv(rows, block["BLOCK_R"]), triton.cdiv(width, block["BLOCK_C"])


def image_strides(images: Tensor) -> tuple[int, int, int, int]:
    """Element strides (n, c, h, w) of a batch, floating [N, C, H, W] or uint8 [N, H, W, C]."""
    n, *rest = images.stride()
    c, h, w = (rest[2], rest[0], rest[1]) if images.dtype == torch.uint8 else rest
    return n, c, h, w


@triton.jit
def divide(x, y):
    """x / y, correctly rounded: Triton's ``/`` is not for fp32, and ``div_rn`` knows no fp64."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def standardised(x, mean_ptr, std_ptr, channel, known, STANDARDISE: tl.constexpr, WIDE: tl.constexpr):
    """Pixels ``x`` as numbers of type WIDE, bytes standardised as torch rounds it, NaN where not ``known``."""
    value = x.to(WIDE)
    if STANDARDISE:
        mean = tl.load(mean_ptr + channel).to(WIDE)
        std = tl.load(std_ptr + channel).to(WIDE)
        value = divide(divide(value, tl.full(value.shape, 255, WIDE)) - mean, std)
    return tl.where(known, value, float("nan"))


def programs(x: Tensor, tiles: int, at_once: int) -> int:
    """How many programs share ``tiles``, ``at_once`` on a multiprocessor: all of them run from the start."""
    known = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS
    return min(tiles, known * at_once)


@triton.jit
def _column_sums_kernel(
    partial_ptr,  # [count, sums, D]
    first_ptr, second_ptr, third_ptr,  # [D] each; None where there are fewer sums
    count,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    which, sums = tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = col < D
    total = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        place = (row * sums + which)[:, None] * D + col[None, :]
        total += tl.load(partial_ptr + place, mask=(row < count)[:, None] & in_row[None, :], other=0)
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
        partial, *out, *(None,) * (3 - sums), count, D=width, WIDE=wide(partial.dtype), BLOCK_R=128, BLOCK_C=32,
        num_warps=8,
    )  # fmt: skip
    return out
