"""Settings of a model that its weights do not show, and models built from weights and settings."""

import argparse
import json
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from ..models.sizes import ENCODERS, MAE_CONFIGS
from ..models.vit import VisionTransformer
from ..pixel_dtypes import PIXEL_DTYPES
from .convert import fold_batch_norm
from .files import METADATA_KEY, WEIGHT_FILES, load_weights_and_metadata

Model = MaskedAutoencoderViT | VisionTransformer
# Attention heads by width.
HEADS = {size["embed_dim"]: size["num_heads"] for size in ENCODERS.values()}
DECODER_HEADS = {size["decoder_embed_dim"]: size["decoder_num_heads"] for size in MAE_CONFIGS.values()}
PAPER_EPS = 1e-6
PIXEL_SETTINGS = ("pixel_mean", "pixel_std", "nodata", "pixel_dtype")  # constructor arguments
# timm's config.json cannot hold eps, so the eps selects an architecture.
TIMM_ARCHITECTURES = {PAPER_EPS: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


@dataclass(frozen=True)
class ModelMetadata:
    """Settings of a model. None: unknown.

    ``classes`` are the names of a classifier's outputs. With ``multi_label``, an image may have several classes, and
    probabilities are sigmoids of the outputs. ``preprocessing`` is a record of ``data.preprocessing.Preprocessing``.
    """

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    img_size: tuple[int, int] | None = None
    norm_eps: float | None = None
    norm_pix_loss: bool | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    mask_ratio: float | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: dict[str, Any] | None = None
    multi_label: bool | None = None
    nodata: float | None = None
    pixel_dtype: str | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any], origin: Path) -> "ModelMetadata":
        """The settings in ``state.json`` of a checkpoint. Error messages name ``origin``."""
        known = {name: state.get(name) for name in ("mask_ratio", "classes", "preprocessing", "multi_label")}
        config, made = state["model"], state.get("preprocessing") or {}
        norm, size = config.get("norm_layer"), config.get("img_size")
        known["img_size"] = [size, size] if isinstance(size, int) else size
        known |= {name: config.get(name) for name in ("num_heads", "decoder_num_heads", "norm_pix_loss")}
        known |= {"norm_eps": norm.get("eps") if isinstance(norm, dict) else None}
        known |= {"pixel_mean": made.get("mean"), "pixel_std": made.get("std"), "nodata": made.get("nodata")}
        known["pixel_dtype"] = None if made.get("dtype") == "uint8" else made.get("dtype")
        return parse_metadata(known, origin)

    @classmethod
    def from_model(cls, model: Model) -> "ModelMetadata":
        """All settings of a model except the mask ratio, which a model does not have.

        Raises:
            UserError: if its layer norms differ in eps. No file format can record that.
        """
        mae = model if isinstance(model, MaskedAutoencoderViT) else None
        block: Any = model.blocks[0]
        decoder: Any = mae.decoder_blocks[0] if mae and len(mae.decoder_blocks) else None
        if model.norm_eps is None:
            raise UserError("the layer norms of this model differ in eps", "build it with one norm_layer")
        settings = model.settings()
        pixels: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in settings.items() if name in PIXEL_SETTINGS
        }
        return cls(
            num_heads=block.attn.num_heads,
            decoder_num_heads=decoder.attn.num_heads if decoder else None,
            img_size=model.patch_embed.img_size,
            norm_eps=model.norm_eps,
            norm_pix_loss=mae.norm_pix_loss if mae else None,
            **pixels,
        )

    def to_dict(self) -> dict[str, Any]:
        """The known settings as JSON values, as in files under ``METADATA_KEY``."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def constructor_arguments(self) -> dict[str, Any]:
        """The known settings as arguments of model factories, in the form of ``Encoder.settings``."""
        known = self.to_dict()
        found: dict[str, Any] = {x: known[x] for x in (*PIXEL_SETTINGS, "norm_pix_loss") if x in known}
        return {**found, "norm_layer": {"eps": self.norm_eps}} if self.norm_eps else found

    def filled_from(self, other: "ModelMetadata") -> "ModelMetadata":
        """A copy in which unknown settings have the values of ``other``."""
        gaps = {x.name: getattr(other, x.name) for x in fields(self) if getattr(self, x.name) is None}
        return replace(self, **gaps)

    def for_pixels(
        self, channels: int, dtype: str | None = None, given: Collection[str] = ()
    ) -> tuple["ModelMetadata", list[str]]:
        """Drop pixel settings that do not fit a model's channels or pixel dtype.

        Args:
            channels: number of channels of the model.
            dtype: pixel dtype of the model. None: that of these settings.
            given: names of settings that the caller overrides. They get no note.

        Returns:
            A copy without them, and a note for each.
        """
        known = self.to_dict()
        recorded = known.get("pixel_dtype", "uint8")
        if dtype not in (None, recorded):
            wrong = [name for name in PIXEL_SETTINGS if name in known]
            notes = [
                f"left out {name} of {recorded} pixels: the model takes {dtype}" for name in wrong if name not in given
            ]
            return replace(self, **dict.fromkeys(wrong)), notes
        wrong = [x for x in ("pixel_mean", "pixel_std") if len(known.get(x, range(channels))) != channels]
        dropped = [name for name in wrong if name not in given]
        notes = [f"left out {name} of {len(known[name])} channels: the model has {channels}" for name in dropped]
        if wrong:  # these settings describe the same pixels
            dropped = [name for name in ("nodata", "pixel_dtype") if name in known and name not in given]
            notes += [f"left out {name} {known[name]}" for name in dropped]
            wrong += ["nodata", "pixel_dtype"]
        return replace(self, **dict.fromkeys(wrong)), notes


UNKNOWN = ModelMetadata()


def read_weights(path: Path) -> tuple[dict[str, Tensor], ModelMetadata]:
    """The weights in a file or folder, and the recorded settings of the model.

    Settings are taken from the configuration in a folder of transformers, timm or ``save_pretrained``, then from the
    file, then from the defaults of the library that wrote the configuration. A ``.pth`` file of the published code
    records ``norm_pix_loss`` in its ``args``. ``FOLDER/model.safetensors`` is read like the folder.

    Raises:
        UserError: if a file is damaged, or our models cannot compute the same as this model.
    """
    weights, raw = load_weights_and_metadata(path)
    metadata = _from_file(raw, path)
    if config := read_config(path):
        metadata = _from_config(config, config_folder(path)).filled_from(metadata).filled_from(_defaults(config))
    return weights, metadata


def read_config(path: Path) -> dict[str, Any]:
    """The content of ``config.json`` in a folder, or beside a file of weights. Empty if there is none."""
    config = config_folder(path) / "config.json"
    return _read_json(config) if config.exists() else {}


def config_folder(path: Path) -> Path:
    """FOLDER for ``FOLDER/model.safetensors``, otherwise ``path``."""
    return path.parent if path.name in WEIGHT_FILES else path


def _from_file(raw: dict[str, Any], path: Path) -> ModelMetadata:
    found = raw.get(METADATA_KEY)
    if isinstance(found, str):  # safetensors headers hold only text
        found = _parse_json(found, path)
    metadata = parse_metadata(found, path) if isinstance(found, dict) else ModelMetadata()
    args = raw.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if isinstance(args, dict):
        published = {key: args.get(key) for key in ("norm_pix_loss", "mask_ratio")}
        metadata = metadata.filled_from(parse_metadata(published, path))
    return metadata


def _from_config(config: dict[str, Any], folder: Path) -> ModelMetadata:
    path = folder / "config.json"
    if isinstance(config.get("model_args"), dict):
        config = {**config, **config["model_args"]}
    activation = config.get("hidden_act", config.get("act_layer"))
    if activation not in (None, "gelu", "gelu_python"):
        raise UserError(f"{path}: the activation is {activation!r}, our models only have gelu", "give other weights")
    size = config.get("image_size", config.get("img_size"))
    norm = config.get("norm_layer")
    mean, std, classes = config.get("pixel_mean"), config.get("pixel_std"), _class_names(config.get("id2label"))
    if isinstance(timm := config.get("pretrained_cfg"), dict):
        mean, std, classes = timm.get("mean"), timm.get("std"), timm.get("label_names", config.get("label_names"))
    if (processor := folder / "preprocessor_config.json").exists():
        images = _read_json(processor)
        mean, std = images.get("image_mean"), images.get("image_std")
        if images.get("do_normalize") is False and isinstance(mean, list) and isinstance(std, list):
            mean, std = [0.0] * len(mean), [1.0] * len(std)
    return parse_metadata(
        {
            "num_heads": config.get("num_attention_heads", config.get("num_heads")),
            "decoder_num_heads": config.get("decoder_num_attention_heads", config.get("decoder_num_heads")),
            "img_size": [size, size] if isinstance(size, int) else size,
            "norm_eps": config.get("layer_norm_eps", norm.get("eps") if isinstance(norm, dict) else None),
            "norm_pix_loss": config.get("norm_pix_loss"),
            "pixel_mean": mean,
            "pixel_std": std,
            "mask_ratio": config.get("mask_ratio"),
            "classes": classes,
            "nodata": config.get("nodata"),
            "pixel_dtype": config.get("pixel_dtype"),
        },
        path,
    )


def _class_names(id2label: object) -> list[str] | None:
    """The names in transformers' ``id2label``, in order. None for its placeholders."""
    if not isinstance(id2label, dict):
        return None
    names = [id2label.get(str(i)) for i in range(len(id2label))]
    if any(not isinstance(name, str) for name in names) or names == [f"LABEL_{i}" for i in range(len(names))]:
        return None
    return [str(name) for name in names]


