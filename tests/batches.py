"""The functions of ``mae_fast.data`` that return batches, with all options as keywords."""

from dataclasses import fields
from typing import Any

from mae_fast.data import coco, loader, segmentation
from mae_fast.data.loader import LoaderConfig
from mae_fast.data.pixel_format import PixelFormat

CONFIG = {field.name for field in fields(LoaderConfig)}
PIXELS = {field.name for field in fields(PixelFormat)}


def with_keywords(make: Any) -> Any:
    """Wrap ``make(*of, LoaderConfig, **others)`` as a function of keywords, including those of ``PixelFormat``.

    A square's ``size`` may be its side.
    """

    def call(*of: Any, **options: Any) -> Any:
        options = {"batch_size": 1, **options}
        if isinstance(options["size"], int):
            options["size"] = options["size"], options["size"]
        pixels = {name: options.pop(name) for name in PIXELS & options.keys()}
        if pixels:
            options["pixels"] = PixelFormat(**pixels)
        config = LoaderConfig(**{name: x for name, x in options.items() if name in CONFIG})
        return make(*of, config, **{name: x for name, x in options.items() if name not in CONFIG})

    return call


training_batches = with_keywords(loader.training_batches)
evaluation_batches = with_keywords(loader.evaluation_batches)
training_segmentation = with_keywords(segmentation.training_segmentation)
evaluation_segmentation = with_keywords(segmentation.evaluation_segmentation)
training_detections = with_keywords(coco.training_detections)
evaluation_detections = with_keywords(coco.evaluation_detections)
