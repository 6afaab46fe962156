"""Predict classes, masks or objects in new images with trained models.

Shapes: N images, K classes, M objects per image, H x W pixels of the original image.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.datasets import GivenImages
from ..data.decode import BadImage
from ..data.loader import unusable_image
from ..data.preprocessing import Preprocessing
from ..data.sources import Source
from ..data.workers import by_processes
from ..errors import UserError
from ..models.vit import VisionTransformer
from ..ops.patches import without_missing
from ..weights.create import LoadedModel
from ..weights.trained import DETECTION, SEGMENTATION, load_trained
from .encoding import with_progress
from .images import preprocessing_of

logger = logging.getLogger(__name__)

MASK_THRESHOLD = 0.5  # minimum probability that a pixel belongs to an object
POSITIVE = 0.5  # minimum probability of a label, if an image may have several


@dataclass(frozen=True)
class Classification:
    """The predicted classes of an image.

    Attributes:
        classes: names of the classes.
        probabilities: fp32 [K]. They sum to 1 unless ``multi_label``.
        multi_label: whether an image may have several labels.
    """

    classes: tuple[str, ...]
    probabilities: Tensor
    multi_label: bool = False

    @property
    def label(self) -> str:
        """The most likely class."""
        return self.classes[int(self.probabilities.argmax())]

    @property
    def labels(self) -> list[str]:
        """The most likely class; if ``multi_label``, all classes with a probability of at least 0.5."""
        if not self.multi_label:
            return [self.label]
        return [name for name, p in zip(self.classes, self.probabilities.tolist(), strict=True) if p >= POSITIVE]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most likely classes with their probabilities, or all if there are fewer."""
        found = self.probabilities.topk(min(k, len(self.classes)))
        return [(self.classes[i], p) for p, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)]


@dataclass(frozen=True)
class Segmentation:
    """The predicted class of each pixel of an image.

    Attributes:
        classes: names of the classes.
        labels: uint8 [H, W], indices of ``classes``.
    """

    classes: tuple[str, ...]
    labels: Tensor


@dataclass(frozen=True)
class Detections:
    """The detected objects in an image, sorted by decreasing score.

    Attributes:
        classes: names of the classes.
        size: height and width of the image.
        boxes: fp64 [M, 4], left, top, right, bottom, in pixels of the image.
        labels: int64 [M], indices of ``classes``.
        scores: fp32 [M], 0 to 1.
        small_masks: fp32 [M, 1, 28, 28], masks within the boxes, as probabilities; None if the model has no masks.
    """

    classes: tuple[str, ...]
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    small_masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def above(self, score: float) -> "Detections":
        """The objects with a score of at least ``score``."""
        kept = self.scores >= score
        masks = None if self.small_masks is None else self.small_masks[kept]
        return replace(
            self, boxes=self.boxes[kept], labels=self.labels[kept], scores=self.scores[kept], small_masks=masks
        )

    def mask(self, index: int) -> Tensor:
        """The mask of one object, bool [H, W]."""
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        assert self.small_masks is not None
        one = slice(index, index + 1)
        pasted: Tensor = paste_masks_in_image(self.small_masks[one], self.boxes[one].float(), self.size)
        return pasted[0, 0] >= MASK_THRESHOLD

    @property
    def masks(self) -> Tensor | None:
        """The masks of all objects, bool [M, H, W]; None if the model has no masks."""
        if self.small_masks is None:
            return None
        return torch.stack([self.mask(i) for i in range(len(self))]) if len(self) else torch.empty(0, *self.size).bool()


Result = TypeVar("Result", Classification, Segmentation, Detections)


@dataclass(frozen=True)
class _Inputs:
    """A batch of images for a model: indices, pixels [n, h, w, C], original sizes, and unusable images."""

    ids: list[int]
    images: list[Tensor]
    sizes: list[tuple[int, int]]
    skipped: list[tuple[int, BadImage]]


