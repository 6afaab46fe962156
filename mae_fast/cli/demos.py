"""Verbs that run several other verbs: the demos and the study."""

from collections.abc import Callable
from pathlib import Path

from .groups import Directory, parse_verb
from .images import data
from .report import logreg_probe, reconstruct
from .training import finetune, pretrain

DEMO_EPOCHS = 4  # of pre-training on Fashion-MNIST
DEMO_LABELS = 25  # labelled images per class
DEMO_FINETUNE_EPOCHS = 86  # of 7 steps each


def demo(args: list[str]) -> None:
    """Download a small dataset, pre-train, draw reconstructions, and fine-tune: about 5 minutes on two cores."""

    def command(directory: Directory) -> None:
        """Pre-train a tiny model on Fashion-MNIST, and fine-tune it with 25 labels per class.

        Example: mae-fast demo runs/demo

        For comparison, the same model is also fine-tuned from random weights. If Fashion-MNIST cannot be downloaded,
        the demo uses satellite tiles, and evaluates the features with a logistic regression instead.

        Args:
            directory: Output folder. Run the same command again to continue a stopped demo.
        """
        if _has_fashion_mnist(directory / "data"):
            _demo_on_fashion_mnist(directory)
        else:
            _demo_on_satellite_tiles(directory)

    parse_verb(command, "demo", args)


def _has_fashion_mnist(data_path: Path) -> bool:
    """Download Fashion-MNIST unless an earlier demo has done so. False if the demo has to use satellite tiles."""
    from ..studies.fashion_mnist import DownloadError

    if (data_path / "demo.json").exists():  # an earlier demo
        print(f"Using the satellite tiles of NASA's Blue Marble in {data_path}.")
        return False
    try:
        _step(data, ["fashion-mnist", str(data_path)])
    except DownloadError as error:
        print(f"Using satellite tiles of NASA's Blue Marble: {error.message}.")
        return False
    print("Using Fashion-MNIST.")
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
    # Only land: open water has nearly one colour and is trivial to reconstruct.
    land = sorted(d for d in (data_path / "val").iterdir() if d.name not in ("water_bodies", "snow_and_ice"))
    _step(reconstruct, [str(run), "--images", *map(str, land), "--output", str(picture), "--paste-visible"])
    _step(logreg_probe, [str(run), "--data-path", str(data_path)])


def study(args: list[str]) -> None:
    """Compare MAE with training from scratch on Fashion-MNIST, with ablations: about an hour on two cores."""

    def command(directory: Directory, measure: bool = False) -> None:
        """Compare MAE with training from scratch on Fashion-MNIST; write study.md, study.json and plots.

        Example: mae-fast study runs/study

        The study also runs the paper's ablations and shorter pre-training. Each core runs one training process with
        one thread. Run the same command again to continue a stopped study. Fashion-MNIST is downloaded, unless it is in
        DIRECTORY/data.

        Args:
            directory: Output folder.
            measure: Do not train; only measure the images per second again. Run nothing else meanwhile.
        """
        from ..studies.study import run_study

        run_study(directory, measure=measure)

    parse_verb(command, "study", args)


def demo_transfer(args: list[str]) -> None:
    """Compare segmentation and detection on satellite images with and without pre-training."""

    def command(directory: Directory) -> None:
        """Compare segmentation and detection with and without pre-training, on satellite images.

        Example: mae-fast demo-transfer runs/demo-transfer

        Trains the tiny model with three seeds. Writes a table and pictures of the predictions.

        Args:
            directory: Output folder. Run the same command again to continue a stopped demo.
        """
        from ..studies.transfer import transfer_demo

        transfer_demo(directory)

    parse_verb(command, "demo-transfer", args)


def _step(verb: Callable[[list[str]], None], words: list[str]) -> None:
    print(f"\n$ mae-fast {verb.__name__.replace('_', '-')} {' '.join(words)}", flush=True)
    verb(words)
