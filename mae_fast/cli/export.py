"""The verb that writes models for other runtimes."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError


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
        if output.suffix not in (".onnx", ".pt2"):
            raise UserError(f"{output}: the format is unknown", "give a name that ends in .onnx or .pt2")
        from ..evaluation.images import preprocessing_of
        from ..evaluation.reconstruct import MASK_RATIO
        from ..weights.export import export_onnx, parts_of, save_program
        from ..weights.trained import load_trained

        loaded = load_trained(weights, model, ema)
        ratio = (loaded.metadata.mask_ratio or MASK_RATIO) if mask_ratio is None else mask_ratio
        part = what or parts_of(loaded.model)[0]
        recorded = replace(loaded.metadata, preprocessing=preprocessing_of(loaded).record())
        if output.suffix == ".pt2":
            save_program(loaded.model, output, part, ratio, raw_pixels, recorded)
            checked = "torch.export.load(...).module()(images=...) runs it"
        else:
            difference = export_onnx(loaded.model, output, part, ratio, raw_pixels, recorded)
            checked = (
                "not checked: onnxruntime is not installed"
                if difference is None
                else f"onnxruntime and torch differ by {difference:.2g} at most"
            )
        print(f"wrote {part} of {loaded.checkpoint.path.name if loaded.checkpoint else weights} to {output}; {checked}")

    tyro.cli(command, prog="mae-fast export", args=args)
