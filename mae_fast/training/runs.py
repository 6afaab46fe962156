"""List runs, and remove the optimizer state of finished runs."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..console import table_text
from ..data.folders import some
from ..errors import UserError
from ..weights.run_reader import BEST, STATE, Checkpoint, checkpoints_in, read_checkpoint, read_config
from .checkpoint import drop_optimizer
from .run_dir import RunFolder, read_metrics, verb_of

logger = logging.getLogger(__name__)

# The metric of a run in the list is the first of these that it has logged.
MAIN_METRICS = ("val_acc1", "val_map", "val_miou", "val_mask_ap", "val_box_ap", "train_loss")


@dataclass(frozen=True)
class RunSummary:
    """A summary of a run.

    Attributes:
        path: its folder.
        verb: the verb that started it.
        epochs: its configured number of epochs.
        step: step of the newest checkpoint, which is not verified; 0 without a checkpoint.
        metric: name and last value of its main metric; empty if nothing is logged.
        best: metric, value and step of the best checkpoint; empty without one.
        bytes: size of all its files.
    """

    path: Path
    verb: str
    epochs: int
    step: int
    metric: str
    best: str
    bytes: int


def list_runs(folder: Path) -> list[RunSummary]:
    """The runs in ``folder`` and its subfolders, sorted by path. Unreadable runs are logged and skipped.

    Raises:
        UserError: if there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "give a folder that contains runs")
    found = []
    for path in _run_folders(folder):
        try:
            found.append(_summary(path))
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(f"skipped {path}: {error}")
    if not found:
        raise UserError(f"no run in {folder}", "give a folder that contains output folders of training commands")
    return found


def _run_folders(folder: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(folder):
        if "config.json" in files and ("checkpoints" in folders or "log.jsonl" in files):
            yield Path(name)
        folders[:] = sorted({*folders} - {"checkpoints"})


def _summary(path: Path) -> RunSummary:
    config, checkpoints = read_config(path), path / "checkpoints"
    metrics = read_metrics(path) if (path / "log.jsonl").exists() else {}
    name = next((name for name in MAIN_METRICS if name in metrics), None)
    newest, best = checkpoints_in(checkpoints)[:1], ""
    if (checkpoints / BEST / STATE).exists():
        about = json.loads((checkpoints / BEST / STATE).read_text())["best"]
        best = f"{about['metric']} {about['value']:.4g}, step {about['step']}"
    return RunSummary(
        path=path,
        verb=verb_of(config) or "?",
        epochs=int(config["epochs"]),
        step=int(newest[0].name.removeprefix("step-")) if newest else 0,
        metric=f"{name} {metrics[name]:.4g}" if name else "",
        best=best,
        bytes=sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()),
    )


def format_runs(runs: list[RunSummary], folder: Path) -> str:
    """A table with a row for each run."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("run", "verb", "epochs", "step", "last metric", "best", "size")
    for run in runs:
        name = escape(os.path.relpath(run.path, folder))
        size = f"{run.bytes / 1e9:.2f} GB" if run.bytes >= 1e9 else f"{run.bytes / 1e6:.1f} MB"
        table.add_row(name, run.verb, str(run.epochs), str(run.step), run.metric, run.best, size)
    return table_text(table, 160)


def slim(run: Path) -> int:
    """Remove the optimizer state from all checkpoints of a run and return the number of bytes that this frees.

    The run cannot be resumed afterwards. The weights do not change, and a kill at any time leaves every checkpoint
    readable. Damaged checkpoints are not changed.

    Raises:
        UserError: if ``run`` is not a run, is being trained, or has no usable checkpoint.
    """
    folder = RunFolder(run, {})
    if not folder.config_path.is_file() or not folder.checkpoints.is_dir():
        raise UserError(f"{run} is not a run", "give the output folder of a training command")
    with closing(folder):
        folder.acquire()
        paths, best = checkpoints_in(folder.checkpoints), folder.checkpoints / BEST
        if best.is_dir() and not best.is_symlink():  # in a copy of the run that has followed links
            paths.append(best)
        usable = [path for path in paths if isinstance(read_checkpoint(path), Checkpoint)]
        if not usable:
            raise UserError(f"no usable checkpoint in {run}; nothing is removed", "give another run")
        if damaged := [path.name for path in paths if path not in usable]:
            logger.warning(f"not changed, as they are damaged: {some(damaged)}")
        return sum(map(drop_optimizer, usable))
