"""Helpers of the studies: results over seeds, subsets with few labels, figures in the logs of runs."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..data.sources import Files, labelled
from ..errors import UserError
from ..training.run_dir import read_log

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """The final held-out accuracy of each seed, in per cent."""

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
    """Fill ``few`` with links to ``count`` images per class of ``data/train`` and to all images of ``val``; return it.

    Args:
        seed: random seed of the choice. With the same seed, smaller sets are subsets of larger ones. None: choose
            evenly spaced images in the order of names.

    Raises:
        UserError: if these are not folders with class folders, or a class has fewer images.
    """
    train, val = labelled(data)
    for source in (train, val):
        if not isinstance(source, Files):
            raise UserError(f"{source.root} is not a folder of images", "give train/ and val/ with class folders")
    of_class: dict[str, list[str]] = {folder: [] for folder in train.classes}
    for path in train.names:
        folder, _, name = path.partition("/")
        of_class[folder].append(name)
    for folder, names in of_class.items():
        if len(names) < count:
            raise UserError(
                f"{train.root / folder} contains {len(names)} images, but {count} are needed", "use fewer labels"
            )
        names = sorted(names)
        for name in evenly(names, count) if seed is None else shuffled(names, seed, folder)[:count]:
            link_into((few / "train" / folder / name).parent, train.root / folder / name)
    for name in val.names:
        link_into((few / "val" / name).parent, val.root / name)
    return few


def shuffled(names: Sequence[str], seed: int, key: str) -> list[str]:
    """``names`` in a random order that depends on ``seed`` and ``key``."""
    return random.Random(f"{seed} {key}").sample(names, len(names))


def link_into(folder: Path, path: Path) -> None:
    """Link to ``path`` in ``folder``, which is created if needed, unless the link exists."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / path.name).exists():
        (folder / path.name).symlink_to(path.resolve())


def final_figure(run: Path, name: str = "val_acc1") -> float:
    """The last value of ``name`` in the log of a run; by default, held-out top-1 in per cent."""
    return float([entry[name] for entry in read_log(run) if name in entry][-1])
