"""Pre-training of a masked autoencoder."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.loader import Batch, LoaderConfig, sample_images, training_batches
from ...data.masks import Sampler, check_mask_ratio, from_file, sampler
from ...data.preprocessing import model_preprocessing
from ...data.rng import MASK, generator
from ...data.sources import Source, open_source
from ...errors import UserError
from ...models.mae import MaskedAutoencoderViT
from ...models.reconstruction import picture, reconstruct
from ...models.sizes import MAE_ALIASES, MAE_CONFIGS
from ...models.targets import PcaTarget, TokenTarget
from ...weights.create import create_model
from ..config import PretrainConfig
from ..distributed import DistContext
from ..optim import adamw
from ..pixels import json_sides, settle_pixels, settle_sizes
from ..task import Task, evaluation_loader, with_exif_of
from ..trainer import RunResult, train
from .dvae import load_tokenizer
from .online_eval import OnlineEvaluation

logger = logging.getLogger(__name__)

PICTURES = 8  # images to reconstruct at each checkpoint


def model_options(config: PretrainConfig) -> dict[str, Any]:
    """The constructor arguments of the model that ``config`` sets, as JSON.

    Raises:
        UserError: if flags contradict each other, or the tokenizer cannot be loaded.
    """
    options: dict[str, Any] = {"img_size": json_sides(config.image_sides()), "norm_pix_loss": config.norm_pix_loss}
    width, heads = config.decoder_embed_dim, config.decoder_num_heads
    if width and not heads:  # heads of the same width as in the paper
        heads = next(n for n in range(max(1, width // 32), 0, -1) if width % n == 0)
    given = {"decoder_depth": config.decoder_depth, "decoder_embed_dim": width, "decoder_num_heads": heads}
    options |= {name: value for name, value in given.items() if value is not None}
    if config.encoder_mask_token:
        options["encoder_mask_token"] = True
    elif config.decoder_depth == 0:
        raise UserError(
            "--decoder-depth 0 predicts removed patches only from their position, as no block follows "
            "the insertion of mask tokens",
            "add --encoder-mask-token, or use at least 1 block",
        )
    if config.tokenizer and config.target != "dvae":
        raise UserError(
            f"--tokenizer {config.tokenizer} requires --target dvae, got --target {config.target}",
            "leave one out",
        )
    if config.target != "pixel" and config.norm_pix_loss:
        raise UserError(
            f"--norm-pix-loss requires --target pixel, got --target {config.target}",
            "leave one of them out (use --no-norm-pix-loss if a preset sets it)",
        )
    if config.target == "pca":
        options["target"] = {"kind": "pca", "components": config.pca_components}
    elif config.target == "dvae" and config.tokenizer:
        options["target"] = {"kind": "dvae", **load_tokenizer(config.tokenizer).config}
    elif config.target == "dvae":
        raise UserError(
            "--target dvae needs --tokenizer",
            "give a run of 'mae-fast train-dvae', or a file with the weights of DALL-E's encoder",
        )
    return options


def pretrain(config: PretrainConfig) -> RunResult:
    """Train with ``config``, or resume the run in ``config.output_dir``: see ``trainer.train``."""
    return train(config, Pretraining)


class Pretraining(Task):
    """A masked autoencoder that learns to reconstruct removed patches."""

    config: PretrainConfig
    model: MaskedAutoencoderViT

    def __init__(self, config: PretrainConfig, dist: DistContext) -> None:
        self.config, self.dist = with_exif_of(config, config.init), dist
        self.source = config.dataset("train") or open_source(config.data_path, "train", mixed=True)
        settled = settle_pixels(self.config, self.source, config.init)
        kwargs = model_options(config) | settle_sizes(config, config.init) | settled.arguments()
        if config.model not in {*MAE_CONFIGS, *MAE_ALIASES}:
            raise UserError(f"--model {config.model} is unknown", f"known are {', '.join(sorted(MAE_ALIASES))}")
        made = create_model(config.model, config.init, **{"in_chans": 3, **kwargs})
        assert isinstance(made, MaskedAutoencoderViT)
        self.model = made
        if config.init:
            kwargs |= made.settings()  # the settings of the weights, unless flags override them
        if isinstance(self.model.target, TokenTarget) and config.tokenizer:
            self.model.target.tokenizer.load_state_dict(load_tokenizer(config.tokenizer).state_dict())
        self.model.to(dist.device)
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        self.size = self.model.patch_embed.img_size
        if config.masks and config.mask_sampling != "random":
            raise UserError(
                f"--masks {config.masks} replaces --mask-sampling {config.mask_sampling}",
                "give one",
            )
        self.maskings: dict[tuple[int, int], Sampler] = {}  # image size -> sampler
        if config.masks:
            self.maskings[self.size], self.mask_ratio = from_file(config.masks, self.model.patch_embed.grid_size)
        else:
            self.mask_ratio = config.mask_ratio
            for stage in config.image_stages(self.size):
                self.maskings[stage.size] = self._sampler(stage.size)
        # Pass only arguments that a flag sets, so that subclasses may override ``loss`` with fewer arguments.
        self.loss_options: dict[str, Any] = {"any_size": True} if len(self.maskings) > 1 else {}
        if config.predict_ratio < 1:
            self.loss_options["predict_ratio"] = config.predict_ratio
        self.pixels = settled.format
        self.settings: dict[str, Any] = settled.record()
        if config.resolution_schedule:
            self.settings["resolution_schedule"] = config.schedule_of_all(config.accum_iter * dist.world)
        if config.masks:
            self.settings["masks_sha256"] = hashlib.sha256(config.masks.read_bytes()).hexdigest()
        self.state = {
            "model": {"name": config.model, **kwargs},
            "mask_ratio": self.mask_ratio,
            "mask_sampling": config.mask_sampling,
            "preprocessing": model_preprocessing(self.model, self.size, self.pixels).record(),
        }
        share = f" with predict ratio {config.predict_ratio:g}" if config.predict_ratio < 1 else ""
        self.title, self.eval_every = f"{config.model}{share}", config.eval_every
        self.online_eval = OnlineEvaluation(config, dist)
        self.metric_names = self.online_eval.metric_names

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in images of ``size``."""
        (height, width), (p, q) = size, self.model.patch_embed.patch_size
        if height % p or width % q:
            nearest = f"{max(1, height // p) * p}x{max(1, width // q) * q}"
            raise UserError(
                f"--resolution-schedule {self.config.resolution_schedule}: {height}x{width} pixels cannot be divided "
                f"into patches of {p}x{q}",
                f"use {nearest}",
            )
        return height // p, width // q

    def _sampler(self, size: tuple[int, int]) -> Sampler:
        """The sampler of masks for images of ``size``."""
        kind, (rows, columns) = self.config.mask_sampling, self._grid(size)
        where = f"--resolution-schedule, {size[0]} x {size[1]} pixels: " if self.config.resolution_schedule else ""
        try:
            check_mask_ratio(rows * columns, self.mask_ratio)
            return sampler(kind, (rows, columns), self.mask_ratio)
        except UserError as error:
            raise UserError(f"{where}{error.message}", error.hint) from error
        except ValueError as error:
            raise UserError(f"{where}--mask-sampling {kind}: {error}") from error

    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        return adamw(self.model, lr, self.config.weight_decay, working_dtype=working_dtype)

    def batches(self, source: Source, loader: LoaderConfig) -> Iterator[Batch]:
        jitter = self.config.augmentation == "crop-jitter"
        window = "crop" if self.config.augmentation == "crop-jitter" else self.config.augmentation
        rows, columns = self._grid(loader.size)
        return training_batches(
            source,
            loader,
            num_patches=rows * columns,
            masking=self.maskings[loader.size],
            window=window,
            color_jitter=jitter,
        )

    def prepare(self, batches: Iterator[Batch], dist: DistContext) -> None:
        target = self.model.target
        if not isinstance(target, PcaTarget):
            return
        seen = (batch.to(dist.device).images for batch in batches)
        moments = target.moments(seen, self.model.pixel_mean, self.model.pixel_std)
        kept = target.fit(*(dist.total(x) for x in moments))
        logger.info(f"the target's {target.size} components explain {kept:.1%} of the variance of patches")

    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        return batch.images, batch.noise

    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        loss: Tensor = model.loss(images, self.mask_ratio, other, **self.loss_options)
        return loss

    def fixed_noise(self, places: Sequence[int]) -> Tensor:
        """Masking noise [N, L] of held-out images, which depends only on their indices ``places`` in the source."""
        noise = np.stack([self.maskings[self.size](generator(self.config.seed, MASK, 0, i)) for i in places])
        return torch.from_numpy(noise).to(self.dist.device)

    def evaluation(self) -> Callable[[], dict[str, Any]] | None:
        if not self.metric_names:
            return None
        loader = evaluation_loader(self.config, self.dist, self.size, self.pixels)

        def loss(images: Tensor, places: Tensor) -> Tensor:
            return self.model.loss(images, self.mask_ratio, self.fixed_noise(places.tolist()))

        return lambda: self.online_eval(self.model, loss, loader)

    def drawing(self) -> Callable[[], Any] | None:
        if isinstance(self.model.target, TokenTarget):
            return None  # the model predicts tokens and not pixels
        source = self.config.dataset("train") or open_source(self.config.data_path, "val", mixed=True)
        few, images = sample_images(source, PICTURES, self.size, self.pixels)
        images, noise = images.to(self.dist.device), self.fixed_noise(few)

        def draw() -> Any:
            """Reconstruct a few images. All processes must call it, as the weights may be sharded."""
            made = reconstruct(self.model, images, noise, self.mask_ratio)
            return picture(made, "masked | reconstruction | original")

        return draw
