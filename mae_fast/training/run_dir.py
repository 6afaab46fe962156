"""The folder of a run: its configuration, the list of its images, and its log."""

import errno
import fcntl
import gzip
import json
import logging
import os
import socket
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ..data.folders import some
from ..data.sources import Source
from ..errors import UserError
from ..files import atomic_write
from ..weights.run_reader import read_config

logger = logging.getLogger(__name__)


# Verb -> a setting that only its runs have. All settings of linprobe also exist in runs of finetune.
VERB_OF = {
    "mask_ratio": "pretrain", "mixup": "finetune", "head_channels": "segment", "window": "detect",
    "vocab_size": "train-dvae", "global_pool": "linprobe",
}  # fmt: skip

# Error numbers of flock on file systems without it.
NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class RunFolder:
    """The folder ``output_dir`` with ``config.json``, ``images.json.gz``, ``log.jsonl`` and ``checkpoints/``.

    A folder can be reopened only with the same configuration, and only by one process at a time.

    Args:
        defaults: default values of flags that runs of earlier versions may not have.
        sources: the images of the run, by the name of their fingerprint in the configuration.

    Attributes:
        epochs_before: the number of epochs in ``config.json``; None if the run is new.
    """

    def __init__(self, path: Path, defaults: dict[str, Any], sources: Mapping[str, Source] | None = None) -> None:
        self.path, self.defaults, self.sources = path, defaults, sources or {}
        self.images_path = path / "images.json.gz"
        self.epochs_before: int | None = None
        self.checkpoints = path / "checkpoints"
        self.log_path = path / "log.jsonl"
        self.config_path = path / "config.json"
        self.lock: BaseFileLock = FileLock(path / ".lock")

    def open(self, config: dict[str, Any]) -> None:
        """Create or reopen the folder, and lock it until this process ends."""
        images = [source.root for source in self.sources.values()]
        if config.get("data_path"):
            images.append(Path(config["data_path"]))
        if not self.config_path.exists() and self.path.resolve() in (folder.resolve() for folder in images):
            raise UserError(f"{self.path} is the folder of the images", "choose another --output-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.acquire()
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"output folder {self.path} cannot be made: a file is in the way", "choose another folder"
            ) from error
        except OSError as error:
            message = f"output folder {self.path} cannot be used ({error.strerror})"
            raise UserError(message, "choose another folder") from error
        self.check(config)
        if not self.images_path.exists():  # runs of earlier versions do not have it
            lists = {name: _list_of(source) for name, source in self.sources.items()}
            with atomic_write(self.images_path) as part, gzip.open(part, "wt", 1) as file:
                json.dump(lists, file)
        if not self.config_path.exists():
            self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write ``config.json``."""
        with atomic_write(self.config_path) as part:
            part.write_text(json.dumps(config, indent=1))

    def check(self, config: dict[str, Any]) -> None:
        """Raise ``UserError`` if the folder belongs to another configuration.

        The images may have moved. The number of epochs, and flags that are not in ``config``, may change.
        """
        if not self.config_path.exists():
            return
        saved = read_config(self.path)
        before, verb = verb_of(saved), verb_of(config)
        if before and verb and before != verb:
            raise UserError(f"{self.path} is a run of {before}, not of {verb}", "choose a new --output-dir")
        free = self.defaults.keys() - config.keys()  # flags that may change; earlier versions recorded some
        there = {key: saved.get(key, self.defaults.get(key)) for key in {*saved, *config} - free}
        self.epochs_before = there.get("epochs")
        changed = {
            key: f"{key}: {there[key]!r} in the run, {config.get(key)!r} now"
            for key in sorted(there)
            if key != "epochs" and not _same(there[key], config.get(key))
        }
        if config.get("resolution_schedule") and self.epochs_before not in (None, config["epochs"]):
            changed["epochs"] = (
                f"epochs: {self.epochs_before!r} in the run, {config['epochs']!r} now, which would move the stages of "
                "its resolution schedule"
            )
        changed |= self._changed_images(changed.keys())
        words = "masks with other names, sizes or classes"
        changed |= {
            key: f"{key}: {words}" for key in ("masks", "val_masks") if key in changed and key not in self.defaults
        }
        if changed.keys() == {"data_path"}:  # "images", the names and labels of all images, is equal
            logger.warning(
                f"{self.path} was started with images of the same names in another folder ({changed['data_path']})"
            )
        elif changed:
            flags = changed.keys() - self.sources.keys() - {"masks_sha256", "masks", "val_masks", "data_path"}
            raise UserError(
                f"{self.path} belongs to a run with another configuration ({'; '.join(changed.values())})",
                "repeat its flags to resume it, or choose a new --output-dir"
                if flags
                else "restore the images to resume it, or choose a new --output-dir",
            )

    def _changed_images(self, changed: Set[str]) -> dict[str, str]:
        """The differences between the recorded lists of images and the current ones, by name."""
        if not changed & self.sources.keys():
            return {}
        lists: dict[str, Any] = {}
        try:
            with gzip.open(self.images_path, "rt") as file:
                lists = json.load(file)
        except (OSError, EOFError, ValueError):  # a run of an earlier version has none
            logger.debug("%s has no list of images", self.path)
        return {
            name: f"{name}: {_difference(lists.get(name), source)}"
            for name, source in self.sources.items()
            if name in changed
        }

    def acquire(self) -> None:
        """Lock the folder until ``close``, or until this process ends.

        Raises:
            UserError: if another process has locked it.
        """
        holder = self.path / "running.txt"
        try:
            self._lock()
        except Timeout as error:
            who = holder.read_text() if holder.exists() else "another process"
            soft = isinstance(self.lock, SoftFileLock)
            gone = f"; if that process is gone, remove {self.lock.lock_file}" if soft else ""
            raise UserError(
                f"{self.path} is in use by {who}", f"wait until it ends, or choose a new --output-dir{gone}"
            ) from error
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    def _lock(self) -> None:
        """Lock the folder by flock or, on a file system without flock, by a file that exists as long as the run."""
        # We test for flock ourselves. Without flock, some versions of filelock remove the lock of another process.
        try:
            with tempfile.TemporaryFile(dir=self.path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            self.lock = SoftFileLock(self.path / ".lock.pid")
        soft = isinstance(self.lock, SoftFileLock)
        self.lock.acquire(timeout=1 if soft else 0)  # soft: the first try may only remove a file of an ended process
        if soft:
            logger.warning(
                f"the file system of {self.path} has no flock: {self.lock.lock_file} marks the folder as in use. If a "
                "run is killed on another machine, remove that file"
            )

    def close(self) -> None:
        """Unlock the folder."""
        self.lock.release()

    def rewind_log(self, step: int) -> None:
        """Remove the log lines after ``step``, as they will be written again."""
        if not self.log_path.exists():
            return
        kept = []
        for line in self.log_path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # a line cut short by a kill
                break
        with atomic_write(self.log_path) as part:
            part.write_text("".join(f"{line}\n" for line in kept))

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to ``log.jsonl``."""
        with self.log_path.open("a") as file:
            file.write(json.dumps(entry) + os.linesep)


