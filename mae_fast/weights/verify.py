"""Compares the outputs of a file of weights, loaded by other libraries or this package, with those of a model.

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
from .convert import convert, detect
from .files import load_weights
from .hub_configs import timm_arguments, transformers_config
from .metadata import TIMM_ARCHITECTURES, Model, ModelMetadata, build_model, mlp_ratio, read_config, read_weights

# Limit of differences relative to the largest value, in fp64, where rounding is about 1e-14. In fp32, rounding could
# hide a wrong eps.
LIMIT = 1e-10


def differences(truth: Model, layout: str, path: Path, model: Model, metadata: ModelMetadata) -> dict[str, float]:
    """Load ``path`` with the library of ``layout`` and compare its outputs with those of ``truth``, in fp64.

    Args:
        truth: the model with these weights.
        layout: selects the library; "ours" is this package. The library's model must have the same keys.
        path: a file or folder. The configuration is read from a folder, and taken from ``model`` for a file.
        model: a model of the same sizes, from ``build_model``.
        metadata: settings of the model, for the mask ratio.

    Returns:
        The largest difference, divided by the largest value of ``truth``, for one image and one mask. The keys are
        ``features``; ``logits``, or ``loss`` and ``pred``, if the library has them; and ``pixels``, the mean and
        standard deviation, if the library records them.

    Raises:
        UserError: if the library is not installed, or cannot load the weights.
    """
    size = (1, model.in_chans, *model.patch_embed.img_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, generator=generator).double()
    noise = torch.randperm(model.patch_embed.num_patches, generator=generator)[None].float()
    ratio = 0.75 if metadata.mask_ratio is None else metadata.mask_ratio
    try:
        run = _READERS[layout]
    except KeyError:
        raise UserError(f"--verify does not support the layout {layout}", "leave --verify out") from None
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about deprecated names
            theirs = run(path, model, images, noise, ratio)
            ours = _outputs(truth, images, noise, ratio)
    except ImportError as error:
        raise UserError(
            f"not verified: {layout} cannot be imported ({error})", "install it, or leave --verify out"
        ) from error
    except RuntimeError as error:
        raise UserError(f"{layout} cannot load these weights: {' '.join(str(error).split())}") from error
    return {
        name: ((x.reshape(ours[name].shape) - ours[name]).abs().max() / ours[name].abs().max()).item()
        for name, x in theirs.items()
    }


def _outputs(model: Model, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double().eval()
    found = {"features": _features(model, images), "pixels": torch.cat([model.pixel_mean, model.pixel_std])}
    if isinstance(model, MaskedAutoencoderViT):
        found["loss"], found["pred"], _ = model(images, mask_ratio, noise=noise)
    elif model.num_classes:
        found["logits"] = model(images)
    return found


def _pixels(mean: list[float], std: list[float]) -> Tensor:
    return torch.tensor([*mean, *std], dtype=torch.float32).double()


def _features(model: Any, images: Tensor) -> Tensor:
    """All tokens [N, 1+L, D] after ``norm``. For a model with ``fc_norm``, the input of its head [N, D]."""
    features: Tensor = model.forward_features(images, **({"pool": "tokens"} if hasattr(model, "norm") else {}))
    return features


def _run_ours(path: Path, model: Model, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
    weights, metadata = read_weights(path)
    if metadata == ModelMetadata():  # the file does not record it
        metadata = ModelMetadata.from_model(model)
    return _outputs(build_model(convert(weights, detect(weights), "ours").weights, metadata), images, noise, mask_ratio)


def _run_transformers(path: Path, model: Model, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
    import transformers
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as temporary:
        folder, found = path, {}
        if (path / "preprocessor_config.json").exists():
            processor: Any = transformers.AutoImageProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]
            found["pixels"] = _pixels(processor.image_mean, processor.image_std)
        if not read_config(path):
            folder = Path(temporary)
            (folder / "config.json").write_text(
                json.dumps(transformers_config(model, ModelMetadata(mask_ratio=mask_ratio)))
            )
            weights = {name: x.contiguous() for name, x in load_weights(path).items()}
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        options: dict[str, Any] = {}
        name = transformers_config(model)["architectures"][0]
        if name == "ViTMAEModel" and read_config(folder).get("model_type") == "vit":
            name, options = "ViTModel", {"add_pooling_layer": False}
        load = getattr(transformers, name).from_pretrained
        theirs, report = load(folder, output_loading_info=True, **options)
    if bar:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    if wrong := {kind: names for kind, names in report.items() if names}:
        raise RuntimeError(f"{name} reports {wrong}")
    theirs.to(images.dtype).eval()
    if name == "ViTForImageClassification":
        return {"features": theirs.vit(images).last_hidden_state, "logits": theirs(images).logits, **found}
    if name == "ViTModel":
        return {"features": theirs(images).last_hidden_state, **found}
    encoder = theirs if name == "ViTMAEModel" else theirs.vit
    if encoder is not theirs:
        output = theirs(images, noise=noise)
        found |= {"loss": output.loss, "pred": output.logits}
    encoder.embeddings.config.mask_ratio = 0.0
    in_order = torch.arange(noise.shape[1], dtype=noise.dtype)[None]
    return {"features": encoder(images, noise=in_order).last_hidden_state, **found}


def _norm(model: Model) -> Any:
    assert model.norm_eps is not None
    return partial(nn.LayerNorm, eps=model.norm_eps)


def _run_timm(path: Path, model: Model, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
    import timm
    from timm.data.config import resolve_model_data_config

    if read_config(path):
        given: dict[str, Any] = {} if model.norm_eps in TIMM_ARCHITECTURES else {"norm_layer": _norm(model)}
        theirs: Any = timm.create_model(f"local-dir:{path}", pretrained=True, **given)
        data: dict[str, Any] = resolve_model_data_config(theirs)  # type: ignore[no-untyped-call]
        pixels = {"pixels": _pixels(data["mean"], data["std"])}
    else:
        pixels = {}
        arguments = {"norm_layer": _norm(model), **timm_arguments(model)}
        theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=str(path), **arguments)
    return {**_outputs_of_timm(theirs.to(images.dtype).eval(), images), **pixels}


def _outputs_of_timm(theirs: Any, images: Tensor) -> dict[str, Tensor]:
    features = theirs.forward_features(images)
    if theirs.global_pool == "avg":
        features = theirs.forward_head(features, pre_logits=True)
    return {"features": features, **({"logits": theirs(images)} if theirs.num_classes else {})}


def _run_lightly(path: Path, model: Model, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
    import timm
    from lightly.models import utils
    from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM

    theirs: Any = nn.Module()
    vit = timm.create_model("vit_base_patch16_224", norm_layer=_norm(model), **timm_arguments(model))
    theirs.backbone = MaskedVisionTransformerTIMM(vit)
    weights = load_weights(path)
    if not isinstance(model, MaskedAutoencoderViT):
        theirs.load_state_dict(weights)
        return _outputs_of_timm(theirs.to(images.dtype).eval().backbone.vit, images)
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
        norm_layer=_norm(model),
    )
    theirs.to(images.dtype).load_state_dict(weights)
    theirs.eval()
    # Mask as in lightly's examples, with our noise. Indices include the class token.
    ids = 1 + noise.argsort(1)
    num_keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_keep = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :num_keep]], 1)
    tokens = theirs.decoder.embed(theirs.backbone.encode(images, idx_keep=ids_keep))
    mask_tokens = utils.repeat_token(theirs.decoder.mask_token, (1, 1 + noise.shape[1]))
    decoded = theirs.decoder.decode(utils.set_at_index(mask_tokens, ids_keep, tokens))
    return {"features": theirs.backbone.encode(images), "pred": theirs.decoder.predict(decoded)[:, 1:]}


_READERS: dict[str, Callable[[Path, Model, Tensor, Tensor, float], dict[str, Tensor]]] = {
    "ours": _run_ours,
    "timm": _run_timm,
    "transformers": _run_transformers,
    "transformers5": _run_transformers,
    "lightly": _run_lightly,
}
