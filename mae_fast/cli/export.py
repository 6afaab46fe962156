"""The verb that writes models for other runtimes."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError


def export(args: list[str]) -> None:
    """Write a trained model as ONNX or as a torch.export program."""

    def command(
        run: tyro.conf.Positional[Path],
        output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT.{onnx,pt2}")],
        what: Literal["encoder", "reconstruction", "classifier"],
        mask_ratio: float | None = None,
        ema: bool = False,
    ) -> None:
        """Write the model of a run for other runtimes: any number of standardised images of the run's size.

        Args:
            run: Output folder of a training command, or one checkpoint in it.
            output: What to write: .onnx, which onnxruntime then checks where it is installed, or .pt2 for torch.export.
            what: encoder: images to tokens; reconstruction: images and noise to predictions and mask; classifier:
                images to logits, of a fine-tuned model.
            mask_ratio: Share of patches that the reconstruction removes; the run's own if not given.
            ema: With the averaged weights of a run with --ema-decay.
        """
        if output.suffix not in (".onnx", ".pt2"):
            raise UserError(f"{output}: the format is unknown", "give a name that ends in .onnx or .pt2")
        from ..weights.create import load_run
        from ..weights.export import export_onnx, save_program

        model, found = load_run(run, ema)
        ratio = found.state.get("mask_ratio", 0.75) if mask_ratio is None else mask_ratio
        if output.suffix == ".pt2":
            save_program(model, output, what, ratio)
            checked = "torch.export.load(...).module() runs it"
        else:
            difference = export_onnx(model, output, what, ratio)
            checked = (
                "not checked: onnxruntime is not installed"
                if difference is None
                else f"onnxruntime and torch differ by {difference:.2g} at most"
            )
        print(f"wrote {what} of checkpoint {found.path.name} to {output}; {checked}")

    tyro.cli(command, prog="mae-fast export", args=args)