def _list_of(source: Source) -> dict[str, Any]:
    return {"names": source.names, "labels": source.labels, "classes": source.classes}


def _difference(there: dict[str, Any] | None, now: Source) -> str:
    """Describe the differences between the recorded list of images and the current images."""
    if there is None:
        hidden = f"; skipped now, but not by earlier versions: {now.left_out}" if "hidden" in now.left_out else ""
        return f"the checksum of the list of images differs; there are {len(now)} images now{hidden}"
    names, new = there["names"], {*now.names}
    old = {*names}
    told = [f"{len(names)} images in the run, {len(now)} now"]
    for what, listed in (
        ("new", [name for name in now.names if name not in old]),
        ("missing", [name for name in names if name not in new]),
    ):
        if listed:
            told.append(f"{len(listed)} {what} ({some(listed)})")
    if len(told) == 1 and there["classes"] != list(now.classes):
        told.append(f"classes {some(there['classes'])} in the run, {some(now.classes)} now")
    elif len(told) == 1 and there["labels"] != (None if now.labels is None else list(now.labels)):
        told.append("other labels")
    elif len(told) == 1:
        told.append("the same names, but other contents or annotations")
    return ", ".join(told)


def verb_of(settings: Mapping[str, Any]) -> str | None:
    """The verb of a run with these settings; None if it is unknown."""
    return next((verb for setting, verb in VERB_OF.items() if setting in settings), None)


def _same(there: Any, now: Any) -> bool:
    """Whether a recorded and a current setting are equal. Different spellings of the same path are equal.

    ``there`` may be the default of a flag, a tuple, which is a list in JSON.
    """
    both_paths = isinstance(there, str) and isinstance(now, str)
    if isinstance(there, tuple):
        there = [*there]
    return there == now or (both_paths and os.path.abspath(there) == os.path.abspath(now))


PLACE = ("step", "epoch", "epochs", "images")  # the position in the run, in each line of a log


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log of the run in ``folder``, up to the first line that a kill has cut off."""
    lines = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def read_metrics(folder: Path) -> dict[str, float]:
    """The last value of each metric in the log of the run in ``folder``."""
    metrics: dict[str, float] = {}
    for line in read_log(folder):
        metrics |= {name: value for name, value in line.items() if isinstance(value, int | float)}
    return {name: value for name, value in metrics.items() if name not in (*PLACE, "img_size")}
