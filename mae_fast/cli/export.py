"""The verb that writes models for other runtimes."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from .groups import Model, Weights, parse_verb


def export(args: list[str]) -> None:
    """Export a trained model to ONNX or torch.export."""

    def command(
        weights: Weights,
        output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT.{onnx,pt2}")],
        what: Literal["classifier", "segmentation", "encoder", "reconstruction"] | None = None,
        raw_pixels: bool = False,
        mask_ratio: float | None = None,
        *,
        model: Model,
    ) -> None:
        """Export a trained model to ONNX or torch.export, for any number of images of the model's size.

        Example: mae-fast export runs/finetuned classifier.onnx

        The metadata entry "mae_fast" of the file is JSON with the class names and the preprocessing of images.

        Args:
            output: File to write, .onnx or .pt2 (torch.export). If onnxruntime is installed, it checks the .onnx file.
            what: Part of the model. classifier: images to logits; segmentation: images to logits of each pixel;
                encoder: images to tokens; reconstruction: images and noise to predictions and mask. Default: the first
                of these that the model has.
            raw_pixels: Take raw pixels [N, H, W, C], uint8 for 8-bit images, and standardise them in the graph. By
                default, the input is standardised fp32 [N, C, H, W].
            mask_ratio: Share of patches that the reconstruction removes; default: that of pre-training.
        """
        from .. import api

        api.export(weights, output, what=what, raw_pixels=raw_pixels, mask_ratio=mask_ratio, **vars(model))

    parse_verb(command, "export", args)
