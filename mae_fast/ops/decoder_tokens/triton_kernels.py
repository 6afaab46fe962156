"""``decoder_tokens`` and its gradient in Triton.

Shapes: N images, L patches, K visible, M mask tokens (L - K, or fewer), E decoder width. The kernels raise no error on
an index outside 0..L-1: it gives NaN in image order, and never an access outside the buffers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..triton_common import acc_dtype, grid, tile

CHUNK = 64  # tokens per program of the backward


@triton.jit
def _decoder_tokens_fwd_kernel(
    x_ptr, mask_token_ptr, ids_restore_ptr, pos_ptr,  # [N*(1+K), E], [E], [N*L], [1+L, E]
    out_ptr,  # [N*(1+K+M), E]
    rows, K, L, LAST,  # LAST = K + M, the last token that is written
    IMAGE_ORDER: tl.constexpr,
    E: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_bounds = (row < rows)[:, None] & (col < E)[None, :]
    n, token = row // (1 + L), row % (1 + L)  # token 0: the class token
    index = tl.load(ids_restore_ptr + (row - n - 1).to(tl.int64), mask=(token > 0) & (row < rows), other=-1)
    valid = (token == 0) | ((index >= 0) & (index < LAST))
    if not IMAGE_ORDER:
        in_bounds = in_bounds & valid[:, None]
    visible = (index < K) & valid  # -1: the class token
    source = n.to(tl.int64) * (1 + K) + 1 + index
    x = tl.load(x_ptr + source[:, None] * E + col[None, :], mask=visible[:, None] & in_bounds, other=0).to(ACC_DTYPE)
    mask_token = tl.load(mask_token_ptr + col, mask=col < E, other=0).to(ACC_DTYPE)
    pos = tl.load(pos_ptr + token[:, None] * E + col[None, :], mask=in_bounds, other=0).to(ACC_DTYPE)
    out = tl.where(visible[:, None], x, mask_token[None, :]) + pos
    if IMAGE_ORDER:
        out = tl.where(valid[:, None], out, float("nan"))
        target = row.to(tl.int64)
    else:
        target = n.to(tl.int64) * (1 + LAST) + 1 + index
    tl.store(out_ptr + target[:, None] * E + col[None, :], out, mask=in_bounds)


@triton.jit
def _decoder_tokens_bwd_kernel(
    dout_ptr, ids_restore_ptr,  # [N*(1+L), E], or [N*(1+K+M), E]; [N*L]
    dx_ptr, partial_ptr,  # [N*(1+K), E], [N*chunks, E]: the mask token's gradient, summed over a chunk of tokens
    K, L,  # K + M in place of L without image order
    IMAGE_ORDER: tl.constexpr,
    E: tl.constexpr, ACC_DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = col < E
    dmask_token = tl.zeros([BLOCK_R, BLOCK_C], ACC_DTYPE)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, 1 + L), BLOCK_R):
        token = start + tl.arange(0, BLOCK_R)
        in_bounds = (token <= L)[:, None] & in_row[None, :]
        if IMAGE_ORDER:
            index = tl.load(ids_restore_ptr + n * L + token - 1, mask=(token > 0) & (token <= L), other=-1)
        else:
            index = (token - 1).to(tl.int64)
        valid = (token == 0) | ((index >= 0) & (index < L))
        visible = (index < K) & valid
        dout = tl.load(dout_ptr + (n * (1 + L) + token)[:, None] * E + col[None, :], mask=in_bounds, other=0)
        target = (n * (1 + K) + 1 + index)[:, None] * E + col[None, :]
        tl.store(dx_ptr + target, dout, mask=visible[:, None] & in_bounds)
        dmask_token += tl.where(visible[:, None], 0, dout.to(ACC_DTYPE))
    partial = (n * tl.num_programs(1) + chunk) * E + col
    tl.store(partial_ptr + partial, tl.sum(dmask_token, axis=0), mask=in_row)


def decoder_tokens_forward(
    x: Tensor,  # [N, 1+K, E]
    mask_token: Tensor,  # [1, 1, E]
    ids_restore: Tensor,  # [N, L]
    pos: Tensor,  # [1, 1+L, E]
    image_order: bool = True,
    num_mask_tokens: int | None = None,
) -> Tensor:  # [N, 1+L, E], or [N, 1+K+M, E]
    n, length = ids_restore.shape
    width, num_keep = x.shape[2], x.shape[1] - 1
    last = length if num_mask_tokens is None else num_keep + num_mask_tokens
    # Eager torch concatenates x and the mask token in their common dtype. ``dtype`` represents all values of it.
    dtype = torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), pos.dtype)
    out = x.new_empty((n, 1 + last, width), dtype=dtype)
    if out.numel():
        block = tile(width)
        with torch.cuda.device_of(x):
            _decoder_tokens_fwd_kernel[grid(n * (1 + length), width, block)](
                x.contiguous(), mask_token.contiguous(), ids_restore.contiguous(), pos.contiguous(), out,
                n * (1 + length), num_keep, length, last,
                IMAGE_ORDER=image_order, E=width, ACC_DTYPE=acc_dtype(dtype), **block,
            )  # fmt: skip
    return out


def decoder_tokens_backward(
    grad: Tensor,  # [N, 1+L, E], or [N, 1+K+M, E]
    ids_restore: Tensor,  # [N, L]
    num_keep: int,
    x_dtype: torch.dtype,
    token_dtype: torch.dtype,
    pos_dtype: torch.dtype,
    needs_pos: bool,
    image_order: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # of x [N, 1+K, E], mask_token [1, 1, E], pos (empty unless needed)
    n, tokens, width = grad.shape
    grad, accumulate = grad.contiguous(), torch.promote_types(grad.dtype, torch.float32)
    grad_x = grad.new_empty((n, 1 + num_keep, width), dtype=x_dtype)
    chunks = triton.cdiv(tokens, CHUNK)
    partial = grad.new_empty((n * chunks, width), dtype=accumulate)
    if grad.numel():
        block = tile(width)
        with torch.cuda.device_of(grad):
            _decoder_tokens_bwd_kernel[(n, chunks, triton.cdiv(width, block["BLOCK_C"]))](
                grad, ids_restore.contiguous(), grad_x, partial,
                num_keep, tokens - 1,
                IMAGE_ORDER=image_order, E=width, ACC_DTYPE=acc_dtype(grad.dtype), CHUNK=CHUNK, **block,
            )  # fmt: skip
    grad_token = partial.sum(0).reshape(1, 1, width)
    if needs_pos and not image_order:
        shuffled = F.pad(grad[:, 1:], (0, 0, 0, 1 + ids_restore.shape[1] - tokens))
        ordered = shuffled.gather(1, ids_restore[:, :, None].expand(-1, -1, width))
        grad = torch.cat([grad[:, :1], ordered], dim=1)
    grad_pos = grad.sum(0, keepdim=True, dtype=accumulate) if needs_pos else grad.new_empty(0)
    return grad_x, grad_token.to(token_dtype), grad_pos.to(pos_dtype)
