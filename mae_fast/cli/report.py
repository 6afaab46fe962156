"""Verbs that evaluate a trained model, measure speed, or check this machine."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError
from .checks import at_least
from .groups import Device, Encoding, Loading, Model, Weights, WeightsFlag, parse_verb, readable
from .old_names import current_verb

Images = Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="IMAGE...")]
DataPath = Annotated[Path, tyro.conf.arg(help="Folder with train/ and val/, which contain the same class folders.")]


@dataclass
@readable
class MaskFlags:
    """"""

    mask_ratio: tuple[float, ...] = ()
    """Share of patches to remove. Several values are shown side by side. Default: the ratio of pre-training."""
    mask_sampling: Literal["random", "block", "grid"] | None = None
    """Single random patches, rectangles, or all but one patch of each grid cell. Default: as in pre-training."""
    masks: Path | None = None
    """Draw masks from this .npy array [M, h, w] instead: 1 = removed, the same number of patches in each mask."""
    seed: int = 0
    """Random seed of the masks."""


@dataclass
@readable
class PictureFlags:
    """"""

    show: int = 12
    """Number of images in the picture. The PSNR is over all images."""
    whole: bool = False
    """Use each image in its own size and shape instead of a centred square of the model's size."""
    paste_visible: bool = False
    """Show the original pixels in visible patches instead of the predicted ones."""
    show_bands: str | None = None
    """For images with other bands than red, green and blue: the bands to show, such as 4,3,2, or one band as grey."""


def reconstruct(args: list[str]) -> None:
    """Draw masked images and their reconstructions."""

    def command(
        weights: Weights,
        images: list[Path],
        output: Path = Path("reconstruction.png"),
        *,
        model: Model,
        masking: Annotated[MaskFlags, tyro.conf.arg(name="masking")],
        picture: Annotated[PictureFlags, tyro.conf.arg(name="picture")],
    ) -> None:
        """Draw masked images, their reconstructions and the originals. Print the PSNR, unless targets are normalised.

        Example: mae-fast reconstruct runs/base --images photos --mask-ratio 0.5 0.75

        The weights must include the decoder of pre-training.

        Args:
            images: Image files or folders. Of a folder with val/, only val/ is used.
            output: Picture to write (.png, .jpg, .webp), or a self-contained page with the error of each image (.html).
        """
        from ..api import reconstruct

        reconstruct(weights, images, output, **vars(model), **vars(masking), **vars(picture))

    parse_verb(command, "reconstruct", args)


def predict(args: list[str]) -> None:
    """Predict the classes, masks or objects of new images."""

    def command(
        weights: Weights,
        images: Images,
        output: Path | None = None,
        top_k: int = 5,
        draw: Path | None = None,
        *,
        model: Model,
        loading: Loading,
    ) -> None:
        """Predict the classes, masks or objects of images without labels.

        Example: mae-fast predict runs/finetuned photos --output predictions.csv

        Weights are a run of finetune, linprobe, segment or detect, or a classifier of another library. Images are
        prepared as in evaluation. A classifier writes a table with the most likely classes and their probabilities, or,
        after multi-label training, with the probability of every label. Segmentation writes PNG masks of the size of
        the images; classes.csv lists the class of each value. Detection writes objects in the COCO result format, with
        the path of the image.

        Args:
            images: Image files, folders, tar shards, or lists of images (.txt, one path per line).
            output: Where to write the predictions. Default: predictions.csv for a classifier (.parquet also works), a
                folder for segmentation, predictions.json for detection.
            top_k: Classes per image in the table of a classifier.
            draw: New folder for pictures of the predictions. Objects are drawn if their score is at least 0.5.
        """
        from ..api import predict

        predict(weights, list(images), output, top_k=top_k, draw=draw, **vars(model), **vars(loading))

    parse_verb(command, "predict", args)


def features(args: list[str]) -> None:
    """Write the encoder features of images to a file."""

    def command(
        data: tyro.conf.Positional[Path],
        weights: WeightsFlag,
        output: Path,
        pool: Literal["cls", "mean", "map"] = "mean",
        layers: tuple[int, ...] = (),
        *,
        model: Model,
        loading: Encoding,
    ) -> None:
        """Write the encoder features of images to a file, in fp32, one row per image. No patch is masked.

        Example: mae-fast features photos --weights runs/base --output features.npy

        Args:
            data: An image, a folder of images or class folders, tar shards, or a saved Hugging Face dataset.
            output: features.npy, with the image names in features.names.csv; or features.parquet, with the columns
                image, label, class and features.
            pool: Class token, mean of the patch tokens, or a map of all patches [D, h, w].
            layers: Use the output of these blocks, before the last norm; -1 is the last block. Default: the output of
                the encoder, after the last norm.
        """
        from ..api import features

        features(data, weights=weights, output=output, pool=pool, layers=layers, **vars(model), **vars(loading))

    parse_verb(command, "features", args)


