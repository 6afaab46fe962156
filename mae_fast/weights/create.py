"""Creates models with weights from training runs, files and folders in any layout, and the Hugging Face hub."""

import logging
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..models import mae, vit
from ..models.pos_embed import resize_pos_embed, sincos_2d
from ..models.sizes import MAE_ALIASES, MAE_CONFIGS, VIT_CONFIGS
from .convert import Converted, convert, detect
from .files import WEIGHT_FILES, load_weights
from .layouts import format_keys
from .metadata import Model as Model
from .metadata import ModelMetadata, build_model, count_blocks, parse_metadata, read_weights
from .run_reader import MODEL, Checkpoint, find_checkpoint, run_or_checkpoint, run_settings

logger = logging.getLogger(__name__)

# Files to download from a repository: the first group that it has. Safetensors, which cannot contain code, come first.
PATTERNS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
)
CONFIGS = ["config.json", "preprocessor_config.json"]
DECODER = ("decoder_", "mask_token", "encoder_mask_token")  # first parts of the names of a decoder's weights


def create_model(name: str, pretrained: str | os.PathLike[str] | None = None, **kwargs: Any) -> Model:
    """A model by name, with weights of any origin.

    Position tables of another grid are resized as in the published fine-tuning code; a masked autoencoder's
    sine-cosine tables are computed anew. The patch embedding is adapted to another number of channels. A warning is
    logged for everything that is left out of the weights, is resized, or starts at random. Two things are logged at
    INFO: a classifier leaves the decoder out, and starts with a new head if the weights have none and ``num_classes``
    is given.

    Args:
        name: a factory, such as "mae_vit_base_patch16" or "vit_base_patch16".
        pretrained: a file (.safetensors, .pth, .bin) in any layout that ``weights.convert`` knows; a folder of
            transformers, timm or ``save_pretrained``; a run, with its newest good checkpoint; or a repository on the
            Hugging Face hub, "organisation/name". None: random weights.
        kwargs: arguments of the model's constructor. Where they are not given, the eps of ``norm_layer``,
            ``norm_pix_loss``, ``pixel_mean``, ``pixel_std``, ``nodata`` and ``pixel_dtype``, and a classifier's
            ``num_classes`` and ``global_pool`` are taken from the weights, if recorded there. A ``.pth`` file of
            another program records none of them.

    Raises:
        UserError: if the name is unknown, sizes do not fit each other, there are no such weights, or they do not fit
            the model. The message has the first keys that are missing or unexpected; all are logged at DEBUG.
    """
    if pretrained is None:
        return _build(name, kwargs)
    weights, metadata = _read_pretrained(pretrained)
    converted = _to_ours(weights, pretrained)
    found, notes = dict(converted.weights), list(converted.notes)
    metadata, dropped = metadata.for_pixels(kwargs.get("in_chans", 3), kwargs.get("pixel_dtype"), kwargs)
    notes += dropped
    recorded, num_classes = metadata.constructor_arguments(), None
    if name in VIT_CONFIGS:
        recorded.pop("norm_pix_loss", None)
        num_classes = _num_classes(found)
        if num_classes is not None:
            recorded |= {"num_classes": num_classes, "global_pool": "fc_norm.weight" in found}
    model = _build(name, {**recorded, **kwargs})
    if _is_ablation(model) and weights.keys() == model.state_dict().keys():
        found, notes = dict(weights), dropped
    notes += _check_metadata(model, metadata, pretrained)
    expected: list[str] = []
    if isinstance(model, vit.VisionTransformer):
        expected = _drop(found, ("decoder_", "mask_token"), "a classifier has no decoder")
        fresh = _fit_classifier(model, found)
        if num_classes is None and "num_classes" in kwargs:
            expected += fresh
        else:
            notes += fresh
    else:
        notes += _fit_mae(model, found)
    notes += _fit_channels(model, found)
    _check_sizes(model, found, pretrained)
    notes += _fit_position_tables(model, found, metadata)
    _load(model, found, pretrained)
    for note in expected:
        logger.info("%s: %s", os.fspath(pretrained), note)
    for note in notes:
        logger.warning("%s: %s", os.fspath(pretrained), note)
    return model


