"""Creates models with weights from training runs, files and folders in any layout, and the Hugging Face hub."""

import logging
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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

# Files to download from a repository: the first group that exists. Safetensors come first: they cannot contain code.
PATTERNS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
)
CONFIGS = ["config.json", "preprocessor_config.json"]
DECODER = ("decoder_", "mask_token", "encoder_mask_token")  # prefixes of the names of a decoder's weights
SEGMENTATION, DETECTION = "segmentation", "detection"  # the names of these models in checkpoints
ENCODER_PREFIXES = {SEGMENTATION: "net.", DETECTION: "backbone.net."}  # of the encoder's weights in these models


def create_model(name: str, pretrained: str | os.PathLike[str] | None = None, **kwargs: Any) -> Model:
    """Create a model by name, with weights of any origin.

    Position tables of another grid are resized as in the published fine-tuning code. The sine-cosine tables of a masked
    autoencoder are not resized: they are computed for the new grid. The patch embedding is adapted to another number of
    channels. A warning is logged for all weights that are left out, resized, or start at random. Expected changes are
    only logged at INFO: a classifier leaves the decoder out, and it has a new head and norm if the weights have no head
    and ``num_classes`` is given.

    Args:
        name: a factory, such as "mae_vit_base_patch16" or "vit_base_patch16".
        pretrained: a file (.safetensors, .pth, .bin) in any layout that ``weights.convert`` knows; a folder of
            transformers, timm or ``save_pretrained``; the folder of a training run (its newest good checkpoint is
            loaded) or of one checkpoint; or a repository on the Hugging Face hub, "organisation/name". Runs of
            segmentation and detection give their encoder. None: random weights.
        kwargs: arguments of the model's constructor. The defaults of ``norm_layer``'s eps, ``norm_pix_loss``,
            ``pixel_mean``, ``pixel_std``, ``nodata`` and ``pixel_dtype`` are those that the weights record. A ``.pth``
            file of another program records none of them. If the weights have a head, they determine a classifier's
            defaults of ``num_classes`` and ``global_pool``. The defaults of ``img_size`` and ``in_chans`` are those of
            the run.

    Raises:
        UserError: if the name is unknown, sizes do not fit each other, the weights do not exist, or they do not fit the
            model. The message names the first missing or unexpected keys. All of them are logged at DEBUG.
    """
    if pretrained is None:
        return _build(name, kwargs)
    if not isinstance(pretrained, str | os.PathLike):
        kind = type(pretrained).__name__
        raise TypeError(f"pretrained must be a path or a name, got {kind}; for a state dict, use load_state_dict")
    weights, metadata, sizes, changes = _read_pretrained(pretrained)
    kwargs = {**sizes, **kwargs}
    converted = _to_ours(weights, pretrained)
    found, notes = dict(converted.weights), [*changes, *converted.notes]
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
        if "norm_pix_loss" not in {**recorded, **kwargs} and "decoder_embed.weight" in found and not model.target:
            expected.append("these weights do not record norm_pix_loss, which is set to False")
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
    """The number of classes of the head in these weights. None without a head. ``pretrained``: see ``create_model``."""
    return _num_classes(_to_ours(_read_pretrained(pretrained).weights, pretrained).weights)


