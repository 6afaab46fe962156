"""Verbs that look at a trained model, or at this machine."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError
from .checks import at_least
from .old_names import current_verb


def reconstruct(args: list[str]) -> None:
    """Show what a pre-trained model makes of masked images."""

    def command(
        weights: tyro.conf.Positional[str],
        images: Annotated[list[Path], tyro.conf.arg(metavar="PATH...")],
        output: Path = Path("reconstruction.png"),
        mask_ratio: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...")] = (),
        mask_sampling: Literal["random", "block", "grid"] | None = None,
        masks: Path | None = None,
        whole: bool = False,
        paste_visible: bool = False,
        show: int = 12,
        seed: int = 0,
        model: str | None = None,
        ema: bool = False,
        show_bands: str | None = None,
    ) -> None:
        """Write a picture or a page of masked images, their reconstructions and originals, and print the error.

        Args:
            weights: A run, a file or folder of any layout, or a hub name; with the decoder of pre-training.
            images: Image files or folders (their val/ where there is one).
            output: A picture (.png, .jpg, .webp), or a page in one file, with each image's figures (.html).
            mask_ratio: Share of patches to remove; several are shown side by side; the run's own if none is given.
            mask_sampling: How masks are drawn: patch by patch, in rectangles, or all but one patch of each cell; as in
                the run if not given.
            masks: Draw from these masks instead: .npy [M, h, w], 1 = removed, as many in each.
            whole: Take each image in its own size and shape, not a centred square of the model's size.
            paste_visible: Show visible patches as they are, not as predicted.
            show: Images in the picture; the error is over all of them.
            seed: Seed of the masks.
            model: Factory of the model, as mae_fast names it, where the weights do not show its sizes.
            ema: With the averaged weights of a run with --ema-decay.
            show_bands: Of images with other bands than red, green and blue: three of them, as 4,3,2, or one, as grey.
        """
        from ..api import reconstruct

        reconstruct(
            weights, images, output, mask_ratio=mask_ratio, mask_sampling=mask_sampling, masks=masks, whole=whole,
            paste_visible=paste_visible, show=show, seed=seed, model=model, ema=ema, show_bands=show_bands,
        )  # fmt: skip

    tyro.cli(command, prog="mae-fast reconstruct", args=args)


def predict(args: list[str]) -> None:
    """Predict classes, masks or objects of new images."""

    def command(
        weights: tyro.conf.Positional[str],
        images: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="IMAGE...")],
        output: Path | None = None,
        top_k: int = 5,
        draw: Path | None = None,
        model: str | None = None,
        ema: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        """Write the predictions of a trained model for images without labels, prepared as in its evaluation.

        A classifier writes a table: the file, and the likeliest classes with their probabilities; after multi-label
        training, the labels and the probability of each. Segmentation writes a
        folder of PNG masks of the images' own size, whose values are the numbers of classes in classes.csv. Detection
        writes the objects in COCO's result format, with the path of the image.

        Args:
            weights: A run of finetune, linprobe, segment or detect, or one of its checkpoints; or a classifier's file,
                folder or hub name.
            images: Image files, folders of any nesting, tar shards, or lists (.txt, one path a line).
            output: predictions.csv or .parquet of a classifier, a new folder of segmentation, predictions.json of
                detection.
            top_k: Classes for each image, of a classifier.
            draw: New folder for pictures: masks over the images; or boxes, masks, names and scores of objects with a
                score of at least 0.5.
            model: Factory of the model, as mae_fast names it, where the weights do not show its sizes.
            ema: With the averaged weights of a run with --ema-decay.
            batch_size: Images at a time; segmentation takes one.
            num_workers: Processes that load images.
            device: Where the model runs; auto: cuda if there is one.
        """
        from ..api import predict

        predict(
            weights, list(images), output, top_k=top_k, draw=draw, model=model, ema=ema, batch_size=batch_size,
            num_workers=num_workers, device=device,
        )  # fmt: skip

    tyro.cli(command, prog="mae-fast predict", args=args)


def features(args: list[str]) -> None:
    """Write the features of images to a file."""

    def command(
        data: tyro.conf.Positional[Path],
        weights: str,
        output: Path,
        model: str | None = None,
        pool: Literal["cls", "mean", "map"] = "mean",
        layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = (),
        batch_size: int = 64,
        num_workers: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        max_bad_fraction: float = 0.01,
        ema: bool = False,
    ) -> None:
        """Write the features of images in fp32, a row for each image that can be used; nothing is masked.

        Args:
            data: An image, a folder of images or class folders, tar shards, or a saved Hugging Face dataset.
            weights: A run, a file or folder of any layout, or a hub name.
            output: features.npy, with the images' names in features.names.csv; or features.parquet, with columns image,
                label, class and features.
            model: Factory of the model, as mae_fast names it, where the weights do not show its sizes.
            pool: The class token, the mean of the patch tokens, or a map of all patches [D, h, w].
            layers: Outputs of these blocks, before the last norm; -1 is the last block. Without it, the output of the
                encoder, after its last norm.
            batch_size: Images at a time.
            num_workers: Processes that load images.
            device: Where the encoder runs; auto: cuda if there is one.
            max_bad_fraction: Share of images that may turn out unusable; they get no row.
            ema: With the averaged weights of a run with --ema-decay.
        """
        from ..api import features

        features(
            data, weights=weights, output=output, model=model, pool=pool, layers=layers, batch_size=batch_size,
            num_workers=num_workers, device=device, max_bad_fraction=max_bad_fraction, ema=ema,
        )  # fmt: skip

    tyro.cli(command, prog="mae-fast features", args=args)


def attention(args: list[str]) -> None:
    """Draw where an encoder attends in images."""

    def command(
        images: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="IMAGE...")],
        weights: str,
        output: Path = Path("attention.png"),
        model: str | None = None,
        whole: bool = False,
        show: int = 12,
        ema: bool = False,
    ) -> None:
        """Write a picture of the class token's attention: each head of the last block, and rollout through all blocks.

        Args:
            images: Image files or folders (their val/ where there is one).
            weights: A run, a file or folder of any layout, or a hub name.
            output: A picture (.png, .jpg, .webp).
            model: Factory of the model, as mae_fast names it, where the weights do not show its sizes.
            whole: Take each image in its own size and shape, not a centred crop of the model's size.
            show: Images in the picture, evenly spaced.
            ema: With the averaged weights of a run with --ema-decay.
        """
        from ..api import attention

        attention(images, weights=weights, output=output, model=model, whole=whole, show=show, ema=ema)

    tyro.cli(command, prog="mae-fast attention", args=args)


def logreg_probe(args: list[str]) -> None:
    """Score frozen features with a logistic regression."""

    def command(
        weights: tyro.conf.Positional[str],
        data_path: Path,
        model: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        max_bad_fraction: float = 0.01,
        ema: bool = False,
    ) -> None:
        """Print the held-out accuracy of a logistic regression on frozen, mean-pooled features.

        Args:
            weights: A run, a file or folder of any layout, or a hub name.
            data_path: Folder with train/ and val/, the same class folders in both.
            model: Factory of the model, as mae_fast names it, where the weights do not show its sizes.
            batch_size: Images at a time.
            num_workers: Processes that load images.
            device: Where the encoder runs; auto: cuda if there is one.
            max_bad_fraction: Share of images that may turn out unusable; they are left out.
            ema: With the averaged weights of a run with --ema-decay.
        """
        from ..api import logreg_probe

        logreg_probe(
            weights, data_path, model=model, batch_size=batch_size, num_workers=num_workers, device=device,
            max_bad_fraction=max_bad_fraction, ema=ema,
        )  # fmt: skip

    tyro.cli(command, prog="mae-fast logreg-probe", args=args)


def knn(args: list[str]) -> None:
    """Score frozen features with their nearest neighbours."""

    def command(
        weights: tyro.conf.Positional[str],
        data_path: Path,
        model: str | None = None,
        k: int = 20,
        temperature: float = 0.07,
        pool: Literal["cls", "mean"] = "mean",
        batch_size: int = 64,
        num_workers: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        max_bad_fraction: float = 0.01,
        ema: bool = False,
    ) -> None:
        """Print the held-out accuracy of a weighted vote of the nearest neighbours, by cosine similarity.

        Args:
            weights: A run, a file or folder of any layout, or a hub name.
            data_path: Folder with train/ and val/, the same class folders in both.
            model: Factory of the model, as mae_fast names it, where the weights do not show its sizes.
            k: Neighbours that vote.
            temperature: Of the votes, exp(similarity / temperature).
            pool: Features: the class token, or the mean of the patch tokens.
            batch_size: Images at a time.
            num_workers: Processes that load images.
            device: Where the encoder runs; auto: cuda if there is one.
            max_bad_fraction: Share of images that may turn out unusable; they are left out.
            ema: With the averaged weights of a run with --ema-decay.
        """
        from ..api import knn

        knn(
            weights, data_path, model=model, k=k, temperature=temperature, pool=pool, batch_size=batch_size,
            num_workers=num_workers, device=device, max_bad_fraction=max_bad_fraction, ema=ema,
        )  # fmt: skip

    tyro.cli(command, prog="mae-fast knn", args=args)


@dataclass
class Bench:
    """Time steps of mae_fast beside baselines, for every combination of the flags.

    Every contender passes a correctness check before it is timed. Writes results.json, table.md and pictures. Run
    the same line again to continue: cases measured on this machine, with these versions and this code, are kept.
    """

    tasks: tuple[Literal["train", "finetune", "infer", "reconstruct"], ...] = ("train",)
    """A training step, a fine-tuning step, the encoder on all patches, a reconstruction."""
    models: tuple[Literal["tiny", "base", "large", "huge"], ...] = ("base",)
    """By size; tiny is the demo's."""
    dtypes: tuple[Literal["bf16", "fp32"], ...] = ()
    """bf16 where the device has instructions for it, else fp32, if none is given."""
    batches: tuple[int, ...] = ()
    """Images in a step; 16 on a CPU, 64 on a GPU, if none is given."""
    image_sizes: tuple[int, ...] = ()
    """Sides of the images in pixels; the model's own, if none is given. Several show how cost grows."""
    mask_ratios: tuple[float, ...] = (0.75,)
    """Shares of patches to remove; several show how cost grows."""
    predict_ratios: tuple[float, ...] = ()
    """Time our training step with these predict ratios, too; the baselines' steps are always full ones."""
    baselines: tuple[Literal["eager", "compile", "transformers", "timm"], ...] = (
        "eager",
        "compile",
        "transformers",
        "timm",
    )
    """Eager torch, the same under torch.compile, and the models of transformers and timm."""
    rounds: int = 5
    """Turns of each contender."""
    minutes: float = 30.0
    """Time limit per case; contenders that are not ready by then are left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto: cuda if there is one."""
    output_dir: Path = Path("bench")
    """Folder of results.json, table.md and pictures."""
    data_path: Path | None = None
    """Measure the loading of these images: the rate of the loader, of the step, and of both together."""
    num_workers: int = 2
    """With --data-path: processes or, for dali on a CPU, threads that load images."""
    image_decoder: Literal["auto", "dali", "pil"] = "auto"
    """With --data-path: the decoder of images; auto: the fastest that is installed."""
    crops_per_image: int = 1
    """With --data-path: crops taken of each decoded image."""
    cache: bool = False
    """With --data-path: keep all decoded images in memory."""
    predict: bool = False
    """Measure nothing; print predicted step times of an A100, an H100 and an H200, from counted work."""

    def check(self) -> None:
        """Raise ``UserError`` if a flag is out of range, or does not go together with another one."""
        at_least(rounds=(self.rounds, 1), num_workers=(self.num_workers, 0), crops_per_image=(self.crops_per_image, 1))
        for batch in self.batches:
            at_least(batches=(batch, 1))
        if not self.minutes > 0:
            raise UserError(f"--minutes {self.minutes:g} is out of range", "give more than 0")
        if self.data_path and (max(map(len, (self.models, self.dtypes, self.batches))) > 1 or not self.models):
            raise UserError("--data-path takes one of --models, --dtypes and --batches")


