"""Plots the logs of runs: loss, learning rate and evaluation metrics."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..bench.formats import new_figure
from ..errors import UserError
from ..evaluation.images import PICTURES, write_file
from ..training.run_dir import read_log

logger = logging.getLogger(__name__)

LABELS = {
    "train_loss": "training loss", "val_loss": "held-out loss", "train_lr": "learning rate",
    "val_acc1": "top-1 accuracy, %", "val_acc5": "top-5 accuracy, %", "val_balanced_acc": "balanced accuracy, %",
}  # fmt: skip
AXES = {"epochs": "epochs", "images": "images seen", "steps": "optimizer step"}
EMA = "_ema"  # suffix of metrics of the averaged weights

Log = list[dict[str, Any]]
Axis = Literal["epochs", "images", "steps"]


def plot_runs(runs: Sequence[Path], output: Path, x: Axis | None = None) -> None:
    """Write a plot with one panel each for the loss, the learning rate and each metric, and one colour per run.

    Args:
        runs: folders of runs. The legend shows them as given.
        output: .png, .jpg or .webp.
        x: the horizontal axis. None: epochs, or steps if the log of a run has no epochs, as in earlier versions.

    Raises:
        UserError: if no run is given, a folder is not a run, a log is empty or has no ``x``, or matplotlib is not
            installed.
    """
    if not runs:
        raise UserError("no run is given", "give output folders of training commands")
    if output.suffix.lower() not in PICTURES:
        raise UserError(
            f"--output {output} is not an image file name", f"give a name such as {output.with_suffix('.png')}"
        )
    logs = {str(run): _log_of(run) for run in dict.fromkeys(runs)}
    figure = draw(logs, x or _common_axis(logs))
    write_file(output, lambda part: figure.savefig(part, dpi=120, format=output.suffix[1:].replace("jpg", "jpeg")))
    logger.info(f"wrote {output}")


def _log_of(run: Path) -> Log:
    if not (run / "log.jsonl").is_file():
        raise UserError(f"{run} has no log.jsonl", "give the output folder of a training command")
    log = read_log(run)
    if not log:
        raise UserError(f"the log of {run} is empty", "wait for its first line; --log-every sets the interval")
    return log


def _common_axis(logs: dict[str, Log]) -> Axis:
    """ "epochs" if every line of every log has them, else "steps"."""
    return "epochs" if all("epochs" in line for log in logs.values() for line in log) else "steps"


def draw(logs: dict[str, Log], x: Axis = "steps") -> Any:
    """The plot of ``logs``, whose keys are the names of the runs."""
    key = "step" if x == "steps" else x
    for run, log in logs.items():
        if any(key not in line for line in log):
            raise UserError(f"--x {x}: the log of {run}, from an earlier version, has no {x}", "give --x steps")
    names = {name for log in logs.values() for line in log for name, x in line.items() if isinstance(x, int | float)}
    metrics = {name.removesuffix(EMA) for name in names if name.startswith("val_")}
    order = ["train_loss", "val_loss", "train_lr", *sorted(metrics)]
    panels = [name for name in dict.fromkeys(order) if name in metrics or name.startswith("train_")]
    columns = 2 if len(panels) in (2, 4) else 3
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.4 * columns, 3.3 * rows + 0.2 * len(logs) + 0.3)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        for number, log in enumerate(logs.values()):
            _draw_curve(axis, log, key, panel, color=f"C{number}")
            _draw_curve(axis, log, key, panel + EMA, color=f"C{number}", linestyle=":")
        axis.set_xlabel(AXES[x])
        axis.set_ylabel(LABELS.get(panel, panel))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _draw_legend(figure, list(logs), any(name.endswith(EMA) for name in names))
    return figure


def _draw_curve(axis: Any, log: Log, x: str, name: str, **style: str) -> None:
    """Draw the metric ``name`` over ``x``, with a gap where it is not finite.

    The training loss also has a gap where a resolution schedule changes the image size, because losses at different
    sizes are not comparable. A label shows the size of each part.
    """
    points: list[tuple[float, float]] = []
    size = None
    for line in (line for line in log if name in line):
        point = line[x], math.nan if line[name] is None else line[name]
        if name == "train_loss" and line.get("img_size") != size:
            size = line["img_size"]
            points.append((point[0], math.nan))
            axis.annotate(_pixels(size), point, (2, 4), textcoords="offset points", fontsize=7, color=style["color"])
        points.append(point)
    if points:
        marker = "o" if len(points) <= 30 and name != "train_lr" else ""
        axis.plot(*zip(*points, strict=True), linewidth=1.3, marker=marker, markersize=3, **style)


def _pixels(size: int | list[int]) -> str:
    return f"{size if isinstance(size, int) else ' x '.join(map(str, size))} px"


def _draw_legend(figure: Any, runs: list[str], averaged: bool) -> None:
    """Draw the legend: the colours of the runs, and the line style of averaged weights."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=f"C{number}", label=run) for number, run in enumerate(runs)]
    if averaged:
        handles.append(Line2D([], [], color="grey", linestyle=":", label="averaged weights"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(handles)), fontsize=8)