def has_decoder(pretrained: str | os.PathLike[str]) -> bool:
    """Whether these weights have a decoder that predicts pixels. ``pretrained``: see ``create_model``."""
    return "decoder_embed.weight" in _to_ours(_read_pretrained(pretrained).weights, pretrained).weights


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and its origin.

    Attributes:
        checkpoint: the checkpoint of the run. None if the weights are not of a run.
        settings: the flags of the run, such as "exif". Empty if the weights are not of a run.
        metadata: the settings recorded with the weights, such as the names of classes.
    """

    model: Model
    checkpoint: Checkpoint | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: ModelMetadata = field(default_factory=ModelMetadata)


def load_encoder(weights: str | os.PathLike[str], model: str | None = None, ema: bool = False) -> LoadedModel:
    """Load a model from weights of any origin, in evaluation mode and fp32.

    Args:
        weights: as ``pretrained`` of ``create_model``.
        model: the name of a factory. By default, the model is the one that a run records. For weights not from a run,
            sizes are read from the shapes of the weights and the files beside them.
        ema: load the averaged weights of a run.

    Raises:
        UserError: if the weights do not exist, do not determine the model's sizes, or do not fit ``model``.
    """
    path = find_weights(weights)
    run = run_or_checkpoint(path)
    checkpoint = find_checkpoint(run) if run else None
    if ema and (model or not checkpoint):
        if checkpoint:
            raise UserError(f"--ema and --model {model} exclude each other", "leave --model out: the run records it")
        raise UserError(f"--ema needs a training run, got {weights}", "leave --ema out")
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
    record = "mae-fast convert FILE NEW.safetensors --to ours --num-heads H --decoder-num-heads H"
    try:
        made = build_model(converted.weights, metadata).float()
    except UserError as error:
        hint = f"give --model, or write a file with the missing settings: {record}"
        raise UserError(f"{weights}: {error.message}", hint) from error
    if notes := _assumed_heads(made, metadata):
        logger.warning("%s does not record the number of attention heads: assuming %s (%s)", weights, notes, record)
    return LoadedModel(made, metadata=metadata)


def _assumed_heads(model: Model, metadata: ModelMetadata) -> str:
    """The numbers of heads, as a phrase, if ``metadata`` has none and no factory builds a model of these widths."""
    widths = {"embed_dim": model.embed_dim}
    parts: list[tuple[str, int | None, Any]] = [("encoder", metadata.num_heads, model.blocks)]
    if isinstance(model, mae.MaskedAutoencoderViT):
        widths["decoder_embed_dim"] = model.decoder_embed.out_features
        parts.append(("decoder", metadata.decoder_num_heads, model.decoder_blocks))
    if any(widths.items() <= config.items() for config in MAE_CONFIGS.values()):
        return ""
    return " and ".join(f"{blocks[0].attn.num_heads} in the {part}" for part, known, blocks in parts if not known)


def load_run(run: Path, ema: bool = False) -> tuple[Model, Checkpoint]:
    """Load the newest good checkpoint of a run. Returns the model, in evaluation mode, and the checkpoint.

    Args:
        run: the folder of a training run, or of one of its checkpoints.
        ema: load the averaged weights.

    Raises:
        UserError: if there is no checkpoint, or if its model is neither an autoencoder nor a classifier.
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
    """The weights under our names. Error messages name ``origin``."""
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
        raise UserError(f"cannot build the model of {checkpoint.path}: {error}") from error


def _is_ablation(model: Model) -> bool:
    """Whether it is an ablation of the paper, whose decoder and target no other model can use."""
    return isinstance(model, mae.MaskedAutoencoderViT) and (model.mask_token is None or model.target is not None)


def _num_classes(weights: dict[str, Tensor]) -> int | None:
    """The number of classes of our weights; None if they have no head."""
    return next((len(weights[key]) for key in ("head.weight", "head.1.weight") if key in weights), None)


def _check_metadata(model: Model, metadata: ModelMetadata, origin: object) -> list[str]:
    """Compare settings that weights do not show. Refuse another number of heads. Return a note for another eps."""
    for name, blocks in ("num_heads", model.blocks), ("decoder_num_heads", getattr(model, "decoder_blocks", ())):
        theirs = getattr(metadata, name)
        block: Any
        for block in blocks:
            ours = block.attn.num_heads
            if theirs not in (None, ours):
                raise UserError(
                    f"{origin} has {name}={theirs}, but the model has {ours}",
                    f"choose the model or the preset of these weights, or set {name} to {theirs}",
                )
    ours = next((module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)), None)
    if None in (metadata.norm_eps, ours) or metadata.norm_eps == ours:
        return []
    return [f"its layer norms have eps {metadata.norm_eps:g}, but the model was given {ours:g}"]


