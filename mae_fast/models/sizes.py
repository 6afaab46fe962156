"""The sizes of the paper's models and of smaller ones. This module works without torch."""

from typing import Any

ENCODERS: dict[str, dict[str, Any]] = {
    "base": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"img_size": 224, "patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    # ViT-S/16 and ViT-Ti/16 (Touvron et al., 2021). The paper has no such models.
    "small": {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "tiny16": {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    # For 32-pixel images and CPUs. The paper has no such model.
    "tiny": {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4},
}
PAPER_DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
# Depth as in the paper, two thirds of the encoder's width as for ViT-B, 32 values per head.
SMALL_DECODER = {"decoder_embed_dim": 256, "decoder_depth": 8, "decoder_num_heads": 8}
TINY16_DECODER = {"decoder_embed_dim": 128, "decoder_depth": 8, "decoder_num_heads": 4}
TINY_DECODER = {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3}
_SHARED: dict[str, Any] = {"mlp_ratio": 4, "norm_layer": {"eps": 1e-6}}

# Constructor arguments by model name. ``norm_layer`` is a layer norm with this eps, as config.json stores it.
MAE_CONFIGS: dict[str, dict[str, Any]] = {
    "mae_vit_base_patch16_dec512d8b": {**ENCODERS["base"], **PAPER_DECODER, **_SHARED},
    "mae_vit_large_patch16_dec512d8b": {**ENCODERS["large"], **PAPER_DECODER, **_SHARED},
    "mae_vit_huge_patch14_dec512d8b": {**ENCODERS["huge"], **PAPER_DECODER, **_SHARED},
    "mae_vit_small_patch16_dec256d8b": {**ENCODERS["small"], **SMALL_DECODER, **_SHARED},
    "mae_vit_tiny_patch16_dec128d8b": {**ENCODERS["tiny16"], **TINY16_DECODER, **_SHARED},
    "mae_vit_tiny_patch4_dec96d2b": {**ENCODERS["tiny"], **TINY_DECODER, **_SHARED},
}
MAE_ALIASES = {
    "mae_vit_base_patch16": "mae_vit_base_patch16_dec512d8b",
    "mae_vit_large_patch16": "mae_vit_large_patch16_dec512d8b",
    "mae_vit_huge_patch14": "mae_vit_huge_patch14_dec512d8b",
    "mae_vit_small_patch16": "mae_vit_small_patch16_dec256d8b",
    "mae_vit_tiny_patch16": "mae_vit_tiny_patch16_dec128d8b",
    "mae_vit_tiny_patch4": "mae_vit_tiny_patch4_dec96d2b",
}
VIT_CONFIGS: dict[str, dict[str, Any]] = {
    "vit_base_patch16": {**ENCODERS["base"], **_SHARED},
    "vit_large_patch16": {**ENCODERS["large"], **_SHARED},
    "vit_huge_patch14": {**ENCODERS["huge"], **_SHARED},
    "vit_small_patch16": {**ENCODERS["small"], **_SHARED},
    "vit_tiny_patch16": {**ENCODERS["tiny16"], **_SHARED},
    "vit_tiny_patch4": {**ENCODERS["tiny"], **_SHARED},
}


def num_predicted(num_removed: int, predict_ratio: float) -> int:
    """M, the number of predicted patches of an image. Halves are rounded to even numbers, as by ``round``."""
    return min(num_removed, max(1, round(num_removed * predict_ratio)))
