"""Models with weights: out of runs of ours, files and folders of any layout, and the Hugging Face hub."""

from pathlib import Path

from ..errors import warn
from ..models import mae, vit
from ..training.checkpoint import Checkpoint, find

Model = mae.MaskedAutoencoderViT | vit.VisionTransformer


def of_run(run: Path, ema: bool = False) -> tuple[Model, Checkpoint]:
    """The model of a run's newest good checkpoint, in evaluation mode, and that checkpoint.

    Args:
        run: the output folder of a training command, or one checkpoint in it.
        ema: with the averaged weights.

    Raises:
        UserError: if there is none.
    """
    found = find(run, warn)
    made = found.state["model"]
    model: Model = (vit if made["name"] in vit.CONFIGS else mae).build(**made)
    found.load_model(model, ema)
    return model.eval(), found