def count_classes(pretrained: str | os.PathLike[str]) -> int | None:
    """The number of classes of the head in these weights, None without a head. Arguments as in ``create_model``."""
    weights, _ = _read_pretrained(pretrained)
    return _num_classes(_to_ours(weights, pretrained).weights)


def has_decoder(pretrained: str | os.PathLike[str]) -> bool:
    """Whether these weights have a decoder that predicts pixels. Arguments as in ``create_model``."""
    weights, _ = _read_pretrained(pretrained)
    return "decoder_embed.weight" in _to_ours(weights, pretrained).weights


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and its origin.

    Attributes:
        checkpoint: of the run; None if the weights are not a run.
        settings: the flags of the run, such as "exif"; empty if the weights are not a run.
        metadata: what is recorded with the weights, such as the names of classes.
    """

    model: Model
    checkpoint: Checkpoint | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: ModelMetadata = field(default_factory=ModelMetadata)


def load_encoder(weights: str | os.PathLike[str], model: str | None = None, ema: bool = False) -> LoadedModel:
    """The model of weights of any origin, in evaluation mode and fp32.

    Args:
        weights: as ``pretrained`` of ``create_model``.
        model: the name of a factory. Without it, a run says which model it has; the sizes of other models are read from
            the shapes of the weights and the files beside them.
        ema: load the averaged weights of a run.

    Raises:
        UserError: if there are no such weights, if they do not show the model's sizes, or if they do not fit ``model``.
    """
    path = find_weights(weights)
    run = run_or_checkpoint(path)
    checkpoint = find_checkpoint(run) if run else None
    if ema and (model or not checkpoint):
        raise UserError("--ema: only a run has averaged weights", f"leave {'--model' if model else '--ema'} out")
    if checkpoint:
        made = create_model(model, checkpoint.path).eval() if model else load_checkpoint(checkpoint, ema)
        return LoadedModel(
            made, checkpoint, run_settings(checkpoint), ModelMetadata.from_state(checkpoint.state, checkpoint.path)
        )
    found, metadata = read_weights(path)
    if model:
        return LoadedModel(create_model(model, weights).eval(), metadata=metadata)
    converted = _to_ours(found, weights)
    for note in converted.notes:
        logger.warning("%s: %s", weights, note)
    try:
        return LoadedModel(build_model(converted.weights, metadata).float(), metadata=metadata)
    except UserError as error:
        raise UserError(f"{weights}: {error.message}", "give --model") from error


def load_run(run: Path, ema: bool = False) -> tuple[Model, Checkpoint]:
    """The model of a run's newest good checkpoint, in evaluation mode, and that checkpoint.

    Args:
        run: the output folder of a training command, or one checkpoint in it.
        ema: load the averaged weights.

    Raises:
        UserError: if there is no checkpoint, or it is not of one of this package's models.
    """
    checkpoint = find_checkpoint(run)
    return load_checkpoint(checkpoint, ema), checkpoint


def load_checkpoint(checkpoint: Checkpoint, ema: bool = False) -> Model:
    """The model of a checkpoint, in evaluation mode. Arguments and errors as in ``load_run``."""
    model = _build_untrained(checkpoint)
    with safe_open(checkpoint.path / MODEL, "pt") as file:
        probed = "head.1.weight" in file.keys()  # noqa: SIM118
    if probed and isinstance(model, vit.VisionTransformer):
        model.head = vit.probing_head(model.head)
    checkpoint.load_model(model, ema)
    return model.eval()


def _to_ours(weights: dict[str, Tensor], origin: object) -> Converted:
    """The weights under our names. Errors name their origin."""
    try:
        return convert(weights, detect(weights), "ours")
    except UserError as error:
        raise UserError(f"{origin}: {error.message}", error.hint) from error


def _build(name: str, kwargs: dict[str, Any]) -> Model:
    try:
        if name in VIT_CONFIGS:
            return vit.build(name, **kwargs)
        if name in MAE_CONFIGS or name in MAE_ALIASES:
            return mae.build(name, **kwargs)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error
    raise UserError(
        f"unknown model {name!r}", f"known: {', '.join(sorted({*MAE_CONFIGS, *MAE_ALIASES, *VIT_CONFIGS}))}"
    )


def _build_untrained(checkpoint: Checkpoint) -> Model:
    """The model of a checkpoint with random weights."""
    kwargs = dict(checkpoint.state["model"])
    try:
        return _build(kwargs.pop("name"), kwargs)
    except UserError as error:
        raise UserError(f"{checkpoint.path} is not of one of this package's models: {error}") from error


def _is_ablation(model: Model) -> bool:
    """Whether it is one of the paper's ablations, whose decoder and target no other model can use."""
    return isinstance(model, mae.MaskedAutoencoderViT) and (model.mask_token is None or model.target is not None)


