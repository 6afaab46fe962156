"""The benefit of pre-training on the demo set: fine-tuning and linear probing, with and without it, over seeds."""

import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import api
from ..bench.formats import markdown_table, new_figure
from ..errors import UserError
from ..training.config import FinetuneConfig, LinprobeConfig, PretrainConfig, RunConfig
from .demo_data import build_demo

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """Labelled tiles per class, each number a column; seeds; and steps, the same for all runs of a protocol.

    Pre-training sees all tiles, without labels.
    """

    labels: tuple[int, ...] = (10, 25, 100)
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrain_epochs: int = 15
    finetune_steps: int = 600
    probe_steps: int = 200


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


PROBE_FLAGS = {"cache_features": True, "global_pool": True}
Results = dict[str, dict[int, Result]]  # by protocol and start, by labels per class


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` evenly spaced items."""
    return [items[i * len(items) // count] for i in range(count)]


def few_labels(data: Path, few: Path, count: int) -> Path:
    """Make ``few``: links to ``count`` images of each class of ``data/train``, evenly spaced in the order of names, and
    to all of ``val``; returns it."""
    classes = sorted((data / "train").iterdir())
    for folder in classes:
        names = sorted(path.name for path in folder.iterdir())
        if len(names) < count:
            raise UserError(f"{folder} holds {len(names)} images, {count} are wanted")
        (few / "train" / folder.name).mkdir(parents=True, exist_ok=True)
        for name in evenly(names, count):
            link_into(few / "train" / folder.name, folder / name)
    for path in sorted((data / "val").rglob("*")):
        if path.is_file():
            (few / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
            link_into(few / "val" / path.parent.name, path)
    return few


def link_into(folder: Path, path: Path) -> None:
    """Make a link to ``path`` in ``folder``, if there is none."""
    if not (folder / path.name).exists():
        (folder / path.name).symlink_to(path.resolve())


def final_figure(run: Path, name: str = "val_acc1") -> float:
    """The last figure called ``name`` in the log of a run: by default, held-out top-1 in per cent."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return float([entry[name] for entry in entries if name in entry][-1])


def evaluate_demo(directory: Path, budget: Budget = Budget(), run: Callable[[RunConfig], Any] = api.run) -> Results:
    """Pre-train, fine-tune and probe over seeds, below ``directory``; write and return the table, and draw it.

    Args:
        run: trains; a finished run is not repeated.
    """
    data = directory / "data"
    if not data.exists():
        logger.info("%s", build_demo(data))
    classes = len([*(data / "train").iterdir()])
    found: dict[str, dict[int, list[float]]] = {}

    def train(kind: type[RunConfig], name: str, images: Path, seed: int, **flags: Any) -> Path:
        output = directory / f"{name}-{seed}"
        logger.info("\n%s", output)
        run(kind.with_preset("tiny", data_path=images, output_dir=output, seed=seed, **flags))
        return output

    for seed in budget.seeds:
        encoder = train(PretrainConfig, "mae", data, seed, epochs=budget.pretrain_epochs)
        for labels in budget.labels:
            few = few_labels(data, directory / f"labels-{labels}", labels)
            count = labels * classes
            for protocol, verb, kind, batch, steps, more in (
                ("fine-tuned", "finetune", FinetuneConfig, 32, budget.finetune_steps, {}),
                ("linear probe", "linprobe", LinprobeConfig, 256, budget.probe_steps, PROBE_FLAGS),
            ):
                batch = min(batch, count)
                epochs = -(-steps // (count // batch))
                flags = {"epochs": epochs, "batch_size": batch, "warmup_epochs": epochs / 10, "eval_every": epochs}
                for start, weights in (("MAE", str(encoder)), ("random", None)):
                    output = train(kind, f"{verb}-{start}-{labels}", few, seed, weights=weights, **flags, **more)
                    name = f"{protocol}, {start} weights"
                    found.setdefault(name, {}).setdefault(labels, []).append(final_figure(output))
    results = {name: {labels: Result(x) for labels, x in each.items()} for name, each in sorted(found.items())}
    head = ["held-out top-1, %", *(f"{labels} labels per class" for labels in budget.labels)]
    text = markdown_table(head, ([name, *map(str, each.values())] for name, each in results.items()))
    table, picture = directory / "evaluation.md", directory / "evaluation.png"
    table.write_text(f"{text}\n")
    draw(results, picture)
    logger.info("%s\nwrote %s and %s", text, table, picture)
    return results


def draw(results: Results, path: Path) -> None:
    """A panel for each protocol: mean accuracy over labels per class, bars of one deviation, a dot for each seed."""
    figure = new_figure(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, protocol in zip(panels, ("fine-tuned", "linear probe"), strict=True):
        for name in (name for name in results if name.startswith(protocol)):
            labels, each = list(results[name]), list(results[name].values())
            drawn = panel.errorbar(labels, [r.mean for r in each], [r.deviation for r in each], capsize=4, label=name)
            for x, result in results[name].items():
                panel.plot([x] * len(result.accuracies), result.accuracies, ".", alpha=0.5, color=drawn[0].get_color())
        panel.set_xscale("log")
        panel.set_xticks(labels, [str(x) for x in labels], minor=False)
        panel.minorticks_off()
        panel.set_xlabel("labels per class")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    panels[0].set_ylabel("held-out top-1 accuracy, %")
    figure.savefig(path, dpi=110)
