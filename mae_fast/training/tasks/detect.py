"""Training and evaluation of detection and instance segmentation.

Shapes: N images of S x S pixels, M objects per image.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...console import table_text
from ...data.coco import Coco, DetectionBatch, evaluation_detections, training_detections
from ...data.loader import Batch, LoaderConfig
from ...data.pixel_format import PixelFormat
from ...data.preprocessing import model_preprocessing
from ...data.sources import Source
from ...errors import UserError
from ...evaluation.predict import coco_results, in_own_pixels
from ...models.detection import Detector
from ...weights.trained import DETECTION, build_detector
from ..config import PIXEL_FLAGS, DetectConfig
from ..distributed import DistContext, init_dist
from ..pixels import pixels_of_weights
from ..task import evaluation_config, evaluation_loader, held_out, use_bf16
from ..trainer import RunResult, train
from . import dense
from .dense import DenseTask

logger = logging.getLogger(__name__)

KINDS = {"box": "bbox", "mask": "segm"}  # our names and those of pycocotools
# COCO's metrics, in pycocotools' order. AP is the mean over IoU from 0.5 to 0.95, AR the recall with this many objects.
FIGURES = (
    "AP", "AP, IoU 0.5", "AP, IoU 0.75", "AP, small", "AP, medium", "AP, large",
    "AR, 1 object", "AR, 10 objects", "AR, 100 objects", "AR, small", "AR, medium", "AR, large",
)  # fmt: skip


def detect(config: DetectConfig) -> RunResult:
    """Train with ``config``, or resume the run in ``config.output_dir``: see ``trainer.train``."""
    if config.execution != "eager":
        raise UserError(
            f"--execution {config.execution}: detection supports only eager, as the number of objects per image varies",
            "leave it out",
        )
    return train(config, Detection)


class Detection(DenseTask):
    """Mask R-CNN or Faster R-CNN on an encoder, in training."""

    config: DetectConfig
    source: Coco
    model: Detector
    schedule = "step"

    def __init__(self, config: DetectConfig, dist: DistContext) -> None:
        super().__init__(config, dist)
        self.pixels = PixelFormat(exif=self.config.exif)
        _refuse_other_pixels(self.config)
        self.source, self.val = (Coco(config.data_path, split, config.masks) for split in ("train", "val"))
        for coco in (self.source, self.val):
            if coco.left_out:
                logger.info(coco.left_out)
        classes = list(self.source.classes)
        self.val.match_classes(classes, f"{self.source.root}")
        about = {"num_classes": len(classes), "size": config.input_size, "masks": config.masks, "window": config.window}
        encoder, settings = self.encoder()
        self.model = build_detector(encoder, **about).to(dist.device)
        model = {"name": DETECTION, "encoder": config.model, **about, "settings": settings}
        self.state = {"model": model, "classes": classes, "category_ids": list(self.source.categories)}
        kinds = ("box", "mask") if config.masks else ("box",)
        self.metric_names = tuple(f"val_{kind}_{name}" for kind in kinds for name in ("ap", "ap50"))
        self.state["preprocessing"] = model_preprocessing(encoder, self.size, self.pixels, "longer_side").record()
        self.settings = {"val_images": self.val.fingerprint[:16]}
        self.title += f", {'Mask' if config.masks else 'Faster'} R-CNN of {len(classes)} classes"

    def batches(self, source: Source, loader: LoaderConfig) -> Iterator[DetectionBatch]:
        return training_detections(source, self.source, loader, self.config.scale)

    def targets(self, batch: Batch) -> Any:
        assert isinstance(batch, DetectionBatch)
        return batch.targets

    def loss(self, model: Any, images: Tensor, other: Any) -> Tensor:
        losses: dict[str, Tensor] = model(images, other)
        return torch.stack(list(losses.values())).sum()

    def evaluation(self) -> Callable[[], dict[str, float]]:
        return self.figures

    def figures(self) -> dict[str, float]:
        """AP of the current model on the held-out images, in percent; the same in all processes."""
        found = list(answers(self.model, self.val, self.config, self.dist))
        places = self.dist.gather([i for i, _ in found])
        results = self.dist.gather([result for _, of_one in found for result in of_one])
        kinds = ["box", "mask"] if self.config.masks else ["box"]
        values = torch.zeros(len(kinds), 2, dtype=torch.float64)
        if self.dist.first:
            scored = [score(self.val, places, results, kind) for kind in kinds]
            values += torch.from_numpy(np.stack([evaluation.stats[:2] for evaluation in scored]))
        return _logged(dict(zip(kinds, self.dist.total(values).tolist(), strict=True)))


def _refuse_other_pixels(config: DetectConfig) -> None:
    """Raise ``UserError`` if flags or weights are not for 8-bit RGB."""
    for name in PIXEL_FLAGS:
        if config.was_given(name):
            raise UserError(f"--{name.replace('_', '-')}: detection reads 8-bit RGB", "leave it out")
    found = pixels_of_weights(config.weights, config.exif) if config.weights else None
    if found and not (found.format.is_plain and found.format.channels == 3):
        kind = f"{found.format.dtype} images of {found.format.channels} channels"
        raise UserError(f"--weights {config.weights} are for {kind}: detection reads 8-bit RGB", "give other weights")


def answers(
    model: Detector, val: Coco, config: DetectConfig, dist: DistContext
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield the index and the detections, in COCO's results format, of each usable image of this process's share."""
    size, device = config.input_size, dist.device
    bf16 = use_bf16(config.dtype, device)
    loader = evaluation_loader(config, dist, (config.input_size, config.input_size), PixelFormat(exif=config.exif))
    batches = evaluation_detections(val, loader)
    for batch in held_out(batches, val, config, dist):
        images = batch.images.to(device)
        if not len(images):
            if dist.world == 1 or config.strategy != "fsdp":
                continue
            images = images.new_zeros(1, size, size, 3)  # other processes need this process's shards of the weights
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = model(images)
        for i, of_one in zip(batch.ids.tolist(), found, strict=False):
            yield i, results_of(val, i, {name: x.cpu() for name, x in of_one.items()}, size)


