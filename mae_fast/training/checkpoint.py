"""Write crash-safe checkpoints: a directory of safetensors and JSON files with a SHA-256 manifest, renamed atomically.

A directory gets its final name only when all its files are on disk. ``weights.run_reader`` defines the format and reads
checkpoints.
"""

import json
import logging
import os
import shutil
from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..files import atomic_write
from ..weights.files import METADATA_KEY
from ..weights.metadata import ModelMetadata
from ..weights.run_reader import (
    BEST,
    EMA,
    FULL_STATE,
    MANIFEST,
    MODEL,
    OPTIM,
    STATE,
    Checkpoint,
    checkpoint_path,
    checkpoints_in,
    is_good,
    read_checkpoint,
    sha256,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """The checkpoints that a save keeps, in addition to the best one and the newest good one.

    Attributes:
        newest: the number of newest checkpoints to keep.
        steps: the steps whose checkpoints to keep.
    """

    newest: int = 2
    steps: Set[int] = frozenset()


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state at one step."""

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
    """Copy the contents of a checkpoint. ``state``: any JSON. All ranks of a sharded model call it; rank 0 gets it."""
    optim = get_optimizer_state_dict(model, optimizer, options=FULL_STATE)
    tensors = {MODEL: weights(model), OPTIM: _copies({k: v for k, v in optim.items() if isinstance(v, Tensor)})}
    if ema:
        tensors[EMA] = _copies({n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in ema.items()})
    # Not in the saver's thread: torch would start more threads there, which slow down training.
    finite = all(bool(x.isfinite().all()) for x in tensors[MODEL].values())
    return Snapshot(step, tensors, state, finite)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the state dict's whole tensors, on the CPU. All ranks of a sharded model call it; rank 0 gets them."""
    return _copies(get_model_state_dict(model, options=FULL_STATE))


def _copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.empty_like(x, device="cpu").copy_(x.detach()).contiguous() for name, x in tensors.items()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(folder: Path, saved: Snapshot, bad_steps: Set[int] = frozenset(), retention: Retention = Retention()) -> Path:
    """Write ``folder/step-<step>``, link ``folder/best``, then remove the checkpoints that ``retention`` does not keep.

    Args:
        bad_steps: the steps with non-finite gradients. A checkpoint is good if its weights and the gradients of the
            next step are finite.

    Raises:
        OSError: if the disk is full or broken. Earlier checkpoints are unchanged, and the temporary directory is
            removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    final = checkpoint_path(folder, saved.step)
    temporary = folder / f".tmp-{final.name}"
    try:
        temporary.mkdir()
        # The metadata let the file of weights be loaded on its own.
        record = ModelMetadata.from_state(saved.state, final).to_dict() if "model" in saved.state else {}
        header = {METADATA_KEY: json.dumps(record)}  # one entry: safetensors writes several in random order
        for name, tensors in saved.tensors.items():
            save_file(tensors, temporary / name, header)
        (temporary / STATE).write_text(
            json.dumps({"step": saved.step, "finite": saved.finite, **saved.state}, indent=1)
        )
        files = {name: temporary / name for name in (*saved.tensors, STATE)}
        manifest = {name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*files.values(), temporary / MANIFEST, temporary):
            _fsync(path)
        if final.exists():  # a damaged checkpoint of this step, which the run did not resume from
            _remove(final)
        temporary.rename(final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if isinstance(read_checkpoint(final), Checkpoint):
        link_best(folder, saved.state)
        kept = {path.name for path in checkpoints_in(folder)[: retention.newest]}
        if (folder / BEST).is_symlink():
            kept.add(os.readlink(folder / BEST))
        kept |= {path.name for path in checkpoints_in(folder) if int(path.name[5:]) in retention.steps}
        # The gradients after the new checkpoint are not known yet.
        before = (read_checkpoint(path) for path in checkpoints_in(folder) if path != final)
        good = next(
            (found.path for found in before if isinstance(found, Checkpoint) and is_good(found, bad_steps)), None
        )
        for path in checkpoints_in(folder):
            if path.name not in kept and path != good:
                _remove(path)
    return final


def link_best(folder: Path, state: dict[str, Any]) -> None:
    """Atomically link ``folder/best`` to the checkpoint that ``state["best"]`` names, if that exists.

    A copy of a run may have a folder in place of the link. It is replaced if the checkpoint itself is undamaged.
    """
    best, step = folder / BEST, state.get("best", {}).get("step")
    if step is None or not checkpoint_path(folder, step).exists():
        return
    name = checkpoint_path(folder, step).name
    if best.is_symlink() and os.readlink(best) == name:
        return
    if best.is_dir() and not best.is_symlink():
        if not isinstance(read_checkpoint(checkpoint_path(folder, step)), Checkpoint):
            return
        _remove(best)
    temporary = folder / f".tmp-{BEST}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(best)
    _fsync(folder)


def drop_optimizer(path: Path) -> int:
    """Remove the optimizer's state from a checkpoint and return the number of bytes that this frees.

    A kill at any time leaves the checkpoint readable.
    """
    manifest, file = json.loads((path / MANIFEST).read_text()), path / OPTIM
    if manifest.pop(OPTIM, None):  # first, as readers ignore files that the manifest does not list
        with atomic_write(path / MANIFEST) as part:
            part.write_text(json.dumps(manifest, indent=1))
        _fsync(path)
    size = file.stat().st_size if file.exists() else 0
    file.unlink(missing_ok=True)
    return size


def remove_leftovers(folder: Path) -> None:
    """Remove partly written and partly removed checkpoints that a kill has left behind."""
    for leftover in folder.glob(".tmp-*"):
        if leftover.is_symlink():
            leftover.unlink(missing_ok=True)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _remove(path: Path) -> None:
    """Rename the folder first, so that a partly removed one does not look like a damaged checkpoint."""
    temporary = path.with_name(f".tmp-old-{path.name}")
    path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


class Saver:
    """Writes checkpoints in a background thread.

    A failed save is logged. The run continues, and the next save may succeed.

    Args:
        folder: the folder of the checkpoints.
        retention: which checkpoints to keep.
    """

    def __init__(self, folder: Path, retention: Retention = Retention()) -> None:
        self.folder, self.retention = folder, retention
        self.pool = ThreadPoolExecutor(1, "mae_fast.checkpoint")
        self.pending: Future[Path] | None = None

    def save(self, saved: Snapshot, bad_steps: Set[int] = frozenset()) -> None:
        """Start writing a checkpoint, after the previous one is written."""
        self.wait()
        self.pending = self.pool.submit(write, self.folder, saved, frozenset(bad_steps), self.retention)

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if error := self._finish():
            logger.warning(str(error))

    def check(self) -> None:
        """Wait for the last save.

        Raises:
            UserError: if the save failed.
        """
        if error := self._finish():
            raise error

    def close(self) -> None:
        """Wait for the last save like ``check``, and end the thread."""
        try:
            self.check()
        finally:
            self.pool.shutdown()

    def _finish(self) -> UserError | None:
        """Wait for the last save. Returns the error if it failed."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except (OSError, SafetensorError) as error:
            return UserError(
                f"cannot write a checkpoint to {self.folder} ({error})", "free disk space, or check the disk"
            )
        return None
