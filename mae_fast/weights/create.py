"""Models with weights: out of runs of ours, files and folders of any layout, and the Hugging Face hub."""

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UserError, warn
from ..models import mae, vit
from ..models.pos_embed import resized, sincos_2d
from ..models.sizes import MAE_ALIASES, MAE_CONFIGS, VIT_CONFIGS
from .convert import convert, detect
from .files import FILES, load_weights
from .metadata import Details, checked, read
from .metadata import Model as Model
from .run_reader import MANIFEST, MODEL, Checkpoint, find_checkpoint

# What is fetched of a repository, the first that it has: weights without code in them before others.
PATTERNS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
)
CONFIGS = ["config.json", "preprocessor_config.json"]


def create_model(name: str, pretrained: str | os.PathLike[str] | None = None, **kwargs: Any) -> Model:
    """A model by name, with weights of any origin.

    Tables of positions of another grid are resized as the published fine-tuning code does it; a masked autoencoder's
    sine-cosine tables are made anew. A line on standard error tells each thing that is left out of the weights, is
    resized, or starts at random.

    Args:
        name: of a factory, such as "mae_vit_base_patch16" or "vit_base_patch16".
        pretrained: a file (.safetensors, .pth, .bin) in any layout that ``weights.convert`` knows; a folder of
            transformers, timm or ``save_pretrained``; a run of ours, its newest good checkpoint; or a repository on the
            Hugging Face hub, "organisation/name". None: random weights.
        kwargs: override the factory's constructor arguments. The eps of ``norm_layer``, ``norm_pix_loss``,
            ``pixel_mean`` and ``pixel_std``, and a classifier's ``num_classes`` and ``global_pool``, are those of the
            weights, where these have any and none are given. A ``.pth`` of another program says nothing of them.

    Raises:
        UserError: on an unknown name, or sizes that do not fit each other; if there are no such weights, or they do not
            fit the model: all that is missing or too much is listed.
    """
    if pretrained is None:
        return _build(name, kwargs)
    weights, details = _read(pretrained)
    converted = convert(weights, detect(weights), "ours")
    found, notes = dict(converted.weights), list(converted.notes)
    kwargs, mismatched = _of_weights(name, details, kwargs)
    notes += mismatched
    if name in VIT_CONFIGS:
        head = next((found[key] for key in ("head.weight", "head.1.weight") if key in found), None)
        if head is not None:
            kwargs = {"num_classes": len(head), "global_pool": "fc_norm.weight" in found, **kwargs}
    model = _build(name, kwargs)
    notes += _check_details(model, details, pretrained)
    if isinstance(model, vit.VisionTransformer):
        notes += _fit_classifier(model, found)
    else:
        notes += _fit_mae(model, found)
    notes += _fit_tables(model, found, details)
    _load(model, found, pretrained)
    for note in notes:
        warn(f"{os.fspath(pretrained)}: {note}")
    return model


def classes_of(pretrained: str | os.PathLike[str]) -> int | None:
    """How many classes the head of these weights has; None if they have no head. ``pretrained`` as for
    ``create_model``, which raises what this raises."""
    weights, _ = _read(pretrained)
    found = convert(weights, detect(weights), "ours").weights
    return next((len(found[key]) for key in ("head.weight", "head.1.weight") if key in found), None)


def of_run(run: Path, ema: bool = False) -> tuple[Model, Checkpoint]:
    """The model of a run's newest good checkpoint, in evaluation mode, and that checkpoint.

    Args:
        run: the output folder of a training command, or one checkpoint in it.
        ema: with the averaged weights.

    Raises:
        UserError: if there is none, or its model is not one of this package's.
    """
    found = find_checkpoint(run)
    return of_checkpoint(found, ema), found


def of_checkpoint(found: Checkpoint, ema: bool = False) -> Model:
    """The model of a checkpoint, in evaluation mode; ``ema`` and errors as ``of_run`` has them."""
    model = _untrained(found)
    with safe_open(found.path / MODEL, "pt") as file:
        probed = "head.1.weight" in file.keys()  # noqa: SIM118
    if probed and isinstance(model, vit.VisionTransformer):
        model.head = vit.probing_head(model.head)
    found.load_model(model, ema)
    return model.eval()


