"""Weights from file to file."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..training.checkpoint import MANIFEST
from ..weights import load_weights
from .configs import timm_config, transformers_config
from .convert import convert, detect
from .details import Details, Model, build
from .export import new_file
from .pretrained import of_run

FILES = (".safetensors", ".pth")
NO_FOLDERS = (".bin", ".pt", ".ckpt")  # whoever ends a name so means a file
FOLDERS = ("timm", "transformers", "transformers5")  # layouts whose libraries load folders
# Under which name libraries look for the weights in a .pth; transformers takes them bare.
_IN_PTH = {"ours": "model", "timm": "model", "lightly": "state_dict", "mmpretrain": "state_dict"}


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
        source: a file, a folder of transformers, a training command's output folder or a checkpoint in it.
        target: as ``save`` has it.
        layout: of the source, or "auto".
        to: of the target.
        verify: first compare our model with the libraries' own; nothing is written if they differ.
        ema: a run's averaged weights.
        given: what is known of the model; what ``source`` says must not contradict it.

    Returns:
        Whether it was written: False if the models differ.

    Raises:
        UserError: on anything that the user has to change.
    """
    _check_target(target, to)
    weights, details = _read(source, ema)
    if layout == "auto":
        layout = detect(weights)
    given = given or Details()
    for name in ("num_heads", "decoder_num_heads"):
        asked, said = getattr(given, name), getattr(details, name)
        if None not in (asked, said) and asked != said:
            raise UserError(f"--{name.replace('_', '-')} {asked}: {source} itself says {said}; leave the flag out")
    details = given.or_else(details)
    converted = convert(weights, layout, to)
    model = None
    if verify or target.suffix not in FILES:
        model = build(convert(weights, layout, "ours").weights, details)
    if to == "timm" and details.norm_eps not in (None, 1e-6):
        converted.notes.append(
            f"the norms' eps is {details.norm_eps:g}, in timm 1e-6: give create_model a norm_layer with that eps"
        )
    for note in converted.notes:
        print(f"note: {note}")
    if verify and not _verified(model, weights, layout, to):
        return False
    save(target, to, converted.weights, details, model)
    print(f"wrote {len(converted.weights)} tensors of layout {layout} to {target} as {to}")
    return True


def _read(source: Path, ema: bool) -> tuple[dict[str, Tensor], Details]:
    if (source / "checkpoints").is_dir() or (source / MANIFEST).is_file():
        model, _ = of_run(source, ema)
        return model.state_dict(), Details.of(model)
    if ema:
        raise UserError(f"--ema: only a run with --ema-decay keeps averaged weights, and {source} is no run")
    return load_weights(source), Details.beside(source)


def _verified(model: Model | None, weights: dict[str, Tensor], layout: str, to: str) -> bool:
    """Whether what the libraries compute with these weights is what we compute; prints how far it is."""
    from .twins import LIMIT, differences

    assert model is not None
    sides = [side for side in dict.fromkeys((layout, to)) if side != "ours"]
    if not sides:
        raise UserError("--verify: both sides are ours, there is nothing to compare with; give --from or --to")
    good = True
    for side in sides:
        found = differences(model, side, convert(weights, layout, side).weights)
        agree = all(x <= LIMIT for x in found.values())  # NaN does not
        good &= agree
        print(
            f"{side} and mae_fast {'agree' if agree else 'DIFFER'}: of the largest value, "
            + ", ".join(f"{name} {x:.2g}" for name, x in found.items())
            + f" (allowed {LIMIT:g})"
        )
    if not good:
        print("nothing written")
    return good


def save(path: Path, layout: str, weights: dict[str, Tensor], details: Details, model: Model | None) -> None:
    """Write ``weights``, which have the names of ``layout``, at once or not at all, over nothing that exists.

    Args:
        path: a ``.safetensors`` or ``.pth`` file; else a folder with ``config.json`` and ``model.safetensors`` for
            ``from_pretrained`` of transformers, or ``timm.create_model("local-dir:FOLDER")``.
        layout: of ``LAYOUTS``.
        details: of the model, for a ``.safetensors`` file of ours.
        model: with these weights; needed for a folder.

    Raises:
        UserError: if ``path`` exists, or the library loads no folders, or no such model.
    """
    _check_target(path, layout)

    def write(place: Path) -> None:
        if place.suffix == ".pth":
            torch.save({_IN_PTH[layout]: weights} if layout in _IN_PTH else weights, place)
            return
        metadata = {"format": "pt"}  # transformers 4.x refuses files without
        file = place
        if place.suffix != ".safetensors":
            assert model is not None
            config = timm_config(model) if layout == "timm" else transformers_config(model)
            place.mkdir()
            (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            file = place / "model.safetensors"
        elif layout == "ours":
            metadata |= details.metadata()
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata)

    try:
        new_file(path, write)
    except (SafetensorError, RuntimeError) as error:  # torch's writer reports a full disk as the second
        raise UserError(f"{path} cannot be written ({' '.join(str(error).split())})") from error


def _check_target(path: Path, layout: str) -> None:
    if path.suffix in NO_FOLDERS or (path.suffix not in FILES and layout not in FOLDERS):
        files_only = f"of layout {layout} there are files only; end the name in"
        what = "give a folder, or a file that ends in" if layout in FOLDERS else files_only
        raise UserError(f"{path}: {what} {' or '.join(FILES)}")
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists; give another name, or remove it")
