"""A classifier and its evaluation on labelled images: accuracies and predictions."""

import csv
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...console import table_text
from ...data.decode import BadImage
from ...data.folders import some
from ...data.label_table import class_labelled, classified, multi_labelled, read_label_table
from ...data.loader import Batch, default_crop_pct, evaluation_batches
from ...data.preprocessing import Preprocessing, model_pixel_stats
from ...data.sources import Source, held_out_source, labelled, match_classes, open_held_out
from ...errors import UserError
from ...evaluation.metrics import confusion_matrix
from ...models import vit
from ...ops.patches import without_missing
from ...weights.files import load_weights
from ...weights.layouts import unwrap
from ...weights.run_reader import find_checkpoint, read_config, run_folder, run_or_checkpoint
from ...weights.trained import TIMM, build_classifier, trained_model
from ..config import ClassifyConfig
from ..distributed import DistContext, init_dist
from ..pixels import PixelSettings, json_sides, settle_pixels, settle_sizes
from ..task import evaluation_config, evaluation_loader, held_out, use_bf16, with_exif_of
from .class_metrics import PER_CLASS, accuracies, format_per_class, multi_label_metrics

logger = logging.getLogger(__name__)


def evaluate(config: ClassifyConfig) -> dict[str, float]:
    """Evaluate the run in ``config.output_dir``, or else ``config.weights``, on ``val/``.

    Logs accuracies, metrics per class and the confusion matrix, and writes ``config.predictions``.

    Raises:
        UserError: if there is no such model, or it has other classes.
    """
    with init_dist(config.device) as dist:
        if dist.world > 1:
            raise UserError("--eval-only runs in a single process", "do not use torchrun")
        if run := _run_to_evaluate(config):
            state, model = of_run(run, config.ema)
            config, val = _held_out(config, state, run)
            config = evaluation_config(config, run, state["model"]["name"], state["model"]["img_size"])
            task = Classifier(config, dist, model, val)
        elif config.ema:
            raise UserError(
                f"--ema needs the folder of a run, but {config.output_dir} is not one",
                "leave --ema out",
            )
        elif config.weights:
            task = Classifier(config, dist)
            _check_head(config.model, config.weights, task.classes)
        else:
            raise UserError(f"--eval-only: {config.output_dir} is not a run", "give the folder of a run, or --weights")
        task.model.to(dist.device).eval()
        answers = [tuple(x.cpu() for x in batch) for batch in task.answers()]
        if not answers:
            raise UserError(f"no image of {task.val.root} can be used", "run 'mae-fast data check' to see why")
        ids, logits, labels = (torch.cat(x) for x in zip(*answers, strict=True))
    figures = task.metrics(iter([(logits, labels)]))
    per_class = figures.pop(PER_CLASS)
    logger.info(", ".join(f"{name} {value:.4g}" for name, value in figures.items()) + f", of {len(ids)} images")
    logger.info(format_per_class(per_class))
    if not task.multi_label:
        logger.info(format_confusion(task.classes, labels, logits.argmax(1)))
    if config.predictions:
        with config.predictions.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(_prediction_rows(task, ids, logits, labels))
        logger.info(f"wrote {config.predictions}")
    return figures


def _prediction_rows(task: "Classifier", ids: Tensor, logits: Tensor, labels: Tensor) -> Iterator[list[str]]:
    """The rows of the CSV file of predictions, with a header.

    A row has the image's class, its predicted class and the probability of the prediction; or, with several labels per
    image, the probability of each label.
    """
    names = [task.val.names[i] for i in ids.tolist()]
    if task.multi_label:
        yield ["image", *task.classes]
        for name, row in zip(names, logits.sigmoid().tolist(), strict=True):
            yield [name, *(f"{p:.6f}" for p in row)]
        return
    yield ["image", "class", "prediction", "probability"]
    likeliest = logits.softmax(1).max(1)
    for name, label, guess, p in zip(names, *(x.tolist() for x in (labels, likeliest[1], likeliest[0])), strict=True):
        yield [name, task.classes[label], task.classes[guess], f"{p:.6f}"]