def _of_weights(name: str, details: Details, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Constructor arguments with what ``details`` say of the model, where it is not in ``kwargs``; notes."""
    details, notes = details.for_channels(kwargs.get("in_chans", 3))
    said = details.arguments()
    if name in VIT_CONFIGS:
        said.pop("norm_pix_loss", None)
    return {**said, **kwargs}, notes


def _build(name: str, kwargs: dict[str, Any]) -> Model:
    try:
        if name in VIT_CONFIGS:
            return vit.build(name, **kwargs)
        if name in MAE_CONFIGS or name in MAE_ALIASES:
            return mae.build(name, **kwargs)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error
    raise UserError(
        f"unknown model {name!r}",
        f"known: {', '.join(sorted({*MAE_CONFIGS, *MAE_ALIASES, *VIT_CONFIGS}))}",
    )


def _untrained(found: Checkpoint) -> Model:
    """The model that a checkpoint is of, with weights of its own."""
    made = dict(found.state["model"])
    try:
        return _build(made.pop("name"), made)
    except UserError as error:
        raise UserError(f"{found.path} is not of one of this package's models: {error}") from error


def _check_details(model: Model, details: Details, origin: object) -> list[str]:
    """Of what weights do not show in their shapes: heads must be the model's, another eps is told."""
    for what, blocks in ("num_heads", model.blocks), ("decoder_num_heads", getattr(model, "decoder_blocks", ())):
        theirs = getattr(details, what)
        block: Any
        for block in blocks:
            ours = block.attn.num_heads
            if theirs not in (None, ours):
                raise UserError(f"{origin} has {what}={theirs}, the model {ours}", f"give {what}={theirs}")
    ours = next((module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)), None)
    if None in (details.norm_eps, ours) or details.norm_eps == ours:
        return []
    return [f"its layer norms have eps {details.norm_eps:g}, the model's {ours:g} as given"]


def _fit_mae(model: mae.MaskedAutoencoderViT, found: dict[str, Tensor]) -> list[str]:
    """Add to ``found`` what a masked autoencoder may have of its own, take what it has no place for; say so."""
    notes = _drop(found, "head.", "a masked autoencoder has no head")
    decoder = [key for key in model.state_dict() if key.startswith("decoder_") or key == "mask_token"]
    if not any(key in found for key in decoder):
        found |= {key: model.state_dict()[key] for key in decoder}
        notes.append("these weights have no decoder: it starts at random")
    return notes


def _fit_classifier(model: vit.VisionTransformer, found: dict[str, Tensor]) -> list[str]:
    """As ``_fit_mae``, for a classifier."""
    notes = _drop(found, ("decoder_", "mask_token"), "a classifier has no decoder")
    own = model.state_dict()
    if model.global_pool and "fc_norm.weight" not in found:
        notes += _drop(found, "norm.", "with global_pool, fc_norm takes its place, which starts anew")
        found |= {key: own[key] for key in ("fc_norm.weight", "fc_norm.bias")}
    rows = next((len(found[key]) for key in ("head.weight", "head.1.weight") if key in found), None)
    if rows is not None and rows != model.num_classes:
        notes += _drop(found, "head.", f"it is of {rows} classes, the model of {model.num_classes}")
    elif "head.1.weight" in found:
        model.head = vit.probing_head(model.head)
        return notes
    if model.num_classes and "head.weight" not in found:
        found |= {key: own[key] for key in ("head.weight", "head.bias")}
        notes.append("the head starts at random")
    return notes


def _drop(found: dict[str, Tensor], prefix: str | tuple[str, ...], why: str) -> list[str]:
    names = [name for name in found if name.startswith(prefix)]
    for name in names:
        del found[name]
    listed = ", ".join(names) if len(names) <= 4 else f"{names[0]} and {len(names) - 1} more"
    return [f"left out {listed}: {why}"] if names else []


