"""Weights from file to file."""

import contextlib
import copy
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError, warn
from ..models.mae import MaskedAutoencoderViT
from ..models.vit import VisionTransformer
from .convert import convert, detect, folded
from .create import of_run
from .export import new_file
from .files import METADATA
from .hub_configs import FOLDERS, PICKLED, processor_config, timm_config, transformers_config, unsaid
from .metadata import Details, Model, build, config_of, folder_of, read
from .run_reader import MANIFEST, MODEL

FILES = (".safetensors", ".pth")
NO_FOLDERS = (".bin", ".pt", ".ckpt")  # whoever ends a name so means a file


class _Differs(Exception):
    """Something that reads the target computes something else than the source."""


def convert_files(
    source: Path,
    target: Path,
    layout: str,
    to: str,
    verify: bool = False,
    ema: bool = False,
    given: Details | None = None,
) -> bool:
    """Convert ``source`` to ``target`` and print what was done, left out, rebuilt and compared.

    Args:
        source: a file, a folder of transformers, timm or ``save_pretrained``, a training command's output folder or a
            checkpoint in it.
        target: as ``save`` has it.
        layout: of the source, or "auto".
        to: of the target.
        verify: have the libraries of both sides, and this package, read the files, and compare what they compute with
            the source's model; nothing is written if one differs.
        ema: a run's averaged weights.
        given: what is known of the model; what ``source`` says must not contradict it.

    Returns:
        Whether it was written: False if a model differs.

    Raises:
        UserError: on anything that the user has to change.
    """
    _check_target(target, to)
    weights, details, saved = _read(source, ema)
    if layout == "auto":
        layout = "timm" if "architecture" in config_of(source) else detect(weights)
    given = given or Details()
    for name in ("num_heads", "decoder_num_heads", "norm_eps", "norm_pix_loss"):
        asked, said = getattr(given, name), getattr(details, name)
        if None not in (asked, said) and asked != said:
            raise UserError(f"--{name.replace('_', '-')} {asked}: {source} itself says {said}", "leave the flag out")
    ours = convert(weights, layout, "ours").weights
    details, notes = given.or_else(details).for_channels(ours["patch_embed.proj.weight"].shape[1])
    converted = convert(weights, layout, to)
    model = build(ours, details) if verify or target.suffix not in FILES else None
    if model and details.norm_eps is None:
        notes.append(f"{source} does not say the eps of its layer norms: {model.norm_eps} is taken; give --norm-eps")
    for note in (*notes, *converted.notes):
        print(f"note: {note}")
    lost = unsaid(target, to, details, ours)

    def check(written: Path) -> None:
        assert model is not None
        with tempfile.TemporaryDirectory() as folder:
            sides = [(to, written)] if to != "ours" else []
            if layout != "ours":
                sides.insert(0, (layout, _copy(source, convert(weights, layout, layout).weights, Path(folder))))
            truth = _one_head(saved) or _constructed(source) or model
            _verify(truth, model, [*sides, ("ours", written)], details)

    try:
        save(target, to, converted.weights, details, model, check if verify else None)
    except _Differs:
        print("nothing written")
        return False
    if lost:
        warn(lost)
    print(f"wrote {len(converted.weights)} tensors of layout {layout} to {target} as {to}")
    return True


def _read(source: Path, ema: bool) -> tuple[dict[str, Tensor], Details, Model | None]:
    """The weights of ``source``, what is said of their model, and of a run that model."""
    if source.name == MODEL and (source.parent / MANIFEST).is_file():
        source = source.parent
    if (source / "checkpoints").is_dir() or (source / MANIFEST).is_file():
        model, found = of_run(source, ema)
        return model.state_dict(), replace(Details.of(model), mask_ratio=found.state.get("mask_ratio")), model
    if ema:
        raise UserError(f"--ema: only a run with --ema-decay keeps averaged weights, and {source} is no run")
    return *read(source), None


def _one_head(model: Model | None) -> Model | None:
    """The model of a run; a linear probe's head as every reader gets it, folded and rounded to the weights' dtype."""
    if isinstance(model, VisionTransformer) and isinstance(model.head, nn.Sequential):
        weights = folded(model.state_dict())
        model = copy.deepcopy(model)
        model.head = nn.Linear(model.cls_token.shape[2], model.num_classes).to(model.cls_token)
        model.load_state_dict(weights)
    return model


