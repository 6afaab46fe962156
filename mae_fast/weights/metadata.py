"""What weights do not say of their model, and the model that both together make."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from ..models.sizes import ENCODERS, PAPER_DECODER, TINY_DECODER
from ..models.vit import VisionTransformer
from .convert import folded
from .files import FILES, METADATA, load_described

Model = MaskedAutoencoderViT | VisionTransformer
# Attention heads by width. ViT-Ti and ViT-S are not in the paper.
HEADS = {192: 3, 384: 6} | {size["embed_dim"]: size["num_heads"] for size in ENCODERS.values()}
DECODER_HEADS = {size["decoder_embed_dim"]: size["decoder_num_heads"] for size in (PAPER_DECODER, TINY_DECODER)}
PAPER_EPS = 1e-6
# The timm architecture that has this eps: its config.json has a name for it and no number.
TIMM_ARCHITECTURES = {PAPER_EPS: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


@dataclass(frozen=True)
class Details:
    """None where it is not known."""

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    img_size: tuple[int, int] | None = None
    norm_eps: float | None = None
    norm_pix_loss: bool | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    mask_ratio: float | None = None

    @classmethod
    def of(cls, model: Model) -> "Details":
        """All of a model's, but for the mask ratio, which it does not know.

        Raises:
            UserError: if its layer norms have different eps: no file can say that.
        """
        mae = model if isinstance(model, MaskedAutoencoderViT) else None
        block: Any = model.blocks[0]
        decoder: Any = mae.decoder_blocks[0] if mae and len(mae.decoder_blocks) else None
        if model.norm_eps is None:
            raise UserError("the layer norms of this model differ in eps", "build it with one norm_layer")
        settings = model.settings()
        stats: dict[str, Any] = {x: tuple(settings[x]) for x in ("pixel_mean", "pixel_std") if x in settings}
        return cls(
            num_heads=block.attn.num_heads,
            decoder_num_heads=decoder.attn.num_heads if decoder else None,
            img_size=model.patch_embed.img_size,
            norm_eps=model.norm_eps,
            norm_pix_loss=mae.norm_pix_loss if mae else None,
            **stats,
        )

    def known(self) -> dict[str, Any]:
        """What is known, plain values by name: what files of ours have under ``METADATA``."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def arguments(self) -> dict[str, Any]:
        """What is known of ``Encoder.settings``, as that has it."""
        known = self.known()
        found: dict[str, Any] = {x: known[x] for x in ("pixel_mean", "pixel_std", "norm_pix_loss") if x in known}
        return {**found, "norm_layer": {"eps": self.norm_eps}} if self.norm_eps else found

    def or_else(self, other: "Details") -> "Details":
        """What is not known taken from ``other``."""
        gaps = {x.name: getattr(other, x.name) for x in fields(self) if getattr(self, x.name) is None}
        return replace(self, **gaps)

    def for_channels(self, channels: int) -> tuple["Details", list[str]]:
        """Without pixel statistics of another number of channels; a note for them."""
        wrong = [x for x in ("pixel_mean", "pixel_std") if len(getattr(self, x) or range(channels)) != channels]
        notes = [f"left out {name} of {len(getattr(self, name))} channels: the model has {channels}" for name in wrong]
        return replace(self, **dict.fromkeys(wrong)), notes


def read(path: Path) -> tuple[dict[str, Tensor], Details]:
    """The weights in a file or folder, and what is said of their model there.

    A file of ours says it itself; of a ``.pth`` of the published code the ``args`` say ``norm_pix_loss``. In a folder
    of transformers, timm or ``save_pretrained``, its configuration comes first, then the file, then the defaults of
    the library that wrote the configuration. ``FOLDER/model.safetensors`` is read as the folder is.

    Raises:
        UserError: if a part of it is damaged, or the model computes something that ours cannot.
    """
    weights, about = load_described(path)
    details = _of_file(about, path)
    if config := config_of(path):
        details = _of_config(config, folder_of(path)).or_else(details).or_else(_defaults(config))
    return weights, details


def config_of(path: Path) -> dict[str, Any]:
    """``config.json`` of a folder, or of the folder whose weights the file is; nothing if there is none."""
    config = folder_of(path) / "config.json"
    return _parsed(config) if config.exists() else {}


def folder_of(path: Path) -> Path:
    """The folder of a file such as ``FOLDER/model.safetensors``; of anything else, itself."""
    return path.parent if path.name in FILES else path


def _of_file(about: dict[str, Any], path: Path) -> Details:
    said = about.get(METADATA)
    if isinstance(said, str):  # safetensors have text alone
        said = _json(said, path)
    details = checked(said, path) if isinstance(said, dict) else Details()
    args = about.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if isinstance(args, dict):
        details = details.or_else(checked({key: args.get(key) for key in ("norm_pix_loss", "mask_ratio")}, path))
    return details


