"""The verb that takes weights to other libraries and from them."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError

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
        from ..weights.convert_files import ConversionOptions, convert_files
        from ..weights.metadata import ModelMetadata

        for flag, heads in ("--num-heads", num_heads), ("--decoder-num-heads", decoder_num_heads):
            if heads is not None and heads < 1:
                raise UserError(f"{flag} {heads}: a model has at least one head")
        if norm_eps is not None and not 0 < norm_eps < 1:
            raise UserError(f"--norm-eps {norm_eps}: an epsilon is above 0 and below 1")
        given = ModelMetadata(num_heads, decoder_num_heads, norm_eps=norm_eps, norm_pix_loss=norm_pix_loss or None)
        if not convert_files(input, output, to, ConversionOptions(from_, verify, ema, given)):
            sys.exit(1)

    tyro.cli(command, prog="mae-fast convert", args=args)
