"""Fine-tuning, from pre-trained weights or from scratch, of all blocks or the last ones; and linear probing."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.augment import Mixing
from ..data.keyed import LAYERS, generator
from ..data.loader import Batch, KeyedBatches, Skipped, evaluation_batches, training_batches
from ..data.sources import Source, labelled
from ..errors import UserError, warn
from ..models import vit
from ..ops.patches import standardise
from .checkpoint import find
from .config import ClassifyConfig, FinetuneConfig, LinprobeConfig, PartialConfig
from .distributed import Processes, processes
from .loop import Task, train, wants_bf16
from .optim import AdamW

TIMM = "timm/"


def finetune(config: FinetuneConfig) -> None:
    """Train as ``config`` says, resuming from the newest good checkpoint in ``config.output_dir``.

    Raises:
        UserError, SystemExit: as ``loop.train``.
    """
    train(config, lambda among, say: Finetuning(config, among, say))


def linprobe(config: LinprobeConfig) -> None:
    """``finetune``, of a linear layer on features that stay as they are."""
    train(config, lambda among, say: LinearProbing(config, among, say))


def evaluate(config: ClassifyConfig) -> dict[str, float]:
    """Print top-1, top-5 and the confusion matrix on ``val/`` of the run in ``config.output_dir``, or else of
    ``config.weights``; write ``config.predictions``.

    Raises:
        UserError: if there is no such model, or it knows other classes.
    """
    with processes(config.device) as among:
        if among.world > 1:
            raise UserError("--eval-only is for one process: leave torchrun out")
        classes = None
        if (config.output_dir / "config.json").exists():
            classes, model = _of_run(config.output_dir, config.ema)
            task = Classifier(config, among, model)
        elif config.weights:
            task = Classifier(config, among)
        else:
            raise UserError(f"--eval-only: {config.output_dir} holds no run; give one, or --weights")
        if classes is not None and classes != task.classes:
            raise UserError(f"{config.data_path} has the classes {task.classes}, the run was trained on {classes}")
        task.model.to(among.device).eval()
        answers = [tuple(x.cpu() for x in batch) for batch in task.answers()]
        ids, logits, labels = (torch.cat(x) for x in zip(*answers, strict=True))
    figures = top_accuracies(iter([(logits, labels)]), among)
    print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()) + f", of {len(ids)} images")
    likeliest = logits.softmax(1).max(1)
    print_confusion(task.classes, labels, likeliest.indices)
    if config.predictions:
        with config.predictions.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "class", "prediction", "probability"])
            for i, label, guess, p in zip(
                *(x.tolist() for x in (ids, labels, likeliest[1], likeliest[0])), strict=True
            ):
                table.writerow([task.val.names[i], task.classes[label], task.classes[guess], f"{p:.6f}"])
        print(f"wrote {config.predictions}")
    return figures


def _of_run(path: Path, ema: bool) -> tuple[list[str], Any]:
    """The classes of a run, and its classifier."""
    from ..interop.pretrained import of_run

    found = find(path, warn)
    about = dict(found.state["model"])
    if "classes" not in found.state:
        raise UserError(f"{path} is a run of pre-training, which has no head: fine-tune or probe it first")
    if not about["name"].startswith(TIMM):
        return found.state["classes"], of_run(path, ema)[0]
    model = build_model(about.pop("name"), None, about.pop("num_classes"), about.pop("img_size"), **about)
    if found.state["probed"]:
        model.head = _probing_head(model.head)
    found.load_model(model, ema)
    return found.state["classes"], model


def _probing_head(head: nn.Linear) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(head.in_features, affine=False, eps=1e-6), head)


def print_confusion(classes: list[str], labels: Tensor, guesses: Tensor) -> None:
    """How often images of each class (rows) were taken for each (columns); of many classes, the commonest errors."""
    from rich.console import Console
    from rich.table import Table

    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels, guesses), torch.tensor(1), accumulate=True)
    if len(classes) <= 20:
        table = Table("class \\ taken for", *map(str, range(len(classes))), title="confusion matrix")
        for i, name in enumerate(classes):
            table.add_row(f"{i} {name}", *(str(count) for count in counts[i].tolist()))
    else:
        table = Table("class", "taken for", "times", title="most frequent errors")
        wrong = counts.clone().fill_diagonal_(0).flatten()
        for place in wrong.argsort(descending=True, stable=True)[:20].tolist():
            if wrong[place]:
                i, j = divmod(place, len(classes))
                table.add_row(classes[i], classes[j], str(int(wrong[place])))
    Console(width=max(100, 12 * len(table.columns))).print(table)


def build_model(name: str, weights: str | None, num_classes: int, size: int, **kwargs: Any) -> Any:
    """A classifier of ours, or timm's (``timm/NAME``), with pre-trained weights where there are any.

    Raises:
        UserError: if there is no such model, or the weights are not its.
    """
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM), weights, num_classes, size, **kwargs)
    from ..interop.pretrained import create_model

    if name not in vit.CONFIGS:
        known = ", ".join(sorted(vit.CONFIGS))
        raise UserError(f"--model {name}: known are {known}, and {TIMM}NAME for any of timm's")
    return create_model(name, weights, num_classes=num_classes, img_size=size, **kwargs)


def _of_timm(name: str, weights: str | None, num_classes: int, size: int, global_pool: bool, **kwargs: Any) -> Any:
    """A model of timm's, with its own pooling; ``weights``: a file that timm reads, else random ones."""
    import timm

    overlay = {"file": weights, "url": "", "hf_hub_id": None} if weights else None
    try:
        model: Any = timm.create_model(
            name, bool(weights), pretrained_cfg_overlay=overlay, num_classes=num_classes, img_size=size, **kwargs
        )
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"--model {TIMM}{name}: {str(error).splitlines()[0]}") from error
    return model


