"""Specification of ``decoder_tokens`` and of its gradient, in eager torch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def decoder_tokens_reference(
    x: Tensor,  # [N, 1+K, E]
    mask_token: Tensor,  # [1, 1, E]
    ids_restore: Tensor,  # [N, L]
    pos: Tensor,  # [1, 1+L, E]
    image_order: bool = True,
    num_mask_tokens: int | None = None,
) -> Tensor:  # [N, 1+L, E], or [N, 1+K+M, E] with M mask tokens
    n, _, width = x.shape
    num_removed = ids_restore.shape[1] + 1 - x.shape[1] if num_mask_tokens is None else num_mask_tokens
    dtype = torch.promote_types(x.dtype, mask_token.dtype)
    shuffled = torch.cat([x[:, 1:].to(dtype), mask_token.expand(n, num_removed, -1).to(dtype)], dim=1)
    if not image_order:
        rows = 1 + ids_restore.argsort(dim=1)[:, : shuffled.shape[1]]
        return torch.cat([x[:, :1].to(dtype) + pos[:, :1], shuffled + pos[0, rows]], dim=1)
    ordered = shuffled.gather(1, ids_restore[:, :, None].expand(-1, -1, width))
    return torch.cat([x[:, :1].to(dtype), ordered], dim=1) + pos


def decoder_tokens_backward_reference(
    grad: Tensor,  # [N, 1+L, E], or [N, 1+K+M, E] with M mask tokens
    ids_restore: Tensor,  # [N, L]
    num_keep: int,
    x_dtype: torch.dtype,
    token_dtype: torch.dtype,
    pos_dtype: torch.dtype,
    needs_pos: bool,
    image_order: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # of x [N, 1+K, E], mask_token [1, 1, E], pos (empty unless needed)
    acc_dtype = torch.promote_types(grad.dtype, torch.float32)
    grad = F.pad(grad, (0, 0, 0, 1 + ids_restore.shape[1] - grad.shape[1]))  # 0 for the patches without a token
    rows = (ids_restore.argsort(dim=1) if image_order else ids_restore)[:, :, None].expand(-1, -1, grad.shape[2])
    other_order = grad[:, 1:].gather(1, rows)
    shuffled, ordered = (other_order, grad[:, 1:]) if image_order else (grad[:, 1:], other_order)
    grad_x = torch.cat([grad[:, :1], shuffled[:, :num_keep]], dim=1)
    grad_token = shuffled[:, num_keep:].sum((0, 1), dtype=acc_dtype).reshape(1, 1, -1)
    in_order = torch.cat([grad[:, :1], ordered], dim=1)
    grad_pos = in_order.sum(0, keepdim=True, dtype=acc_dtype) if needs_pos else grad.new_empty(0)
    return grad_x.to(x_dtype), grad_token.to(token_dtype), grad_pos.to(pos_dtype)
