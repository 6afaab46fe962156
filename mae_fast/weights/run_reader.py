"""Reads the folder of a training run. Files of checkpoints are verified, and none of them is a pickle.

``checkpoints/step-00001234/`` has ``model.safetensors``, ``optim.safetensors`` (unless the run is slimmed),
``ema.safetensors`` (with ``--ema-decay``), ``state.json``, and ``manifest.json`` with size and SHA-256 of each file.
``checkpoints/best`` is a link to the best checkpoint, with ``--keep-best``. ``training.checkpoint`` writes them.
"""

import hashlib
import json
import logging
import stat
from collections.abc import Set
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

logger = logging.getLogger(__name__)

MODEL, OPTIM, EMA = "model.safetensors", "optim.safetensors", "ema.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
BEST = "best"
# Old names of settings, and their names today.
RENAMED = {"repeats": "crops_per_image", "decoder": "image_decoder", "blocks": "train_blocks"}
# Both name optimizer state by parameter (``state.<name>.exp_avg``). FULL_STATE gathers shards on the CPU of rank 0.
FLAT_STATE = StateDictOptions(flatten_optimizer_state_dict=True)
FULL_STATE = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its directory.
        state: the content of its ``state.json``.
        slimmed: whether the optimiser's state was removed, so that training cannot resume from it.
    """

    path: Path
    state: dict[str, Any]
    slimmed: bool = False

    @property
    def step(self) -> int:
        """The number of optimiser steps done."""
        return int(self.state["step"])

    def load_model(self, model: nn.Module, ema: bool = False) -> None:
        """Copy the weights into ``model``, which may be sharded. The keys must be the same.

        Args:
            ema: load averaged instead of trained weights. Weights without an average are loaded as they are.

        Raises:
            UserError: if the weights do not fit, or the run has no averages.
        """
        if ema and not (self.path / EMA).exists():
            raise UserError(f"{self.path} has no averaged weights: its run had no --ema-decay", "leave --ema out")
        try:
            weights: dict[str, Any] = load_file(self.path / MODEL) | (load_file(self.path / EMA) if ema else {})
            set_model_state_dict(model, weights, options=FULL_STATE)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"the weights in {self.path} do not fit the model: {error}") from error

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]) -> None:
        """Restore the weights of ``model``, the state of ``optimizer`` except its options, and the averages ``ema``.

        For a slimmed checkpoint, restore only the weights.
        """
        self.load_model(model)
        if self.slimmed:
            return
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=FLAT_STATE))
        state |= {name: _in_shards(saved, state.get(name)) for name, saved in load_file(self.path / OPTIM).items()}
        set_optimizer_state_dict(model, optimizer, state, options=FLAT_STATE)
        if ema:
            averages = load_file(self.path / EMA)
            for name, average in ema.items():
                average.copy_(_in_shards(averages[name], average))


def _in_shards(whole: Tensor, like: object) -> Tensor:
    """``whole``, sharded like ``like`` if that is a DTensor."""
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def run_or_checkpoint(path: Path) -> Path | None:
    """``path`` if it is a run or a checkpoint; the checkpoint for its ``model.safetensors``; None for other paths."""
    if path.name == MODEL and (path.parent / MANIFEST).is_file():
        return path.parent
    return path if (path / "checkpoints").is_dir() or (path / MANIFEST).is_file() else None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def is_good(checkpoint: Checkpoint, bad_steps: Set[int]) -> bool:
    """Whether the weights and the gradient of the next step are finite."""
    return bool(checkpoint.state.get("finite", True)) and checkpoint.step + 1 not in bad_steps


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint directories in ``folder``, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def read_checkpoint(path: Path) -> Checkpoint | str:
    """The checkpoint in ``path`` if all files match the manifest, else a description of the damage."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in sorted({MODEL, STATE, *manifest}):
            entry, file = manifest[name], path / name
            if Path(name).name != name or not stat.S_ISREG(file.lstat().st_mode):
                return f"{name!r} is not a file of the checkpoint"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if sha256(file) != entry["sha256"]:
                return f"{name} does not match its SHA-256"
        state = json.loads((path / STATE).read_text())
        if type(state["step"]) is not int:
            return f"{STATE} has no step"
        return Checkpoint(path, state, slimmed=OPTIM not in manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


def newest_checkpoint(folder: Path, bad_steps: Set[int] | None = None) -> Checkpoint | None:
    """The newest undamaged checkpoint in ``folder``. None if there is none. Damaged ones are logged and skipped.

    Args:
        bad_steps: steps with a non-finite gradient. If given, also skip checkpoints that are not ``is_good``.
    """
    for path in checkpoints_in(folder):
        found = read_checkpoint(path)
        if isinstance(found, str):
            logger.warning("skipped damaged checkpoint %s: %s", path, found)
        elif bad_steps is None or is_good(found, bad_steps):
            return found
    return None


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, or the newest undamaged one if ``path`` is a run.

    Raises:
        UserError: if there is none.
    """
    if (path / MANIFEST).is_file():
        found: Checkpoint | str | None = read_checkpoint(path)
        if isinstance(found, str):
            raise UserError(f"checkpoint {path} is damaged ({found})", "use another checkpoint of the run")
    else:
        found = newest_checkpoint(path / "checkpoints")
    if found is None:
        raise UserError(f"no usable checkpoint in {path}", "give the output folder of 'mae-fast pretrain'")
    return found


def run_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The flags of the checkpoint's run. Empty if the checkpoint is outside of a run.

    Raises:
        UserError: if the run's ``config.json`` is damaged.
    """
    folder = checkpoint.path.absolute().parent.parent
    return read_config(folder) if (folder / "config.json").exists() else {}


def run_folder(path: Path) -> Path | None:
    """The folder of the run, if ``path`` is a run or one of its checkpoints. None without a ``config.json``."""
    found = run_or_checkpoint(path)
    inside = found and (found.name.startswith("step-") or found.name == BEST)
    folder = found.parent.parent if found and inside else found
    return folder if folder and (folder / "config.json").is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in ``folder``, with old names of settings replaced.

    Raises:
        UserError: if it cannot be read.
    """
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "give a run of 'mae-fast pretrain'") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})", "restore it or use a new output folder") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged (not a JSON object)", "restore it or use a new output folder")
    return {RENAMED.get(str(name), str(name)): value for name, value in config.items()}