@dataclass
class _Prepared(Dataset[_Inputs]):
    """Loads the inputs of a model by their indices in a source."""

    source: Source
    preprocessing: Preprocessing

    def __getitems__(self, indices: list[int]) -> _Inputs:
        made = _Inputs([], [], [], [])
        for i in indices:
            try:
                pixels, size = self.preprocessing(self.source.read(i))
            except BadImage as bad:
                made.skipped.append((i, bad.bare()))
                continue
            made.ids.append(i)
            made.images.append(torch.from_numpy(pixels.copy()))
            made.sizes.append(size)
        return made


class Predictor(Generic[Result]):
    """A trained model with the preprocessing that is recorded with it.

    Attributes:
        model: the model in evaluation mode, on its device.
        preprocessing: the preprocessing of images.
        classes: names of the classes.
    """

    kind: ClassVar[Literal["classifier", "segmentation", "detection"]]
    same_size: ClassVar[bool] = True  # whether all inputs have the same size, so that they can be batched

    def __init__(
        self, model: Any, preprocessing: Preprocessing, classes: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.preprocessing, self.classes = model.to(device).eval(), preprocessing, tuple(classes)
        self.device = torch.device(device)

    def predict(self, images: Any, batch_size: int = 64) -> Any:
        """Predict on images in memory or in files.

        Args:
            images: one image or a sequence of images: paths, PIL images, arrays [H, W] or [H, W, C], or tensors [H, W]
                or [C, H, W], with the values and channels of image files. An array or tensor with one more axis is a
                sequence.
            batch_size: images per batch.

        Returns:
            A ``Classification``, ``Segmentation`` or ``Detections``; a list of them for a sequence.

        Raises:
            UserError: if an image cannot be used.
        """
        several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        source = GivenImages(list(images) if several else [images], self.preprocessing.pixels.exif)
        found: list[Result] = []
        for _, result in self.predictions(source, batch_size):
            if isinstance(result, BadImage):
                raise unusable_image(source, len(found), result)
            found.append(result)
        return found if several else found[0]

    def predictions(
        self, source: Source, batch_size: int = 64, num_workers: int = 0
    ) -> Iterator[tuple[int, Result | BadImage]]:
        """Yield the index and prediction of each image of ``source``, in order; a ``BadImage`` if it is unusable."""
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is out of range", "give 1 or more")
        step = batch_size if self.same_size else 1
        places = [list(range(i, min(i + step, len(source)))) for i in range(0, len(source), step)]
        batches: Iterator[_Inputs] = by_processes(
            _Prepared(source, self.preprocessing), places, num_workers, of=source.root
        )
        for inputs in with_progress(batches, source):
            with torch.inference_mode():
                results = self._predict(inputs) if inputs.ids else []
            found: dict[int, Result | BadImage] = dict(zip(inputs.ids, results, strict=True)) | dict(inputs.skipped)
            yield from sorted(found.items())

    def _predict(self, inputs: _Inputs) -> list[Result]:
        raise NotImplementedError

    def _stacked(self, inputs: _Inputs) -> Tensor:
        return torch.stack(inputs.images).to(self.device)


class ClassifierPredictor(Predictor[Classification]):
    """A fine-tuned or probed classifier of this package or of timm."""

    kind = "classifier"
    multi_label = False

    def _predict(self, inputs: _Inputs) -> list[Classification]:
        images = self._stacked(inputs)
        if not isinstance(self.model, VisionTransformer):
            made = self.preprocessing
            mean, std = (torch.tensor(x, device=self.device) for x in (made.mean, made.std))
            images = without_missing(images, mean, std, made.pixels.nodata)
        logits = self.model(images).float()
        probabilities = (logits.sigmoid() if self.multi_label else logits.softmax(1)).cpu()
        return [Classification(self.classes, row, self.multi_label) for row in probabilities]


class SegmentationPredictor(Predictor[Segmentation]):
    """A segmentation model, applied to sliding windows of each image."""

    kind = "segmentation"
    same_size = False

    def _predict(self, inputs: _Inputs) -> list[Segmentation]:
        from ..models.segmentation import whole_image_logits

        (image,), (size,) = inputs.images, inputs.sizes
        logits = whole_image_logits(self.model, image.to(self.device), min(self.preprocessing.size), size)
        return [Segmentation(self.classes, logits.argmax(0).byte().cpu())]


class DetectionPredictor(Predictor[Detections]):
    """A detector. ``category_ids``: the COCO category id of each class in the training annotations."""

    kind = "detection"
    category_ids: Sequence[int] = ()

    def _predict(self, inputs: _Inputs) -> list[Detections]:
        found = self.model(self._stacked(inputs))
        side = max(self.preprocessing.size)
        return [in_own_pixels(one, size, side, self.classes) for one, size in zip(found, inputs.sizes, strict=True)]


def in_own_pixels(found: dict[str, Tensor], size: tuple[int, int], side: int, classes: tuple[str, ...]) -> Detections:
    """Convert the output of ``Detector`` for a square of ``side`` pixels to pixels of the original image of ``size``.

    Boxes outside of the image are dropped.
    """
    from ..data.coco import fitted

    found = {name: x.cpu() for name, x in found.items()}
    (height, width), (h, w) = size, fitted(*size, side)
    boxes = found["boxes"].double() * torch.tensor([width / w, height / h] * 2)
    boxes = boxes.clamp(min=torch.zeros(4), max=torch.tensor([width, height] * 2))
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    masks = found["masks"][kept] if "masks" in found else None
    return Detections(classes, size, boxes[kept], found["labels"][kept] - 1, found["scores"][kept], masks)


def coco_results(objects: Detections, image_id: int, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """Convert objects to COCO's results format.

    Args:
        category_ids: the category id of each object.
    """
    results = []
    for i, ((left, top, right, bottom), category_id, score) in enumerate(
        zip(objects.boxes.tolist(), category_ids, objects.scores.tolist(), strict=True)
    ):
        box = [left, top, right - left, bottom - top]
        result: dict[str, Any] = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        if objects.small_masks is not None:  # one at a time, as each is as large as the image
            from pycocotools import mask

            runs = mask.encode(np.asfortranarray(objects.mask(i).byte().numpy()))
            result["segmentation"] = {"size": list(objects.size), "counts": runs["counts"].decode()}
        results.append(result)
    return results


def load(
    weights: str | os.PathLike[str], *, model: str | None = None, ema: bool = False, device: str = "cpu"
) -> ClassifierPredictor | SegmentationPredictor | DetectionPredictor:
    """Load a trained model for predictions on new images.

    Args:
        weights: a run or one of its checkpoints; or a file, folder or hub name of a classifier in any supported layout.
        model: name of the model, needed if the weights do not determine its sizes.
        ema: load the averaged weights of a run.

    Raises:
        UserError: if there are no such weights, or the model has no head that predicts.
    """
    loaded = load_trained(weights, model, ema)
    state: dict[str, Any] = loaded.checkpoint.state if loaded.checkpoint and not model else {"model": {"name": model}}
    name = state["model"]["name"]
    if name not in (SEGMENTATION, DETECTION):
        return _classifier(loaded, weights, device)
    if loaded.metadata.preprocessing is None:
        raise UserError(f"{weights} is from an earlier version and records no preprocessing", "train it again")
    if name == SEGMENTATION:
        return SegmentationPredictor(loaded.model, preprocessing_of(loaded), state["classes"], device)
    made = DetectionPredictor(loaded.model, preprocessing_of(loaded), state["classes"], device)
    made.category_ids = state.get("category_ids") or range(1, len(state["classes"]) + 1)
    return made


def _classifier(loaded: LoadedModel, weights: str | os.PathLike[str], device: str) -> ClassifierPredictor:
    count = getattr(loaded.model, "num_classes", 0)
    if not count:
        raise UserError(
            f"{os.fspath(weights)} has no head for predictions",
            "give a run of finetune, linprobe, segment or detect; mae-fast features encodes images",
        )
    if loaded.metadata.preprocessing is None and loaded.checkpoint is None:
        logger.warning(
            f"{os.fspath(weights)} records no preprocessing: images are resized, cropped and standardised by default"
        )
    names = loaded.metadata.classes or tuple(map(str, range(count)))
    made = ClassifierPredictor(loaded.model, preprocessing_of(loaded), names, device)
    made.multi_label = bool(loaded.metadata.multi_label)
    return made
