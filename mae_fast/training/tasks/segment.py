"""Training and evaluation of semantic segmentation.

Shapes: K classes, H x W pixels.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ...console import table_text
from ...data.decode import BadImage
from ...data.loader import Batch, LoaderConfig
from ...data.pixel_format import PixelFormat
from ...data.preprocessing import model_preprocessing
from ...data.segmentation import (
    SegmentationDataset,
    colours,
    evaluation_segmentation,
    has_jitter,
    open_segmentation,
    scaled,
    training_segmentation,
)
from ...data.sources import Source
from ...errors import UserError
from ...evaluation.metrics import confusion_matrix
from ...models.reconstruction import as_rgb, as_shown, tile
from ...models.segmentation import UNLABELLED, SegmentationModel, stride_of, whole_image_logits, windows
from ...weights.trained import SEGMENTATION
from ..config import SegmentConfig
from ..distributed import DistContext, init_dist
from ..pixels import pixels_of_run, settle_pixels
from ..task import evaluation_config, evaluation_loader, held_out, use_bf16
from ..trainer import RunResult, train
from . import dense
from .dense import DenseTask

logger = logging.getLogger(__name__)

PICTURES = 4  # images to draw at each checkpoint


def segment(config: SegmentConfig) -> RunResult:
    """Train with ``config``, or resume the run in ``config.output_dir``: see ``trainer.train``."""
    return train(config, Segmentation)


class Segmentation(DenseTask):
    """UPerNet on an encoder, in training."""

    config: SegmentConfig
    source: SegmentationDataset
    model: SegmentationModel
    schedule = "linear"
    metric_names = ("val_loss", "val_miou", "val_acc", "val_macc")

    def __init__(self, config: SegmentConfig, dist: DistContext) -> None:
        super().__init__(config, dist)
        if config.batch_size < 2:
            raise UserError("--batch-size 1: batch norms need at least 2 images in each process")
        if config.cache:
            raise UserError("--cache does not support images with masks", "leave it out")
        self.source, self.val = open_segmentation(config.data_path)
        classes = self.source.classes
        settled = settle_pixels(self.config, self.source, config.weights)
        self.pixels = settled.format
        if not has_jitter(self.pixels):
            logger.info("no colour jitter: it supports only 8-bit images, grey or RGB")
        encoder, settings = self.encoder(**settled.arguments())
        self.mean_colour = (encoder.pixel_mean * (255 if self.pixels.dtype == "uint8" else 1)).tolist()
        self.model = SegmentationModel(encoder, len(classes), config.head_channels)
        if dist.world > 1 and dist.device.type == "cuda":  # torch supports it only on GPUs
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # type: ignore[no-untyped-call]
        self.model.to(dist.device)
        self.settings = {
            "masks": self.source.annotations[:16],
            "val_images": self.val.fingerprint[:16],
            "val_masks": self.val.annotations[:16],
            **settled.record(),
        }
        about = {"encoder": config.model, "img_size": config.input_size, "channels": config.head_channels}
        model = {"name": SEGMENTATION, **about, "settings": settings}
        self.state = {"model": model, "classes": list(classes)}
        self.state["preprocessing"] = model_preprocessing(encoder, self.size, self.pixels, "shorter_side").record()
        self.title = f"{config.model} and UPerNet, {len(classes)} classes"

    def batches(self, source: Source, loader: LoaderConfig) -> Iterator[Batch]:
        assert isinstance(source, SegmentationDataset)
        return training_segmentation(source, loader, self.mean_colour)

    def targets(self, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return batch.labels

    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        loss: Tensor = model.loss(images, other)
        return loss

    def evaluation(self) -> Callable[[], dict[str, float]]:
        Scores(len(self.val.classes))  # fails now if torchmetrics is missing, not after the first epoch

        def figures() -> dict[str, float]:
            scores = Scores(len(self.val.classes))
            for _, logits, labels in answers(self.model, self.val, self.config, self.dist, self.pixels):
                scores.add(logits, labels)
            return scores.figures(self.dist)

        return figures

    def drawing(self) -> Callable[[], Any] | None:
        size = self.config.input_size
        images, labels = [], []
        for i in np.linspace(0, len(self.val) - 1, min(PICTURES, len(self.val))).round().astype(int).tolist():
            try:
                image, mask = self.val.pair(i, self.pixels)
                small = scaled(image, size, self.pixels.nodata)
            except BadImage:
                continue
            height, width, _ = small.shape
            nearest = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
            top, left = (height - size) // 2, (width - size) // 2
            images.append(torch.from_numpy(small[top : top + size, left : left + size].copy()))
            labels.append(torch.from_numpy(nearest[top : top + size, left : left + size].copy()))
        if not images:
            return None
        pixels, truth = torch.stack(images).to(self.dist.device), torch.stack(labels)  # [n, S, S, C] and [n, S, S]

        def draw() -> Any:
            """Draw a few images, each as a row of image, label and prediction. All processes must call it."""
            self.model.eval()
            classes = _logits(self.model, self.bf16, pixels).argmax(1)
            self.model.train()
            first = as_rgb(as_shown(self.model.net, pixels, self.pixels.clip)).cpu()
            maps = (colours(x).permute(0, 3, 1, 2) / 255 for x in (truth, classes))
            rows = torch.cat([first, *maps], 3)  # [n, 3, S, 3 * S]
            return tile(torch.cat(list(rows), 1))

        return draw


def _logits(model: Any, bf16: bool, images: Tensor) -> Tensor:
    """The logits fp32 [N, K, H, W] of raw pixels [N, H, W, C], computed in the run's dtype."""
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits: Tensor = model(images)
        return logits.float()


