"""The results of one part of ``make gpu``: printed immediately, and stored in a file that is valid at any time."""

import json
import time
from pathlib import Path
from typing import Any

from mae_fast.files import atomic_write

RESULTS = Path(__file__).parents[1] / "results"


class Report:
    """The results by name, and the reasons for missing results.

    Args:
        output: the JSON file, which is written after each result.
        head: machine, versions and settings.
        limit: time limit in seconds.
    """

    def __init__(self, output: Path, head: dict[str, Any], limit: float) -> None:
        self.output, self.start, self.limit = output, time.monotonic(), limit
        self.missing: dict[str, dict[str, str]] = {"skipped": {}, "failed": {}, "refused": {}, "left out": {}}
        self.found: dict[str, Any] = head | {"limit s": limit} | self.missing

    @property
    def deadline(self) -> float:
        """The value of ``time.monotonic`` at the time limit."""
        return self.start + self.limit

    @property
    def left(self) -> float:
        """The seconds until the deadline."""
        return self.deadline - time.monotonic()

    def within(self, limit: float) -> float:
        """The deadline of a measurement with a time limit of ``limit`` seconds."""
        return min(self.deadline, time.monotonic() + limit)

    def log(self, line: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {line}", flush=True)

    def note_missing(self, kind: str, what: str, why: str) -> None:
        """Add the reason for a missing result.

        Args:
            kind: "skipped", "failed", "refused" (wrong results), or "left out" (time limit).
        """
        self.missing[kind][what] = why
        self.log(f"{kind}: {what}: {why}")
        self.write()

    def keep(self, name: str, entry: Any) -> None:
        """Add a result."""
        self.found[name] = entry
        self.write()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to a list of results."""
        self.found.setdefault(name, []).append(row)
        self.write()

    def write(self) -> None:
        self.found["seconds"] = time.monotonic() - self.start
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.output) as part:
            part.write_text(json.dumps(self.found, indent=1) + "\n")


def slug(gpu: str) -> str:
    """The name of a GPU as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())
