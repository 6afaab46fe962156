"""Helpers of the Triton kernels: tile shapes, accumulation dtypes, standardised pixels, sums of columns.

For a sum over rows, each program sums its own rows, and the last programs to finish add up the partial sums in a fixed
order. The kernels add nothing atomically, so the same input gives the same bits on the same GPU.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MULTIPROCESSORS = 132  # of an H100, for tensors without a device


def acc_dtype(*dtypes: torch.dtype) -> Any:
    """Accumulation dtype of a kernel: fp64 if one of ``dtypes`` is fp64, else fp32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def element(dtype: torch.dtype) -> Any:
    """``dtype`` in Triton."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def tile(width: int, per_thread: int = 8) -> dict[str, int]:
    """Tile size for a kernel over rows of ``width`` contiguous values: ``BLOCK_R`` rows by ``BLOCK_C`` columns.

    Each thread of the default four warps gets ``per_thread`` values. Eight 16-bit values are one 128-bit access.
    ``BLOCK_C`` divides ``width`` if a large enough power of two does, so that no lane idles.
    """
    divisor = width & -width
    columns = min(divisor if divisor >= 64 else triton.next_power_of_2(width), 256)
    return {"BLOCK_R": max(1, 128 * per_thread // columns), "BLOCK_C": columns}


def grid(rows: int, width: int, block: dict[str, int]) -> tuple[int, int]:
    """The grid of programs that covers ``rows`` x ``width`` values with tiles of ``block``."""
    return triton.cdiv(rows, block["BLOCK_R"]), triton.cdiv(width, block["BLOCK_C"])


def image_strides(images: Tensor, raw: bool) -> tuple[int, int, int, int]:
    """Element strides (n, c, h, w) of a batch [N, H, W, C] if ``raw``, else [N, C, H, W]."""
    n, *rest = images.stride()
    c, h, w = (rest[2], rest[0], rest[1]) if raw else rest
    return n, c, h, w


@triton.jit
def load_row(ptr, col, in_row, ROWS: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """Load the values ``col`` of one row, repeated for ROWS rows, [ROWS, BLOCK_C]; 0 where not ``in_row``.

    Every thread loads the values that it needs. Loading the row once would need shared memory and barriers.
    """
    offsets = col[None, :] + tl.zeros([ROWS, 1], tl.int32)
    return tl.load(ptr + offsets, mask=in_row[None, :], other=0).to(ACC_DTYPE)


@triton.jit
def divide(x, y):
    """x / y, correctly rounded. Triton's ``/`` is inexact for fp32, and ``div_rn`` does not support fp64."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def standardised(x, mean_ptr, std_ptr, channel, STANDARDISE: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """Convert pixels ``x`` to ACC_DTYPE. Raw pixels are also standardised, with the rounding of torch."""
    value = x.to(ACC_DTYPE)
    if STANDARDISE:
        mean = tl.load(mean_ptr + channel).to(ACC_DTYPE)
        std = tl.load(std_ptr + channel).to(ACC_DTYPE)
        if x.dtype == tl.uint8:
            value = divide(value, tl.full(value.shape, 255, ACC_DTYPE))
        value = divide(value - mean, std)
    return value


@triton.jit
def is_missing(x, nodata):
    """Mask of the raw pixels ``x`` that are NaN or equal ``nodata``."""
    missing = x != x
    if nodata is not None:
        if x.dtype.is_floating():  # compare in the dtype of the pixels
            missing |= x == tl.full(x.shape, nodata, x.dtype)
        else:
            missing |= x.to(tl.float32) == nodata
    return missing


def programs(x: Tensor, tiles: int, at_once: int) -> int:
    """Number of programs that share ``tiles``. At most ``at_once`` per multiprocessor, so that all run concurrently."""
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS
    return min(tiles, count * at_once)


GROUP = tl.constexpr(16)  # partial sums that one program adds up


@triton.jit
def _is_last(counter_ptr, expected):
    """Whether this is the last of ``expected`` programs to call this. It then sees the stores of the others."""
    tl.debug_barrier()  # all threads must store before the program is counted
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)  # for the next launch
    return last


