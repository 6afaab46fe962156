"""The configurations that other libraries want beside the weights."""

from typing import Any

from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from .details import Model, mlp_ratio


def transformers_config(model: Model, mask_ratio: float = 0.75) -> dict[str, Any]:
    """``config.json`` of ``ViTMAEForPreTraining``, ``ViTMAEModel`` or ``ViTForImageClassification``.

    Raises:
        UserError: if transformers cannot have a model of this shape.
    """
    (height, width), (p, q) = model.patch_embed.img_size, model.patch_embed.patch_size
    if height != width or p != q:
        raise UserError(
            f"transformers has these models for square images and patches only, got {height} x {width} and {p} x {q}"
        )
    block: Any = model.blocks[0]
    config: dict[str, Any] = {
        "image_size": height,
        "patch_size": p,
        "num_channels": model.in_chans,
        "hidden_size": model.cls_token.shape[2],
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "dtype": str(model.cls_token.dtype).removeprefix("torch."),
    }
    if isinstance(model, MaskedAutoencoderViT):
        decoder: Any = model.decoder_blocks[0]
        return {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            **config,
            "decoder_hidden_size": model.decoder_embed.out_features,
            "decoder_num_hidden_layers": len(model.decoder_blocks),
            "decoder_num_attention_heads": decoder.attn.num_heads,
            "decoder_intermediate_size": decoder.mlp.fc1.out_features,
            "mask_ratio": mask_ratio,
            "norm_pix_loss": model.norm_pix_loss,
        }
    if not model.num_classes:
        return {"architectures": ["ViTMAEModel"], "model_type": "vit_mae", **config, "mask_ratio": mask_ratio}
    labels = {i: f"LABEL_{i}" for i in range(model.num_classes)}
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        **config,
        "id2label": {str(i): label for i, label in labels.items()},
        "label2id": {label: i for i, label in labels.items()},
    }


def timm_config(model: Model) -> dict[str, Any]:
    """``config.json`` for ``timm.create_model("local-dir:FOLDER")``: the architecture and what differs in it."""
    arguments = timm_arguments(model)
    num_classes = arguments.pop("num_classes")
    mean, std = (getattr(model, name).tolist() for name in ("pixel_mean", "pixel_std"))
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": num_classes,
            "input_size": [model.in_chans, *model.patch_embed.img_size],
            "interpolation": "bicubic",
            "mean": mean,
            "std": std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def timm_arguments(model: Model) -> dict[str, Any]:
    """What makes timm's ``VisionTransformer`` of our encoder or classifier, in plain values, but for the norm's eps."""
    block: Any = model.blocks[0]
    return {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.in_chans,
        "embed_dim": model.cls_token.shape[2],
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio(block.mlp.fc1.out_features, model.cls_token.shape[2]),
        "qkv_bias": block.attn.qkv.bias is not None,
        "global_pool": "avg" if hasattr(model, "fc_norm") else "token",
        "num_classes": getattr(model, "num_classes", 0),
    }
