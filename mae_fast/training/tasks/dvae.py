"""Training of a discrete VAE. Its encoder is the tokenizer of ``pretrain --target dvae``."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.folders import data_root, split_folder
from ...data.loader import Batch, LoaderConfig, evaluation_batches, sample_images, training_batches
from ...data.pixel_format import PixelFormat
from ...data.rng import LAYERS, generator
from ...data.sources import Source, open_source
from ...errors import UserError
from ...models.reconstruction import tile
from ...models.targets.dvae import DVAE, FIRST, LAST, NAME, Tokenizer
from ...weights.files import load_weights
from ...weights.run_reader import find_checkpoint
from ..config import DvaeConfig
from ..distributed import DistContext
from ..optim import AdamW
from ..plan import Plan
from ..task import Task, evaluation_loader, held_out, use_bf16
from ..trainer import RunResult, train

PICTURES = 8  # images to reconstruct at each checkpoint
# The hint about a pickled module. Pickles may run code, so the user has to load them.
UNPICKLED = (
    "convert OpenAI's encoder.pkl to encoder.pth where the package DALL-E is installed: python -c \"import torch;"
    "torch.save(torch.load('encoder.pkl', 'cpu', weights_only=False).state_dict(), 'encoder.pth')\""
)


def train_dvae(config: DvaeConfig) -> RunResult:
    """Train with ``config``, or resume the run in ``config.output_dir``: see ``trainer.train``."""
    return train(config, DvaeTraining)


class DvaeTraining(Task):
    """A discrete VAE that learns to reconstruct images."""

    config: DvaeConfig
    model: DVAE

    def __init__(self, config: DvaeConfig, dist: DistContext) -> None:
        self.config, self.dist = config, dist
        self.source = open_source(config.data_path, "train", mixed=True)
        held_out = split_folder(data_root(config.data_path), "val")
        self.val = open_source(held_out, mixed=True) if held_out else None
        factor = 2 ** (config.groups - 1)
        if config.input_size % factor:  # before the model is built, whose width doubles with each group
            raise UserError(
                f"--input-size {config.input_size} is not a multiple of {factor}, the side of a token with "
                f"{config.groups} groups",
                f"use --input-size {max(1, config.input_size // factor) * factor}, or fewer --groups",
            )
        self.model = DVAE(vocab_size=config.vocab_size, hidden=config.hidden, groups=config.groups).to(dist.device)
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        sizes = self.model.encoder.config
        self.size = (config.input_size, config.input_size)
        self.pixels = PixelFormat(channels=sizes["in_chans"], exif=config.exif)
        self.settings: dict[str, Any] = {}
        self.state = {"model": {"name": NAME, **sizes}}
        self.title = f"dVAE of {config.vocab_size} codes"
        self.bf16 = use_bf16(config.dtype, dist.device)
        (stage,) = Plan.of(config, self.size, self.source, dist.world).stages
        self.anneal_steps = round(config.anneal_epochs * stage.steps_per_epoch)

    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        """AdamW, betas (0.9, 0.999), as published. Convolutions do not use bf16 copies."""
        from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

        groups = param_groups_weight_decay(self.model, self.config.weight_decay)
        return AdamW(groups, lr=lr, betas=(0.9, 0.999))

    def batches(self, source: Source, loader: LoaderConfig) -> Iterator[Batch]:
        return training_batches(source, loader)

    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        """Pixels [N, C, H, W] and the temperature, a scalar."""
        # The noise depends only on the step, so that a resumed run draws the same.
        torch.manual_seed(int(generator(self.config.seed, LAYERS, micro_step, self.dist.rank).integers(2**63)))
        pixels = _pixels(batch.images)
        return pixels, torch.full((), self.temperature(micro_step // self.config.accum_iter), device=pixels.device)

    def temperature(self, step: int) -> float:
        """The temperature of step number ``step``, from 0: half a cosine, then constant."""
        start, end = self.config.temperature_start, self.config.temperature_end
        if step >= self.anneal_steps:
            return end
        return end + (start - end) * (1 + math.cos(math.pi * step / self.anneal_steps)) / 2

    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        loss: Tensor = model.loss(images, other, self.config.kl_weight)
        return loss

    def drawing(self) -> Callable[[], Any]:
        from torchvision.utils import make_grid

        source = self.val or self.source
        _, images = sample_images(source, PICTURES, self.size, self.pixels)
        pixels = _pixels(images.to(self.dist.device))

        def draw() -> Any:
            """Draw images beside their reconstructions, two pairs per row. All processes must call it."""
            pairs = torch.stack([pixels, self.reconstruct(pixels)[0]], 1).flatten(0, 1)
            return tile(make_grid(pairs, nrow=4, pad_value=1))

        return draw

    def evaluation(self) -> Callable[[], dict[str, float]] | None:
        return partial(self.figures, self.val) if self.val else None

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The result of ``DVAE.forward`` in the run's dtype: pixels and tokens."""
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            made: tuple[Tensor, Tensor] = self.model(pixels)
            return made

    def figures(self, val: Source) -> dict[str, float]:
        """The mean squared error of reconstructions from the likeliest codes, for pixels in 0..1, and the use of codes.

        The latter is the number of different codes, and the perplexity of their frequencies. Both are equal if all used
        codes are equally frequent.
        """
        config, dist = self.config, self.dist
        batches = evaluation_batches(val, evaluation_loader(config, dist, self.size, self.pixels))
        sums = torch.zeros(2, dtype=torch.float64)  # sum of squared errors, number of values
        counts = torch.zeros(config.vocab_size, dtype=torch.float64)
        for batch in held_out(batches, val, config, dist):
            pixels = _pixels(batch.to(dist.device).images)
            made, tokens = self.reconstruct(pixels)  # also without images: others may need this process's weights
            sums += torch.tensor([(made - pixels).square().sum(dtype=torch.float64).item(), pixels.numel()])
            counts += tokens.flatten().bincount(minlength=config.vocab_size).cpu()
        error, values = dist.total(sums).tolist()
        if not values:
            raise UserError("no image of val/ can be used", "run 'mae-fast data check' to see why")
        counts = dist.total(counts)
        return {
            "val_mse": error / values,
            "val_codes": float(counts.count_nonzero()),
            "val_perplexity": torch.distributions.Categorical(counts).perplexity().item(),
        }