def _held_out(config: ClassifyConfig, state: dict[str, Any], run: Path) -> tuple[ClassifyConfig, Source]:
    """``config`` with the table of labels of ``run``, if it has one, and the held-out images with its classes."""
    folder = run_folder(run)
    if not state.get("multi_label"):
        if config.multi_label:
            raise UserError(f"--multi-label: the images of {run} have a single class each", "leave --multi-label out")
        if table := config.labels or (folder and read_config(folder).get("labels")):
            images = open_held_out(config.data_path, nested=True)
            return config, classified(images, Path(table), state["classes"], f"{run}")
        return config, held_out_source(config.data_path, state["classes"], f"{run}")
    if config.labels:
        raise UserError(f"--labels: the images of {run} have several labels each", "use --multi-label")
    table = config.multi_label or (folder and read_config(folder).get("multi_label"))
    if not table:
        raise UserError(f"{run} was trained on several labels per image", "give the labels by --multi-label")
    val = read_label_table(Path(table)).apply(open_held_out(config.data_path, nested=True), state["classes"])
    return config.model_copy(update={"multi_label": Path(table)}), val


def _run_to_evaluate(config: ClassifyConfig) -> Path | None:
    """The run or checkpoint in ``config.output_dir``, else in ``config.weights``; None if neither is one."""
    if run_folder(config.output_dir) or (config.output_dir / "config.json").exists():
        return config.output_dir
    return run_or_checkpoint(Path(config.weights)) if config.weights else None


def of_run(path: Path, ema: bool) -> tuple[dict[str, Any], Any]:
    """The state of the newest checkpoint of a run, and its classifier."""
    found = find_checkpoint(path)
    if "classes" not in found.state:
        raise UserError(
            f"{path} is a run of {found.state['model']['name']}, which has no head", "fine-tune or probe it first"
        )
    return found.state, trained_model(found, ema)


def classes_of(name: str, weights: str) -> int | None:
    """The number of classes of the head in the weights of a model; None without a head."""
    from ...weights.create import count_classes

    if not name.startswith(TIMM):
        return count_classes(weights)
    head = None if weights == "pretrained" else unwrap(load_weights(Path(weights)))[0].get("head.weight")
    return None if head is None else len(head)


def _check_head(name: str, weights: str, classes: list[str]) -> None:
    """Raise ``UserError`` unless the weights have a head with the right number of classes, whose names are unknown."""
    found = classes_of(name, weights)
    if found != len(classes):
        what = "no head" if found is None else f"a head of {found} classes"
        raise UserError(
            f"--eval-only: {weights} has {what}, but the images have {len(classes)} classes", "fine-tune it first"
        )
    logger.warning(f"{weights} does not name its classes; they are assumed to be, in this order: {some(classes)}")