def _num_classes(weights: dict[str, Tensor]) -> int | None:
    """The number of classes of our weights; None if they have no head."""
    return next((len(weights[key]) for key in ("head.weight", "head.1.weight") if key in weights), None)


def _check_metadata(model: Model, metadata: ModelMetadata, origin: object) -> list[str]:
    """Compare settings that weights do not show: refuse another number of heads, return a note for another eps."""
    for name, blocks in ("num_heads", model.blocks), ("decoder_num_heads", getattr(model, "decoder_blocks", ())):
        theirs = getattr(metadata, name)
        block: Any
        for block in blocks:
            ours = block.attn.num_heads
            if theirs not in (None, ours):
                raise UserError(f"{origin} has {name}={theirs}, the model {ours}", f"give {name}={theirs}")
    ours = next((module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)), None)
    if None in (metadata.norm_eps, ours) or metadata.norm_eps == ours:
        return []
    return [f"its layer norms have eps {metadata.norm_eps:g}, but the model was given {ours:g}"]


def _fit_mae(model: mae.MaskedAutoencoderViT, found: dict[str, Tensor]) -> list[str]:
    """Remove a head from ``found``, and add the parts of the model that it lacks or that do not fit; returns notes."""
    notes = _drop(found, "head.", "a masked autoencoder has no head")
    own = model.state_dict()
    if "norm.weight" not in found:
        notes += _drop(found, "fc_norm.", "a masked autoencoder has a norm of all tokens instead, which starts anew")
        found |= {key: own[key] for key in ("norm.weight", "norm.bias")}
    if not any(key.startswith("decoder_") for key in found):
        notes.append("these weights have no decoder: it starts at random")
        found |= {key: x for key, x in own.items() if key.startswith(DECODER)}
    pred = "decoder_pred.weight"
    if pred in found and len(found[pred]) != len(own[pred]):
        why = f"it predicts {len(found[pred])} values of a patch, the model {len(own[pred])}; it starts at random"
        notes += _drop(found, "decoder_pred.", why)
        found |= {key: own[key] for key in (pred, "decoder_pred.bias")}
    found |= {key: x for key, x in own.items() if key.startswith("target.") and key not in found}  # a tokenizer's
    return notes


def _fit_classifier(model: vit.VisionTransformer, found: dict[str, Tensor]) -> list[str]:
    """Add a random norm and head to ``found`` where the weights' do not fit; returns notes."""
    notes: list[str] = []
    own = model.state_dict()
    if model.global_pool and "fc_norm.weight" not in found:
        notes += _drop(found, "norm.", "with global_pool, the model has fc_norm instead, which starts anew")
        found |= {key: own[key] for key in ("fc_norm.weight", "fc_norm.bias")}
    num_classes = _num_classes(found)
    if num_classes is not None and num_classes != model.num_classes:
        notes += _drop(found, "head.", f"it has {num_classes} classes, the model {model.num_classes}")
    elif "head.1.weight" in found:
        model.head = vit.probing_head(model.head)
        return notes
    if model.num_classes and "head.weight" not in found:
        found |= {key: own[key] for key in ("head.weight", "head.bias")}
        notes.append("the head starts at random")
    return notes


