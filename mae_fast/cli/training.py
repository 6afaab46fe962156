"""Verbs that train, and the verb that debugs a training step."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from .groups import Device, parse_verb


def pretrain(args: list[str]) -> None:
    """Pre-train a masked autoencoder."""
    _run("pretrain", args)


def finetune(args: list[str]) -> None:
    """Fine-tune a classifier: all blocks, or only the last ones."""
    _run("finetune", args)


def linprobe(args: list[str]) -> None:
    """Train a linear classifier on frozen features."""
    _run("linprobe", args)


def train_dvae(args: list[str]) -> None:
    """Train a discrete VAE, the tokenizer of 'pretrain --target dvae'."""
    _run("train-dvae", args)


def segment(args: list[str]) -> None:
    """Train semantic segmentation on images and masks."""
    _run("segment", args)


def detect(args: list[str]) -> None:
    """Train detection and instance segmentation on COCO files."""
    _run("detect", args)


def _run(verb: str, args: list[str]) -> None:
    from .flags import parse

    config = parse(verb, args)
    from ..api import run

    run(config)


def debug_step(args: list[str]) -> None:
    """Recompute a skipped training step and show which images, layers and weights are not finite."""

    def command(
        dump: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DUMP")], device: Device = "auto"
    ) -> None:
        """Recompute a skipped training step and show which images, layers and weights are not finite.

        Example: mae-fast debug-step runs/base/not_finite/step-00001234.json

        The exit status is 1 if everything is finite when recomputed on this machine.

        Args:
            dump: File that training wrote for the step: RUN/not_finite/step-*.json.
            device: Device of the model; auto: cuda if there is a GPU.
        """
        from ..doctor.debug_step import debug_step as run_debug_step

        if not run_debug_step(dump, device):
            sys.exit(1)

    parse_verb(command, "debug-step", args)