class Classifier:
    """A classifier of the classes of ``data_path/train``, evaluated on ``data_path/val``."""

    def __init__(self, config: ClassifyConfig, among: Processes, model: Any = None, **kwargs: Any) -> None:
        self.config, self.among = config, among
        self.source, self.val = labelled(config.data_path)
        self.classes = list(self.source.classes)
        self.num_classes = len(self.classes)
        self.size, self.channels = (config.input_size, config.input_size), 3
        kwargs["global_pool"] = config.global_pool
        self.model = model or build_model(config.model, config.weights, self.num_classes, config.input_size, **kwargs)
        about = {"name": config.model, "num_classes": self.num_classes, "img_size": config.input_size, **kwargs}
        self.state = {"model": about, "classes": self.classes, "probed": False}
        self.settings = {"val_images": self.val.fingerprint[:16]}
        self.title, self.eval_every = config.model, config.eval_every
        self.bf16 = wants_bf16(config.dtype, among.device)
        self.ours = isinstance(self.model, vit.VisionTransformer)
        self.mean, self.std = (x.to(among.device) for x in _pixel_stats(self.model))

    def prepared(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, C] as the model takes them: ours as they are, timm's standardised [N, C, H, W]."""
        if self.ours:
            return images
        return standardise(images, self.mean, self.std)

    def evaluation(self) -> Callable[[], dict[str, float]]:
        return lambda: top_accuracies(((logits, labels) for _, logits, labels in self.answers()), self.among)

    def answers(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of this process's share of ``val``, batch by batch: places [N], logits [N, classes] and labels [N]."""
        for batch in self._all_of(self.val):
            assert batch.labels is not None
            if len(batch.ids):
                yield batch.ids, self._without_autograd(self.model, batch.images).float(), batch.labels
            elif self.among.world > 1 and self.config.strategy == "fsdp":  # the others need its shards of the weights
                blank = torch.zeros(1, *self.size, self.channels, dtype=torch.uint8, device=self.among.device)
                self._without_autograd(self.model, self.prepared(blank))

    def _all_of(self, source: Source, whole: bool = False) -> Iterator[Batch]:
        """Every image once, centred, prepared, on the device; this process's share unless ``whole``."""
        config, among = self.config, self.among
        batches = evaluation_batches(
            source,
            size=self.size,
            channels=self.channels,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            rank=0 if whole else among.rank,
            world=1 if whole else among.world,
            exif=config.exif,
        )
        skipped = Skipped(source, config.max_bad_fraction, warn)
        for batch in batches:
            skipped.add(batch)
            batch = batch.to(among.device)
            yield replace(batch, images=self.prepared(batch.images))

    def _without_autograd(self, call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return call(images)


class Classification(Classifier, Task):
    """A classifier in training."""

    cached: Tensor | None = None  # what the frozen part makes of each image of ``source``, if it is kept

    def new_head(self, std: float) -> nn.Linear:
        """In the place of the model's head, whose weights may be those of another task."""
        norm = self.model.blocks[-1].norm2
        head = nn.Linear(norm.normalized_shape[0], self.num_classes)
        nn.init.trunc_normal_(head.weight, std=std)
        nn.init.zeros_(head.bias)
        self.model.head = head
        return head

    def check_cache(self) -> None:
        """Raise ``UserError`` unless the frozen part's outputs can be kept."""
        if self.config.strategy == "fsdp" and self.among.world > 1:
            raise UserError("--cache-features: weights in shards cannot be taken apart; leave --strategy fsdp out")

    def frozen(self, images: Tensor) -> Tensor:
        """What is not trained of the model, of prepared images: what ``rest`` takes."""
        raise NotImplementedError

    def rest(self, model: Any, kept: Tensor) -> Tensor:
        """What is trained, of ``frozen``'s output: logits."""
        raise NotImplementedError

    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        logits = model(images) if self.cached is None else self.rest(model, images)
        return F.cross_entropy(logits.float(), other)

    def cached_batches(self, source: Source, **options: Any) -> Iterator[Batch]:
        """Batches of ``frozen``'s outputs in the place of images, computed once; bad images leave theirs to others."""
        labels = torch.tensor(source.labels)
        kept, ids = [], []
        for batch in self._all_of(source, whole=True):
            kept.append(self._without_autograd(self.frozen, batch.images))
            ids.append(batch.ids.cpu())
        self.cached, usable = torch.cat(kept), torch.cat(ids)
        if not len(usable):
            raise UserError(f"no image of {source.root} can be used; look at them by mae-fast data check {source.root}")
        keys = KeyedBatches(
            len(source), options["batch_size"], options["epochs"], options["seed"], options["first"],
            options["rank"], options["world"], per_epoch=options["batches_per_epoch"],
        )  # fmt: skip
        place = torch.arange(len(source)) % len(usable)
        place[usable] = torch.arange(len(usable))
        for batch_keys in keys:
            at = place[[sample for _, sample in batch_keys]]
            yield Batch(self.cached[at], torch.empty(len(at), 0), usable[at], labels[usable[at]])


def _pixel_stats(model: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] that the model's images are standardised with."""
    if isinstance(model, vit.VisionTransformer):
        return model.pixel_mean, model.pixel_std
    return torch.tensor(model.pretrained_cfg["mean"]), torch.tensor(model.pretrained_cfg["std"])


class Finetuning(Classification):
    """All weights, or those of the last blocks, the norm and the head."""

    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, among: Processes, say: Callable[[str], None]) -> None:
        super().__init__(config, among, drop_path_rate=config.drop_path)
        if config.weights:
            self.new_head(std=2e-5)
        self.model.to(among.device)
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        self.mixing = Mixing(
            num_classes=self.num_classes,
            seed=config.seed,
            rank=among.rank,
            mixup=config.mixup,
            cutmix=config.cutmix,
            smoothing=config.smoothing,
            reprob=config.reprob,
            mean=self.mean,
            std=self.std,
        )
        self.first, self.keep = 0, False
        if isinstance(config, PartialConfig):
            self.first, self.keep = freeze(self.model, config.blocks), config.cache_features
            self.title += f", {config.blocks:g} blocks of {len(self.model.blocks)}"
            if self.keep:
                self.check_cache()
            if self.keep and not self.ours:
                raise UserError(f"--cache-features: {config.model} cannot be taken apart, only this package's models")
            if self.keep and not self.first:
                raise UserError(f"--cache-features: no block is frozen with --blocks {config.blocks:g}")

    def frozen(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model.forward_features(images, layers=[self.first - 1], pool="tokens")[0]
        return tokens

    def rest(self, model: Any, kept: Tensor) -> Tensor:
        logits: Tensor = model.forward_from(kept, self.first)
        return logits

    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

        groups = param_groups_layer_decay(
            self.model,
            self.config.weight_decay,
            no_weight_decay_list=self.model.no_weight_decay(),
            layer_decay=self.config.layer_decay,
        )
        return AdamW(groups, lr=lr, betas=(0.9, self.config.beta2), working_dtype=working_dtype)

    def batches(self, source: Source, **options: Any) -> Iterator[Batch]:
        if self.keep:
            return self.cached_batches(source, **options)
        return training_batches(source, scale=(0.08, 1.0), auto_augment=self.config.aa, **options)

    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        assert batch.labels is not None
        # What drop path draws in this step is its own, too, wherever the run was resumed.
        torch.manual_seed(int(generator(self.config.seed, LAYERS, micro_step, self.among.rank).integers(2**63)))
        if self.keep:
            return batch.images, batch.labels
        return self.mixing(batch.images, batch.labels, micro_step)


class LinearProbing(Classification):
    """A linear layer behind a batch norm without weights, on features that stay as they are."""

    config: LinprobeConfig

    def __init__(self, config: LinprobeConfig, among: Processes, say: Callable[[str], None]) -> None:
        super().__init__(config, among)
        if config.cache_features:
            self.check_cache()
        freeze(self.model, 0, norm=False)
        self.model.head = _probing_head(self.new_head(std=0.01))
        self.state["probed"] = True
        self.model.to(among.device)

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

    def batches(self, source: Source, **options: Any) -> Iterator[Batch]:
        if self.config.cache_features:
            return self.cached_batches(source, **options)
        return training_batches(source, scale=(0.08, 1.0), **options)

    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        assert batch.labels is not None
        return (batch.images if self.config.cache_features else self.prepared(batch.images)), batch.labels


def freeze(model: Any, blocks: float, norm: bool = True) -> int:
    """Leave the last ``blocks`` blocks to be trained, the head, and the norm after the blocks unless ``norm`` is false.

    0.5 is the last block's MLP with its norm. What is frozen is not regularised by drop path either.

    Returns:
        The number of the first block with a weight to train, or of blocks.

    Raises:
        UserError: if the model does not have that many, or ``blocks`` is neither whole nor 0.5.
    """
    depth = len(model.blocks)
    if not 0 <= blocks <= depth or (blocks != 0.5 and blocks != int(blocks)):
        raise UserError(f"--blocks {blocks:g}: give 0, 0.5, 1, 2, ... or {depth}, which are all")
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
    """LARS as for linear probes (You et al., "Large Batch Training of Convolutional Networks", 2017): the step of each
    matrix is scaled by ``0.001 * |w| / (|g| + weight_decay * |w|)``; vectors are neither scaled nor decayed."""
    from timm.optim import Lars  # type: ignore[attr-defined]

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, "always_adapt": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=lr, momentum=momentum)


@torch.no_grad()
def top_accuracies(predictions: Iterator[tuple[Tensor, Tensor]], among: Processes) -> dict[str, float]:
    """Mean cross-entropy, and the share in per cent of images whose class is the likeliest, or among the five.

    ``predictions``: of this process, logits [N, classes] and labels [N].
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for logits, labels in predictions:
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(labels))]).double().cpu()
    total, first, five, count = (float(x) for x in among.total(sums))
    return {"val_loss": total / count, "val_acc1": 100 * first / count, "val_acc5": 100 * five / count}
