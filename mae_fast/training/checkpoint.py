"""Checkpoints that survive: safetensors and JSON in a directory, a SHA-256 manifest, one atomic rename.

``checkpoints/step-00001234/`` holds ``model.safetensors``, ``optim.safetensors``, ``state.json`` and ``manifest.json``
(size and SHA-256 of each). A directory appears under its name only when all of it is on disk; loading takes the newest
whose files match its manifest. No pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ..errors import UserError

MODEL, OPTIM, STATE, MANIFEST = "model.safetensors", "optim.safetensors", "state.json", "manifest.json"
KEEP = 2  # checkpoints left after a save


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its directory and the content of its ``state.json``."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["step"])

    def load_model(self, model: nn.Module) -> None:
        """Copy the weights into ``model``; every key must be there, and no other."""
        model.load_state_dict(load_file(self.path / MODEL))

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state of ``model``'s parameters into ``optimizer``, whose options stay as they are."""
        state = {**_optimizer_state(model, optimizer), **load_file(self.path / OPTIM)}
        set_optimizer_state_dict(model, optimizer, state, options=_FLAT)


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's tensors and options by parameter name, ``state.<name>.exp_avg`` and so on."""
    return dict(get_optimizer_state_dict(model, optimizer, options=_FLAT))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write ``folder/step-<step>`` and then remove all but the newest ``KEEP``; ``state`` is any JSON.

    Raises:
        OSError: on a full or broken disk; earlier checkpoints are untouched and the temporary directory is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        optim = _optimizer_state(model, optimizer)
        save_file(_contiguous(model.state_dict()), temporary / MODEL)
        save_file(_contiguous({k: v for k, v in optim.items() if isinstance(v, Tensor)}), temporary / OPTIM)
        (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
        files = {name: temporary / name for name in (MODEL, OPTIM, STATE)}
        manifest = {name: {"size": path.stat().st_size, "sha256": _digest(path)} for name, path in files.items()}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*files.values(), temporary / MANIFEST, temporary):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)  # the same step again, after falling back past a damaged one
        temporary.rename(final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if verify(final) is None:
        for old in _steps(folder)[KEEP:]:
            shutil.rmtree(old)
    return final


def _steps(folder: Path) -> list[Path]:
    """The checkpoint directories in ``folder``, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def verify(path: Path) -> str | None:
    """None if every file of the checkpoint matches its manifest, else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in (MODEL, OPTIM, STATE):
            entry, file = manifest[name], path / name
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, its manifest says {entry['size']}"
            if _digest(file) != entry["sha256"]:
                return f"{name} differs from its SHA-256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that verifies; ``warn`` is told of each one skipped. None without any."""
    for path in _steps(folder):
        problem = verify(path)
        if problem is None:
            return Checkpoint(path, json.loads((path / STATE).read_text()))
        warn(f"skipped damaged checkpoint {path}: {problem}")
    return None


def find(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that a user means by a run folder or a checkpoint directory.

    Raises:
        UserError: if there is none that verifies.
    """
    if (path / MANIFEST).is_file():
        problem = verify(path)
        if problem is not None:
            raise UserError(f"checkpoint {path} is damaged ({problem}); use another one of the run")
        return Checkpoint(path, json.loads((path / STATE).read_text()))
    found = newest(path / "checkpoints", warn)
    if found is None:
        raise UserError(f"no usable checkpoint in {path}; give the output folder of 'mae-fast pretrain'")
    return found
