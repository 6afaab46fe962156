"""The verbs that run others in a row."""

from collections.abc import Callable
from pathlib import Path

import tyro

from .images import data
from .report import logreg_probe, reconstruct
from .training import pretrain


def demo(args: list[str]) -> None:
    """Demo set, pre-training, reconstruction and probe in one go, minutes on two cores."""

    def command(directory: tyro.conf.Positional[Path]) -> None:
        """Build the demo set, pre-train the tiny model on it, reconstruct held-out tiles and probe the features.

        Args:
            directory: Where everything goes; a second run continues the first.
        """
        data_path, run, picture = directory / "data", directory / "run", directory / "reconstruction.png"
        steps: list[tuple[Callable[[list[str]], None], list[str]]] = [
            (data, ["demo", str(data_path)]),
            (pretrain, ["--preset", "tiny", "--data-path", str(data_path), "--output-dir", str(run)]),
        ]
        for verb, words in steps:
            _step(verb, words)
        # Land only: open water is nearly one colour, which any fill predicts.
        land = sorted(d for d in (data_path / "val").iterdir() if d.name not in ("water_bodies", "snow_and_ice"))
        _step(reconstruct, [str(run), "--images", *map(str, land), "--output", str(picture), "--paste-visible"])
        _step(logreg_probe, [str(run), "--data-path", str(data_path)])

    tyro.cli(command, prog="mae-fast demo", args=args)


def study(args: list[str]) -> None:
    """MAE on Fashion-MNIST: against random weights, the paper's ablations, shorter pre-training; about an hour."""

    def command(directory: tyro.conf.Positional[Path], measure: bool = False) -> None:
        """Pre-train, fine-tune and probe tiny models on Fashion-MNIST; write study.md, study.json and pictures.

        As many processes train at a time as there are cores, one thread each. The same line continues a study that was
        stopped. A Fashion-MNIST set in DIRECTORY/data is used; otherwise, it is downloaded.

        Args:
            directory: Where everything goes.
            measure: Measure only the images per second again, on an otherwise idle machine.
        """
        from ..studies.study import run_study

        run_study(directory, measure=measure)

    tyro.cli(command, prog="mae-fast study", args=args)


def demo_transfer(args: list[str]) -> None:
    """What pre-training is worth to segmentation and detection on the demo's maps, over seeds."""

    def command(directory: tyro.conf.Positional[Path]) -> None:
        """Pre-train, segment and detect with the tiny model and three seeds; a table, and pictures of predictions.

        Args:
            directory: Where everything goes; a second run continues the first.
        """
        from ..studies.transfer import transfer_demo

        transfer_demo(directory)

    tyro.cli(command, prog="mae-fast demo-transfer", args=args)


def _step(verb: Callable[[list[str]], None], words: list[str]) -> None:
    print(f"\n$ mae-fast {verb.__name__.replace('_', '-')} {' '.join(words)}", flush=True)
    verb(words)
