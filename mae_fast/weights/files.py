"""Weights out of files of unknown origin: tensors are taken, code is never run."""

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError

FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder, alone or in parts with an index
METADATA = "mae_fast"  # the key, in any file of ours, of what the tensors do not say of their model


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``.pth`` one (its ``model``, ``state_dict`` or ``teacher``).

    Of a folder, as transformers and huggingface_hub write it: its ``model.safetensors`` or ``pytorch_model.bin``, or
    the files in it that ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json`` names.

    A ``.pth`` is read by torch's restricted unpickler, which knows tensors, plain values and the ``argparse.Namespace``
    of published checkpoints; its tensors stay mapped from the file.

    Raises:
        UserError: if it is no such file, is damaged, or asks for anything else.
    """
    return load_described(path)[0]


def load_described(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``load_weights``, and what the file itself says of its model: ``METADATA`` and the published code's ``args``,
    where it has them, as they are there. An index of parts says nothing."""
    if path.is_dir():
        return _load_folder(path)
    try:
        path.stat()  # zipfile only says that it is none
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
            return load_file(path), {METADATA: about[METADATA]} if METADATA in about else {}
        found = _load_pickled(path)
    except (OSError, ValueError) as error:  # the second of names that no file can have
        raise UserError(
            f"weights {path} cannot be read ({getattr(error, 'strerror', None) or error})",
            "give another path",
        ) from error
    except SafetensorError as error:
        raise UserError(f"weights {path} are damaged ({error})", "fetch or save them again") from error
    about = {key: found[key] for key in (METADATA, "args") if isinstance(found, dict) and key in found}
    for name in ("model", "state_dict", "teacher"):  # the last is DINO's
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise UserError(
            f"weights {path} hold no state dict: a dictionary of tensors, alone or as 'model'",
            "save one",
        )
    return {str(name): x for name, x in found.items()}, about


def _load_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    for name in FILES:
        if (folder / name).exists():
            return load_described(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            return _load_shards(index), {}
    raise UserError(
        f"no weights in the folder {folder}: neither {' nor '.join(FILES)}, nor an index of either",
        "give a file",
    )


def _load_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of an index's files, each in the file that the index says; files of other folders are refused."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is no index of weights ({type(error).__name__}: {error})") from error
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(places.values()):
        if not isinstance(file, str) or file != Path(file).name or Path(file).suffix not in (".safetensors", ".bin"):
            raise UserError(f"{index} names {file!r}, which is no file of weights beside it")
        if (index.parent / file).is_dir():
            raise UserError(f"{index} names {file!r}, which is a folder")
        part = load_weights(index.parent / file)
        listed = {name for name, place in places.items() if place == file}
        if wrong := listed ^ part.keys():
            raise UserError(f"{index} and {file} do not agree on {', '.join(sorted(wrong))}")
        found |= part
    return found


def _load_pickled(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise UserError(f"weights {path} are no .safetensors and no .pth of torch 1.6 or newer", "save them again")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [file.filename for file in archive.infolist() if file.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch never packs; a few bytes might unpack to more than there is memory
            raise UserError(f"weights {path} were not written by torch: {packed[0]!r} in it is compressed")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "its pickle is not plain")
        raise UserError(
            f"weights {path} are refused: they want to run code ({asked})",
            "save the state dict alone, as safetensors",
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise UserError(
            f"weights {path} are damaged ({str(error).splitlines()[0] if str(error) else error!r})",
            "fetch or save them again",
        ) from error