def _fit_mae(model: mae.MaskedAutoencoderViT, found: dict[str, Tensor]) -> list[str]:
    """Make ``found`` fit the model: remove a head, add missing parts, replace those of other sizes. Return notes."""
    notes = _drop(found, "head.", "a masked autoencoder has no head")
    own = model.state_dict()
    if "norm.weight" not in found:
        notes += _drop(found, "fc_norm.", "a masked autoencoder has norm instead, which starts with its initial values")
        found |= {key: own[key] for key in ("norm.weight", "norm.bias")}
    if not any(key.startswith("decoder_") for key in found):
        notes.append("these weights have no decoder: it starts at random")
        found |= {key: x for key, x in own.items() if key.startswith(DECODER)}
    pred = "decoder_pred.weight"
    if pred in found and len(found[pred]) != len(own[pred]):
        why = f"it predicts {len(found[pred])} values per patch, the model {len(own[pred])}; it starts at random"
        notes += _drop(found, "decoder_pred.", why)
        found |= {key: own[key] for key in (pred, "decoder_pred.bias")}
    found |= {key: x for key, x in own.items() if key.startswith("target.") and key not in found}  # a tokenizer's
    return notes


def _fit_classifier(model: vit.VisionTransformer, found: dict[str, Tensor]) -> list[str]:
    """Make ``found`` fit the model: add an initial norm and a random head if needed. Return notes."""
    notes: list[str] = []
    own = model.state_dict()
    if model.global_pool and "fc_norm.weight" not in found:
        why = "with global_pool, the model has fc_norm instead, which starts with its initial values"
        notes += _drop(found, "norm.", why)
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
    """Adapt the patch embedding in ``found`` to the model's number of channels. Return a note if it changed.

    For one channel, the weights are summed over the channels. For several, they are repeated and scaled, so that the
    output keeps its magnitude.
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
        hint = f"give {' and '.join(named)}" if len(named) == len(different) else "choose a model of these sizes"
        raise UserError(f"{origin} does not fit the model: it has {listed}", hint)


def _sizes(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes of a model, as arguments of our constructors."""
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
    """Replace position tables of another grid in ``found``. Return a note for each."""
    notes = []
    grid = model.patch_embed.grid_size
    for name in ("pos_embed", "decoder_pos_embed"):
        table, own = found.get(name), model.state_dict().get(name)
        if table is None or own is None or table.ndim != 3 or table.shape[2] != own.shape[2]:
            continue  # reported by _load
        old = _grid(table.shape[1] - 1, model, metadata)
        if old is None or old == grid:
            continue
        change = f"from {old[0]} x {old[1]} to {grid[0]} x {grid[1]} patches"
        # A masked autoencoder's table is a function of the grid; a classifier's is trained and keeps its values.
        if isinstance(model, mae.MaskedAutoencoderViT) and _is_sincos(table, old):
            found[name] = own
            notes.append(f"{name} was computed again (sine-cosine), {change}")
        else:
            found[name] = resize_pos_embed(table.float(), old, grid)
            notes.append(f"{name} was resized (bicubic), {change}")
    return notes


def _grid(num_patches: int, model: Model, metadata: ModelMetadata) -> tuple[int, int] | None:
    """The grid of a position table: the recorded one, else the model's, else a square. None if none fits."""
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
    """Whether ``table`` is the sine-cosine table, up to rounding to bf16."""
    limit = torch.finfo(torch.bfloat16).eps
    return bool((table.float() - sincos_2d(table.shape[2], grid)).abs().max() <= limit)


