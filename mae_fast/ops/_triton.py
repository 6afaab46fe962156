"""What the ops' Triton kernels share: tile shapes, accumulation types, standardised pixels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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
def _divide(x, y):
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
        value = _divide(_divide(value, tl.full(value.shape, 255, WIDE)) - mean, std)
    return tl.where(known, value, float("nan"))
