"""The folder of a run: its configuration and its log."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UserError


class RunFolder:
    """``output_dir`` with ``config.json``, ``log.jsonl`` and ``checkpoints/``.

    Another configuration is refused, and a second run while this one lives.

    Args:
        write: whether this process is the one that writes there.
    """

    def __init__(self, path: Path, config: dict[str, Any], write: bool = True) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log_path = path / "log.jsonl"
        saved_path = path / "config.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"output folder {path} cannot be made: a file is in the way; choose another") from error
        except OSError as error:
            raise UserError(f"output folder {path} cannot be made ({error.strerror}); choose another") from error
        self.lock = FileLock(path / ".lock")
        if write:
            self._lock()
        if saved_path.exists():
            try:
                saved = json.loads(saved_path.read_text())
            except ValueError as error:
                raise UserError(f"{saved_path} is damaged ({error}); restore it or use a new output folder") from error
            changed = [
                f"{key}: {saved.get(key)!r} there, {config.get(key)!r} now"
                for key in sorted({*saved, *config})
                if saved.get(key) != config.get(key)
            ]
            if changed:
                raise UserError(
                    f"{path} belongs to a run with another configuration ({'; '.join(changed)}); "
                    "repeat its flags to resume it, or choose a new --output-dir"
                )
        elif write:
            temporary = saved_path.with_suffix(".tmp")
            temporary.write_text(json.dumps(config, indent=1))
            temporary.rename(saved_path)

    def _lock(self) -> None:
        """Until this process ends, however it ends."""
        holder = self.path / "running.txt"
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            who = holder.read_text() if holder.exists() else "another process"
            raise UserError(
                f"{self.path} is in use by {who}; wait for its end, or choose a new --output-dir"
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
            except (ValueError, KeyError):  # a line cut short by a kill
                break
        temporary = self.log_path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.rename(self.log_path)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to ``log.jsonl``."""
        with self.log_path.open("a") as file:
            file.write(json.dumps(entry) + os.linesep)
