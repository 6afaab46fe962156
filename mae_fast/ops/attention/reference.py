"""Specification of ``attention`` and of its gradient, in eager torch."""

import math

import torch
from torch import Tensor


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:  # [N, H, T, d] each, at least fp32
    n, t, width = qkv.shape
    qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = qkv.reshape(n, t, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def attention_reference(
    qkv: Tensor,  # [N, T, 3*H*d]
    bias: Tensor | None,
    num_heads: int,
    save_lse: bool,
    first_query: int = 0,
) -> tuple[Tensor, Tensor]:  # [N, Q, H*d]; log-sum-exp of each row to base 2 [N, H, Q], or empty
    q, k, v = _heads(qkv, num_heads)
    q = q[:, :, first_query:]
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).to(qkv.dtype, copy=True)
    lse = scores.logsumexp(-1).float() / math.log(2) if save_lse else qkv.new_empty(0, dtype=torch.float32)
    return out, lse


def attention_backward_reference(
    grad: Tensor,  # [N, Q, H*d]
    qkv: Tensor,  # [N, T, 3*H*d]
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,  # [3*H*d]
    num_heads: int,
    first_query: int = 0,
) -> tuple[Tensor, Tensor]:  # gradients of qkv and bias (empty without bias)
    (q, k, v), scale = _heads(qkv, num_heads), (qkv.shape[2] // (3 * num_heads)) ** -0.5
    n, queries, width = grad.shape
    q = q[:, :, first_query:]
    dout = grad.to(q.dtype).reshape(n, queries, num_heads, width // num_heads).transpose(1, 2)
    p = (q @ k.transpose(2, 3) * scale).softmax(-1)
    dp = dout @ v.transpose(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq = torch.nn.functional.pad(ds @ k, (0, 0, first_query, 0))
    dqkv = torch.stack([dq, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ dout])  # [3, N, H, T, d]
    dqkv = dqkv.permute(1, 3, 0, 2, 4).flatten(2)
    dbias = qkv.new_empty(0) if bias is None else dqkv.sum((0, 1)).to(bias.dtype)
    return dqkv.to(qkv.dtype, copy=True), dbias