def attention(args: list[str]) -> None:
    """Draw the attention maps of an encoder."""

    def command(
        images: Images,
        weights: WeightsFlag,
        output: Path = Path("attention.png"),
        whole: bool = False,
        show: int = 12,
        *,
        model: Model,
    ) -> None:
        """Draw the attention of the class token: each head of the last block, and the rollout through all blocks.

        Example: mae-fast attention photos --weights runs/base

        Args:
            images: Image files or folders. Of a folder with val/, only val/ is used.
            output: Picture to write (.png, .jpg, .webp).
            whole: Use each image in its own size and shape instead of a centred square of the model's size.
            show: Number of images in the picture, evenly spaced in the order of names.
        """
        from ..api import attention

        attention(images, weights=weights, output=output, whole=whole, show=show, **vars(model))

    parse_verb(command, "attention", args)


def logreg_probe(args: list[str]) -> None:
    """Evaluate frozen features with a logistic regression."""

    def command(
        weights: Weights,
        data_path: DataPath,
        *,
        model: Model,
        loading: Encoding,
    ) -> None:
        """Print the held-out accuracy of a logistic regression on frozen, mean-pooled features.

        Example: mae-fast logreg-probe runs/base --data-path labelled
        """
        from ..api import logreg_probe

        logreg_probe(weights, data_path, **vars(model), **vars(loading))

    parse_verb(command, "logreg-probe", args)


def knn(args: list[str]) -> None:
    """Evaluate frozen features with a k-nearest-neighbour classifier."""

    def command(
        weights: Weights,
        data_path: DataPath,
        k: int = 20,
        temperature: float = 0.07,
        pool: Literal["cls", "mean"] = "mean",
        *,
        model: Model,
        loading: Encoding,
    ) -> None:
        """Print the held-out accuracy of a k-nearest-neighbour classifier on frozen features (cosine similarity).

        Example: mae-fast knn runs/base --data-path labelled

        Args:
            k: Number of neighbours that vote.
            temperature: Temperature of the votes, exp(similarity / temperature).
            pool: Features: the class token, or the mean of the patch tokens.
        """
        from ..api import knn

        knn(weights, data_path, k=k, temperature=temperature, pool=pool, **vars(model), **vars(loading))

    parse_verb(command, "knn", args)


@dataclass
@readable
class CaseFlags:
    """All combinations are timed."""

    tasks: tuple[Literal["train", "finetune", "infer", "reconstruct"], ...] = ("train",)
    """Training step, fine-tuning step, encoder on all patches, or reconstruction."""
    models: tuple[Literal["tiny", "base", "large", "huge"], ...] = ("base",)
    """Model sizes; tiny is the model of the demo."""
    dtypes: tuple[Literal["bf16", "fp32"], ...] = ()
    """Default: bf16 if the device has instructions for it, else fp32."""
    batches: tuple[int, ...] = ()
    """Images per step. Default: 16 on a CPU, 64 on a GPU."""
    image_sizes: tuple[int, ...] = ()
    """Sides of the images in pixels. Default: that of the model. Several values also give a plot."""
    mask_ratios: tuple[float, ...] = (0.75,)
    """Shares of patches to remove. Several values also give a plot."""
    predict_ratios: tuple[float, ...] = ()
    """Also time our training step with these predict ratios. The baselines always predict all removed patches."""
    device: Device = "auto"
    """Device to measure; auto: cuda if there is a GPU."""


@dataclass
@readable
class TimingFlags:
    """"""

    baselines: tuple[Literal["eager", "compile", "transformers", "timm"], ...] = (
        "eager",
        "compile",
        "transformers",
        "timm",
    )
    """Eager torch, eager torch under torch.compile, and the models of transformers and timm."""
    rounds: int = 5
    """Rounds; each contender is timed once per round."""
    minutes: float = 30.0
    """Time limit per case, in minutes. Contenders that are not ready by then are left out."""


@dataclass
@readable
class LoadingFlags:
    """With --data-path: compare the rates of the loader, the step, and both together."""

    data_path: Path | None = None
    """Images to load."""
    num_workers: int = 2
    """Worker processes, or threads for dali on a CPU."""
    image_decoder: Literal["auto", "dali", "pil"] = "auto"
    """Image decoder; auto: the fastest that is installed."""
    crops_per_image: int = 1
    """Crops per decoded image."""
    cache: bool = False
    """Cache all decoded images in memory."""


