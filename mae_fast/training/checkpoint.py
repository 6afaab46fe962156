"""Checkpoints that survive: safetensors and JSON in a directory, a SHA-256 manifest, one atomic rename.

``checkpoints/step-00001234/`` holds ``model.safetensors``, ``optim.safetensors``, ``ema.safetensors`` where there is an
average, ``state.json`` and ``manifest.json`` (size and SHA-256 of each). A directory appears under its name only when
all of it is on disk; loading takes the newest whose files match its manifest. No pickle.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError

MODEL, OPTIM, EMA = "model.safetensors", "optim.safetensors", "ema.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
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

    def load_model(self, model: nn.Module, ema: bool = False) -> None:
        """Copy the weights into ``model``, in whatever shards it has them; every key must be there, and no other.

        Args:
            ema: the averages instead, of the weights that were trained.

        Raises:
            UserError: if they do not fit, or the run kept no averages.
        """
        if ema and not (self.path / EMA).exists():
            raise UserError(f"{self.path} has no averaged weights, as its run had no --ema-decay; leave --ema out")
        try:
            weights: dict[str, Any] = load_file(self.path / MODEL) | (load_file(self.path / EMA) if ema else {})
            set_model_state_dict(model, weights, options=_WHOLE)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"the weights in {self.path} do not fit the model: {error}") from error

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]) -> None:
        """Copy everything back: weights, the state of ``optimizer``, whose options stay as they are, and averages."""
        self.load_model(model)
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_FLAT))
        state |= {name: _spread(saved, state.get(name)) for name, saved in load_file(self.path / OPTIM).items()}
        set_optimizer_state_dict(model, optimizer, state, options=_FLAT)
        if ema:
            averages = load_file(self.path / EMA)
            for name, average in ema.items():
                average.copy_(_spread(averages[name], average))


def _spread(whole: Tensor, like: object) -> Tensor:
    """``whole`` in the shards that ``like`` is in, if it is."""
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


# By parameter name: ``state.<name>.exp_avg`` and so on. And whole, on the CPU of rank 0, however the model is sharded.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_WHOLE = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Snapshot:
    """A run's state as it was at a step: copies, which training does not change."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by file
    state: dict[str, Any]
    finite: bool  # all weights


def snapshot(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ema: dict[str, Tensor] | None = None,
) -> Snapshot:
    """Copy what a checkpoint holds; ``state`` is any JSON. All ranks of a sharded model take part, rank 0 gets it."""
    optim = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    tensors = {MODEL: weights(model), OPTIM: _copies({k: v for k, v in optim.items() if isinstance(v, Tensor)})}
    if ema:
        tensors[EMA] = _copies({n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in ema.items()})
    # Not in the thread that writes: torch would start threads for it, and all would be slower until it has ended.
    finite = all(bool(x.isfinite().all()) for x in tensors[MODEL].values())
    return Snapshot(step, tensors, state, finite)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the state dict's tensors, whole; of shards, all ranks take part and rank 0 gets them."""
    return _copies(get_model_state_dict(model, options=_WHOLE))


def _copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.empty_like(x, device="cpu").copy_(x.detach()).contiguous() for name, x in tensors.items()}


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


