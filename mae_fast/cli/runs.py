"""Verbs that list, plot and shrink runs."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from .groups import parse_verb


def runs(args: list[str]) -> None:
    """List the runs below a folder: step, metric, best checkpoint, size on disk."""

    def command(
        folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[FOLDER]")] = Path("runs"),
    ) -> None:
        """List the runs below a folder: verb, epochs, step, last metric, best checkpoint and size on disk.

        Example: mae-fast runs experiments

        Args:
            folder: Folder that contains output folders of training commands.
        """
        from ..training.runs import format_runs, list_runs

        print(format_runs(list_runs(folder), folder))

    parse_verb(command, "runs", args)


def plot(args: list[str]) -> None:
    """Plot the loss, learning rate and metrics of runs."""

    def command(
        runs: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="RUN...")],
        output: Path = Path("runs.png"),
        x: Literal["epochs", "images", "steps"] | None = None,
    ) -> None:
        """Plot the loss, learning rate and metrics of runs, finished or in progress.

        Example: mae-fast plot runs/base runs/large --output curves.png

        This needs matplotlib: pip install 'mae_fast[report]'.

        Args:
            runs: Output folders of training commands.
            output: Image file to write (.png, .jpg, .webp).
            x: Horizontal axis: epochs, images seen, or optimizer steps. Default: epochs, or steps if the log of a run
                has no epochs, as in earlier versions.
        """
        from ..studies.plot_runs import plot_runs

        plot_runs(runs, output, x)

    parse_verb(command, "plot", args)


def slim(args: list[str]) -> None:
    """Delete the optimizer state of a run to save disk space; the run cannot be resumed afterwards."""

    def command(run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]) -> None:
        """Delete the optimizer state from all checkpoints of a run, about two thirds of their size.

        Example: mae-fast slim runs/base

        The run cannot be resumed afterwards. The weights do not change, and all other verbs still read the run.

        Args:
            run: Output folder of a training command.
        """
        from ..training.runs import slim

        print(f"removed {slim(run) / 1e6:.1f} MB from {run}; the run can no longer be resumed")

    parse_verb(command, "slim", args)
