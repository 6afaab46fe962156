"""What pre-training is worth on the demo set: fine-tuning and linear probing, with it and without, over seeds."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError


@dataclass(frozen=True)
class Budget:
    """What is spent: ``labels`` tiles of each class; pre-training sees all tiles, without labels."""

    labels: int = 50
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrain_epochs: int = 30
    finetune_epochs: int = 60


@dataclass(frozen=True)
class Row:
    """One protocol from one start: held-out accuracy in per cent of each seed, and its course over the epochs."""

    name: str
    accuracies: list[float]
    courses: list[list[tuple[int, float]]]

    def __str__(self) -> str:
        spread = statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0
        return f"{statistics.fmean(self.accuracies):.2f} +- {spread:.2f}"


def few_labels(data: Path, few: Path, count: int) -> None:
    """``few``: ``count`` images of each class of ``data/train``, evenly spaced in the order of names, and ``val``."""
    for folder in sorted((data / "train").iterdir()):
        names = sorted(path.name for path in folder.iterdir())
        if len(names) < count:
            raise UserError(f"{folder} holds {len(names)} images, {count} are wanted")
        (few / "train" / folder.name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            _link(folder / names[i * len(names) // count], few / "train" / folder.name)
    for path in sorted((data / "val").rglob("*")):
        if path.is_file():
            (few / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
            _link(path, few / "val" / path.parent.name)


def _link(path: Path, folder: Path) -> None:
    if not (folder / path.name).exists():
        (folder / path.name).symlink_to(path.resolve())


def course(run: Path) -> list[tuple[int, float]]:
    """(epoch, held-out top-1 in per cent) of each evaluation of a run."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(entry["epoch"] + 1, entry["val_acc1"]) for entry in entries if "val_acc1" in entry]


def evaluate_demo(directory: Path, run: Callable[[str, list[str]], None], budget: Budget = Budget()) -> list[Row]:
    """Pre-train, fine-tune and probe over seeds, below ``directory``; write and return the table, and draw it.

    Args:
        run: runs a verb of the command line with its words. What is finished is not run again.
    """
    data, few = directory / "data", directory / f"few-{budget.labels}"
    if not data.exists():
        run("data", ["demo", str(data)])
    few_labels(data, few, budget.labels)
    runs: dict[str, list[Path]] = {}
    for seed in budget.seeds:
        folder = directory / f"seed-{seed}"

        def train(verb: str, name: str, images: Path, *flags: str, folder: Path = folder, seed: int = seed) -> Path:
            words = ["--preset", "tiny", "--data-path", str(images), "--output-dir", str(folder / name)]
            run(verb, [*words, "--seed", str(seed), *flags])
            return folder / name

        encoder = train("pretrain", "mae", data, f"--epochs={budget.pretrain_epochs}")
        starts = {"MAE": ("--weights", str(encoder)), "random": ()}
        for start, flags in starts.items():
            epochs = f"--epochs={budget.finetune_epochs}"
            tuned = train("finetune", f"finetune-{start}", few, epochs, *flags)
            runs.setdefault(f"fine-tuned from {start} weights", []).append(tuned)
            probed = train("linprobe", f"linprobe-{start}", few, "--cache-features", "--global-pool", *flags)
            runs.setdefault(f"linear probe of {start} features", []).append(probed)
    rows = []
    for name in sorted(runs):
        courses = [course(path) for path in runs[name]]
        rows.append(Row(name, [each[-1][1] for each in courses], courses))
    title = f"held-out top-1, {budget.labels} labels per class"
    lines = [f"| {title} | mean +- deviation of {len(budget.seeds)} seeds | each |", "|---|---|---|"]
    lines += [f"| {row.name} | {row} | {', '.join(f'{x:.2f}' for x in row.accuracies)} |" for row in rows]
    (directory / "evaluation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(rows, directory / "evaluation.png")
    print(f"wrote {directory / 'evaluation.md'} and {directory / 'evaluation.png'}")
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each protocol: accuracy over epochs, a thin line for each seed, their mean thick."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the picture needs matplotlib: pip install 'mae_fast[report]'") from error

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, protocol in zip(panels, ("fine-tuned", "linear probe"), strict=True):
        for row in (row for row in rows if row.name.startswith(protocol)):
            epochs = [epoch for epoch, _ in row.courses[0]]
            mean = [statistics.fmean(values) for values in zip(*([y for _, y in c] for c in row.courses), strict=True)]
            (line,) = panel.plot(epochs, mean, linewidth=2.5, label=f"{row.name}: {row}")
            for each in row.courses:
                panel.plot(epochs, [y for _, y in each], linewidth=0.7, alpha=0.5, color=line.get_color())
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    panels[0].set_ylabel("held-out top-1 accuracy, %")
    figure.savefig(path, dpi=110)
