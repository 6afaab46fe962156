"""Pre-training: the paper's task, in the loop that all training shares."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.keyed import mask_noise
from ..data.loader import Batch, centred_image, training_batches
from ..data.sources import Source, open_source
from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT, build
from ..models.reconstruction import picture, reconstruct
from ..weights import load_weights
from .config import PretrainConfig
from .distributed import Processes
from .loop import Task, train
from .optim import adamw

PICTURES = 8  # images that are reconstructed at each checkpoint


def check_mask_ratio(num_patches: int, mask_ratio: float) -> None:
    """Raise ``UserError`` unless at least one patch stays visible and at least one is removed."""
    num_keep = int(num_patches * (1 - mask_ratio))
    if not 0 < num_keep < num_patches:
        what = "no visible" if num_keep <= 0 else "no removed"
        raise UserError(
            f"--mask-ratio {mask_ratio:g} leaves {what} patch of {num_patches}; "
            f"use {1 / num_patches:.3g} to {1 - 1 / num_patches:.3g}"
        )


def pretrain(config: PretrainConfig) -> None:
    """Train as ``config`` says, resuming from the newest good checkpoint in ``config.output_dir``.

    Raises:
        UserError, SystemExit: as ``loop.train``.
    """
    train(config, lambda among, say: Pretraining(config, among, say))


class Pretraining(Task):
    """A masked autoencoder that learns to reconstruct removed patches."""

    model: MaskedAutoencoderViT

    def __init__(self, config: PretrainConfig, among: Processes, say: Callable[[str], None]) -> None:
        self.config, self.device = config, among.device
        self.source = open_source(config.data_path, "train")
        kwargs = {"img_size": config.input_size, "norm_pix_loss": config.norm_pix_loss}
        try:
            self.model = build(config.model, **kwargs)
        except ValueError as error:
            raise UserError(f"--model {config.model}: {error}") from error
        if config.init:
            _start_from(self.model, config.init, say)
        self.model.to(among.device)
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        check_mask_ratio(self.model.patch_embed.num_patches, config.mask_ratio)
        self.size, self.channels = self.model.patch_embed.img_size, self.model.in_chans
        self.settings: dict[str, Any] = {}
        self.state = {"model": {"name": config.model, **kwargs}, "mask_ratio": config.mask_ratio}
        self.title = config.model

    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        return adamw(self.model, lr, self.config.weight_decay, working_dtype=working_dtype)

    def batches(self, source: Source, **options: Any) -> Iterator[Batch]:
        return training_batches(source, num_patches=self.model.patch_embed.num_patches, **options)

    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        return batch.images, batch.noise

    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        loss: Tensor = model.loss(images, self.config.mask_ratio, other)
        return loss

    def drawing(self) -> Callable[[], Any]:
        source = open_source(self.config.data_path, "val")
        few = np.linspace(0, len(source) - 1, min(PICTURES, len(source))).round().astype(int).tolist()
        num_patches = self.model.patch_embed.num_patches
        images = torch.stack([centred_image(source, i, self.size, self.channels) for i in few]).to(self.device)
        noise = torch.from_numpy(np.stack([mask_noise(self.config.seed, 0, i, num_patches) for i in few]))
        noise = noise.to(self.device)

        def draw() -> Any:
            """What the model makes of a few images. All processes call it: they may share the weights."""
            made = reconstruct(self.model, images, noise, self.config.mask_ratio)
            return picture(made, "masked | reconstruction | original")

        return draw


def _start_from(model: MaskedAutoencoderViT, path: Path, say: Callable[[str], None]) -> None:
    weights = load_weights(path)
    try:
        keys = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"--init {path} does not fit the model: {error}") from error
    decoder = [name for name in keys.missing_keys if name.startswith("decoder_") or name == "mask_token"]
    if keys.unexpected_keys or len(decoder) < len(keys.missing_keys):
        missing = [name for name in keys.missing_keys if name not in decoder]
        raise UserError(
            f"--init {path} does not fit the model: it lacks {missing or 'nothing'}, "
            f"and has {keys.unexpected_keys or 'nothing'} besides"
        )
    say(f"weights of {path}{'; it has no decoder, which starts at random' if decoder else ''}")
