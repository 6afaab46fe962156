"""Models with weights: out of runs of ours, files and folders of any layout, and the Hugging Face hub."""

import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UserError, warn
from ..models import mae, vit
from ..models.position import resized, sincos_2d
from ..training.checkpoint import MANIFEST, MODEL, Checkpoint, find
from ..weights import load_weights
from .convert import HEAD_EPS, convert, detect

Model = mae.MaskedAutoencoderViT | vit.VisionTransformer
INDEX = "model.safetensors.index.json"
# What may be fetched of a repository, the first that it has: others' weights without code in them before such with.
PATTERNS = (["*.safetensors", INDEX], ["*.bin", "*.pth"])


def create_model(name: str, pretrained: str | os.PathLike[str] | None = None, **kwargs: Any) -> Model:
    """A model by name, with weights of any origin.

    Tables of positions of another grid are resized as the published fine-tuning code does it; a masked autoencoder's
    sine-cosine tables are made anew. Whatever is left out of the weights, resized, or starts at random is told in a
    ``UserWarning``.

    Args:
        name: of a factory, such as "mae_vit_base_patch16" or "vit_base_patch16".
        pretrained: a file (.safetensors, .pth, .bin) in any layout that ``interop.convert`` knows; a folder with one,
            or with a transformers or hub-mixin model; a run of ours, its newest good checkpoint; or a repository on the
            Hugging Face hub, "organisation/name". None: random weights.
        kwargs: override the factory's constructor arguments. A classifier's ``num_classes`` and ``global_pool`` are
            those of the weights, where they have a head and none are given.

    Raises:
        ValueError: on an unknown name, or sizes that do not fit each other.
        UserError: if there are no such weights, or they do not fit the model: all that is missing or too much is
            listed.
    """
    classifier = name in vit.CONFIGS
    if pretrained is None:
        return vit.build(name, **kwargs) if classifier else mae.build(name, **kwargs)
    weights = _read(pretrained)
    converted = convert(weights, detect(weights), "ours")
    found, notes = dict(converted.weights), list(converted.notes)
    if classifier:
        head = next((found[key] for key in ("head.weight", "head.1.weight") if key in found), None)
        if head is not None:
            kwargs = {"num_classes": len(head), "global_pool": "fc_norm.weight" in found, **kwargs}
    model: Model = vit.build(name, **kwargs) if classifier else mae.build(name, **kwargs)
    if isinstance(model, vit.VisionTransformer):
        notes += _fit_classifier(model, found)
    else:
        notes += _fit_mae(model, found)
    notes += _fit_tables(model, found)
    _load(model, found, pretrained)
    for note in notes:
        warnings.warn(f"{os.fspath(pretrained)}: {note}", stacklevel=2)
    return model


def of_run(run: Path, ema: bool = False) -> tuple[Model, Checkpoint]:
    """The model of a run's newest good checkpoint, in evaluation mode, and that checkpoint.

    Args:
        run: the output folder of a training command, or one checkpoint in it.
        ema: with the averaged weights.

    Raises:
        UserError: if there is none, or its model is not one of this package's.
    """
    found = find(run, warn)
    made = found.state["model"]
    try:
        model: Model = (vit if made["name"] in vit.CONFIGS else mae).build(**made)
    except ValueError as error:
        raise UserError(f"the model of {found.path} is not one of this package's: {error}") from error
    with safe_open(found.path / MODEL, "pt") as file:
        probed = "head.1.weight" in file.keys()  # noqa: SIM118
    if probed and isinstance(model, vit.VisionTransformer):
        model.head = _probing_head(model.head)
    found.load_model(model, ema)
    return model.eval(), found


def _probing_head(head: nn.Module) -> nn.Module:
    """The published linear probe's head: a batch norm without weights before the linear layer."""
    assert isinstance(head, nn.Linear)
    return nn.Sequential(nn.BatchNorm1d(head.in_features, affine=False, eps=HEAD_EPS), head)


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
        model.head = _probing_head(model.head)
        return notes
    if model.num_classes and "head.weight" not in found:
        found |= {key: own[key] for key in ("head.weight", "head.bias")}
        notes.append("the head starts at random")
    return notes