def _defaults(config: dict[str, Any]) -> ModelMetadata:
    """The default settings of the library that wrote a ``config.json``."""
    if config.get("model_type") in ("vit", "vit_mae"):  # transformers
        return ModelMetadata(num_heads=12, norm_eps=1e-12)
    if "architecture" in config:  # timm
        eps = {name: eps for eps, name in TIMM_ARCHITECTURES.items()}
        return ModelMetadata(norm_eps=eps.get(config["architecture"], PAPER_EPS))
    if "embed_dim" in config:  # save_pretrained leaves out a plain nn.LayerNorm
        return ModelMetadata(norm_eps=1e-5)
    return ModelMetadata()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _parse_json(path.read_text(errors="replace"), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its configuration is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: its configuration is not a JSON object")
    return found


def _is_size(x: object) -> bool:
    return type(x) is int and x > 0


def _is_number(x: object) -> bool:
    return isinstance(x, (float, int)) and not isinstance(x, bool) and math.isfinite(x)


def _are_numbers(x: object) -> bool:
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(map(_is_number, x))


_IS_VALID: dict[str, Callable[[Any], bool]] = {
    "num_heads": _is_size,
    "decoder_num_heads": _is_size,
    "img_size": lambda x: isinstance(x, (list, tuple)) and len(x) == 2 and all(map(_is_size, x)),
    "norm_eps": lambda x: _is_number(x) and x > 0,
    "norm_pix_loss": lambda x: isinstance(x, bool),
    "pixel_mean": _are_numbers,
    "pixel_std": lambda x: _are_numbers(x) and min(x) > 0,
    "mask_ratio": lambda x: _is_number(x) and 0 <= x <= 1,
    "classes": lambda x: isinstance(x, (list, tuple)) and all(isinstance(name, str) for name in x),
    "preprocessing": lambda x: isinstance(x, dict),
    "multi_label": lambda x: isinstance(x, bool),
    "nodata": _is_number,
    "pixel_dtype": lambda x: x in PIXEL_DTYPES,
}


def parse_metadata(values: dict[str, Any], path: Path) -> ModelMetadata:
    """Metadata from JSON values. Other keys are ignored.

    Raises:
        UserError: if a value is invalid.
    """
    found: dict[str, Any] = {name: value for name in _IS_VALID if (value := values.get(name)) is not None}
    for name, value in found.items():
        if not _IS_VALID[name](value):
            raise UserError(f"{path}: {name} cannot be {value!r}", "correct the file, or write it again")
        if isinstance(value, list):
            found[name] = tuple(value)
    return ModelMetadata(**found)


def build_model(weights: dict[str, Tensor], metadata: ModelMetadata) -> Model:
    """Build a model with these weights, in evaluation mode and in their dtype.

    It is a masked autoencoder if the weights have a decoder, else a classifier.

    Args:
        weights: all weights of the model, under our names. The batch norm of a linear probe is folded into its head.
        metadata: settings of the model. Unknown ones are as in the paper: number of heads by width, square images, eps
            1e-6, pixels as targets.

    Raises:
        UserError: if the number of heads or the shape of the images is unknown, or the weights do not fit each other.
    """
    if "head.1.weight" in weights:
        weights = fold_batch_norm(weights)
    try:
        width, channels, p, q = weights["patch_embed.proj.weight"].shape
        num_patches = weights["pos_embed"].shape[1] - 1
        side = round(num_patches**0.5)
        if metadata.img_size is None and side * side != num_patches:
            raise UserError(f"the image size is not recorded, and {num_patches} patches are not a square")
        shape: dict[str, Any] = {
            "img_size": metadata.img_size or (side * p, side * q),
            "patch_size": (p, q),
            "in_chans": channels,
            "embed_dim": width,
            "depth": count_blocks(weights, "blocks"),
            "num_heads": metadata.num_heads or _heads(HEADS, width, "--num-heads"),
            "mlp_ratio": mlp_ratio(weights["blocks.0.mlp.fc1.weight"].shape[0], width),
            "norm_layer": partial(nn.LayerNorm, eps=metadata.norm_eps or PAPER_EPS),
            "pixel_mean": metadata.pixel_mean,
            "pixel_std": metadata.pixel_std,
            "nodata": metadata.nodata,
            "pixel_dtype": metadata.pixel_dtype or "uint8",
        }
        model: Model
        if "decoder_embed.weight" in weights:
            decoder_width = weights["decoder_embed.weight"].shape[0]
            decoder_ratio = mlp_ratio(weights["decoder_blocks.0.mlp.fc1.weight"].shape[0], decoder_width)
            shape["mlp_ratio"] = max(shape["mlp_ratio"], decoder_ratio)  # the larger one: widths are rounded down
            heads = metadata.decoder_num_heads or _heads(DECODER_HEADS, decoder_width, "--decoder-num-heads")
            model = MaskedAutoencoderViT(
                **shape,
                decoder_embed_dim=decoder_width,
                decoder_depth=count_blocks(weights, "decoder_blocks"),
                decoder_num_heads=heads,
                norm_pix_loss=bool(metadata.norm_pix_loss),
            )
        else:
            model = VisionTransformer(
                **shape,
                global_pool="fc_norm.weight" in weights,
                num_classes=len(weights["head.weight"]) if "head.weight" in weights else 0,
                qkv_bias="blocks.0.attn.qkv.bias" in weights,
            )
        model.to(weights["cls_token"].dtype).load_state_dict(weights)
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"the weights do not fit each other: {' '.join(str(error).split())}") from error
    return model.eval()


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio for which ``int(width * ratio)`` is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def count_blocks(weights: dict[str, Tensor], blocks: str) -> int:
    """The number of ``blocks`` in our ``weights``."""
    return sum(name.startswith(f"{blocks}.") and name.endswith(".norm1.weight") for name in weights)


def _heads(table: dict[int, int], width: int, flag: str) -> int:
    if width not in table:
        raise UserError(f"the number of attention heads is unknown for a width of {width}", f"give {flag}")
    return table[width]