def write(folder: Path, saved: Snapshot, bad_steps: Set[int] = frozenset()) -> Path:
    """Write ``folder/step-<step>``, then remove older ones but the newest ``KEEP`` and the newest good one.

    Args:
        bad_steps: whose gradients were not finite: a checkpoint is good if its weights are finite, and so were the
            gradients of the step after it.

    Raises:
        OSError: on a full or broken disk; earlier checkpoints are untouched and the temporary directory is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    final = place(folder, saved.step)
    temporary = folder / f".tmp-{final.name}"
    try:
        temporary.mkdir()
        for name, tensors in saved.tensors.items():
            save_file(tensors, temporary / name)
        (temporary / STATE).write_text(
            json.dumps({"step": saved.step, "finite": saved.finite, **saved.state}, indent=1)
        )
        files = {name: temporary / name for name in (*saved.tensors, STATE)}
        manifest = {name: {"size": path.stat().st_size, "sha256": _digest(path)} for name, path in files.items()}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*files.values(), temporary / MANIFEST, temporary):
            _fsync(path)
        if final.exists():  # the same step again, after falling back past a damaged one
            _remove(final)
        temporary.rename(final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if verify(final) is None:
        kept = _steps(folder)[:KEEP]
        before = (_read(path) for path in _steps(folder) if path != final)  # of the new one, nothing is known yet
        good = next(
            (found.path for found in before if isinstance(found, Checkpoint) and _is_good(found, bad_steps)), None
        )
        for path in _steps(folder):
            if path not in (*kept, good):
                _remove(path)
    return final


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left of checkpoints half written and half removed."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is."""
    return folder / f"step-{step:08d}"


def _remove(path: Path) -> None:
    """First its name: half removed, it must not look like a damaged checkpoint."""
    temporary = path.with_name(f".tmp-old-{path.name}")
    path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _is_good(found: Checkpoint, bad_steps: Set[int]) -> bool:
    return bool(found.state.get("finite", True)) and found.step + 1 not in bad_steps


class Saver:
    """Writes checkpoints while training goes on.

    Args:
        folder: of the checkpoints.
        warn: told of a save that failed. The run goes on, and the next save may succeed.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.warn = folder, warn
        self.pool = ThreadPoolExecutor(1, "mae_fast.checkpoint")
        self.pending: Future[Path] | None = None

    def save(self, saved: Snapshot, bad_steps: Set[int] = frozenset()) -> None:
        """``write``, when the one before is written."""
        self.wait()
        self.pending = self.pool.submit(write, self.folder, saved, frozenset(bad_steps))

    def wait(self) -> None:
        """Until what was asked for is written."""
        self._finish(self.warn)

    def close(self) -> None:
        """Wait for the last save.

        Raises:
            UserError: if it failed.
        """

        def fail(message: str) -> None:
            raise UserError(message)

        try:
            self._finish(fail)
        finally:
            self.pool.shutdown()

    def _finish(self, tell: Callable[[str], None]) -> None:
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except (OSError, SafetensorError) as error:
            tell(f"no checkpoint could be written to {self.folder} ({error}); make room, or check the disk")


def _steps(folder: Path) -> list[Path]:
    """The checkpoint directories in ``folder``, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def verify(path: Path) -> str | None:
    """None if every file of the checkpoint matches its manifest, else what is wrong."""
    found = _read(path)
    return found if isinstance(found, str) else None


def _read(path: Path) -> Checkpoint | str:
    """The checkpoint in ``path``, verified; or what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in sorted({MODEL, OPTIM, STATE, *manifest}):
            entry, file = manifest[name], path / name
            if Path(name).name != name or not stat.S_ISREG(file.lstat().st_mode):
                return f"{name!r} is no file in it"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, its manifest says {entry['size']}"
            if _digest(file) != entry["sha256"]:
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
    for path in _steps(folder):
        found = _read(path)
        if isinstance(found, str):
            warn(f"skipped damaged checkpoint {path}: {found}")
        elif bad_steps is None or _is_good(found, bad_steps):
            return found
    return None


def find(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that a user means by a run folder or a checkpoint directory.

    Raises:
        UserError: if there is none that verifies.
    """
    if (path / MANIFEST).is_file():
        found: Checkpoint | str | None = _read(path)
        if isinstance(found, str):
            raise UserError(f"checkpoint {path} is damaged ({found}); use another one of the run")
    else:
        found = newest(path / "checkpoints", warn)
    if found is None:
        raise UserError(f"no usable checkpoint in {path}; give the output folder of 'mae-fast pretrain'")
    return found