def _drop(found: dict[str, Tensor], prefix: str | tuple[str, ...], why: str) -> list[str]:
    names = [name for name in found if name.startswith(prefix)]
    for name in names:
        del found[name]
    listed = ", ".join(names) if len(names) <= 4 else f"{names[0]} and {len(names) - 1} more of {prefix}"
    return [f"left out {listed}: {why}"] if names else []


def _fit_tables(model: Model, found: dict[str, Tensor]) -> list[str]:
    """Position tables for the model's grid, of those in ``found``; a note for each that was not as it should be."""
    notes = []
    grid = model.patch_embed.grid_size
    for name in ("pos_embed", "decoder_pos_embed"):
        table, own = found.get(name), model.state_dict().get(name)
        if table is None or own is None or table.shape == own.shape:
            continue
        side = math.isqrt(table.shape[1] - 1) if table.ndim == 3 else 0
        if table.ndim != 3 or table.shape[2] != own.shape[2] or side < 1 or side * side + 1 != table.shape[1]:
            continue  # listed with whatever else does not fit
        change = f"{name} of {side} x {side} patches was"
        # A masked autoencoder's table is a function of the grid; a classifier's is trained from what it was.
        if isinstance(model, mae.MaskedAutoencoderViT) and _is_sincos(table, side):
            found[name] = own
            notes.append(f"{change} made anew for {grid[0]} x {grid[1]}: sine-cosine")
        else:
            found[name] = resized(table.float(), (side, side), grid)
            notes.append(f"{change} resized to {grid[0]} x {grid[1]}: bicubic")
    return notes


def _is_sincos(table: Tensor, side: int) -> bool:
    """Up to what rounding the table to bf16 does to it."""
    limit = torch.finfo(torch.bfloat16).eps
    return bool((table.float() - sincos_2d(table.shape[2], (side, side))).abs().max() <= limit)


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
        advice = "; give global_pool=True" if "has fc_norm.weight besides" in wrong else ""
        raise UserError(f"{origin} does not fit the model: it {', '.join(wrong)}{advice}")
    model.load_state_dict(found)


def _read(pretrained: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a file, a folder, a run or a repository of the hub, under the names they have there."""
    path = Path(pretrained)
    if path.is_file():
        return load_weights(path)
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(pretrained)) is None:
            raise UserError(f"weights {path}: there is no such file or folder")
        path = _download(os.fspath(pretrained))
    if (path / "checkpoints").is_dir() or (path / MANIFEST).is_file():
        return load_weights(find(path, warn).path / MODEL)
    return load_folder(path)


def load_folder(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder of transformers, timm or the hub: one file, or the shards that an index lists.

    Raises:
        UserError: if there is none, or more than one and no index, or they are damaged.
    """
    if (folder / INDEX).is_file():
        return _load_shards(folder)
    for endings in (".safetensors",), (".bin", ".pth"):
        files = sorted(file for file in folder.iterdir() if file.suffix in endings)
        if len(files) > 1:
            raise UserError(f"{folder} has several files of weights: give one, such as {files[0]}")
        if files:
            return load_weights(files[0])
    raise UserError(f"{folder} has no weights: no .safetensors, .bin or .pth, and is no run of this package")


def _load_shards(folder: Path) -> dict[str, Tensor]:
    try:
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error})") from error
    found: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} is refused: {name!r} is no .safetensors file beside it")
        found |= load_weights(folder / name)
    if lost := sorted(set(places) ^ set(found)):
        raise UserError(f"{folder / INDEX} and its files do not agree on {', '.join(lost)}")
    return found


def _download(repository: str) -> Path:
    """The folder with the weights of ``repository``, fetched or out of the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        for patterns in PATTERNS:
            folder = Path(snapshot_download(repository, allow_patterns=[*patterns, "config.json"]))
            if any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.iterdir()):
                break
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repository} is no file or folder here, and the Hugging Face hub did not give it ({why}); either give a "
            "local file or folder; or fetch it where there is a network ('hf download') and set HF_HOME to that cache, "
            "and HF_HUB_OFFLINE=1; or start from random weights: pretrained=None"
        ) from error
    return folder
