"""What weights do not say of their model, and the model that both together make."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from ..models.vit import VisionTransformer
from .convert import folded

Model = MaskedAutoencoderViT | VisionTransformer
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 128: 4}  # of encoders by width; the last is our demo's
DECODER_HEADS = {512: 16, 96: 3}
METADATA = "mae_fast"  # key of the details in a .safetensors file


@dataclass(frozen=True)
class Details:
    """None where it is not known."""

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    img_size: tuple[int, int] | None = None
    norm_eps: float | None = None
    norm_pix_loss: bool | None = None

    @classmethod
    def of(cls, model: Model) -> "Details":
        """All of a model's."""
        mae = model if isinstance(model, MaskedAutoencoderViT) else None
        block: Any = model.blocks[0]
        decoder: Any = mae.decoder_blocks[0] if mae and len(mae.decoder_blocks) else None
        return cls(
            num_heads=block.attn.num_heads,
            decoder_num_heads=decoder.attn.num_heads if decoder else None,
            img_size=model.patch_embed.img_size,
            norm_eps=block.norm1.eps,
            norm_pix_loss=mae.norm_pix_loss if mae else None,
        )

    @classmethod
    def beside(cls, path: Path) -> "Details":
        """What a ``.safetensors`` file of ours says, or a folder's ``config.json``: transformers', timm's or ours.

        Raises:
            UserError: if either is damaged.
        """
        if path.is_dir():
            return cls._of_config(path / "config.json") if (path / "config.json").exists() else cls()
        if path.suffix != ".safetensors":
            return cls()
        try:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get(METADATA)
        except (OSError, SafetensorError) as error:
            raise UserError(f"weights {path} cannot be read ({error})") from error
        return cls() if said is None else _checked(_parsed(said, path), path)

    @classmethod
    def _of_config(cls, config: Path) -> "Details":
        said = _parsed(config.read_text(errors="replace"), config)
        if isinstance(said.get("model_args"), dict):
            said |= said["model_args"]
        size = said.get("image_size", said.get("img_size"))
        norm = said.get("norm_layer")
        return _checked(
            {
                "num_heads": said.get("num_attention_heads", said.get("num_heads")),
                "decoder_num_heads": said.get("decoder_num_attention_heads", said.get("decoder_num_heads")),
                "img_size": [size, size] if isinstance(size, int) else size,
                "norm_eps": said.get("layer_norm_eps", norm.get("eps") if isinstance(norm, dict) else None),
                "norm_pix_loss": said.get("norm_pix_loss"),
            },
            config,
        )

    def metadata(self) -> dict[str, str]:
        """For a ``.safetensors`` file."""
        return {METADATA: json.dumps({name: value for name, value in asdict(self).items() if value is not None})}

    def or_else(self, other: "Details") -> "Details":
        """What is not known taken from ``other``."""
        gaps = {x.name: getattr(other, x.name) for x in fields(self) if getattr(self, x.name) is None}
        return replace(self, **gaps)


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its configuration is no JSON ({error})") from error
    if not isinstance(said, dict):
        raise UserError(f"{path} is damaged: its configuration is no JSON object")
    return said


def _checked(said: dict[str, Any], path: Path) -> Details:
    def is_size(x: object) -> bool:
        return type(x) is int and x > 0

    right: dict[str, Callable[[Any], bool]] = {
        "num_heads": is_size,
        "decoder_num_heads": is_size,
        "img_size": lambda x: isinstance(x, list) and len(x) == 2 and all(map(is_size, x)),
        "norm_eps": lambda x: type(x) in (float, int) and 0 < x < math.inf,
        "norm_pix_loss": lambda x: isinstance(x, bool),
    }
    found = {name: value for name in right if (value := said.get(name)) is not None}
    for name, value in found.items():
        if not right[name](value):
            raise UserError(f"{path}: {name} cannot be {value!r}")
    if "img_size" in found:
        found["img_size"] = tuple(found["img_size"])
    return Details(**found)


def build(weights: dict[str, Tensor], details: Details) -> Model:
    """The model of our weights, in evaluation mode and their dtype: a masked autoencoder if they have a decoder.

    Args:
        weights: complete, under our names; a linear probe's head is folded.
        details: what is not known becomes the paper's: heads of that width, a square image, eps 1e-6.

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
            "norm_layer": partial(nn.LayerNorm, eps=details.norm_eps or 1e-6),
        }
        model: Model
        if "decoder_embed.weight" in weights:
            decoder_width = weights["decoder_embed.weight"].shape[0]
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
            f"weights do not say how many heads a model {width} wide has, and it is none of the usual; give {flag}"
        )
    return table[width]
