"""Verbs that train, and look into training."""

import sys
from pathlib import Path
from typing import Literal

import tyro


def pretrain(args: list[str]) -> None:
    """Pre-train a masked autoencoder; run the same line again to resume."""
    _run("pretrain", args)


def finetune(args: list[str]) -> None:
    """Fine-tune a classifier, all blocks or the last ones; run the same line again to resume."""
    _run("finetune", args)


def linprobe(args: list[str]) -> None:
    """Train a linear classifier on frozen features."""
    _run("linprobe", args)


def train_dvae(args: list[str]) -> None:
    """Train a discrete VAE, whose tokens 'pretrain --target dvae' predicts."""
    _run("train-dvae", args)


def segment(args: list[str]) -> None:
    """Train semantic segmentation on an encoder, from images and masks."""
    _run("segment", args)


def detect(args: list[str]) -> None:
    """Train detection and instance segmentation on an encoder, from COCO files."""
    _run("detect", args)


def _run(verb: str, args: list[str]) -> None:
    from .flags import parse

    config = parse(verb, args)
    from ..api import run

    run(config)


def debug_step(args: list[str]) -> None:
    """Compute a skipped step again, image by image, and show what in it is not finite."""

    def command(dump: tyro.conf.Positional[Path], device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
        """Take the images, masks and weights of a step that was left out, and look for what is not finite.

        Args:
            dump: A file of the run's not_finite/: step-00001234.json.
            device: Where to compute; auto: cuda if there is one.
        """
        from ..doctor.debug_step import debug_step as run_debug_step

        if not run_debug_step(dump, device):
            sys.exit(1)

    tyro.cli(command, prog="mae-fast debug-step", args=args)