def _constructed(source: Path) -> Model | None:
    """The model of a folder of ``save_pretrained``, by its own way back; None of anything else."""
    config = config_of(source)
    if "embed_dim" not in config:  # the constructor's argument
        return None
    kind = MaskedAutoencoderViT if "decoder_embed_dim" in config else VisionTransformer
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "Loading weights from local directory"
            model: Model = kind.from_pretrained(folder_of(source))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{source} is no folder of save_pretrained ({' '.join(str(error).split())})") from error
    return model


def _copy(source: Path, weights: dict[str, Tensor], folder: Path) -> Path:
    """``source`` for its own library: the same configuration, if any, and ``weights``, whose tables may be rebuilt."""
    place = folder / ("source" if config_of(source) else "source.safetensors")
    file = place
    if config_of(source):
        place.mkdir()
        shutil.copy(folder_of(source) / "config.json", place)
        file = place / "model.safetensors"
    save_file({name: x.contiguous() for name, x in weights.items()}, file, {"format": "pt"})
    return place


def _verify(saved: Model, model: Model, sides: list[tuple[str, Path]], details: Details) -> None:
    """Print how far what each side computes is from ``saved``; raise ``_Differs`` if one is too far."""
    from .verify import LIMIT, differences

    good = True
    for side, path in sides:
        found = differences(saved, side, path, model, details)
        agree = all(x <= LIMIT for x in found.values())  # NaN does not
        good &= agree
        who = "the source and mae_fast's reader" if side == "ours" else f"{side} and mae_fast"
        print(
            f"{who} {'agree' if agree else 'DIFFER'}: of the largest value, "
            + ", ".join(f"{name} {x:.2g}" for name, x in found.items())
            + f" (allowed {LIMIT:g})"
        )
    if not good:
        raise _Differs


def save(
    path: Path,
    layout: str,
    weights: dict[str, Tensor],
    details: Details,
    model: Model | None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write ``weights``, which have the names of ``layout``, at once or not at all, over nothing that exists.

    Args:
        path: a ``.safetensors`` or ``.pth`` file; else a folder with ``config.json`` and ``model.safetensors`` for
            ``from_pretrained`` of transformers, or ``timm.create_model("local-dir:FOLDER")``.
        layout: of ``LAYOUTS``.
        details: of the model. Every file has them where its format has a place, for this package's own reader.
        model: with these weights; needed for a folder.
        check: called with what was written, before it gets its name; nothing is written if it raises an exception.

    Raises:
        UserError: if ``path`` exists, or the library loads no folders, or no such model.
    """
    _check_target(path, layout)

    def write(place: Path) -> None:
        if place.suffix == ".pth":
            about = {METADATA: details.known()} if details.known() else {}
            torch.save({PICKLED[layout]: weights, **about} if layout in PICKLED else weights, place)
            return
        file = place
        if place.suffix != ".safetensors":
            assert model is not None
            if layout == "timm":
                configs = {"config.json": timm_config(model)}
            else:
                ratio = 0.75 if details.mask_ratio is None else details.mask_ratio
                configs = {"config.json": transformers_config(model, ratio)}
                configs["preprocessor_config.json"] = processor_config(model)
            place.mkdir()
            for name, config in configs.items():
                (place / name).write_text(json.dumps(config, indent=2) + "\n")
            file = place / "model.safetensors"
        # transformers 4.x refuses files without "format"
        metadata = {"format": "pt", METADATA: json.dumps(details.known())}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata)

    def write_checked(place: Path) -> None:
        write(place)
        if check:
            check(place)

    try:
        new_file(path, write_checked)
    except (SafetensorError, RuntimeError) as error:  # torch's writer reports a full disk as the second
        raise UserError(f"{path} cannot be written ({' '.join(str(error).split())})") from error


def _check_target(path: Path, layout: str) -> None:
    if path.suffix in NO_FOLDERS or (path.suffix not in FILES and layout not in FOLDERS):
        names = " or ".join(FILES)
        if layout in FOLDERS:
            raise UserError(f"{path} is no name for weights", f"give a folder, or a file that ends in {names}")
        raise UserError(f"{path}: of layout {layout} there are files only", f"end the name in {names}")
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists", "give another name, or remove it")