def bench(args: list[str]) -> None:
    """Measure steps beside baselines, or the loading of a folder; or predict steps of GPUs."""
    words = [_current(word) for word in args]
    flags = tyro.cli(Bench, prog="mae-fast bench", args=words)
    if flags.predict:
        if others := [word for word in words if word.startswith("--") and word != "--predict"]:
            raise UserError(f"{', '.join(others)}: no effect with --predict", "it predicts ViT-B, L and H at batch 256")
        from ..bench.predict import print_predictions

        print_predictions()
        return
    flags.check()
    if flags.data_path:
        from ..bench.loading import Loading, loading

        dtype = flags.dtypes[0] if flags.dtypes else "auto"
        options = Loading(
            flags.models[0], dtype, flags.device, flags.num_workers, flags.image_decoder, flags.crops_per_image,
            flags.cache,
        )  # fmt: skip
        loading(flags.data_path, options, flags.batches[0] if flags.batches else None, flags.rounds, flags.output_dir)
        return
    from ..bench.case import Grid
    from ..bench.report import report

    grid = Grid(
        flags.tasks, flags.models, flags.dtypes, flags.batches, flags.image_sizes, flags.mask_ratios, flags.device,
        flags.predict_ratios,
    )  # fmt: skip
    report(grid, flags.baselines, flags.rounds, flags.minutes, flags.output_dir)