def answers(
    model: Any, source: SegmentationDataset, config: SegmentConfig, dist: DistContext, pixels: PixelFormat
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield index, logits fp32 [K, H, W] and labels [H, W] of each image of this process's share of ``source``.

    The shorter side of the image is scaled to ``config.input_size``, the side of the sliding window. The logits are
    scaled to the size of the mask.
    """
    size, bf16 = config.input_size, use_bf16(config.dtype, dist.device)
    batches = evaluation_segmentation(source, evaluation_loader(config, dist, (size, size), pixels))
    for batch in held_out(batches, source, config, dist):
        batch = batch.to(dist.device)
        assert batch.labels is not None
        calls = sum(len(windows(len(image), len(image[0]), size, stride_of(size))) for image in batch.images)
        if dist.world > 1 and config.strategy == "fsdp":  # all processes need each other's shards in each call
            for _ in range(max(dist.gather([calls])) - calls):
                blank = torch.zeros(1, size, size, pixels.channels, dtype=pixels.torch_dtype, device=dist.device)
                _logits(model, bf16, blank)
        for i, image, labels in zip(batch.ids.tolist(), batch.images, batch.labels, strict=True):
            height, width = labels.shape
            yield i, whole_image_logits(partial(_logits, model, bf16), image, size, (height, width)), labels


class Scores:
    """Counts the predicted classes of pixels."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # rows: labels
        self.entropy = torch.zeros((), dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count the pixels of an image: logits [K, H, W], labels [H, W]."""
        self.confusion += confusion_matrix(logits.argmax(0), labels, len(self.confusion), UNLABELLED).cpu()
        entropy = F.cross_entropy(logits[None], labels[None], ignore_index=UNLABELLED, reduction="sum")
        self.entropy += entropy.double().cpu()

    def figures(self, dist: DistContext) -> dict[str, float]:
        """The metrics of the images of all processes.

        They are the mean cross-entropy of labelled pixels, and in percent the mIoU, the pixel accuracy and the mean of
        the classes' accuracies. The means ignore classes that occur nowhere.

        Raises:
            UserError: if there is no labelled pixel.
        """
        self.confusion, self.entropy = dist.total(self.confusion), dist.total(self.entropy)
        pixels = self.confusion.sum().item()
        if not pixels:
            message = "the held-out images have no labelled pixel, or none of them can be used"
            raise UserError(message, "check the images and masks of val/")
        iou, accuracy = self.of_classes()
        return {
            "val_loss": self.entropy.item() / pixels,
            "val_miou": 100 * iou.nanmean().item(),
            "val_acc": 100 * self.confusion.trace().item() / pixels,
            "val_macc": 100 * accuracy.nanmean().item(),
        }

    def of_classes(self) -> tuple[Tensor, Tensor]:
        """IoU and pixel accuracy of each class, [K] each. NaN for 0 / 0."""
        right, labelled = self.confusion.diag(), self.confusion.sum(1)
        return right / (labelled + self.confusion.sum(0) - right), right / labelled


def evaluate(config: SegmentConfig) -> dict[str, float]:
    """Log the metrics of the run in ``config.output_dir`` on the held-out images, over all classes and per class.

    Writes the folder ``config.predictions``: a PNG per image with the name of its mask and the values of masks, and
    classes.txt.

    Raises:
        UserError: if there is no such run, or it has other classes.
    """
    folder = config.predictions
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--predictions {folder} already exists", "give a new folder")
    with init_dist(config.device) as dist:
        if dist.world > 1:
            raise UserError("--eval-only runs in a single process", "do not use torchrun")
        found, model = dense.of_run(config.output_dir, config.ema, SEGMENTATION, "segment")
        _, val = open_segmentation(config.data_path)
        classes = found.state["classes"]
        val.match_classes(classes, f"{config.output_dir}")
        model.to(dist.device)
        about = found.state["model"]
        config = evaluation_config(config, config.output_dir, about["encoder"], about["img_size"])
        settled = pixels_of_run(config.output_dir, config.exif)
        pixels = settled.format if settled else PixelFormat(exif=config.exif)
        scores, images = Scores(len(classes)), 0
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        for i, logits, labels in answers(model, val, config, dist, pixels):
            scores.add(logits, labels)
            images += 1
            if folder:
                values = val.values[logits.argmax(0).cpu().numpy()]
                Image.fromarray(values.astype(np.uint8)).save((folder / val.masks.names[i]).with_suffix(".png"))
    figures = scores.figures(dist)
    logger.info(", ".join(f"{name} {value:.4g}" for name, value in figures.items()) + f", of {images} images")
    logger.info(_format_classes(classes, scores))
    if folder:
        if not val.first:  # one class per line, from value 0
            names = (classes[c] for c in np.argsort(val.values))
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        logger.info(f"wrote {images} masks to {folder}")
    return figures


def _format_classes(classes: list[str], scores: Scores) -> str:
    from rich.markup import escape
    from rich.table import Table

    table = Table("class", "IoU", "accuracy", "share of pixels", title="classes, in percent")
    labelled = scores.confusion.sum(1)
    for name, *row in zip(classes, *scores.of_classes(), labelled / labelled.sum(), strict=True):
        table.add_row(escape(name), *("-" if x.isnan() else f"{100 * x.item():.1f}" for x in row))
    return table_text(table)
