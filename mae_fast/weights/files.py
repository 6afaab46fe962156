"""Loads weights from files of unknown origin. Only tensors and plain values are read. No code in a file is run."""

import argparse
import json
import logging
import pickle
import stat
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

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in folders: one file, or shards with an index
METADATA_KEY = "mae_fast"  # key of the model's settings in all files that this package writes
# Keys of state dicts in training checkpoints. The first existing one is used, so trained weights precede averages.
STATE_DICTS = ("model", "state_dict", "model_state_dict", "net", "module", "encoder", "teacher", "model_ema",
               "state_dict_ema", "ema_state_dict")  # fmt: skip
ZIP_START = b"PK\x03\x04"  # the first bytes of a file of torch 1.6 or newer
# The first bytes of a file of torch before 1.6, or with _use_new_zipfile_serialization=False.
LEGACY_STARTS = tuple(pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol) for protocol in range(2, 6))
# Suffixes of the names of weights. Other tensors may be integers, such as batch counters and indices.
WEIGHT_NAMES = ("weight", "bias", "token", "pos_embed", "position_embeddings")
STANDARD = ("__builtin__", "builtins", "_codecs", "collections", "copy_reg", "copyreg")  # named last in messages


def load_weights(path: Path, finite: bool = True) -> dict[str, Tensor]:
    """The tensors in a ``.safetensors`` or ``.pth`` file, or in a folder as transformers and the hub write it.

    The state dict of a ``.pth`` file is the whole file or one of ``STATE_DICTS``. Objects of other packages are left
    out, without importing or running their code. Tensors of files in the format of torch 1.6 or newer stay
    memory-mapped. Safetensors are recognised under any file name.

    Args:
        finite: refuse NaN and infinite values.

    Raises:
        UserError: if there are no weights, if the file is damaged or of another format, or if weights are integers.
    """
    return load_weights_and_metadata(path, finite)[0]


def load_weights_and_metadata(path: Path, finite: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``load_weights``, and the raw values of ``METADATA_KEY`` and of ``args`` of the published code, if present."""
    if path.is_dir():
        return _load_folder(path)
    tensors, metadata = _load_file(path)
    _check_values(tensors, path, finite)
    return tensors, metadata


def _check_values(tensors: dict[str, Tensor], path: Path, finite: bool) -> None:
    """Raise ``UserError`` if weights are not floating point, or with ``finite`` if any value is NaN or infinite."""
    integers = [name for name, x in tensors.items() if not x.is_floating_point() and name.endswith(WEIGHT_NAMES)]
    if integers:
        raise UserError(
            f"weights {path} are not floating point: {integers[0]} is {_dtype(tensors[integers[0]])} "
            f"({len(integers)} of {len(tensors)} tensors)",
            "give the weights before quantisation",
        )
    if finite and (wrong := [name for name, x in tensors.items() if not _is_finite(x)]):
        raise UserError(
            f"weights {path} have values that are NaN or infinite: in {wrong[0]} "
            f"({len(wrong)} of {len(tensors)} tensors)",
            "give weights from before the training diverged, or download them again",
        )


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _is_finite(x: Tensor) -> bool:
    if not x.is_floating_point():
        return True
    return bool(torch.isfinite(x if x.itemsize > 1 else x.float()).all())  # isfinite does not support 8-bit floats


def _load_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file. Values are not checked."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
            raise UserError(f"{path} is not a file", "give a file, a folder or a name on the Hugging Face hub")
        with path.open("rb") as opened:
            start = opened.read(512)
        _check_start(start, path)
        if path.suffix == ".safetensors" and start.startswith((ZIP_START, *LEGACY_STARTS)):
            raise UserError(f"weights {path} were written by torch.save, not as safetensors", "rename the file to .pth")
        if start[8:9] == b"{" or path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            return load_file(path), {METADATA_KEY: header[METADATA_KEY]} if METADATA_KEY in header else {}
        found = _load_pickled(path)
    except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
        raise UserError(
            f"weights {path} cannot be read ({getattr(error, 'strerror', None) or error})", "give another path"
        ) from error
    except SafetensorError as error:
        raise UserError(f"weights {path} are damaged ({error})", "download or save them again") from error
    metadata = {key: found[key] for key in (METADATA_KEY, "args") if isinstance(found, dict) and key in found}
    return _find_state_dict(found, path), metadata


def _check_start(start: bytes, path: Path) -> None:
    """Raise ``UserError`` if a file with these first bytes is empty, text, or an archive without its end."""
    again = "download it again"
    if not start:
        raise UserError(f"weights {path} are an empty file", again)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"weights {path} are a pointer of Git LFS, not the file itself", "run 'git lfs pull'")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"weights {path} are a web page (HTML)", "download the file itself")
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        raise UserError(f"weights {path} are a text file", again)
    if start.startswith(ZIP_START) and not zipfile.is_zipfile(path):
        raise UserError(f"weights {path} are cut off: the end of the file is missing", again)


def _find_state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in the content of a file. Log its key if it is unusual, and the entries that are left out."""
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
            f"{path} has no state dict: expected a dictionary of tensors, or one under a key such as 'model'",
            "save model.state_dict()",
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
    """The tensors of all files in an index. The files must be in its folder, with exactly the listed tensors."""
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
    except Exception as error:  # torch raises many types
        raise UserError(f"weights {path} are damaged ({first_line(error)})", "download or save them again") from error


def _check_stored(path: Path) -> None:
    """Raise ``UserError`` on compressed entries: torch writes none, and a small file could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        packed = [file.filename for file in archive.infolist() if file.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UserError(
            f"weights {path} were not written by torch.save: the entry {packed[0]!r} is compressed",
            "save only the state dict",
        )


def _torch_load(path: Path, is_zip: bool) -> Any:
    """Read a file with torch's restricted unpickler or, if that refuses a name, with stubs for other packages."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols and TorchScript
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        found, stubbed = load_with_stubs(path, is_zip)
    if stubbed:
        listed = format_keys(sorted(stubbed, key=lambda name: (name.startswith(STANDARD), name)))
        logger.info("%s: left out objects of other packages, without running them: %s", path, listed)
    return found
