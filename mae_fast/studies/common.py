"""What studies share: results over seeds, subsets with few labels, figures in the logs of runs."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import UserError
from ..training.run_dir import read_log

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """Held-out accuracy in per cent of each seed at the end."""

    accuracies: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" +- {self.deviation:.1f}" if len(self.accuracies) > 1 else "")


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` evenly spaced items."""
    return [items[i * len(items) // count] for i in range(count)]


def few_labels(data: Path, few: Path, count: int, seed: int | None = None) -> Path:
    """Make ``few``: links to ``count`` images of each class of ``data/train``, and to all of ``val``; returns it.

    Args:
        seed: of the draw; with the same seed, the smaller sets are part of the larger ones. None: evenly spaced in the
            order of names.
    """
    for folder in sorted((data / "train").iterdir()):
        names = sorted(path.name for path in folder.iterdir())
        if len(names) < count:
            raise UserError(f"{folder} holds {len(names)} images, {count} are wanted")
        (few / "train" / folder.name).mkdir(parents=True, exist_ok=True)
        for name in evenly(names, count) if seed is None else shuffled(names, seed, folder.name)[:count]:
            link_into(few / "train" / folder.name, folder / name)
    for path in sorted((data / "val").rglob("*")):
        if path.is_file():
            (few / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
            link_into(few / "val" / path.parent.name, path)
    return few


def shuffled(names: Sequence[str], seed: int, key: str) -> list[str]:
    """``names`` in the order that ``seed`` and ``key`` draw."""
    return random.Random(f"{seed} {key}").sample(names, len(names))


def link_into(folder: Path, path: Path) -> None:
    """Make a link to ``path`` in ``folder``, if there is none."""
    if not (folder / path.name).exists():
        (folder / path.name).symlink_to(path.resolve())


def final_figure(run: Path, name: str = "val_acc1") -> float:
    """The last figure called ``name`` in the log of a run: by default, held-out top-1 in per cent."""
    return float([entry[name] for entry in read_log(run) if name in entry][-1])