def _load(model: Model, found: dict[str, Tensor], origin: object) -> None:
    """Copy ``found`` into the model. Raise ``UserError`` if names or shapes differ."""
    own = model.state_dict()
    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    shapes = [
        f"{name} of {list(found[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    wrong = [f"does not have {format_keys(missing)}"] * bool(missing)
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


class _Pretrained(NamedTuple):
    """Weights as they were read.

    Attributes:
        weights: under the names of their file. Of a segmentation or detection model, the encoder's.
        sizes: ``img_size`` and ``in_chans`` of a run; else empty.
        notes: a line for each change of the weights.
    """

    weights: dict[str, Tensor]
    metadata: ModelMetadata
    sizes: dict[str, Any]
    notes: list[str]


def _read_pretrained(pretrained: str | os.PathLike[str]) -> _Pretrained:
    """Read a file, folder, run or repository."""
    path = find_weights(pretrained)
    run = run_or_checkpoint(path)
    if run is None:
        return _Pretrained(*read_weights(path), {}, [])
    checkpoint = find_checkpoint(run)
    config, weights = checkpoint.state["model"], load_weights(checkpoint.path / MODEL)
    notes = []
    with torch.device("meta"):
        model = saved_encoder(config) if config["name"] in ENCODER_PREFIXES else _build_untrained(checkpoint)
    if prefix := ENCODER_PREFIXES.get(config["name"]):
        weights = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        weights |= {"norm.weight": torch.ones(model.embed_dim), "norm.bias": torch.zeros(model.embed_dim)}
        notes.append(f"a {config['name']} model has no last norm: it starts with its initial values")
        config = config.get("settings", {})
    stats = {name: config.get(name) for name in ("pixel_mean", "pixel_std")}
    metadata = ModelMetadata.from_model(model).filled_from(parse_metadata(stats, checkpoint.path))
    metadata = metadata.filled_from(ModelMetadata.from_state(checkpoint.state, checkpoint.path))
    sizes = {"img_size": model.patch_embed.img_size, "in_chans": model.in_chans}
    return _Pretrained(weights, metadata, sizes, notes)


def saved_encoder(config: dict[str, Any]) -> Model:
    """The encoder, with random weights, of a segmentation or detection model.

    Args:
        config: "model" in ``state.json``. Runs of old versions have no "settings".
    """
    size = config["img_size" if config["name"] == SEGMENTATION else "size"]
    return create_model(config["encoder"], num_classes=0, img_size=size, **config.get("settings", {}))


def find_weights(weights: str | os.PathLike[str]) -> Path:
    """The path of a file or folder of weights. A repository on the hub is downloaded."""
    if not os.fspath(weights):  # Path("") would be the current folder
        raise UserError("weights '': the name is empty", "give a file, a folder or a name on the Hugging Face hub")
    path = Path(weights)
    if path.exists():
        return path
    is_repository = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", os.fspath(weights)) is not None
    if not is_repository or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        hint = "download it, and give its path" if "://" in os.fspath(weights) else f"give another path{_near(path)}"
        raise UserError(f"weights {weights}: there is no such file or folder", hint)
    return _download(os.fspath(weights))


def _near(path: Path) -> str:
    """List the first names in the folder of ``path``, for a hint. Empty if the folder does not exist."""
    folder = path.parent
    there = sorted(x.name for x in folder.iterdir()) if path.name != f"{path}" and folder.is_dir() else []
    return f"; {folder} has {', '.join(there[:5])}{', ...' * (len(there) > 5)}" if there else ""


def _download(repository: str) -> Path:
    """The folder with the weights of ``repository``, downloaded or from the cache."""
    from huggingface_hub import snapshot_download

    try:
        for patterns in PATTERNS:
            folder = Path(snapshot_download(repository, allow_patterns=[*CONFIGS, *patterns]))
            if any((folder / name).exists() for name in patterns):
                return folder
    except Exception as error:  # the hub's errors have no common base class
        why = first_line(error)
        raise UserError(
            f"there is no file or folder {repository} here, and the download from the Hugging Face hub failed ({why})",
            f"give a local file or folder{_near(Path(repository))}; or run 'hf download {repository}' on another "
            "machine, copy its cache, ~/.cache/huggingface, to this one, and set HF_HOME to the copy and "
            "HF_HUB_OFFLINE=1",
        ) from error
    raise UserError(f"{repository} on the Hugging Face hub has no weights: neither {' nor '.join(WEIGHT_FILES)}")
