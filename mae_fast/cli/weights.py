"""The verb that takes weights to other libraries and from them."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .. import api

Layout = Literal["ours", "timm", "transformers", "transformers5", "lightly", "mmpretrain"]


def convert(args: list[str]) -> None:
    """Convert weights between our layout and those of other libraries."""

    def command(
        input: tyro.conf.Positional[str],
        output: tyro.conf.Positional[Path],
        to: Layout,
        from_: Annotated[Literal["auto", Layout], tyro.conf.arg(name="from")] = "auto",
        verify: bool = False,
        ema: bool = False,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
        norm_eps: float | None = None,
        norm_pix_loss: bool = False,
    ) -> None:
        """Write the weights of a masked autoencoder, an encoder or a classifier under the names of another library.

        Args:
            input: Weights (.safetensors or .pth), a folder of transformers, timm or a training command, or a hub name.
            output: What to write: .safetensors or .pth; for timm and transformers also a folder that they load.
            to: ours: as published; transformers: its files, and 4.x in memory; transformers5: 5.x in memory.
            from_: Layout of the input; auto: told by its names.
            verify: Read the output with its library and with this package; compare both with the input's model.
            ema: With the averaged weights of a run with --ema-decay.
            num_heads: Of the encoder, where neither the input nor its width tells.
            decoder_num_heads: Of the decoder, likewise.
            norm_eps: Epsilon of the layer norms, where the input does not say it; 1e-6 if not given.
            norm_pix_loss: Loss on normalised patches, where the input does not say it.
        """
        made = api.convert(
            input, output, to, from_=from_, verify=verify, ema=ema, num_heads=num_heads,
            decoder_num_heads=decoder_num_heads, norm_eps=norm_eps, norm_pix_loss=norm_pix_loss,
        )  # fmt: skip
        if not made:
            sys.exit(1)

    tyro.cli(command, prog="mae-fast convert", args=args)