class Classifier:
    """A classifier of the classes of ``data_path/train``, evaluated on ``data_path/val``.

    Args:
        model: an existing model; None: the one that ``config`` describes.
        val: the images to evaluate on, if the model is not trained.
    """

    def __init__(
        self, config: ClassifyConfig, dist: DistContext, model: Any = None, val: Source | None = None, **kwargs: Any
    ) -> None:
        self.config, self.dist = config if val else with_exif_of(config, config.weights), dist
        self.source, self.val = (val, val) if val else _labelled(config)
        self.multi_label = config.multi_label is not None
        self.classes = list(self.source.classes)
        self.num_classes = len(self.classes)
        settled = settle_pixels(self.config, self.source, config.weights)
        self.size, self.pixels = config.image_sides(), settled.format
        kwargs["global_pool"] = config.global_pool
        if not config.model.startswith(TIMM):
            kwargs |= settle_sizes(config, config.weights) | settled.arguments()
        elif self.pixels.channels != 3:
            kwargs["in_chans"] = self.pixels.channels
        size = json_sides(self.size)
        self.model = model or build_classifier(config.model, config.weights, self.num_classes, size, **kwargs)
        self.ours = isinstance(self.model, vit.VisionTransformer)
        about = {"name": config.model, "num_classes": self.num_classes, "img_size": size, **kwargs}
        if self.ours:  # recorded with the weights
            about |= self.model.settings()
        mean, std = _pixel_stats(self.model, settled)
        self.mean, self.std = (torch.tensor(x, device=dist.device) for x in (mean, std))
        crop_pct = default_crop_pct(self.size)
        made = Preprocessing(size=self.size, crop_pct=crop_pct, pixels=self.pixels, mean=mean, std=std)
        self.state = {"model": about, "classes": self.classes, "probed": False, "preprocessing": made.record()}
        top5 = ("val_acc5",) if self.num_classes > 5 else ()
        self.metric_names: tuple[str, ...] = ("val_loss", "val_acc1", "val_balanced_acc", *top5)
        if self.multi_label:
            self.state["multi_label"] = True
            self.metric_names = ("val_loss", "val_map")
        self.settings = {"val_images": self.val.fingerprint[:16], **settled.record()}
        self.title, self.eval_every = config.model, config.eval_every
        self.bf16 = use_bf16(config.dtype, dist.device)

    def prepared(self, images: Tensor) -> Tensor:
        """Convert raw images [N, H, W, C] to the model's input: unchanged for our models, else standardised
        [N, C, H, W]."""
        if self.ours:
            return images
        return without_missing(images, self.mean, self.std, self.pixels.nodata)

    def evaluation(self) -> Callable[[], dict[str, Any]]:
        return lambda: self.metrics((logits, labels) for _, logits, labels in self.answers())

    def metrics(self, answers: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """The metrics of the logits and labels of all processes. ``answers``: those of this process."""
        measure = multi_label_metrics if self.multi_label else accuracies
        return measure(answers, self.classes, self.dist)

    def summary(self, metrics: Mapping[str, Any]) -> str:
        return format_per_class(metrics[PER_CLASS])

    def answers(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield indices [N], logits [N, classes] and labels [N] of each batch of this process's share of ``val``."""
        for batch in self.all_of(self.val):
            assert batch.labels is not None
            if len(batch.ids):
                yield batch.ids, self.without_autograd(self.model, batch.images).float(), batch.labels
            elif (
                self.dist.world > 1 and self.config.strategy == "fsdp"
            ):  # other processes need its shards of the weights
                shape, dtype = (1, *self.size, self.pixels.channels), self.pixels.torch_dtype
                blank = torch.zeros(shape, dtype=dtype, device=self.dist.device)
                self.without_autograd(self.model, self.prepared(blank))

    def all_of(self, source: Source, whole: bool = False, bad: Mapping[int, BadImage] | None = None) -> Iterator[Batch]:
        """Yield prepared center crops of all images if ``whole``, else of this process's share, on the device."""
        config, dist = self.config, self.dist
        loader = replace(evaluation_loader(config, dist, self.size, self.pixels), bad=bad or {})
        if whole:
            loader = replace(loader, rank=0, world=1)
        batches = evaluation_batches(source, loader)
        for batch in held_out(batches, source, config, dist):
            batch = batch.to(dist.device)
            yield replace(batch, images=self.prepared(batch.images))

    def without_autograd(self, call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """``call(images)`` in the run's dtype, without autograd."""
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return call(images)


def _labelled(config: ClassifyConfig) -> tuple[Source, Source]:
    """The training images and the held-out images."""
    train, val = config.dataset("train"), config.dataset("val")
    if config.labels and config.multi_label:
        raise UserError("--labels and --multi-label exclude each other", "give --multi-label if images have several")
    if train is None:
        if config.labels:
            return class_labelled(config.data_path, config.labels)
        return (
            multi_labelled(config.data_path, config.multi_label) if config.multi_label else labelled(config.data_path)
        )
    if table := config.labels or config.multi_label:
        flag = "--labels" if config.labels else "--multi-label"
        raise UserError(f"{flag} {table} requires images in folders", "give data_path, not data")
    match_classes(val, train.classes, f"{train.root}")
    return train, val


def _pixel_stats(model: Any, settled: PixelSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation [C] that standardise the images for the model."""
    if settled.mean is not None and settled.std is not None:
        return settled.mean, settled.std
    if isinstance(model, vit.VisionTransformer):
        return model_pixel_stats(model)
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def format_confusion(classes: list[str], labels: Tensor, guesses: Tensor) -> str:
    """A table of the confusion matrix, with classes in rows and predictions in columns, or of the most frequent errors
    if there are many classes."""
    from rich.markup import escape
    from rich.table import Table

    counts = confusion_matrix(guesses, labels, len(classes))
    if len(classes) <= 20:
        table = Table("class \\ predicted", *map(str, range(len(classes))), title="confusion matrix")
        for i, name in enumerate(classes):
            table.add_row(escape(f"{i} {name}"), *(str(count) for count in counts[i].tolist()))
    else:
        table = Table("class", "predicted", "count", title="most frequent errors")
        wrong = counts.clone().fill_diagonal_(0).flatten()
        for place in wrong.argsort(descending=True, stable=True)[:20].tolist():
            if wrong[place]:
                i, j = divmod(place, len(classes))
                table.add_row(escape(classes[i]), escape(classes[j]), str(int(wrong[place])))
    return table_text(table, max(100, 12 * len(table.columns)))
