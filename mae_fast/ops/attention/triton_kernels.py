"""``pack_heads`` in Triton: three tensors into one packed projection, and the sums of its columns, in one pass.

Shapes: R = N * T rows, W = H * d values of each of q, k and v in a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import acc_dtype, column_sums, grid, programs, tile
from . import reference

AT_ONCE = 8  # programs per multiprocessor


@triton.jit
def _pack_heads_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # [R, W] each
    out_ptr, partial_ptr,  # [R, 3*W], [programs, 1, 3*W]
    rows, W,
    ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    which, col = tl.program_id(2), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], ACC_DTYPE)
    for part in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = part * BLOCK_R + tl.arange(0, BLOCK_R)
        in_bounds = (row < rows)[:, None] & (col < W)[None, :]
        source = row.to(tl.int64)[:, None] * W + col[None, :]
        if which == 0:  # the compiler does not see the alignment of a selected pointer
            x = tl.load(q_ptr + source, mask=in_bounds, other=0)
        elif which == 1:
            x = tl.load(k_ptr + source, mask=in_bounds, other=0)
        else:
            x = tl.load(v_ptr + source, mask=in_bounds, other=0)
        offsets = row.to(tl.int64)[:, None] * (3 * W) + (which * W + col)[None, :]
        tl.store(out_ptr + offsets, x, mask=in_bounds)
        total += x.to(ACC_DTYPE)
    partial = partial_ptr + tl.program_id(0) * (3 * W) + which * W + col
    tl.store(partial, tl.sum(total, axis=0), mask=col < W)


def pack_heads_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # [N, T, H, d] each
    if not q.numel():
        return reference.pack_heads_reference(q, k, v)
    n, t, heads, dim = q.shape
    width, block = heads * dim, tile(heads * dim)
    tiles, columns = grid(n * t, width, block)
    out = q.new_empty((n, t, 3, heads, dim))
    count = max(1, programs(q, 3 * tiles * columns, AT_ONCE) // (3 * columns))
    partial = q.new_empty((count, 1, 3 * width), dtype=torch.promote_types(q.dtype, torch.float32))
    with torch.cuda.device_of(q):
        _pack_heads_fwd_kernel[(count, columns, 3)](
            q.contiguous(), k.contiguous(), v.contiguous(), out, partial,
            n * t, width, ACC_DTYPE=acc_dtype(q.dtype), **block,
        )  # fmt: skip
        (sums,) = column_sums(partial, partial.dtype)
    return out, sums
