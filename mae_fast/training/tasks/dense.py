"""The common base of segmentation and detection: an encoder with weights of any origin, and its fine-tuning."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.loader import Batch
from ...data.rng import LAYERS, generator
from ...errors import UserError
from ...models import vit
from ...models.sizes import VIT_CONFIGS
from ...weights.create import create_model
from ...weights.run_reader import Checkpoint, find_checkpoint
from ...weights.trained import trained_model
from ..config import DenseConfig
from ..distributed import DistContext
from ..optim import layer_decayed_adamw
from ..pixels import settle_sizes
from ..task import Task, use_bf16, with_exif_of


class DenseTask(Task):
    """A model on the feature maps of an encoder.

    A subclass sets ``source``, ``pixels``, ``model``, ``settings`` and ``state``.
    """

    config: DenseConfig

    def __init__(self, config: DenseConfig, dist: DistContext) -> None:
        if config.image_decoder == "dali":
            raise UserError("--image-decoder dali does not support images with masks or objects", "leave it out")
        config = with_exif_of(config, config.weights)
        self.config, self.dist = config.model_copy(update={"image_decoder": "pil"}), dist
        self.size = config.input_size, config.input_size
        self.title, self.eval_every = config.model, config.eval_every
        self.bf16 = use_bf16(config.dtype, dist.device)
        if config.crops_per_image > 1:
            raise UserError(
                f"--crops-per-image {config.crops_per_image}: this task uses a single crop per image", "leave it out"
            )

    def encoder(self, **pixels: Any) -> tuple[vit.VisionTransformer, dict[str, Any]]:
        """The encoder with the weights of ``--weights``, and the record from which ``saved_encoder`` rebuilds it.

        Args:
            pixels: ``PixelSettings.arguments``.

        Raises:
            UserError: if the model is unknown, or the weights do not fit it.
        """
        config = self.config
        if config.model not in VIT_CONFIGS:
            raise UserError(f"--model {config.model} is unknown", f"known are {', '.join(sorted(VIT_CONFIGS))}")
        drop_path = 0.0 if config.freeze_encoder else config.drop_path
        arguments = settle_sizes(config, config.weights) | pixels
        made = create_model(
            config.model,
            config.weights,
            num_classes=0,
            img_size=config.input_size,
            drop_path_rate=drop_path,
            **{"in_chans": 3, **arguments},
        )
        assert isinstance(made, vit.VisionTransformer)
        made.set_grad_checkpointing(config.grad_checkpointing)
        if config.freeze_encoder:
            made.requires_grad_(False)
        return made, arguments | made.settings()

    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        config = self.config
        return layer_decayed_adamw(self.model, lr, config.weight_decay, config.layer_decay, working_dtype=working_dtype)

    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Any]:
        # The random numbers of drop path, dropout and box samplers depend only on the step, also in a resumed run.
        torch.manual_seed(int(generator(self.config.seed, LAYERS, micro_step, self.dist.rank).integers(2**63)))
        return batch.images, self.targets(batch)

    @abstractmethod
    def targets(self, batch: Batch) -> Any:
        """The targets of a batch, for ``loss``."""


def of_run(path: Path, ema: bool, name: str, verb: str) -> tuple[Checkpoint, Any]:
    """The newest good checkpoint of a run and its model, in evaluation mode.

    Args:
        name: the name of the model in checkpoints of ``verb``.

    Raises:
        UserError: if there is none, or the run is of another verb.
    """
    found = find_checkpoint(path)
    if found.state["model"]["name"] != name:
        raise UserError(f"{path} is a run of {found.state['model']['name']}", f"give a run of 'mae-fast {verb}'")
    return found, trained_model(found, ema)
