"""The presets of each task: name -> the values that differ from the defaults of its configuration."""

from typing import Any

# base, large and huge follow the published pre-training command, which predicts normalised pixels.
PRESETS: dict[str, dict[str, Any]] = {
    "base": {"model": "mae_vit_base_patch16", "norm_pix_loss": True},
    "large": {"model": "mae_vit_large_patch16", "norm_pix_loss": True},
    "huge": {"model": "mae_vit_huge_patch14", "norm_pix_loss": True},
    "small": {"model": "mae_vit_small_patch16", "norm_pix_loss": True},
    "tiny16": {"model": "mae_vit_tiny_patch16", "norm_pix_loss": True},
    "tiny": {
        "model": "mae_vit_tiny_patch4",
        "input_size": 32,
        "batch_size": 32,
        "epochs": 15,
        "warmup_epochs": 1,
        "lr": 1.5e-3,
    },
}
# The published fine-tuning and probing recipes; "scratch-": the recipe of the paper for random initial weights.
_SCRATCH = {
    "blr": 1e-4,
    "weight_decay": 0.3,
    "beta2": 0.95,
    "layer_decay": 1.0,
    "ema_decay": 0.9999,
    "warmup_epochs": 20,
}
FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    "base": {"model": "vit_base_patch16", "epochs": 100, "layer_decay": 0.65, "drop_path": 0.1},
    "large": {"model": "vit_large_patch16", "blr": 1e-3, "drop_path": 0.2},
    "huge": {"model": "vit_huge_patch14", "blr": 1e-3, "drop_path": 0.3},
    # Not published: the recipe of ViT-B with less stochastic depth, as for smaller models.
    "small": {"model": "vit_small_patch16", "epochs": 100, "layer_decay": 0.65, "drop_path": 0.05},
    "tiny16": {"model": "vit_tiny_patch16", "epochs": 100, "layer_decay": 0.65, "drop_path": 0.0},
    "scratch-base": {"model": "vit_base_patch16", **_SCRATCH, "epochs": 300, "drop_path": 0.1},
    "scratch-large": {"model": "vit_large_patch16", **_SCRATCH, "epochs": 200, "drop_path": 0.2},
    "scratch-huge": {"model": "vit_huge_patch14", **_SCRATCH, "epochs": 200, "drop_path": 0.2},
    # For the demo: 32-pixel tiles, too small for an augmentation policy for photographs.
    "tiny": {
        "model": "vit_tiny_patch4",
        "input_size": 32,
        "epochs": 15,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "layer_decay": 0.75,
        "drop_path": 0.0,
        "aa": None,
        "mixup": 0.0,
        "cutmix": 0.0,
    },
}
LINPROBE_PRESETS: dict[str, dict[str, Any]] = {
    "base": {"model": "vit_base_patch16"},
    "small": {"model": "vit_small_patch16"},
    "tiny16": {"model": "vit_tiny_patch16"},
    "large": {"model": "vit_large_patch16", "epochs": 50},
    "huge": {"model": "vit_huge_patch14", "epochs": 50},
    "tiny": {
        "model": "vit_tiny_patch4",
        "input_size": 32,
        "batch_size": 256,
        "epochs": 60,
        "warmup_epochs": 6,
        "blr": 30.0,  # a LARS step is 0.1% of a matrix's norm, and the published rate is for 7,000 steps
    },
}
# The transfer recipes of the paper: crops and batch size of UperNet, learning rates of ViTDet. "tiny": for the demo
# with 64-pixel tiles.
SEGMENT_PRESETS: dict[str, dict[str, Any]] = {
    "base": {"model": "vit_base_patch16"},
    "large": {"model": "vit_large_patch16", "layer_decay": 0.75, "drop_path": 0.2},
    "huge": {"model": "vit_huge_patch14", "input_size": 518, "layer_decay": 0.8, "drop_path": 0.3},
    "tiny": {
        "model": "vit_tiny_patch4",
        "input_size": 64,
        "epochs": 20,
        "lr": 1e-3,
        "layer_decay": 0.75,
        "drop_path": 0.0,
        "head_channels": 32,
    },
}
DETECT_PRESETS: dict[str, dict[str, Any]] = {
    "base": {"model": "vit_base_patch16"},
    "large": {"model": "vit_large_patch16", "layer_decay": 0.8, "drop_path": 0.4},
    "huge": {"model": "vit_huge_patch14", "input_size": 1008, "layer_decay": 0.9, "drop_path": 0.5},
    "tiny": {
        "model": "vit_tiny_patch4",
        "input_size": 64,
        "batch_size": 16,
        "epochs": 20,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "layer_decay": 0.75,
        "drop_path": 0.0,
        "window": 0,
        "scale": (0.8, 1.25),
    },
}
# The published sizes are the defaults. "tiny": for the demo, with one token per patch of mae_vit_tiny_patch4.
DVAE_PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {},
    "huge": {"input_size": 128},  # for 16 x 16 patches
    "tiny": {
        "input_size": 32,
        "batch_size": 16,
        "epochs": 8,
        "lr": 1e-2,
        "vocab_size": 256,
        "hidden": 16,
        "groups": 3,
        "kl_weight": 3.0,  # a token has a quarter of the pixels that it has with the published sizes
        "temperature_end": 0.1,
        "anneal_epochs": 8,
    },
}