def results_of(val: Coco, index: int, found: dict[str, Tensor], size: int) -> list[dict[str, Any]]:
    """The detections of ``Detector`` in an image, in COCO's results format and in pixels of the original image."""
    objects = in_own_pixels(found, val.sizes[index], size, val.classes)
    numbers = [val.predicted[label] for label in objects.labels.tolist()]  # None: not a class of the evaluation
    return [x for x in coco_results(objects, val.image_ids[index], numbers) if x["category_id"] is not None]


def score(val: Coco, places: list[int], results: list[dict[str, Any]], kind: str) -> Any:
    """Run pycocotools' ``COCOeval`` of ``results`` on the images at ``places`` of ``val``. ``kind``: of ``KINDS``."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    about = {
        "images": [
            {"id": val.image_ids[i], "height": val.sizes[i][0], "width": val.sizes[i][1]} for i in sorted(places)
        ],
        "categories": [{"id": i, "name": name} for i, name in zip(val.categories, val.classes, strict=True)],
    }

    def indexed(annotations: list[dict[str, Any]]) -> Any:
        coco = COCO()
        coco.dataset = {**about, "annotations": annotations}
        coco.createIndex()
        return coco

    # loadRes changes its input, and uses the area of the box, if there is one, as the area of the mask.
    own = [{name: x for name, x in result.items() if kind == "box" or name != "bbox"} for result in results]
    with redirect_stdout(io.StringIO()):
        truth = indexed([x for i in sorted(places) for x in val.objects(i)])
        evaluation = COCOeval(truth, truth.loadRes(own) if own else indexed([]), KINDS[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def evaluate(config: DetectConfig) -> dict[str, float]:
    """Log COCO's metrics of the run in ``config.output_dir`` on the held-out images; write ``config.predictions``.

    Returns:
        The metrics as training logs them.

    Raises:
        UserError: if there is no such run, or it has other classes.
    """
    with init_dist(config.device) as dist:
        if dist.world > 1:
            raise UserError("--eval-only runs in a single process", "do not use torchrun")
        found, model = dense.of_run(config.output_dir, config.ema, DETECTION, "detect")
        about = found.state["model"]
        val = Coco(config.data_path, "val", about["masks"])
        if val.left_out:
            logger.info(val.left_out)
        val.match_classes(found.state["classes"], f"{config.output_dir}")
        config = evaluation_config(config, config.output_dir, about["encoder"], about["size"])
        answered = list(answers(model.to(dist.device), val, config, dist))
    if not answered:
        raise UserError(f"no image of {val.root} can be used", "run 'mae-fast data check' to see why")
    places, results = [i for i, _ in answered], [x for _, of_one in answered for x in of_one]
    kinds = ["box", "mask"] if about["masks"] else ["box"]
    scored = {kind: score(val, places, results, kind) for kind in kinds}
    logger.info(_format_figures(val, scored, len(places)))
    if config.predictions:
        config.predictions.write_text(json.dumps(results))
        logger.info(f"wrote {len(results)} objects to {config.predictions}")
    return _logged({kind: evaluation.stats for kind, evaluation in scored.items()})


def _logged(stats: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The metrics that training logs: AP and AP50 of boxes and masks in percent; 0 for pycocotools' -1 (no data)."""
    return {
        f"val_{kind}_{name}": 100 * max(0.0, float(x))
        for kind, figures in stats.items()
        for name, x in zip(("ap", "ap50"), figures, strict=False)
    }


def _format_figures(val: Coco, scored: dict[str, Any], images: int) -> str:
    from rich.markup import escape
    from rich.table import Table

    def shown(*values: float) -> list[str]:
        return ["-" if not x >= 0 else f"{100 * x:.1f}" for x in values]  # -1 or NaN: no data

    figures = Table("", *scored, title=f"{images} images, in percent")
    for name, *row in zip(FIGURES, *(evaluation.stats for evaluation in scored.values()), strict=True):
        figures.add_row(name, *shown(*row))
    classes = Table("class", *(f"{kind} AP" for kind in scored), title="classes, in percent")
    for k, name in enumerate(val.classes):
        # precision: [IoUs, recalls, classes, areas, numbers of objects]
        of_class = [evaluation.eval["precision"][:, :, k, 0, -1] for evaluation in scored.values()]
        classes.add_row(escape(name), *shown(*(x[x > -1].mean() if (x > -1).any() else -1 for x in of_class)))
    return "\n".join([table_text(figures), table_text(classes)])
