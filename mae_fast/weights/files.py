"""Loads weights from files of unknown origin. Only tensors and plain values are read; no code is run."""

import argparse
import json
import logging
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError, first_line
from .layouts import format_keys
from .stub_unpickler import load_with_stubs

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder, whole or in shards with an index
METADATA_KEY = "mae_fast"  # the key of the model's settings in every file that this package writes
# Keys of state dicts in training checkpoints. The first one that is there is taken: trained weights before averages.
STATE_DICTS = ("model", "state_dict", "model_state_dict", "net", "module", "encoder", "teacher", "model_ema",
               "state_dict_ema", "ema_state_dict")  # fmt: skip
# The first bytes of a file of torch before 1.6, or with _use_new_zipfile_serialization=False.
LEGACY_STARTS = tuple(pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol) for protocol in range(2, 6))
STANDARD = ("__builtin__", "builtins", "_codecs", "collections", "copy_reg", "copyreg")  # named last


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a ``.safetensors`` or ``.pth`` file, or in a folder as transformers and the hub write it.

    Of a ``.pth`` file, the state dict is the whole file or one of ``STATE_DICTS``. Objects of other packages beside it
    are left out: nothing of theirs is imported or run. If the file is in the format of torch 1.6 or newer, its tensors
    stay memory-mapped.

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
    return _find_state_dict(found, path), metadata


def _find_state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of the state dict in the content of a file. Logs which one was taken, and what was left out."""
    taken: list[str] = []
    while isinstance(found, dict) and len(taken) < len(STATE_DICTS):
        there = [name for name in STATE_DICTS if isinstance(found.get(name), dict) and found[name]]
        if not there:
            break
        taken.append(there[0])
        if there[1:] or there[0] not in ("model", "state_dict"):
            also = f", not of {', '.join(there[1:])}" if there[1:] else ""
            logger.info("%s: reading the weights of %s%s", path, ".".join(taken), also)
        found = found[there[0]]
    tensors = {str(name): x for name, x in found.items() if isinstance(x, Tensor)} if isinstance(found, dict) else {}
    if not tensors:
        raise UserError(
            f"{path} has no state dict: a dictionary of tensors, alone or as 'model'", "save model.state_dict()"
        )
    if others := [str(name) for name in found if str(name) not in tensors]:
        logger.info("%s: left out %s: not tensors", path, format_keys(others))
    size = path.stat().st_size
    for name, x in tensors.items():
        if x.layout != torch.strided or x.is_meta or x.is_quantized or x.nbytes > size:
            raise UserError(f"weights {path} are damaged: {name} is not a dense tensor in this file")
    return tensors


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
            raise UserError(f"{index} and {file} do not agree on {format_keys(sorted(wrong))}")
        found |= shard
    return found


def _load_pickled(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if not is_zip:
        with path.open("rb") as file:
            start = file.read(32)
        if not start.startswith(LEGACY_STARTS):
            raise UserError(f"weights {path} are neither .safetensors nor a .pth file of torch", "save them again")
    try:
        if is_zip:
            _check_stored(path)
        return _torch_load(path, is_zip)
    except (OSError, UserError):
        raise
    except Exception as error:  # of many kinds
        raise UserError(f"weights {path} are damaged ({first_line(error)})", "download or save them again") from error


def _check_stored(path: Path) -> None:
    """torch does not compress. A small compressed file could expand to more than the memory."""
    with zipfile.ZipFile(path) as archive:
        packed = [file.filename for file in archive.infolist() if file.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UserError(
            f"weights {path} are not a file of torch.save: {packed[0]!r} in it is compressed",
            "save only the state dict",
        )


def _torch_load(path: Path, is_zip: bool) -> Any:
    """The content by torch's restricted unpickler or, if it refuses something, with stubs for it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols, and of TorchScript, which is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        found, stubbed = load_with_stubs(path, is_zip)
    if stubbed:
        listed = format_keys(sorted(stubbed, key=lambda name: (name.startswith(STANDARD), name)))
        logger.info("%s: left out objects of other packages, without running them: %s", path, listed)
    return found
