"""Verbs that look after folders of runs."""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def runs(args: list[str]) -> None:
    """List the runs in a folder: step, metric, best checkpoint, size on disk."""

    def command(folder: tyro.conf.Positional[Path] = Path("runs")) -> None:
        """Print a row for each run in a folder and below: verb, epochs, step, last metric, best checkpoint and size.

        Args:
            folder: Folder that holds output folders of training commands.
        """
        from ..training.runs import format_runs, list_runs

        print(format_runs(list_runs(folder), folder))

    tyro.cli(command, prog="mae-fast runs", args=args)


def plot(args: list[str]) -> None:
    """Draw the loss, learning rate and metrics of runs."""

    def command(
        runs: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="RUN...")],
        output: Path = Path("runs.png"),
        x: Literal["epochs", "images", "steps"] | None = None,
    ) -> None:
        """Write a picture of the logs of runs, in progress or finished: loss, learning rate and the metrics of their
        evaluations. It needs matplotlib: pip install 'mae_fast[report]'.

        Args:
            runs: Output folders of training commands.
            output: A picture (.png, .jpg, .webp).
            x: The horizontal axis: epochs, images seen or optimizer steps. If not given, epochs, or steps if the log of
                a run has no epochs, as in earlier versions.
        """
        from ..studies.plot_runs import plot_runs

        plot_runs(runs, output, x)

    tyro.cli(command, prog="mae-fast plot", args=args)


def slim(args: list[str]) -> None:
    """Remove the optimizer's state from a run, which then cannot be resumed."""

    def command(run: tyro.conf.Positional[Path]) -> None:
        """Remove the state of the optimizer from all checkpoints of a run, about two thirds of their size. Every other
        verb reads the run as before, but it cannot be resumed. Weights are not touched.

        Args:
            run: The output folder of a training command.
        """
        from ..training.runs import slim

        print(f"removed {slim(run) / 1e6:.1f} MB from {run}: it cannot be resumed now, and is read as before")

    tyro.cli(command, prog="mae-fast slim", args=args)