@dataclass
@readable
class Bench:
    """Time mae_fast against baselines, measure data loading, or predict step times on GPUs.

    Example: mae-fast bench --tasks train infer --models base --batches 16

    Every contender passes a correctness check before it is timed. The results are written to results.json, table.md and
    plots. Run the same command again to continue. Cases are not repeated if machine, versions and code are unchanged.
    """

    cases: Annotated[CaseFlags, tyro.conf.arg(name="case")]
    timing: Annotated[TimingFlags, tyro.conf.arg(name="timing")]
    loading: Annotated[LoadingFlags, tyro.conf.arg(name="data loading")]
    output_dir: Path = Path("bench")
    """Folder for results.json, table.md and plots."""
    predict: bool = False
    """Measure nothing; print step times of A100, H100 and H200 GPUs, predicted from counted work."""

    def check(self) -> None:
        """Raise ``UserError`` if a flag is out of range or conflicts with another one."""
        cases, loading = self.cases, self.loading
        at_least(rounds=(self.timing.rounds, 1))
        at_least(num_workers=(loading.num_workers, 0), crops_per_image=(loading.crops_per_image, 1))
        for batch in cases.batches:
            at_least(batches=(batch, 1))
        if not self.timing.minutes > 0:
            raise UserError(f"--minutes {self.timing.minutes:g} is out of range", "give more than 0")
        if loading.data_path and (max(map(len, (cases.models, cases.dtypes, cases.batches))) > 1 or not cases.models):
            raise UserError(
                "--data-path needs exactly one model, and at most one dtype and batch size",
                "give one value to each of --models, --dtypes and --batches",
            )


def bench(args: list[str]) -> None:
    """Time mae_fast against baselines, measure data loading, or predict step times on GPUs."""
    words = [_current_flag(word) for word in args]
    flags = parse_verb(Bench, "bench", words)
    if flags.predict:
        if others := [word for word in words if word.startswith("--") and word != "--predict"]:
            raise UserError(
                f"{', '.join(others)}: no effect with --predict",
                "leave other flags out; --predict always shows ViT-B, ViT-L and ViT-H at batch size 256",
            )
        from ..bench.predict import print_predictions

        print_predictions()
        return
    flags.check()
    cases, timing, loading_flags = flags.cases, flags.timing, flags.loading
    if loading_flags.data_path:
        from ..bench.loading import Loading, loading

        dtype = cases.dtypes[0] if cases.dtypes else "auto"
        options = Loading(
            cases.models[0], dtype, cases.device, loading_flags.num_workers, loading_flags.image_decoder,
            loading_flags.crops_per_image, loading_flags.cache,
        )  # fmt: skip
        batch = cases.batches[0] if cases.batches else None
        loading(loading_flags.data_path, options, batch, timing.rounds, flags.output_dir)
        return
    from ..bench.case import Grid
    from ..bench.report import report

    report(Grid(**vars(cases)), timing.baselines, timing.rounds, timing.minutes, flags.output_dir)


def _current_flag(word: str) -> str:
    """A flag of ``bench`` under its current name. Former names work for one release."""
    flag, equals, value = word.partition("=")
    former = {"--rivals": "--baselines", "--data": "--data-path", "--decoder": "--image-decoder"}
    former["--repeats"] = "--crops-per-image"
    return f"{former.get(flag, flag)}{equals}{value}"


def doctor(args: list[str]) -> None:
    """Show hardware, active kernels and missing packages; check whether a training command can run."""
    if args and not args[0].startswith("-"):
        _preflight(args[0], args[1:])
        return

    def command() -> None:
        """Show versions, hardware, missing packages, the kernel that runs each op, and how to fix problems.

        Example: mae-fast doctor

        Example: mae-fast doctor pretrain --data-path images --output-dir runs/base

        The second form takes a training command with its flags. It checks whether the command can run on this machine:
        data, memory, disk. The exit status is 1 if it cannot.
        """
        from ..doctor.machine import doctor

        doctor()

    parse_verb(command, "doctor", args)


def _preflight(verb: str, args: list[str]) -> None:
    from .flags import KINDS, parse

    verb, args = current_verb(verb, args)
    if verb not in KINDS:
        raise UserError(f"doctor checks training commands, got {verb!r}", f"give one of {', '.join(KINDS)}")
    if any(word.replace("_", "-") in ("--eval", "--eval-only") for word in args):
        raise UserError("doctor checks training, but --eval-only does not train", "leave --eval-only out")
    from ..doctor.preflight import print_preflight

    if print_preflight(f"mae-fast {verb}", parse(verb, args)):
        sys.exit(1)