def _current(word: str) -> str:
    """A flag of ``bench`` under its current name; its former names work for one release."""
    flag, equals, value = word.partition("=")
    former = {"--rivals": "--baselines", "--data": "--data-path", "--decoder": "--image-decoder"}
    former["--repeats"] = "--crops-per-image"
    return f"{former.get(flag, flag)}{equals}{value}"


def doctor(args: list[str]) -> None:
    """Say what this machine has, which kernel answers each op, and whether a line that trains can run here."""
    if args and not args[0].startswith("-"):
        _look_at(args[0], args[1:])
        return

    def command() -> None:
        """Print versions, processor and GPUs, and which kernel answers each op on each device, with what to do about
        each problem. 'mae-fast doctor VERB FLAGS', with the flags of pretrain or another verb that trains, says whether
        that line can run here: data, memory, disk; exit status 1 if not."""
        from ..doctor.machine import doctor

        doctor()

    tyro.cli(command, prog="mae-fast doctor", args=args)


def _look_at(verb: str, args: list[str]) -> None:
    from .flags import KINDS, parse

    verb, args = current_verb(verb, args)
    if verb not in KINDS:
        raise UserError(f"doctor looks at lines that train, got {verb!r}", f"give one of {', '.join(KINDS)}")
    if any(word.replace("_", "-") in ("--eval", "--eval-only") for word in args):
        raise UserError("doctor looks at training, got --eval-only", "leave it out")
    from ..doctor.preflight import print_preflight

    if print_preflight(f"mae-fast {verb}", parse(verb, args)):
        sys.exit(1)
