"""Models of other libraries with our weights, and how far what they compute is from ours.

Shapes: N images, L patches, D width, P values per patch.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from .configs import timm_arguments, transformers_config
from .details import Model, mlp_ratio

LIMIT = 1e-5  # of the largest value; rounding in fp32 is a tenth of it


def differences(model: Model, layout: str, weights: dict[str, Tensor]) -> dict[str, float]:
    """How far the library's own model with ``weights`` is from ours, for one image and one mask.

    In fp32, or in fp64 where our model is.

    Args:
        model: ours.
        layout: whose names ``weights`` have, strictly: none may be missing or left over.
        weights: the same ones.

    Returns:
        The largest difference over the largest value of ours, of ``features`` and of ``logits`` or ``loss`` and
        ``pred``, where the library has them.

    Raises:
        UserError: if the library is not installed, or does not take the weights.
    """
    size = (1, model.in_chans, *model.patch_embed.img_size)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if model.cls_token.dtype == torch.float64 else torch.float32
    images = torch.randn(size, generator=generator).to(dtype)
    noise = torch.randperm(model.patch_embed.num_patches, generator=generator)[None].float()
    try:
        run = _RUNS[layout]
    except KeyError:
        raise UserError(f"not verified: {layout}'s own model cannot be run here; leave out --verify") from None
    weights = {name: x.to(dtype) if x.is_floating_point() else x for name, x in weights.items()}
    model = copy.deepcopy(model).to(dtype)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that a library will give up
            theirs = run(model, weights, images, noise)
            ours = _ours(model, images, noise)
    except ImportError as error:
        raise UserError(
            f"not verified: {layout} cannot be imported ({error}); install it, or leave out --verify"
        ) from error
    except RuntimeError as error:
        raise UserError(f"{layout} does not take these weights: {' '.join(str(error).split())}") from error
    return {
        name: ((x.reshape(ours[name].shape) - ours[name]).abs().max() / ours[name].abs().max()).item()
        for name, x in theirs.items()
    }


def _ours(model: Model, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    if isinstance(model, MaskedAutoencoderViT):
        loss, pred, _ = model(images, noise=noise)
        return {"features": _features(model, images), "loss": loss, "pred": pred}
    return {"features": _features(model, images), **({"logits": model(images)} if model.num_classes else {})}


def _features(model: Any, images: Tensor) -> Tensor:
    """All tokens [N, 1+L, D] after ``norm``; of a model with ``fc_norm``, what its head sees [N, D]."""
    features: Tensor = model.forward_features(images, **({"pool": "tokens"} if hasattr(model, "norm") else {}))
    return features


def _run_transformers(model: Model, weights: dict[str, Tensor], images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    import transformers
    from transformers.utils import logging

    config = transformers_config(model)
    name = config["architectures"][0]
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
        theirs, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    if bar:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    if wrong := {kind: names for kind, names in report.items() if names}:
        raise RuntimeError(f"{name} reports {wrong}")
    theirs.to(images.dtype).eval()
    if name == "ViTForImageClassification":
        return {"features": theirs.vit(images).last_hidden_state, "logits": theirs(images).logits}
    encoder = theirs if name == "ViTMAEModel" else theirs.vit
    found = {}
    if encoder is not theirs:
        output = theirs(images, noise=noise)
        found = {"loss": output.loss, "pred": output.logits}
    encoder.embeddings.config.mask_ratio = 0.0
    in_order = torch.arange(noise.shape[1], dtype=noise.dtype)[None]
    return {"features": encoder(images, noise=in_order).last_hidden_state, **found}


def _timm(model: Model) -> Any:
    """timm's model of our shape, with weights of its own."""
    import timm

    block: Any = model.blocks[0]
    norm_layer = partial(nn.LayerNorm, eps=block.norm1.eps)
    theirs = timm.create_model("vit_base_patch16_224", norm_layer=norm_layer, **timm_arguments(model))
    return theirs.to(model.cls_token.dtype).eval()


def _run_timm(model: Model, weights: dict[str, Tensor], images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    theirs = _timm(model)
    theirs.load_state_dict(weights)
    return _outputs_of_timm(theirs, images)


def _outputs_of_timm(theirs: Any, images: Tensor) -> dict[str, Tensor]:
    features = theirs.forward_features(images)
    if theirs.global_pool == "avg":
        features = theirs.forward_head(features, pre_logits=True)
    return {"features": features, **({"logits": theirs(images)} if theirs.num_classes else {})}


def _run_lightly(model: Model, weights: dict[str, Tensor], images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    from lightly.models import utils
    from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM

    theirs: Any = nn.Module()
    theirs.backbone = MaskedVisionTransformerTIMM(_timm(model))
    if not isinstance(model, MaskedAutoencoderViT):
        theirs.to(images.dtype).load_state_dict(weights)
        return _outputs_of_timm(theirs.backbone.vit, images)
    block: Any = model.decoder_blocks[0]
    width = model.decoder_embed.out_features
    theirs.decoder = MAEDecoderTIMM(
        num_patches=noise.shape[1],
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.in_chans,
        embed_dim=model.cls_token.shape[2],
        decoder_embed_dim=width,
        decoder_depth=len(model.decoder_blocks),
        decoder_num_heads=block.attn.num_heads,
        mlp_ratio=mlp_ratio(block.mlp.fc1.out_features, width),
        norm_layer=partial(nn.LayerNorm, eps=block.norm1.eps),
    )
    theirs.to(images.dtype).load_state_dict(weights)
    theirs.eval()
    # As its examples mask, with our noise; they count the class token.
    ids = 1 + noise.argsort(1)
    kept = int(noise.shape[1] * 0.25)
    keep = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :kept]], 1)
    tokens = theirs.decoder.embed(theirs.backbone.encode(images, idx_keep=keep))
    whole = utils.repeat_token(theirs.decoder.mask_token, (1, 1 + noise.shape[1]))
    decoded = theirs.decoder.decode(utils.set_at_index(whole, keep, tokens))
    return {"features": theirs.backbone.encode(images), "pred": theirs.decoder.predict(decoded)[:, 1:]}


_RUNS: dict[str, Callable[[Model, dict[str, Tensor], Tensor, Tensor], dict[str, Tensor]]] = {
    "timm": _run_timm,
    "transformers": _run_transformers,
    "transformers5": _run_transformers,
    "lightly": _run_lightly,
}
