"""The findings of a run: printed as they come, and kept in a file that is complete whenever the run ends."""

import json
import time
from pathlib import Path
from typing import Any

from mae_fast.files import atomic_write

RESULTS = Path(__file__).parents[1] / "results"


class Report:
    """All results by stage, and the reasons of missing results.

    Args:
        output: the JSON file, written at each ``keep``.
        head: what the figures have to be read with.
        budget: seconds that the run may take.
    """

    def __init__(self, output: Path, head: dict[str, Any], budget: float) -> None:
        self.output, self.start, self.budget = output, time.monotonic(), budget
        self.missing: dict[str, dict[str, str]] = {"skipped": {}, "failed": {}, "refused": {}, "left out": {}}
        self.found: dict[str, Any] = head | {"budget s": budget} | self.missing

    @property
    def deadline(self) -> float:
        """Of the whole run, on ``time.monotonic``."""
        return self.start + self.budget

    def within(self, limit: float) -> float:
        """The deadline of a part that may take ``limit`` seconds."""
        return min(self.deadline, time.monotonic() + limit)

    def tell(self, line: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {line}", flush=True)

    def lack(self, kind: str, what: str, why: str) -> None:
        """``what`` is not among the results: "skipped", "failed", "refused" by a gate, "left out" for want of time."""
        self.missing[kind][what] = why
        self.tell(f"{kind}: {what}: {why}")

    def keep(self, stage: str, entry: Any) -> None:
        """Add a stage's results, and write the file."""
        self.found[stage] = entry
        self.found["seconds"] = time.monotonic() - self.start
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.output) as part:
            part.write_text(json.dumps(self.found, indent=1) + "\n")


def slug(gpu: str) -> str:
    """A GPU's name as the name of a file."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())
