"""One training step (forward, backward, AdamW) of every contender, each as its users would run it at its best.

All of them: the same images in memory, mask ratio 0.75, normalised-pixel loss, fused AdamW, bf16 by autocast.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mae_fast
from mae_fast.reference import ReferenceMAE
from mae_fast.training.optim import adamw

MODELS = {"base": "mae_vit_base_patch16", "large": "mae_vit_large_patch16", "huge": "mae_vit_huge_patch14"}
Step = Callable[[], Tensor]


def ours(model: str) -> nn.Module:
    """Our model with fixed weights."""
    torch.manual_seed(0)
    built: nn.Module = getattr(mae_fast, MODELS[model])(norm_pix_loss=True)
    return built


def reference(model: str) -> nn.Module:
    """The eager reference with SDPA."""
    return ReferenceMAE.of(ours(model))


def timm_blocks(model: str) -> nn.Module:
    """The eager reference, its transformer blocks timm's."""
    from timm.models.vision_transformer import Block

    mae = reference(model)
    for blocks in (mae.blocks, mae.decoder_blocks):
        for i, block in enumerate(blocks):
            dim, heads = block.attn.proj.in_features, block.attn.num_heads
            theirs = Block(dim, heads, qkv_bias=True, norm_layer=lambda d: nn.LayerNorm(d, eps=1e-6))
            theirs.load_state_dict(block.state_dict())
            blocks[i] = theirs
    return mae


def transformers(model: str) -> nn.Module:
    """transformers' ViTMAEForPreTraining with SDPA; from scratch its position tables are zero, which costs as much."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    like = ours(model)
    width, depth = like.cls_token.shape[2], len(like.blocks)
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=like.blocks[0].attn.num_heads,
        intermediate_size=4 * width,
        patch_size=like.patch_embed.patch_size[0],
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    return ViTMAEForPreTraining(config)


def published_step(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, bf16: bool) -> Step:
    """The published loop's step: autocast, backward, torch's fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    return _step(loss, optimizer, images, bf16)


def _step(loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, bf16: bool) -> Step:
    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            value = loss(images)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    return step


def first(model: Any) -> Callable[[Tensor], Tensor]:
    """The loss of a model that returns (loss, pred, mask)."""
    return lambda images: model(images)[0]


def build(name: str, model: str, images: Tensor, bf16: bool) -> Step:
    """The step of the contender called ``name``."""
    if name == "mae_fast":
        mine = ours(model)
        return _step(mine.loss, adamw(mine, 1e-4, 0.05), images, bf16)
    if name == "mae_fast drop-in":
        mine = ours(model)
        return published_step(mine, first(mine), images, bf16)
    if name == "transformers":
        theirs = transformers(model)
        return published_step(theirs, lambda images: theirs(images).loss, images, bf16)
    made = {"reference": reference, "reference compiled": reference, "timm blocks": timm_blocks}[name](model)
    called = torch.compile(made) if name.endswith("compiled") else made
    return published_step(made, first(called), images, bf16)


OURS = ("mae_fast", "mae_fast drop-in")
RIVALS = ("reference", "reference compiled", "transformers", "timm blocks")