@triton.jit
def _sum_rows(ptrs, count, stride, valid, ACC_DTYPE: tl.constexpr):
    """Sum of ``count`` rows from ``ptrs`` on. ``.cg`` bypasses the L1 cache, which may hold old values."""
    total = tl.zeros(valid.shape, ACC_DTYPE)
    for start in range(0, count, GROUP):
        for i in tl.static_range(GROUP):
            in_bounds = valid & (start + i < count)
            total += tl.load(ptrs + (start + i) * stride, mask=in_bounds, other=0, cache_modifier=".cg")
    return total


@triton.jit
def column_sums(
    partial_ptr, counters_ptr,  # [count, sums * width], [1 + groups]
    first_ptr, second_ptr, third_ptr,  # [width] each; None if there are fewer sums
    program, count, stride, width,
    ACC_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the ``count`` rows of ``partial_ptr``, ``stride`` apart, after every program has stored its own row.

    Programs form groups of GROUP. The last program of a group to finish adds up the rows of the group and stores the
    sum in the first of them. The last of these programs adds up the sums of the groups. No program waits for another.
    The order of the additions is fixed, whichever program adds, so the same input gives the same bits.
    """
    sums: tl.constexpr = 1 + (second_ptr is not None) + (third_ptr is not None)
    group, groups = program // GROUP, tl.cdiv(count, GROUP)
    members = tl.minimum(count - group * GROUP, GROUP)
    if _is_last(counters_ptr + 1 + group, members):
        for start in range(0, sums * width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            ptrs, valid = partial_ptr + group * GROUP * stride + col, col < sums * width
            tl.store(ptrs, _sum_rows(ptrs, members, stride, valid, ACC_DTYPE), mask=valid)
        if _is_last(counters_ptr, groups):
            for start in range(0, sums * width, BLOCK):
                col = start + tl.arange(0, BLOCK)
                total = _sum_rows(partial_ptr + col, groups, GROUP * stride, col < sums * width, ACC_DTYPE)
                tl.store(first_ptr + col, total, mask=col < width)
                if second_ptr is not None:
                    tl.store(second_ptr + col - width, total, mask=(col >= width) & (col < 2 * width))
                if third_ptr is not None:
                    tl.store(third_ptr + col - 2 * width, total, mask=(col >= 2 * width) & (col < 3 * width))


class _Counters:
    """Zeroed memory of one GPU for the counters of ``column_sums``, which resets them to zero.

    Launches on one stream run one after another and share the same counters. A launch captured in a CUDA graph may run
    in parallel with others, so it gets counters that no other launch ever uses.
    """

    SIZE, OF_A_STREAM = 2**20, 2**13

    def __init__(self, device: torch.device) -> None:
        # Allocate in another thread, so that the memory is not part of the memory pool of a CUDA graph.
        with ThreadPoolExecutor(1) as thread:
            self.memory = thread.submit(self._allocate, device).result()
        self.used, self.streams, self.lock = 0, dict[int, Tensor](), Lock()

    def _allocate(self, device: torch.device) -> Tensor:
        zeros = torch.zeros(self.SIZE, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        return zeros

    def take(self, count: int) -> Tensor | None:
        """``count`` counters that no later call gets, or None if too few are left."""
        with self.lock:
            if self.used + count > self.SIZE:
                return None
            self.used += count
            return self.memory[self.used - count : self.used]

    def of_stream(self, stream: int) -> Tensor | None:
        if stream not in self.streams and (taken := self.take(self.OF_A_STREAM)) is not None:
            self.streams[stream] = taken
        return self.streams.get(stream)


_counters: dict[torch.device, _Counters] = {}


def _zeros(x: Tensor, count: int) -> Tensor | None:
    """At least ``count`` zeros on the GPU of ``x``, without a kernel launch, or None."""
    with torch.cuda.device_of(x):
        capturing = torch.cuda.is_current_stream_capturing()
    if x.device not in _counters:
        if capturing:
            return None
        _counters[x.device] = _Counters(x.device)
    if capturing:
        return _counters[x.device].take(count)
    found = _counters[x.device].of_stream(torch.cuda.current_stream(x.device).cuda_stream)
    return None if found is None or len(found) < count else found


def counters(x: Tensor, count: int) -> Tensor:
    """At least ``count`` zeros on the device of ``x``: the counters of one launch of a kernel with ``column_sums``."""
    found = _zeros(x, count) if x.is_cuda else None
    return x.new_zeros(count, dtype=torch.int32) if found is None else found


def num_counters(count: int) -> int:
    """The number of counters that ``column_sums`` of ``count`` programs needs."""
    return 1 + -(-count // int(GROUP.value))
