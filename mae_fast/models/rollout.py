"""Attention maps of an encoder: the class token's attention in the last block, and attention rollout (Abnar & Zuidema,
"Quantifying Attention Flow in Transformers", ACL 2020).

The fused attention op does not return its weights. They are computed here from the normed input of each block.

Shapes: N images, T = 1 + L tokens, D width, H heads of width d, h x w grid of patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Attention, apply_block, apply_linear
from .features import Backbone
from .residual import Residual


class AttentionMaps(NamedTuple):
    """The contribution of each patch to the class token: shares from 0 to 1, in fp32 or wider."""

    heads: Tensor  # [N, H, h, w], attention of the class token to the patches in the last block
    rollout: Tensor  # [N, h, w], attention of the class token through all blocks

    def __repr__(self) -> str:
        return f"AttentionMaps(heads={list(self.heads.shape)}, rollout={list(self.rollout.shape)})"


@torch.no_grad()
def attention_maps(model: Backbone, images: Tensor) -> AttentionMaps:
    """The attention of the class token to all patches of ``images``.

    The rollout averages the heads of each block, adds the identity for the residual connection, normalizes the rows,
    and multiplies the matrices of all blocks. A map sums to less than 1: the rest is the class token's own share.

    Args:
        model: an autoencoder or a classifier, in evaluation mode.
        images: floating [N, C, H, W], standardised, or raw pixels [N, H, W, C]. Sides are multiples of the patch size.

    Raises:
        ValueError: if the shape of the images is wrong, or the model has no blocks, or blocks of another package.
    """
    grid = model.patch_grid(images)
    residual = Residual(model.embed_patches(images, None, grid))
    rollout = heads = None
    for i, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if not isinstance(attention, Attention) or not isinstance(block.norm1, nn.Module):
            raise ValueError(f"block {i} must be a mae_fast.models.blocks.Block, got {type(block).__name__}")
        with residual.add_and_norm(block.norm1) as (_, normed):
            q, k = _queries_and_keys(attention, normed)
        mixed = _with_residual(q, k)
        rollout = mixed if rollout is None else mixed @ rollout
        heads = _weights(q[:, :, :1], k)  # [N, H, 1, T]
        residual = apply_block(block, residual)
    if rollout is None or heads is None:
        raise ValueError("a model without blocks has no attention")
    return AttentionMaps(heads[:, :, 0, 1:].reshape(*heads.shape[:2], *grid), rollout[:, 0, 1:].reshape(-1, *grid))


def _queries_and_keys(attention: Attention, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Queries / sqrt(d) and keys of normed tokens [N, T, D]: [N, H, T, d] each, in fp32 or wider."""
    packed = apply_linear(attention.qkv, normed)
    packed = packed.to(torch.promote_types(packed.dtype, torch.float32))
    n, t, width = packed.shape
    q, k, _ = packed.reshape(n, t, 3, attention.num_heads, width // (3 * attention.num_heads)).permute(2, 0, 3, 1, 4)
    return q / q.shape[3] ** 0.5, k


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights [..., T, T] of queries and keys [..., T, d]."""
    return (q @ k.transpose(-2, -1)).softmax(-1)


def _with_residual(q: Tensor, k: Tensor) -> Tensor:
    """Mean attention of the heads plus the identity, [N, T, T], with rows that sum to 1. Heads are added one by one."""
    mean = _weights(q[:, 0], k[:, 0])
    for i in range(1, q.shape[1]):
        mean += _weights(q[:, i], k[:, i])
    mean /= q.shape[1]
    mean.diagonal(dim1=1, dim2=2).add_(1)
    return mean / mean.sum(-1, keepdim=True)
