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


def demo_eval(args: list[str]) -> None:
    """What pre-training is worth on the demo set: fine-tuning and probing with it and without, over seeds."""

    def command(directory: tyro.conf.Positional[Path]) -> None:
        """Pre-train, fine-tune and probe the tiny model on the demo set with three seeds; a table and a picture.

        Args:
            directory: Where everything goes; a second run continues the first.
        """
        from ..studies.evaluation import evaluate_demo

        evaluate_demo(directory)

    tyro.cli(command, prog="mae-fast demo-eval", args=args)


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
