"""Fine-tuning of all blocks or the last ones, from pre-trained weights or from scratch; and linear probing."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.augment import PICTURES_ONLY, Mixing, RandAugment, is_picture
from ...data.loader import Batch, KeyedBatches, LoaderConfig, training_batches
from ...data.rng import LAYERS, generator
from ...data.sources import Source
from ...errors import UserError
from ...memory import free_memory
from ...models.vit import probing_head
from ..config import ClassifyConfig, FinetuneConfig, LinprobeConfig
from ..distributed import DistContext
from ..optim import layer_decayed_adamw
from ..task import Task
from ..trainer import RunResult, train
from .classifier import Classifier, classes_of

logger = logging.getLogger(__name__)


def finetune(config: FinetuneConfig) -> RunResult:
    """Train with ``config``, or resume the run in ``config.output_dir``: see ``trainer.train``."""
    return train(config, Finetuning)


def linprobe(config: LinprobeConfig) -> RunResult:
    """Train a linear classifier on frozen features, or resume the run in ``config.output_dir``."""
    return train(config, LinearProbing)


class Classification(Classifier, Task):
    """A classifier in training."""

    config: ClassifyConfig
    keep = False  # whether the outputs of the frozen part are computed only once
    cached: Tensor | None = None  # the outputs of the frozen part for all images of ``source``
    scale = (0.08, 1.0)  # of random crops
    auto_augment: str | None = None  # RandAugment policy

    def __init__(self, config: ClassifyConfig, dist: DistContext, **kwargs: Any) -> None:
        super().__init__(config, dist, **kwargs)
        self.class_weights: Tensor | None = None  # [classes]
        if config.class_weights == "balanced":
            assert self.source.labels is not None
            self.class_weights = balanced_weights(self.source.labels, self.num_classes).to(dist.device)

    def new_head(self, std: float) -> nn.Linear:
        """Replace the model's head by a new one, and log it if the weights have a head of the same size."""
        weights = self.config.weights
        # Heads of other sizes are already logged.
        if weights and classes_of(self.config.model, weights) == self.num_classes:
            logger.warning("the head of %s is not used: the new head is initialized randomly", weights)
        norm = self.model.blocks[-1].norm2
        head = nn.Linear(norm.normalized_shape[0], self.num_classes)
        nn.init.trunc_normal_(head.weight, std=std)
        nn.init.zeros_(head.bias)
        self.model.head = head
        return head

    def check_cache(self) -> None:
        """Raise ``UserError`` if the outputs of the frozen part cannot be cached."""
        if self.config.strategy == "fsdp" and self.dist.world > 1:
            raise UserError("--cache-features does not support sharded weights", "leave --strategy fsdp out")
        if self.config.crops_per_image > 1:
            raise UserError("--cache-features keeps one crop of each image", "leave --crops-per-image out")

    def frozen(self, images: Tensor) -> Tensor:
        """The output of the frozen part for prepared images. It is the input of ``rest``."""
        raise NotImplementedError

    def rest(self, model: Any, kept: Tensor) -> Tensor:
        """The logits of the trained part for the output ``kept`` of ``frozen``."""
        raise NotImplementedError

    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        logits = model(images) if self.cached is None else self.rest(model, images)
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits.float(), other.float())
        if self.class_weights is None:
            return F.cross_entropy(logits.float(), other)
        # Divide by the number of images, as torch does for mixed targets. For labels, it divides by the sum of weights.
        return F.cross_entropy(logits.float(), other, self.class_weights, reduction="sum") / len(other)

    def batches(self, source: Source, loader: LoaderConfig) -> Iterator[Batch]:
        loader = replace(loader, balanced=self.config.sampler == "balanced")
        if self.keep:
            return self.cached_batches(source, loader)
        return training_batches(source, loader, scale=self.scale, auto_augment=self.auto_augment)

    def cached_batches(self, source: Source, loader: LoaderConfig) -> Iterator[Batch]:
        """Batches of outputs of ``frozen`` instead of images. The outputs are computed once.

        Bad images have no output. Other images replace them in each epoch.
        """
        labels = torch.tensor(source.labels)
        kept, ids = [], []
        for batch in self.all_of(source, whole=True, bad=loader.bad):
            kept.append(self.without_autograd(self.frozen, batch.images))
            ids.append(batch.ids.cpu())
            if len(kept) == 1 and len(batch.ids):
                _check_memory(kept[0][0].nbytes * len(source), kept[0].device)
        self.cached, usable = torch.cat(kept), torch.cat(ids)
        if not len(usable):
            raise UserError(
                f"no image of {source.root} can be used",
                f"run 'mae-fast data check {source.root}' to see why",
            )
        places = torch.arange(len(source)) % len(usable)
        for batch_keys in KeyedBatches(len(source), loader, labels[usable[places]].tolist()):
            at = places[[sample for _, sample in batch_keys]]
            yield Batch(self.cached[at], torch.empty(len(at), 0), usable[at], labels[usable[at]])


