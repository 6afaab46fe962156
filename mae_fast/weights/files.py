"""Loads weights from files of unknown origin. Only tensors and plain values are read; no code is run."""

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

from ..errors import UserError, first_line

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder, whole or in shards with an index
METADATA_KEY = "mae_fast"  # the key of the model's settings in every file that this package writes


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a ``.safetensors`` or ``.pth`` file, or in a folder as transformers and the hub write it.

    Of a ``.pth`` file, the state dict is the whole file or its ``model``, ``state_dict`` or ``teacher``. It is read by
    torch's restricted unpickler, which accepts tensors, plain values and the ``argparse.Namespace`` of published
    checkpoints. Its tensors stay memory-mapped.

    Raises:
        UserError: if there are no weights, or the file is damaged or contains anything else.
    """
    return load_weights_and_metadata(path)[0]


def load_weights_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``load_weights``, and the raw values of ``METADATA_KEY`` and of the published code's ``args``, where present."""
    if path.is_dir():
        return _load_folder(path)
    try:
        path.stat()  # zipfile hides the reason why a file cannot be opened
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            return load_file(path), {METADATA_KEY: header[METADATA_KEY]} if METADATA_KEY in header else {}
        found = _load_pickled(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(
            f"weights {path} cannot be read ({getattr(error, 'strerror', None) or error})", "give another path"
        ) from error
    except SafetensorError as error:
        raise UserError(f"weights {path} are damaged ({error})", "download or save them again") from error
    metadata = {key: found[key] for key in (METADATA_KEY, "args") if isinstance(found, dict) and key in found}
    for name in ("model", "state_dict", "teacher"):  # DINO writes "teacher"
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise UserError(f"{path} has no state dict: a dictionary of tensors, alone or as 'model'", "save a state dict")
    return {str(name): x for name, x in found.items()}, metadata


def _load_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return load_weights_and_metadata(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            return _load_shards(index), {}
    raise UserError(
        f"no weights in the folder {folder}: neither {' nor '.join(WEIGHT_FILES)}, nor an index of one", "give a file"
    )


def _load_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files in the index. Each file must hold exactly what the index says and lie beside it."""
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of weights ({type(error).__name__}: {error})") from error
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or file != Path(file).name or Path(file).suffix not in (".safetensors", ".bin"):
            raise UserError(f"{index} names {file!r}, which is not a file of weights in the same folder")
        if (index.parent / file).is_dir():
            raise UserError(f"{index} names {file!r}, which is a folder")
        shard = load_weights(index.parent / file)
        listed = {name for name, place in weight_map.items() if place == file}
        if wrong := listed ^ shard.keys():
            raise UserError(f"{index} and {file} do not agree on {', '.join(sorted(wrong))}")
        found |= shard
    return found


def _load_pickled(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"weights {path} are neither .safetensors nor a .pth file of torch 1.6 or newer", "save them again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [file.filename for file in archive.infolist() if file.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch does not compress; a small compressed file could expand to more than the memory
            raise UserError(f"weights {path} were not written by torch: {packed[0]!r} in it is compressed")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        asked = next((line.strip() for line in lines if "GLOBAL" in line), "its pickle has more than plain values")
        raise UserError(
            f"weights {path} are refused: loading them would run code ({asked})",
            "save only the state dict, as safetensors",
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise UserError(
            f"weights {path} are damaged ({first_line(error)})",
            "download or save them again",
        ) from error
