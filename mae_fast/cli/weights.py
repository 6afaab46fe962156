"""The verb that converts weights between layouts."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .groups import parse_verb, readable

Layout = Literal["ours", "timm", "transformers", "transformers5", "lightly", "mmpretrain"]


@dataclass
@readable
class MetadataFlags:
    """Give these only if the input does not record them."""

    num_heads: int | None = None
    """Attention heads of the encoder; default: derived from its width."""
    decoder_num_heads: int | None = None
    """Attention heads of the decoder; default: derived from its width."""
    norm_eps: float | None = None
    """Epsilon of the layer norms; default: 1e-6."""
    norm_pix_loss: bool = False
    """The loss uses normalised patches."""


def convert(args: list[str]) -> None:
    """Convert weights between our layout and those of other libraries."""

    def command(
        input: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="INPUT")],
        output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")],
        to: Layout,
        from_: Annotated[Literal["auto", Layout], tyro.conf.arg(name="from")] = "auto",
        verify: bool = False,
        ema: bool = False,
        *,
        metadata: Annotated[MetadataFlags, tyro.conf.arg(name="model")],
    ) -> None:
        """Convert the weights of a masked autoencoder, an encoder or a classifier to the layout of another library.

        Example: mae-fast convert runs/base vit_base_timm --to timm --verify

        Args:
            input: Weights: a .safetensors or .pth file, a run, a folder of transformers or timm, or a Hub name.
            output: File to write, .safetensors or .pth; or, for timm and transformers, a folder that they can load.
            to: Layout of the output. ours: as published; transformers: checkpoint files, or 4.x models; transformers5:
                5.x models.
            from_: Layout of the input; auto: recognised by the names of the weights.
            verify: Load the output with its library and with this package, and compare both with the input model. If
                they differ, nothing is written.
            ema: Convert the averaged weights of a run that was trained with --ema-decay.
        """
        from .. import api

        ok = api.convert(input, output, to, from_=from_, verify=verify, ema=ema, **vars(metadata))
        if not ok:
            sys.exit(1)

    parse_verb(command, "convert", args)
