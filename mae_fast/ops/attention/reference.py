"""Specification of ``attention`` and of its gradient, in eager torch."""

import torch
from torch import Tensor


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:  # [N, H, T, d] each, at least fp32
    n, t, width = qkv.shape
    qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = qkv.reshape(n, t, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def attention_reference(qkv: Tensor, num_heads: int) -> Tensor:  # [N, T, 3*H*d] -> [N, T, H*d]
    q, k, v = _heads(qkv, num_heads)
    p = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)
    out: Tensor = p @ v
    return out.transpose(1, 2).flatten(2).to(qkv.dtype, copy=True)


def attention_backward_reference(grad: Tensor, qkv: Tensor, num_heads: int) -> Tensor:  # [N, T, H*d], [N, T, 3*H*d]
    (q, k, v), scale = _heads(qkv, num_heads), (qkv.shape[2] // (3 * num_heads)) ** -0.5
    n, t, width = grad.shape
    dout = grad.to(q.dtype).reshape(n, t, num_heads, width // num_heads).transpose(1, 2)
    p = (q @ k.transpose(2, 3) * scale).softmax(-1)
    dp = dout @ v.transpose(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dqkv = torch.stack([ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ dout])  # [3, N, H, T, d]
    return dqkv.permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype, copy=True)


def pack_heads_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # [N, T, H, d] each
    """[N, T, 3, H, d], and the sum of its rows [3*H*d], at least fp32."""
    packed = torch.stack([q, k, v], 2).contiguous()
    rows = packed.to(torch.promote_types(q.dtype, torch.float32)).flatten(2)
    return packed, rows.sum((0, 1))