def _fit_channels(model: Model, found: dict[str, Tensor]) -> list[str]:
    """Adapt the patch embedding in ``found`` to the model's number of channels; returns a note if it changed.

    One channel gets the sum over the channels. Several channels repeat them, scaled to keep the size of the sum.
    """
    weight, ours = found.get("patch_embed.proj.weight"), model.in_chans
    if weight is None or weight.ndim != 4 or weight.shape[1] == ours:
        return []
    theirs = weight.shape[1]
    repeated = weight.repeat(1, math.ceil(ours / theirs), 1, 1)[:, :ours] * (theirs / ours)
    found["patch_embed.proj.weight"] = weight.sum(1, keepdim=True) if ours == 1 else repeated
    return [f"the patch embedding of {theirs} channels was {'summed' if ours == 1 else 'repeated'} for {ours}"]


def _check_sizes(model: Model, found: dict[str, Tensor], origin: object) -> None:
    """Raise ``UserError`` if the weights are of a model with other sizes."""
    theirs, ours = _sizes(found), _sizes(model.state_dict())
    different = {name: size for name, size in theirs.items() if name in ours and size != ours[name]}
    if different:
        listed = ", ".join(f"{name} {size} instead of {ours[name]}" for name, size in different.items())
        named = [f"{name}={size}" for name, size in different.items() if name.startswith("decoder_")]
        hint = f"give {' and '.join(named)}" if len(named) == len(different) else "give the model of these sizes"
        raise UserError(f"{origin} does not fit the model: it has {listed}", hint)