def _pixels(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] as floating [N, C, H, W] in 0..1, in channels-last format, the fastest for convolutions."""
    return images.permute(0, 3, 1, 2).float() / 255


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a run of ``mae-fast train-dvae``, or of a file of weights with the names of DALL-E.

    Args:
        path: the output folder of the run (its newest good checkpoint is used) or one of its checkpoints. Or a
            .safetensors file or .pth state dict of the encoder, whose names may have a common prefix, or of a whole
            ``DVAE``. The sizes follow from the tensors.

    Raises:
        UserError: if the file does not exist, or the weights belong to another model. The error lists missing and
            unexpected keys.
    """
    if path.is_dir():
        return _of_run(path)
    try:
        weights = load_weights(path)
    except UserError as error:
        if path.suffix == ".safetensors" or not path.is_file():
            raise
        raise UserError(str(error), UNPICKLED) from error
    return _of_weights(weights, path)


def _of_run(path: Path) -> Tokenizer:
    found = find_checkpoint(path)
    about = dict(found.state["model"])
    if about.pop("name") != NAME:
        raise UserError(f"{path} is a run of {found.state['model']['name']}", "give a run of 'mae-fast train-dvae'")
    model = DVAE(**about)
    found.load_model(model)
    return model.encoder


def _of_weights(weights: dict[str, Tensor], path: Path) -> Tokenizer:
    """The tokenizer with these ``weights``. Its sizes follow from the shapes of the tensors."""
    own = {name: x for name, x in weights.items() if not name.startswith("decoder.")}
    prefix = next((name.removesuffix(FIRST) for name in own if name.endswith(FIRST)), "")
    if all(name.startswith(prefix) for name in own):
        own = {name.removeprefix(prefix): x for name, x in own.items()}
    groups = {name.split(".")[1] for name in own if name.startswith("blocks.group_")}
    blocks = {name.split(".")[2] for name in own if name.startswith("blocks.group_1.block_")}
    sizes = {"groups": len(groups), "blocks_per_group": len(blocks)} if groups and blocks else {}
    if FIRST in own and LAST in own and own[FIRST].ndim == 4 and own[LAST].ndim == 1:
        sizes |= {"vocab_size": len(own[LAST]), "hidden": own[FIRST].shape[0], "in_chans": own[FIRST].shape[1]}
    try:
        with torch.device("meta"):  # a file may ask for any size
            model = Tokenizer(**sizes)
        # Copies: what was read may be mapped from the file.
        model.load_state_dict({name: x.to(torch.float32, copy=True) for name, x in own.items()}, assign=True)
    except (RuntimeError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} is not a dVAE encoder with the names of DALL-E: {why}", "give another file") from error
    return model