def _fit_tables(model: Model, found: dict[str, Tensor], details: Details) -> list[str]:
    """Position tables for the model's grid, of those in ``found``; a note for each that was not as it should be."""
    notes = []
    grid = model.patch_embed.grid_size
    for name in ("pos_embed", "decoder_pos_embed"):
        table, own = found.get(name), model.state_dict().get(name)
        if table is None or own is None or table.ndim != 3 or table.shape[2] != own.shape[2]:
            continue  # listed with whatever else does not fit
        old = _grid(table.shape[1] - 1, model, details)
        if old is None or old == grid:
            continue
        change = f"{name} of {old[0]} x {old[1]} patches was"
        # A masked autoencoder's table is a function of the grid; a classifier's is trained from what it was.
        if isinstance(model, mae.MaskedAutoencoderViT) and _is_sincos(table, old):
            found[name] = own
            notes.append(f"{change} made anew for {grid[0]} x {grid[1]}: sine-cosine")
        else:
            found[name] = resized(table.float(), old, grid)
            notes.append(f"{change} resized to {grid[0]} x {grid[1]}: bicubic")
    return notes


def _grid(num_patches: int, model: Model, details: Details) -> tuple[int, int] | None:
    """The grid of a table with that many patches: as said, else the model's, else a square; None if it is neither."""
    (p, q), own = model.patch_embed.patch_size, model.patch_embed.grid_size
    if details.img_size is not None:
        said = details.img_size[0] // p, details.img_size[1] // q
        if said[0] * said[1] == num_patches:
            return said
    if num_patches == own[0] * own[1]:
        return own
    side = math.isqrt(max(0, num_patches))
    return (side, side) if side and side * side == num_patches else None


def _is_sincos(table: Tensor, grid: tuple[int, int]) -> bool:
    """Up to what rounding the table to bf16 does to it."""
    limit = torch.finfo(torch.bfloat16).eps
    return bool((table.float() - sincos_2d(table.shape[2], grid)).abs().max() <= limit)


def _load(model: Model, found: dict[str, Tensor], origin: object) -> None:
    """Copy all of ``found`` into all of the model, or say everything that stands in the way."""
    own = model.state_dict()
    wrong = [f"lacks {name}" for name in own if name not in found]
    wrong += [f"has {name} besides" for name in found if name not in own]
    wrong += [
        f"has {name} of {list(found[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    if wrong:
        pooled = isinstance(model, vit.VisionTransformer) and "has fc_norm.weight besides" in wrong
        advice = "; give global_pool=True" if pooled else ""
        raise UserError(f"{origin} does not fit the model: it {', '.join(wrong)}{advice}")
    model.load_state_dict(found)


def _read(pretrained: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Details]:
    """The weights in a file, a folder, a run or a repository, under the names they have there; what is said of them."""
    path = Path(pretrained)
    if not path.exists():
        named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", os.fspath(pretrained)) is not None
        if not named or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
            raise UserError(f"weights {path}: there is no such file or folder", "give another path")
        path = _download(os.fspath(pretrained))
    if path.name == MODEL and (path.parent / MANIFEST).is_file():
        path = path.parent
    if (path / "checkpoints").is_dir() or (path / MANIFEST).is_file():
        found = find_checkpoint(path)
        with torch.device("meta"):
            details = Details.of(_untrained(found))
        made = {name: found.state["model"].get(name) for name in ("pixel_mean", "pixel_std")}
        details = details.or_else(checked({**made, "mask_ratio": found.state.get("mask_ratio")}, found.path))
        return load_weights(found.path / MODEL), details
    return read(path)


def _download(repository: str) -> Path:
    """The folder with the weights of ``repository``, fetched or out of the cache."""
    from huggingface_hub import snapshot_download

    try:
        for patterns in PATTERNS:
            folder = Path(snapshot_download(repository, allow_patterns=[*CONFIGS, *patterns]))
            if any((folder / name).exists() for name in patterns):
                return folder
    except Exception as error:  # its errors have no class in common
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repository} is no file or folder here, and the Hugging Face hub did not give it ({why})",
            "either give a local file or folder; or fetch it where there is a network ('hf download') and set HF_HOME "
            "to that cache, and HF_HUB_OFFLINE=1; or start from random weights: pretrained=None",
        ) from error
    raise UserError(f"{repository} on the Hugging Face hub has no weights: neither {' nor '.join(FILES)}")
