"""The decoder's input: visible tokens and mask tokens plus positions, in image order or with the mask tokens last.

Equals: append mask tokens, un-shuffle, class token, add positions.

Shapes: N images, L patches, K visible, M mask tokens (L - K, or fewer), E decoder width.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import forbid_double_backward, needs_torch_ops
from ..native import HAS_TRITON
from ..patches import check_tensor
from . import reference

torch.library.define(
    "mae_fast::decoder_tokens",
    "(Tensor x, Tensor mask_token, Tensor ids_restore, Tensor pos, bool image_order=True, "
    "SymInt? num_mask_tokens=None) -> Tensor",
)
torch.library.define(
    "mae_fast::decoder_tokens_backward",
    "(Tensor grad, Tensor ids_restore, SymInt num_keep, ScalarType x_dtype, ScalarType token_dtype, "
    "ScalarType pos_dtype, bool needs_pos, bool image_order=True) -> (Tensor, Tensor, Tensor)",
)

# Any device: eager reference. CPU: csrc/cpu/decoder_tokens.cpp registers itself. CUDA: Triton.
torch.library.impl("mae_fast::decoder_tokens", "default", reference.decoder_tokens_reference)
torch.library.impl("mae_fast::decoder_tokens_backward", "default", reference.decoder_tokens_backward_reference)
if HAS_TRITON:
    from . import triton_kernels

    torch.library.impl("mae_fast::decoder_tokens", "CUDA", triton_kernels.decoder_tokens_forward)
    torch.library.impl("mae_fast::decoder_tokens_backward", "CUDA", triton_kernels.decoder_tokens_backward)


@torch.library.register_fake("mae_fast::decoder_tokens")
def _(x, mask_token, ids_restore, pos, image_order=True, num_mask_tokens=None):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), pos.dtype)
    tokens = ids_restore.shape[1] + 1 if num_mask_tokens is None else x.shape[1] + num_mask_tokens
    return x.new_empty((x.shape[0], tokens, x.shape[2]), dtype=dtype)


@torch.library.register_fake("mae_fast::decoder_tokens_backward")
def _(grad, ids_restore, num_keep, x_dtype, token_dtype, pos_dtype, needs_pos, image_order=True):  # type: ignore[no-untyped-def]
    n, tokens, width = grad.shape[0], 1 + ids_restore.shape[1], grad.shape[2]
    return (
        grad.new_empty((n, 1 + num_keep, width), dtype=x_dtype),
        grad.new_empty((1, 1, width), dtype=token_dtype),
        grad.new_empty((1, tokens, width) if needs_pos else (0,), dtype=pos_dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask_token, ids_restore, pos, ctx.image_order, _ = inputs
    ctx.save_for_backward(ids_restore)
    ctx.num_keep = x.shape[1] - 1
    ctx.dtypes = (x.dtype, mask_token.dtype, pos.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids_restore,) = ctx.saved_tensors
    needs_x, needs_token, _, needs_pos = ctx.needs_input_grad[:4]  # shorter if the last arguments have their defaults
    grad_x, grad_token, grad_pos = torch.ops.mae_fast.decoder_tokens_backward(
        grad, ids_restore, ctx.num_keep, *ctx.dtypes, needs_pos, ctx.image_order
    )
    grads = (grad_x if needs_x else None, grad_token if needs_token else None, None, grad_pos if needs_pos else None)
    return *grads, None, None


torch.library.register_autograd("mae_fast::decoder_tokens", _backward, setup_context=_save)
forbid_double_backward("decoder_tokens_backward")


def decoder_tokens(
    x: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    pos: Tensor,
    *,
    image_order: bool = True,
    num_mask_tokens: int | None = None,
) -> Tensor:
    """Same value as

        shuffled = torch.cat([x[:, 1:], mask_token.expand(N, L - K, -1)], dim=1)            # [N, L, E]
        ordered = shuffled.gather(1, ids_restore[:, :, None].expand(-1, -1, E))             # [N, L, E]
        torch.cat([x[:, :1], ordered], dim=1) + pos                                         # [N, 1+L, E]

    in one pass. Without ``image_order``, the tokens of patches stay in the shuffled order, each with its own position:

        torch.cat([x[:, :1] + pos[:, :1], shuffled + pos[0, 1 + ids_restore.argsort(1)]], dim=1)

    The gradient of ``mask_token`` is summed in fp32 (fp64 for fp64 input).

    Args:
        x: [N, 1+K, E], class token first, then the visible patches in the shuffled order of ``ids_keep``.
        mask_token: [1, 1, E].
        ids_restore: [N, L] int64, a permutation per image: the index of each patch in the shuffled order.
        pos: [1, 1+L, E], position table with the class token's row first.
        image_order: if False, the visible patches come first and the mask tokens last.
        num_mask_tokens: M, only without ``image_order``: keep the first M mask tokens. ``None``: all L - K.

    Returns:
        [N, 1+L, E], or [N, 1+K+M, E], in the widest of the inputs' dtypes.

    Raises:
        ValueError: on mismatched shapes, or if ``num_mask_tokens`` is out of range or given with ``image_order``.
        IndexError: from the CPU kernel on an index outside 0..L-1.
    """
    check_tensor("decoder_tokens: x", x)
    check_tensor("decoder_tokens: ids_restore", ids_restore)
    if x.ndim != 3 or ids_restore.ndim != 2 or ids_restore.shape[0] != x.shape[0] or ids_restore.dtype != torch.int64:
        raise ValueError(
            "decoder_tokens: x must be [N, 1+K, E] and ids_restore int64 [N, L], "
            f"got {list(x.shape)} and {ids_restore.dtype} {list(ids_restore.shape)}"
        )
    tokens, width = ids_restore.shape[1] + 1, x.shape[2]
    if not 1 <= x.shape[1] <= tokens:
        raise ValueError(f"decoder_tokens: x must have 1 to {tokens} tokens, got {list(x.shape)}")
    if mask_token.shape != (1, 1, width) or pos.shape != (1, tokens, width):
        raise ValueError(
            f"decoder_tokens: mask_token must be [1, 1, {width}] and pos [1, {tokens}, {width}], "
            f"got {list(mask_token.shape)} and {list(pos.shape)}"
        )
    if num_mask_tokens is not None and (image_order or not 0 <= num_mask_tokens <= tokens - x.shape[1]):
        raise ValueError(
            f"decoder_tokens: num_mask_tokens must be in 0..{tokens - x.shape[1]} and needs image_order=False, "
            f"got num_mask_tokens={num_mask_tokens} and image_order={image_order}"
        )
    op = reference.decoder_tokens_reference if needs_torch_ops() else torch.ops.mae_fast.decoder_tokens
    out: Tensor = op(x, mask_token, ids_restore, pos, image_order, num_mask_tokens)
    return out
