"""The verb that writes models for other runtimes."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from .. import api


def export(args: list[str]) -> None:
    """Write a trained model as ONNX or as a torch.export program."""

    def command(
        weights: tyro.conf.Positional[str],
        output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT.{onnx,pt2}")],
        what: Literal["classifier", "segmentation", "encoder", "reconstruction"] | None = None,
        raw_pixels: bool = False,
        mask_ratio: float | None = None,
        model: str | None = None,
        ema: bool = False,
    ) -> None:
        """Write a model for other runtimes. It takes any number of images of the model's size.

        The file's metadata entry "mae_fast" is JSON with the names of classes and the preprocessing: how images are
        resized, cropped and standardised.

        Args:
            weights: A run, a file or folder of any layout, or a hub name.
            output: What to write: .onnx, which onnxruntime then checks where it is installed, or .pt2 for torch.export.
            what: classifier: images to logits; segmentation: images to logits of each pixel; encoder: images to tokens;
                reconstruction: images and noise to predictions and mask. If not given, the first that the model has.
            raw_pixels: Take images as raw pixels [N, H, W, C], uint8 for pictures, and standardise them in the graph.
                Without it, images are standardised fp32 [N, C, H, W].
            mask_ratio: Share of patches that the reconstruction removes; as in pre-training if not given.
            model: Factory of the model, as mae_fast names it, where the weights do not show its sizes.
            ema: With the averaged weights of a run with --ema-decay.
        """
        api.export(weights, output, what=what, raw_pixels=raw_pixels, mask_ratio=mask_ratio, model=model, ema=ema)

    tyro.cli(command, prog="mae-fast export", args=args)