class Finetuning(Classification):
    """Fine-tuning of all weights, or of the last blocks, the norm and the head."""

    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, dist: DistContext) -> None:
        super().__init__(config, dist, drop_path_rate=config.drop_path)
        if config.aa is not None and not is_picture(self.pixels):
            if config.was_given("aa"):
                raise UserError(f"--aa {config.aa}: {PICTURES_ONLY}", "leave it out")
            logger.info(f"no RandAugment: {PICTURES_ONLY}")
            config = self.config = self.config.model_copy(update={"aa": None})
        self.scale, self.auto_augment = config.scale, config.aa
        if config.aa is not None:  # an invalid policy raises an error here, before the run has a folder
            RandAugment(config.aa, config.seed, self.pixels.channels)
        if config.weights:
            self.new_head(std=2e-5)
        self.model.to(dist.device)
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        self.mixing = Mixing(
            num_classes=self.num_classes,
            seed=config.seed,
            rank=dist.rank,
            mixup=0.0 if self.multi_label else config.mixup,
            cutmix=0.0 if self.multi_label else config.cutmix,
            smoothing=config.smoothing,
            reprob=config.reprob,
            pixel_stats=(self.mean, self.std),
            nodata=self.pixels.nodata,
        )
        self.first, self.keep = 0, config.cache_features
        if config.train_blocks != "all":
            self.first = freeze(self.model, config.train_blocks)
            self.title += f", {config.train_blocks:g} blocks of {len(self.model.blocks)}"
        if self.keep:
            self.check_cache()
            if not self.ours:
                raise UserError(f"--cache-features does not support {config.model}", "use a model of this package")
            if not self.first:
                raise UserError(f"--cache-features: no block is frozen with --train-blocks {config.train_blocks}")

    def frozen(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model.forward_features(images, layers=[self.first - 1], pool="tokens")[0]
        return tokens

    def rest(self, model: Any, kept: Tensor) -> Tensor:
        logits: Tensor = model.forward_from(kept, self.first)
        return logits

    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        config = self.config
        return layer_decayed_adamw(
            self.model, lr, config.weight_decay, config.layer_decay, config.beta2, working_dtype=working_dtype
        )

    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        assert batch.labels is not None
        # The random numbers of drop path depend only on the step, so that a resumed run draws the same.
        torch.manual_seed(int(generator(self.config.seed, LAYERS, micro_step, self.dist.rank).integers(2**63)))
        if self.keep:
            return batch.images, batch.labels
        labels = batch.labels.float() if self.multi_label else batch.labels
        return self.mixing(batch.images, labels, micro_step)


class LinearProbing(Classification):
    """A batch norm without weights and a linear layer, on frozen features."""

    config: LinprobeConfig

    def __init__(self, config: LinprobeConfig, dist: DistContext) -> None:
        if config.batch_size < 2:
            raise UserError("--batch-size 1: the probe's batch norm needs at least 2 images in each process")
        super().__init__(config, dist)
        self.keep = config.cache_features
        if self.keep:
            self.check_cache()
        freeze(self.model, 0, norm=False)
        self.model.head = probing_head(self.new_head(std=0.01))
        self.state["probed"] = True
        self.model.to(dist.device)

    def frozen(self, images: Tensor) -> Tensor:
        if self.ours:
            features: Tensor = self.model.forward_features(images)
        else:
            features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return features

    def rest(self, model: Any, kept: Tensor) -> Tensor:
        logits: Tensor = model.head(kept)
        return logits

    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        return lars(self.model, lr, self.config.weight_decay)

    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        assert batch.labels is not None
        return (batch.images if self.keep else self.prepared(batch.images)), batch.labels


def balanced_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Class weights [num_classes] that balance the classes in a loss: n / (k * count), for n images of k classes.

    A class without images has weight 0.
    """
    counts = torch.tensor(labels).bincount(minlength=num_classes)
    weights = len(labels) / ((counts > 0).sum() * counts)
    return weights.where(counts > 0, 0.0)


def _check_memory(size: int, device: torch.device) -> None:
    """Raise ``UserError`` unless twice ``size`` bytes are free, which the concatenation of the batches needs."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = free_memory()
    if 2 * size > free:
        raise UserError(
            f"--cache-features needs {2 * size / 2**30:.1f} GiB to store the outputs of the frozen part, but only "
            f"{free / 2**30:.1f} GiB are free",
            "leave --cache-features out",
        )


def freeze(model: Any, blocks: float, norm: bool = True) -> int:
    """Freeze all weights but those of the last ``blocks`` blocks, the head and, if ``norm``, the norm after the blocks.

    0.5 is the MLP of the last block with its norm. Frozen blocks get no drop path.

    Returns:
        The index of the first block with trained weights, or the number of blocks if there is none.

    Raises:
        UserError: if the model has fewer blocks, or ``blocks`` is neither a whole number nor 0.5.
    """
    depth = len(model.blocks)
    if not 0 <= blocks <= depth or (blocks != 0.5 and blocks != int(blocks)):
        raise UserError(f"--train-blocks {blocks:g} is invalid", f"give 0, 0.5, 1, 2, ..., {depth} or all")
    whole = int(blocks)
    if whole == depth:
        return 0
    model.requires_grad_(False)
    trained = [*model.blocks[depth - whole :], model.head]
    if norm:
        trained += [getattr(model, name) for name in ("norm", "fc_norm") if hasattr(model, name)]
    if blocks == 0.5:
        trained += [model.blocks[-1].norm2, model.blocks[-1].mlp]
    for module in trained:
        module.requires_grad_(True)
    for block in model.blocks[: depth - whole]:
        for module in block.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    return depth - whole - (blocks == 0.5)


def lars(model: nn.Module, lr: float, weight_decay: float = 0.0, momentum: float = 0.9) -> torch.optim.Optimizer:
    """LARS for linear probes (You et al., "Large Batch Training of Convolutional Networks", 2017).

    The step of each matrix is scaled by ``0.001 * |w| / (|g| + weight_decay * |w|)``. Vectors are neither scaled nor
    decayed.
    """
    from timm.optim import Lars  # type: ignore[attr-defined]

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, "always_adapt": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=lr, momentum=momentum)
