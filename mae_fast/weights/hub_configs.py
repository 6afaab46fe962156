"""Configuration files of other libraries, and warnings about settings that a file cannot record."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..models.features import default_pixel_stats
from ..models.mae import MaskedAutoencoderViT
from .metadata import DECODER_HEADS, HEADS, PAPER_EPS, TIMM_ARCHITECTURES, UNKNOWN, Model, ModelMetadata, mlp_ratio


def transformers_config(model: Model, metadata: ModelMetadata = UNKNOWN) -> dict[str, Any]:
    """``config.json`` of ``ViTMAEForPreTraining``, ``ViTMAEModel`` or ``ViTForImageClassification``.

    Args:
        metadata: source of the mask ratio (0.75 if unknown) and the names of the classes.

    Raises:
        UserError: if transformers cannot have a model of this shape.
    """
    (height, width), (p, q) = model.patch_embed.img_size, model.patch_embed.patch_size
    if height != width or p != q:
        raise UserError(
            f"transformers only has models for square images and patches, got {height} x {width} and {p} x {q}",
            "convert to timm",
        )
    mask_ratio = 0.75 if metadata.mask_ratio is None else metadata.mask_ratio
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
        "layer_norm_eps": model.norm_eps,
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
    labels = metadata.classes or tuple(f"LABEL_{i}" for i in range(model.num_classes))
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        **config,
        **({"problem_type": "multi_label_classification"} if metadata.multi_label else {}),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def processor_config(model: Model, metadata: ModelMetadata = UNKNOWN) -> dict[str, Any]:
    """``preprocessor_config.json`` for ``AutoImageProcessor`` of transformers.

    With recorded preprocessing, the processor takes the centre crop of our evaluation. The crop may be one pixel off,
    because transformers and torchvision round half pixels differently. Otherwise it resizes to a square.
    """
    height, width = model.patch_embed.img_size
    settings, recorded = model.settings(), metadata.preprocessing
    size: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    if recorded:
        size = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": int(height / recorded["crop_pct"])},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_convert_rgb": recorded["channels"] == 3,
        }
    return {
        **size,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": model.pixel_dtype == "uint8",
        "rescale_factor": recorded["rescale_factor"] if recorded else 1 / 255,
        "do_normalize": True,
        "image_mean": settings["pixel_mean"],
        "image_std": settings["pixel_std"],
    }


def timm_config(model: Model, metadata: ModelMetadata = UNKNOWN) -> dict[str, Any]:
    """``config.json`` for ``timm.create_model("local-dir:FOLDER")``: an architecture, and arguments that override it.

    JSON cannot hold timm's ``norm_layer``, so an architecture with the right eps is chosen, if there is one.
    """
    arguments = timm_arguments(model)
    num_classes = arguments.pop("num_classes")
    settings = model.settings()
    crop = {"crop_pct": metadata.preprocessing["crop_pct"], "crop_mode": "center"} if metadata.preprocessing else {}
    labels = {"label_names": list(metadata.classes)} if metadata.classes else {}
    architecture = TIMM_ARCHITECTURES.get(model.norm_eps or 0, TIMM_ARCHITECTURES[PAPER_EPS])
    if "clip" in architecture:  # unlike our models, it has a norm before the blocks
        arguments["pre_norm"] = False
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "model_args": arguments,
        **labels,
        "pretrained_cfg": {
            "num_classes": num_classes,
            "input_size": [model.in_chans, *model.patch_embed.img_size],
            "interpolation": "bicubic",
            **crop,
            "mean": settings["pixel_mean"],
            "std": settings["pixel_std"],
            # timm 1.0.26 adapts this layer unless the model has 3 channels, even if the file has as many as the model.
            "first_conv": "patch_embed.proj" if model.in_chans == 3 else None,
            "classifier": "head",
        },
    }


def timm_arguments(model: Model) -> dict[str, Any]:
    """Arguments of timm's ``VisionTransformer`` for our encoder or classifier, except ``norm_layer``."""
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


