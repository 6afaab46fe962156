"""Weights out of files of unknown origin: tensors are taken, code is never run."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import UserError


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``.pth`` one (its ``model`` or ``state_dict``, if it has one).

    A ``.pth`` is read by torch's restricted unpickler, which knows tensors, plain values and the ``argparse.Namespace``
    of published checkpoints; its tensors stay mapped from the file.

    Raises:
        UserError: if it is no such file, is damaged, or asks for anything else.
    """
    try:
        path.stat()  # zipfile only says that it is none
        if path.suffix == ".safetensors":
            return load_file(path)
        found = _load_pickled(path)
    except OSError as error:
        raise UserError(f"weights {path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise UserError(f"weights {path} are damaged ({error})") from error
    for name in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise UserError(f"weights {path} hold no state dict: a dictionary of tensors, alone or as 'model'")
    return {str(name): x for name, x in found.items()}


def _load_pickled(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise UserError(f"weights {path} are no .safetensors and no .pth of torch 1.6 or newer; save them again")
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
            f"weights {path} are refused: they want to run code ({asked}); save the state dict alone, as safetensors"
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise UserError(
            f"weights {path} are damaged ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from error
