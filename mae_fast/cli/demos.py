"""The verbs that run others in a row."""

from collections.abc import Callable
from pathlib import Path

import tyro

from .images import data
from .report import logreg_probe, reconstruct
from .training import finetune, pretrain

DEMO_EPOCHS = 4  # of Fashion-MNIST
DEMO_LABELS = 25  # per class
DEMO_FINETUNE_EPOCHS = 86  # of 7 steps


def demo(args: list[str]) -> None:
    """Download a dataset, pre-train, draw reconstructions, and fine-tune with few labels: minutes on two cores."""

    def command(directory: tyro.conf.Positional[Path]) -> None:
        """Pre-train the tiny model on Fashion-MNIST, and fine-tune it with 25 labels per class.

        The same model with random weights is fine-tuned, too. Without Fashion-MNIST, satellite tiles are used, and a
        probe of the features replaces fine-tuning.

        Args:
            directory: Where everything goes; a second run continues the first.
        """
        if _has_fashion_mnist(directory / "data"):
            _demo_on_fashion_mnist(directory)
        else:
            _demo_on_satellite_tiles(directory)

    tyro.cli(command, prog="mae-fast demo", args=args)


def _has_fashion_mnist(data_path: Path) -> bool:
    """Whether the demo's dataset is Fashion-MNIST, which is downloaded if need be."""
    from ..studies.fashion_mnist import DownloadError

    if (data_path / "demo.json").exists():  # an earlier demo
        print(f"The dataset is satellite tiles of NASA's Blue Marble: {data_path} has them.")
        return False
    try:
        _step(data, ["fashion-mnist", str(data_path)])
    except DownloadError as error:
        print(f"The dataset is satellite tiles of NASA's Blue Marble: {error.message}.")
        return False
    print("The dataset is Fashion-MNIST.")
    return True


def _demo_on_fashion_mnist(directory: Path) -> None:
    from ..studies.common import few_labels, final_figure

    data_path, run = directory / "data", directory / "run"
    size = ["--preset", "tiny", "--input-size", "28"]
    grey = ["--in-chans", "1", "--mean", "auto", "--std", "auto"]
    words = [*size, *grey, "--batch-size", "128", "--epochs", str(DEMO_EPOCHS)]
    _step(pretrain, [*words, "--data-path", str(data_path), "--output-dir", str(run)])
    picture = directory / "reconstruction.png"
    _step(reconstruct, [str(run), "--images", str(data_path), "--output", str(picture), "--paste-visible"])

    labelled = few_labels(data_path, directory / f"labels-{DEMO_LABELS}", DEMO_LABELS)
    print(f"\n{labelled}: links to {DEMO_LABELS} training images of each class, and to all held-out images")
    epochs = str(DEMO_FINETUNE_EPOCHS)
    steps = [*size, "--epochs", epochs, "--warmup-epochs", str(DEMO_FINETUNE_EPOCHS / 10), "--eval-every", epochs]
    accuracies = {}
    for name, start in (("MAE", ["--weights", str(run)]), ("random", [*grey, "--layer-decay", "1"])):
        output = directory / f"finetuned-{name}"
        _step(finetune, [*steps, *start, "--data-path", str(labelled), "--output-dir", str(output)])
        accuracies[name] = final_figure(output)
    print(
        f"\nHeld-out accuracy after fine-tuning with {DEMO_LABELS} labels per class: "
        f"{accuracies['MAE']:.1f} % from MAE weights, {accuracies['random']:.1f} % from random weights.\n"
        f"Reconstructions: {picture}"
    )


def _demo_on_satellite_tiles(directory: Path) -> None:
    data_path, run, picture = directory / "data", directory / "run", directory / "reconstruction.png"
    _step(data, ["demo", str(data_path)])
    _step(pretrain, ["--preset", "tiny", "--data-path", str(data_path), "--output-dir", str(run)])
    # Land only: open water is nearly one colour, which any fill predicts.
    land = sorted(d for d in (data_path / "val").iterdir() if d.name not in ("water_bodies", "snow_and_ice"))
    _step(reconstruct, [str(run), "--images", *map(str, land), "--output", str(picture), "--paste-visible"])
    _step(logreg_probe, [str(run), "--data-path", str(data_path)])


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
