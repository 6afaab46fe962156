"""Reads the folder of a training run: its newest good checkpoint, verified. No pickle.

``checkpoints/step-00001234/`` holds ``model.safetensors``, ``optim.safetensors``, ``ema.safetensors`` where there is an
average, ``state.json`` and ``manifest.json`` (size and SHA-256 of each). ``training.checkpoint`` writes it.
"""

import hashlib
import json
import stat
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError

MODEL, OPTIM, EMA = "model.safetensors", "optim.safetensors", "ema.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
# By parameter name: ``state.<name>.exp_avg`` and so on. And whole, on the CPU of rank 0, however the model is sharded.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
WHOLE = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its directory and the content of its ``state.json``."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["step"])

    def load_model(self, model: nn.Module, ema: bool = False) -> None:
        """Copy the weights into ``model``, in whatever shards it has them; every key must be there, and no other.

        Args:
            ema: the averages instead, of the weights that were trained.

        Raises:
            UserError: if they do not fit, or the run kept no averages.
        """
        if ema and not (self.path / EMA).exists():
            raise UserError(f"{self.path} has no averaged weights, as its run had no --ema-decay", "leave --ema out")
        try:
            weights: dict[str, Any] = load_file(self.path / MODEL) | (load_file(self.path / EMA) if ema else {})
            set_model_state_dict(model, weights, options=WHOLE)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"the weights in {self.path} do not fit the model: {error}") from error

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]) -> None:
        """Copy everything back: weights, the state of ``optimizer``, whose options stay as they are, and averages."""
        self.load_model(model)
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=FLAT))
        state |= {name: _in_shards(saved, state.get(name)) for name, saved in load_file(self.path / OPTIM).items()}
        set_optimizer_state_dict(model, optimizer, state, options=FLAT)
        if ema:
            averages = load_file(self.path / EMA)
            for name, average in ema.items():
                average.copy_(_in_shards(averages[name], average))


def _in_shards(whole: Tensor, like: object) -> Tensor:
    """``whole`` in the shards that ``like`` is in, if it is."""
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is."""
    return folder / f"step-{step:08d}"


def is_good(found: Checkpoint, bad_steps: Set[int]) -> bool:
    return bool(found.state.get("finite", True)) and found.step + 1 not in bad_steps


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint directories in ``folder``, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def verify(path: Path) -> str | None:
    """None if every file of the checkpoint matches its manifest, else what is wrong."""
    found = read_checkpoint(path)
    return found if isinstance(found, str) else None


def read_checkpoint(path: Path) -> Checkpoint | str:
    """The checkpoint in ``path``, verified; or what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in sorted({MODEL, OPTIM, STATE, *manifest}):
            entry, file = manifest[name], path / name
            if Path(name).name != name or not stat.S_ISREG(file.lstat().st_mode):
                return f"{name!r} is no file in it"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, its manifest says {entry['size']}"
            if digest(file) != entry["sha256"]:
                return f"{name} differs from its SHA-256"
        state = json.loads((path / STATE).read_text())
        return Checkpoint(path, state) if type(state["step"]) is int else f"{STATE} has no step"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


def newest(folder: Path, warn: Callable[[str], None], bad_steps: Set[int] | None = None) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that verifies; ``warn`` is told of each one skipped. None without any.

    Args:
        bad_steps: if given, pass over those that are not good, as ``write`` has it.
    """
    for path in checkpoints_in(folder):
        found = read_checkpoint(path)
        if isinstance(found, str):
            warn(f"skipped damaged checkpoint {path}: {found}")
        elif bad_steps is None or is_good(found, bad_steps):
            return found
    return None


def find(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that a user means by a run folder or a checkpoint directory.

    Raises:
        UserError: if there is none that verifies.
    """
    if (path / MANIFEST).is_file():
        found: Checkpoint | str | None = read_checkpoint(path)
        if isinstance(found, str):
            raise UserError(f"checkpoint {path} is damaged ({found})", "use another one of the run")
    else:
        found = newest(path / "checkpoints", warn)
    if found is None:
        raise UserError(f"no usable checkpoint in {path}", "give the output folder of 'mae-fast pretrain'")
    return found