def _sizes(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Sizes of a model by the names of our constructors' arguments."""
    weight = weights["patch_embed.proj.weight"]
    found = {"patch_size": tuple(weight.shape[2:]), "embed_dim": len(weight), "depth": count_blocks(weights, "blocks")}
    if "decoder_embed.weight" in weights:
        found["decoder_embed_dim"] = len(weights["decoder_embed.weight"])
        found["decoder_depth"] = count_blocks(weights, "decoder_blocks")
    return found


def _drop(found: dict[str, Tensor], prefix: str | tuple[str, ...], why: str) -> list[str]:
    names = [name for name in found if name.startswith(prefix)]
    for name in names:
        del found[name]
    listed = ", ".join(names) if len(names) <= 4 else f"{names[0]} and {len(names) - 1} more"
    return [f"left out {listed}: {why}"] if names else []


def _fit_position_tables(model: Model, found: dict[str, Tensor], metadata: ModelMetadata) -> list[str]:
    """Replace position tables of another grid in ``found``; returns a note for each."""
    notes = []
    grid = model.patch_embed.grid_size
    for name in ("pos_embed", "decoder_pos_embed"):
        table, own = found.get(name), model.state_dict().get(name)
        if table is None or own is None or table.ndim != 3 or table.shape[2] != own.shape[2]:
            continue  # reported by _load
        old = _grid(table.shape[1] - 1, model, metadata)
        if old is None or old == grid:
            continue
        change = f"{name} of {old[0]} x {old[1]} patches was"
        # A masked autoencoder's table is a function of the grid; a classifier's is trained and keeps its values.
        if isinstance(model, mae.MaskedAutoencoderViT) and _is_sincos(table, old):
            found[name] = own
            notes.append(f"{change} made anew for {grid[0]} x {grid[1]}: sine-cosine")
        else:
            found[name] = resize_pos_embed(table.float(), old, grid)
            notes.append(f"{change} resized to {grid[0]} x {grid[1]}: bicubic")
    return notes


def _grid(num_patches: int, model: Model, metadata: ModelMetadata) -> tuple[int, int] | None:
    """The grid of a table of so many patches: by the metadata, else the model's, else a square; None if none fits."""
    (p, q), own = model.patch_embed.patch_size, model.patch_embed.grid_size
    if metadata.img_size is not None:
        recorded = metadata.img_size[0] // p, metadata.img_size[1] // q
        if recorded[0] * recorded[1] == num_patches:
            return recorded
    if num_patches == own[0] * own[1]:
        return own
    side = math.isqrt(max(0, num_patches))
    return (side, side) if side and side * side == num_patches else None


def _is_sincos(table: Tensor, grid: tuple[int, int]) -> bool:
    """Whether it is the sine-cosine table, up to rounding to bf16."""
    limit = torch.finfo(torch.bfloat16).eps
    return bool((table.float() - sincos_2d(table.shape[2], grid)).abs().max() <= limit)


def _load(model: Model, found: dict[str, Tensor], origin: object) -> None:
    """Copy ``found`` into the model. Raises ``UserError`` if something does not fit."""
    own = model.state_dict()
    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    shapes = [
        f"{name} of {list(found[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    wrong = [f"lacks {format_keys(missing)}"] * bool(missing)
    wrong += [f"has unexpected {format_keys(unexpected)}"] * bool(unexpected)
    if shapes:
        more = f" and {len(shapes) - 3} other shapes" if len(shapes) > 3 else ""
        wrong.append(f"has {', '.join(shapes[:3])}{more}")
        logger.debug("all shapes: %s", ", ".join(shapes))
    if wrong:
        pooled = isinstance(model, vit.VisionTransformer) and "fc_norm.weight" in unexpected
        raise UserError(
            f"{origin} does not fit the model: it {', it '.join(wrong)}", "give global_pool=True" if pooled else None
        )
    model.load_state_dict(found)


def _read_pretrained(pretrained: str | os.PathLike[str]) -> tuple[dict[str, Tensor], ModelMetadata]:
    """The weights of a file, folder, run or repository, under the names they have there, and their metadata."""
    path = find_weights(pretrained)
    run = run_or_checkpoint(path)
    if run is None:
        return read_weights(path)
    checkpoint = find_checkpoint(run)
    with torch.device("meta"):
        metadata = ModelMetadata.from_model(_build_untrained(checkpoint))
    state = {name: checkpoint.state["model"].get(name) for name in ("pixel_mean", "pixel_std")}
    metadata = metadata.filled_from(parse_metadata(state, checkpoint.path))
    return load_weights(checkpoint.path / MODEL), metadata.filled_from(
        ModelMetadata.from_state(checkpoint.state, checkpoint.path)
    )


def find_weights(weights: str | os.PathLike[str]) -> Path:
    """The file or folder of weights; a repository on the hub is downloaded."""
    if not os.fspath(weights):  # Path("") would be the current folder
        raise UserError("weights '': the name is empty", "give a file, a folder or a name on the Hugging Face hub")
    path = Path(weights)
    if path.exists():
        return path
    is_repository = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", os.fspath(weights)) is not None
    if not is_repository or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        hint = "download it, and give its path" if "://" in os.fspath(weights) else "give another path"
        raise UserError(f"weights {weights}: there is no such file or folder", hint)
    return _download(os.fspath(weights))


def _download(repository: str) -> Path:
    """The folder with the weights of ``repository``, downloaded or from the cache."""
    from huggingface_hub import snapshot_download

    try:
        for patterns in PATTERNS:
            folder = Path(snapshot_download(repository, allow_patterns=[*CONFIGS, *patterns]))
            if any((folder / name).exists() for name in patterns):
                return folder
    except Exception as error:  # the hub's errors have no common class
        why = first_line(error)
        raise UserError(
            f"there is no file or folder {repository} here, and the download from the Hugging Face hub failed ({why})",
            "give a local file or folder; or download it elsewhere ('hf download'), set HF_HOME to that cache and "
            "HF_HUB_OFFLINE=1",
        ) from error
    raise UserError(f"{repository} on the Hugging Face hub has no weights: neither {' nor '.join(WEIGHT_FILES)}")