FOLDER_LAYOUTS = ("timm", "transformers", "transformers5")  # these libraries load folders
# The key of the weights in a .pth file of each library. transformers has no such key.
PTH_KEYS = {"ours": "model", "timm": "model", "lightly": "state_dict", "mmpretrain": "state_dict"}
_NORM = "norm_layer=partial(torch.nn.LayerNorm, eps={})"
_ARGUMENTS = {"num_heads": "num_heads={}", "decoder_num_heads": "decoder_num_heads={}", "norm_eps": _NORM}
# Each library's arguments for the settings that a file of weights does not record.
_LIBRARY_ARGUMENTS: dict[str, dict[str, str]] = {
    "ours": {**_ARGUMENTS, "norm_pix_loss": "norm_pix_loss={}"},
    "timm": {"num_heads": "num_heads={}", "norm_eps": _NORM},
    "transformers": {
        "num_heads": "num_attention_heads={}",
        "decoder_num_heads": "decoder_num_attention_heads={}",
        "norm_eps": "layer_norm_eps={}",
        "norm_pix_loss": "norm_pix_loss={}",
    },
    "lightly": _ARGUMENTS,
    "mmpretrain": {**_ARGUMENTS, "norm_eps": "norm_cfg=dict(type='LN', eps={})", "norm_pix_loss": "norm_pix={}"},
}


def unrecorded_settings(path: Path, layout: str, metadata: ModelMetadata, ours: dict[str, Tensor]) -> str | None:
    """A warning about settings that the target does not record and that differ from its library's defaults, or None.

    Args:
        path: the target. It is a folder, unless it ends in .safetensors or .pth.
        layout: a layout in ``LAYOUTS``.
        metadata: settings of the model.
        ours: weights of the model, under our names.

    Raises:
        UserError: if this package could not restore the model from the target either.
    """
    eps, library = metadata.norm_eps, layout.removesuffix("5")
    if path.suffix not in (".safetensors", ".pth"):
        if layout != "timm" or eps is None or eps in TIMM_ARCHITECTURES:
            return None
        return (
            f"timm's config.json cannot record layer norms with eps {eps}: timm uses {PAPER_EPS}. Load the folder with "
            f"timm.create_model('local-dir:{path}', pretrained=True, {_NORM.format(eps)})"
        )
    if layout == "ours" and path.suffix == ".safetensors":  # it records all settings
        return None
    different = _different_from_defaults(library, metadata, ours)
    arguments = _LIBRARY_ARGUMENTS[library]
    build = [template.format(different[name]) for name, template in arguments.items() if name in different]
    images = [f"{x} {list(different[f'pixel_{x}'])}" for x in ("mean", "std") if f"pixel_{x}" in different]
    advice = [f"build its model with {', '.join(build)}"] * bool(build)
    kind = f"{metadata.pixel_dtype} pixels in their own units" if "pixel_dtype" in different else "images"
    advice += [f"standardise {kind} with {' and '.join(images)}"] * bool(images)
    if not advice:
        return None
    if layout not in PTH_KEYS and path.suffix == ".pth" and (images or eps not in (None, PAPER_EPS)):
        raise UserError(
            f"{path}: a .pth file of {library} cannot record layer norms with eps {eps} or unusual pixel statistics",
            "give a folder, or a file that ends in .safetensors",
        )
    reader = "the published code" if library == "ours" else library
    folder = ", or convert to a folder, which records them" if layout in FOLDER_LAYOUTS else ""
    return f"{path} only has weights, and {reader} has other defaults: {' and '.join(advice)}{folder}"


def _different_from_defaults(library: str, metadata: ModelMetadata, ours: dict[str, Tensor]) -> dict[str, Any]:
    """The known settings that differ from the defaults of ``library``."""
    mean, std = default_pixel_stats(ours["patch_embed.proj.weight"].shape[1])
    defaults = ModelMetadata(
        num_heads=HEADS.get(ours["cls_token"].shape[2]),
        norm_eps=1e-12 if library == "transformers" else PAPER_EPS,
        pixel_mean=mean,
        pixel_std=std,
        pixel_dtype="uint8",
    )
    if "decoder_embed.weight" in ours:
        heads = DECODER_HEADS.get(ours["decoder_embed.weight"].shape[0])
        defaults = replace(defaults, decoder_num_heads=heads, norm_pix_loss=False)
    else:
        metadata = replace(metadata, decoder_num_heads=None, norm_pix_loss=None)
    return {name: x for name, x in metadata.to_dict().items() if x != getattr(defaults, name)}
