"""Verbs that look at a trained model, or at this machine."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError
from .images import at_least


def reconstruct(args: list[str]) -> None:
    """Show what a pre-trained model makes of masked images."""

    def command(
        run: tyro.conf.Positional[Path],
        images: Annotated[list[Path], tyro.conf.arg(metavar="PATH...")],
        output: Path = Path("reconstruction.png"),
        mask_ratio: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...")] = (),
        mask_sampling: Literal["random", "block", "grid"] | None = None,
        masks: Path | None = None,
        whole: bool = False,
        paste_visible: bool = False,
        show: int = 12,
        seed: int = 0,
        ema: bool = False,
    ) -> None:
        """Write a picture or a page of masked images, their reconstructions and originals, and print the error.

        Args:
            run: Output folder of 'mae-fast pretrain', or one checkpoint in it.
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
            ema: With the averaged weights of a run with --ema-decay.
        """
        from ..report.reconstruct import Masking, reconstruct_files

        masking = Masking(mask_ratio, mask_sampling, masks, seed)
        reconstruct_files(run, images, output, masking, whole=whole, paste_visible=paste_visible, show=show, ema=ema)

    tyro.cli(command, prog="mae-fast reconstruct", args=args)


def probe(args: list[str]) -> None:
    """Score frozen features with a logistic regression."""

    def command(run: tyro.conf.Positional[Path], data_path: Path, ema: bool = False) -> None:
        """Print the held-out accuracy of a logistic regression on frozen, mean-pooled features.

        Args:
            run: Output folder of 'mae-fast pretrain', or one checkpoint in it.
            data_path: Folder with train/ and val/, the same class folders in both.
            ema: With the averaged weights of a run with --ema-decay.
        """
        from ..report.probe import probe

        probe(run, data_path, ema)

    tyro.cli(command, prog="mae-fast probe", args=args)


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
        ema: bool = False,
    ) -> None:
        """Print the held-out accuracy of a weighted vote of the nearest neighbours, by cosine similarity.

        Args:
            weights: Output folder of a run; or, with --model, a file or folder of any layout, or a hub name.
            data_path: Folder with train/ and val/, the same class folders in both.
            model: Factory of the model, as mae_fast names it, where the weights do not tell.
            k: Neighbours that vote.
            temperature: Of the votes, exp(similarity / temperature).
            pool: Features: the class token, or the mean of the patch tokens.
            batch_size: Images at a time.
            num_workers: Processes that load images.
            ema: With the averaged weights of a run with --ema-decay.
        """
        from ..report.knn import knn

        at_least(batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        knn(weights, data_path, model, k, temperature, pool, batch_size, num_workers, ema)

    tyro.cli(command, prog="mae-fast knn", args=args)


def bench(args: list[str]) -> None:
    """Predict a training step's time on GPUs: 'mae-fast bench --predict'."""

    def command(predict: bool = False) -> None:
        """Print what a roofline makes of the counted FLOPs and bytes of a training step, for A100 and H100.

        Args:
            predict: Needed: nothing is measured here yet.
        """
        from ..predict import print_predictions

        if not predict:
            raise UserError("bench: give --predict; what is measured comes by 'make bench-ops' and 'make bench-model'")
        print_predictions()

    tyro.cli(command, prog="mae-fast bench", args=args)


def doctor(args: list[str]) -> None:
    """Say which kernel answers each op on this machine, and why."""

    def command() -> None:
        """Print versions, processor and GPUs, and which kernel answers each op on each device, and why."""
        from ..report.doctor import doctor

        doctor()

    tyro.cli(command, prog="mae-fast doctor", args=args)
