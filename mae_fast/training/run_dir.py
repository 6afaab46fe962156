"""The folder of a run: its configuration and its log."""

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UserError
from ..files import atomic_write

logger = logging.getLogger(__name__)

# Settings that had another name when the run was started.
RENAMED = {"repeats": "crops_per_image", "decoder": "image_decoder", "blocks": "train_blocks"}


class RunFolder:
    """``output_dir`` with ``config.json``, ``log.jsonl`` and ``checkpoints/``.

    Another configuration is refused, and a second run while this one lives.

    Args:
        defaults: of flags that a run of an earlier version may not have had.
    """

    def __init__(self, path: Path, defaults: dict[str, Any]) -> None:
        self.path, self.defaults = path, defaults
        self.checkpoints = path / "checkpoints"
        self.log_path = path / "log.jsonl"
        self.config_path = path / "config.json"
        self.lock = FileLock(path / ".lock")

    def open(self, config: dict[str, Any]) -> None:
        """Create or reopen the folder, and lock it until this process ends, however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"output folder {self.path} cannot be made: a file is in the way", "choose another"
            ) from error
        except OSError as error:
            raise UserError(f"output folder {self.path} cannot be used ({error.strerror})", "choose another") from error
        self.check(config)
        if not self.config_path.exists():
            with atomic_write(self.config_path) as part:
                part.write_text(json.dumps(config, indent=1))

    def check(self, config: dict[str, Any]) -> None:
        """Raise ``UserError`` if the folder belongs to another configuration; images may have moved."""
        if not self.config_path.exists():
            return
        saved = read_config(self.path)
        there = {key: saved.get(key, self.defaults.get(key)) for key in {*saved, *config}}
        changed = {
            key: f"{key}: {there[key]!r} there, {config.get(key)!r} now"
            for key in sorted(there)
            if not _same(there[key], config.get(key))
        }
        if changed.keys() == {"data_path"}:  # "images" is the same: names and labels of all of them
            logger.warning(
                f"{self.path} was started with images that lay elsewhere, of the same names ({changed['data_path']})"
            )
        elif changed:
            raise UserError(
                f"{self.path} belongs to a run with another configuration ({'; '.join(changed.values())})",
                "repeat its flags to resume it, or choose a new --output-dir",
            )

    def _lock(self) -> None:
        holder = self.path / "running.txt"
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            who = holder.read_text() if holder.exists() else "another process"
            raise UserError(
                f"{self.path} is in use by {who}", "wait for its end, or choose a new --output-dir"
            ) from error
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    def close(self) -> None:
        """Let others use the folder."""
        self.lock.release()

    def rewind_log(self, step: int) -> None:
        """Drop the log lines after ``step``: they will be written again."""
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


def _same(there: Any, now: Any) -> bool:
    """Of a setting; a path that another folder or an earlier version spelled otherwise is the same."""
    both_paths = isinstance(there, str) and isinstance(now, str)
    return there == now or (both_paths and os.path.abspath(there) == os.path.abspath(now))


def read_metrics(folder: Path) -> dict[str, float]:
    """The last value of each figure in the log of the run in ``folder``."""
    metrics: dict[str, float] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        metrics |= {name: value for name, value in json.loads(line).items() if value is not None}
    return {name: value for name, value in metrics.items() if name not in ("step", "epoch")}


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in ``folder``, under today's names.

    Raises:
        UserError: if it is none.
    """
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "give a run of 'mae-fast pretrain'") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})", "restore it or use a new output folder") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged (it holds no object)", "restore it or use a new output folder")
    return {RENAMED.get(str(name), str(name)): value for name, value in config.items()}