def _of_config(config: dict[str, Any], folder: Path) -> Details:
    path, said = folder / "config.json", config
    if isinstance(said.get("model_args"), dict):
        said = {**said, **said["model_args"]}
    activation = said.get("hidden_act", said.get("act_layer"))
    if activation not in (None, "gelu", "gelu_python"):
        raise UserError(
            f"{path}: the activation is {activation!r}, our models have gelu alone",
            "give other weights",
        )
    size = said.get("image_size", said.get("img_size"))
    norm = said.get("norm_layer")
    mean, std = said.get("pixel_mean"), said.get("pixel_std")
    if isinstance(timm := said.get("pretrained_cfg"), dict):
        mean, std = timm.get("mean"), timm.get("std")
    if (processor := folder / "preprocessor_config.json").exists():
        images = _parsed(processor)
        mean, std = images.get("image_mean"), images.get("image_std")
        if images.get("do_normalize") is False and isinstance(mean, list) and isinstance(std, list):
            mean, std = [0.0] * len(mean), [1.0] * len(std)
    return checked(
        {
            "num_heads": said.get("num_attention_heads", said.get("num_heads")),
            "decoder_num_heads": said.get("decoder_num_attention_heads", said.get("decoder_num_heads")),
            "img_size": [size, size] if isinstance(size, int) else size,
            "norm_eps": said.get("layer_norm_eps", norm.get("eps") if isinstance(norm, dict) else None),
            "norm_pix_loss": said.get("norm_pix_loss"),
            "pixel_mean": mean,
            "pixel_std": std,
            "mask_ratio": said.get("mask_ratio"),
        },
        path,
    )


def _defaults(config: dict[str, Any]) -> Details:
    """What a ``config.json`` means where it says nothing."""
    if config.get("model_type") in ("vit", "vit_mae"):  # of transformers
        return Details(num_heads=12, norm_eps=1e-12)
    if "architecture" in config:  # of timm
        eps = {name: eps for eps, name in TIMM_ARCHITECTURES.items()}
        return Details(norm_eps=eps.get(config["architecture"], PAPER_EPS))
    if "embed_dim" in config:  # of save_pretrained, which left out the class nn.LayerNorm
        return Details(norm_eps=1e-5)
    return Details()


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return _json(path.read_text(errors="replace"), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its configuration is no JSON ({error})") from error
    if not isinstance(said, dict):
        raise UserError(f"{path} is damaged: its configuration is no JSON object")
    return said


def checked(said: dict[str, Any], path: Path) -> Details:
    """Details of JSON.

    Raises:
        UserError: on a value that none can have.
    """

    def is_size(x: object) -> bool:
        return type(x) is int and x > 0

    def is_number(x: object) -> bool:
        return isinstance(x, (float, int)) and not isinstance(x, bool) and math.isfinite(x)

    def are_numbers(x: object) -> bool:
        return isinstance(x, (list, tuple)) and len(x) > 0 and all(map(is_number, x))

    right: dict[str, Callable[[Any], bool]] = {
        "num_heads": is_size,
        "decoder_num_heads": is_size,
        "img_size": lambda x: isinstance(x, (list, tuple)) and len(x) == 2 and all(map(is_size, x)),
        "norm_eps": lambda x: is_number(x) and x > 0,
        "norm_pix_loss": lambda x: isinstance(x, bool),
        "pixel_mean": are_numbers,
        "pixel_std": lambda x: are_numbers(x) and min(x) > 0,
        "mask_ratio": lambda x: is_number(x) and 0 <= x <= 1,
    }
    found: dict[str, Any] = {name: value for name in right if (value := said.get(name)) is not None}
    for name, value in found.items():
        if not right[name](value):
            raise UserError(f"{path}: {name} cannot be {value!r}")
        if isinstance(value, list):
            found[name] = tuple(value)
    return Details(**found)


def build(weights: dict[str, Tensor], details: Details) -> Model:
    """The model of our weights, in evaluation mode and their dtype: a masked autoencoder if they have a decoder.

    Args:
        weights: complete, under our names; a linear probe's head is folded.
        details: what is not known becomes the paper's: heads of that width, a square image, eps 1e-6, plain pixels.

    Raises:
        UserError: if the number of heads or the image's shape is not known, or the weights do not fit each other.
    """
    if "head.1.weight" in weights:
        weights = folded(weights)
    try:
        width, channels, p, q = weights["patch_embed.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        side = round((tokens - 1) ** 0.5)
        if details.img_size is None and side * side != tokens - 1:
            raise UserError(f"these weights are of {tokens - 1} patches, no square: the image's size has to be known")
        shape: dict[str, Any] = {
            "img_size": details.img_size or (side * p, side * q),
            "patch_size": (p, q),
            "in_chans": channels,
            "embed_dim": width,
            "depth": _depth(weights, "blocks"),
            "num_heads": details.num_heads or _heads(HEADS, width, "--num-heads"),
            "mlp_ratio": mlp_ratio(hidden, width),
            "norm_layer": partial(nn.LayerNorm, eps=details.norm_eps or PAPER_EPS),
            "pixel_mean": details.pixel_mean,
            "pixel_std": details.pixel_std,
        }
        model: Model
        if "decoder_embed.weight" in weights:
            decoder_width = weights["decoder_embed.weight"].shape[0]
            hidden = weights["decoder_blocks.0.mlp.fc1.weight"].shape[0]
            shape["mlp_ratio"] = max(shape["mlp_ratio"], mlp_ratio(hidden, decoder_width))  # both are rounded down
            heads = details.decoder_num_heads or _heads(DECODER_HEADS, decoder_width, "--decoder-num-heads")
            model = MaskedAutoencoderViT(
                **shape,
                decoder_embed_dim=decoder_width,
                decoder_depth=_depth(weights, "decoder_blocks"),
                decoder_num_heads=heads,
                norm_pix_loss=bool(details.norm_pix_loss),
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
    """The ratio of which ``int(width * ratio)`` is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _depth(weights: dict[str, Tensor], blocks: str) -> int:
    return sum(name.startswith(f"{blocks}.") and name.endswith(".norm1.weight") for name in weights)


def _heads(table: dict[int, int], width: int, flag: str) -> int:
    if width not in table:
        raise UserError(
            f"weights do not say how many heads a model {width} wide has, and it is none of the usual",
            f"give {flag}",
        )
    return table[width]
