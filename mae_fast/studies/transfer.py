"""Compares segmentation and detection with and without pre-training, on the satellite maps of the demo."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import api
from ..bench.formats import markdown_table, new_figure
from ..training.config import DetectConfig, PretrainConfig, RunConfig, SegmentConfig
from .common import Result, evenly, final_figure, link_into
from .demo_data import build_demo
from .scenes import CLASSES, UNLABELLED, build_scenes

logger = logging.getLogger(__name__)

Run = Callable[[RunConfig], Any]
Results = dict[tuple[str, str], dict[str, Result]]  # by task and start; by column


@dataclass(frozen=True)
class Budget:
    """The size of the comparison. All runs of a task take the same number of steps.

    Pre-training uses the train tiles of the demo, without labels. Detection uses all images with objects, and only the
    first seed.

    Attributes:
        images: numbers of labelled images for segmentation, one column each.
    """

    images: tuple[int, ...] = (16, 455)
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrain_epochs: int = 15
    segment_steps: int = 150
    detect_steps: int = 150
    batch_size: int = 16


MAE, SCRATCH = "MAE, fine-tuned", "from scratch"
# Whether the encoder is pre-trained, and flags. Training from scratch has no layer-wise decay, as in the paper.
STARTS: dict[str, tuple[bool, dict[str, Any]]] = {
    MAE: (True, {}),
    SCRATCH: (False, {"layer_decay": 1.0}),
    "MAE, frozen": (True, {"freeze_encoder": True}),
    "random, frozen": (False, {"freeze_encoder": True}),
}
# Columns of detection.
FIGURES = {
    "val_box_ap": "box AP",
    "val_box_ap50": "box AP50",
    "val_mask_ap": "mask AP",
    "val_mask_ap50": "mask AP50",
}


def transfer_demo(directory: Path, budget: Budget = Budget(), run: Run = api.run) -> Results:
    """Pre-train, segment and detect with all seeds, in ``directory``; write and return the table, draw predictions.

    Args:
        run: trains a configuration, unless its run is finished.
    """
    demo, scenes = directory / "demo", directory / "scenes"
    if not demo.exists():
        logger.info("%s", build_demo(demo))
    if not scenes.exists():
        build_scenes(scenes)
    whole = len([*(scenes / "train" / "images").iterdir()])
    found: dict[tuple[str, str], dict[str, list[float]]] = {}

    def tune(kind: type[RunConfig], name: str, images: Path, count: int, steps: int, seed: int, start: str) -> Path:
        pretrained, flags = STARTS[start]
        batch = min(budget.batch_size, count)
        epochs = -(-steps // (count // batch))
        output = _folder(directory, name, start, seed)
        same = {"batch_size": batch, "epochs": epochs, "warmup_epochs": epochs / 10, "eval_every": epochs}
        weights = str(directory / f"mae-{seed}") if pretrained else None
        _train(run, kind, images, output, seed=seed, weights=weights, **same, **flags)
        return output

    for seed in budget.seeds:
        _train(run, PretrainConfig, demo, directory / f"mae-{seed}", seed=seed, epochs=budget.pretrain_epochs)
        for images in sorted({min(count, whole) for count in budget.images}):
            few = few_scenes(scenes, directory / f"scenes-{images}", images)
            for start in STARTS:
                done = tune(SegmentConfig, f"segment-{images}", few, images, budget.segment_steps, seed, start)
                row = found.setdefault(("segmentation", start), {})
                row.setdefault(f"mIoU, {images} images", []).append(final_figure(done, "val_miou"))
    coco = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    with_objects = len({each["image_id"] for each in coco["annotations"]})
    for start in (MAE, SCRATCH):
        done = tune(DetectConfig, "detect", scenes, with_objects, budget.detect_steps, budget.seeds[0], start)
        found["detection", start] = {column: [final_figure(done, figure)] for figure, column in FIGURES.items()}
    results = {key: {column: Result(each) for column, each in row.items()} for key, row in found.items()}
    text = ""
    for task in ("segmentation", "detection"):
        rows = {start: row for (of, start), row in results.items() if of == task}
        head = [f"{task}, held out, %", *next(iter(rows.values()))]
        text += markdown_table(head, ([start, *map(str, row.values())] for start, row in rows.items())) + "\n\n"
    table = directory / "transfer.md"
    table.write_text(text)
    logger.info("%swrote %s", text, table)
    _draw_all(directory, run, budget, whole)
    return results


def _train(run: Run, kind: type[RunConfig], images: Path, output: Path, **flags: Any) -> None:
    logger.info("\n%s", output)
    run(kind.with_preset("tiny", data_path=images, output_dir=output, **flags))


def _folder(directory: Path, name: str, start: str, seed: int) -> Path:
    """The output folder of a run."""
    return directory / f"{name}-{start.replace(', ', '-').replace(' ', '-')}-{seed}"


def few_scenes(scenes: Path, few: Path, count: int) -> Path:
    """Fill ``few`` with links to ``count`` images of ``scenes/train``, with masks, and to all of ``val``; return it.

    The images are evenly spaced in the order of names.
    """
    names = sorted(path.name for path in (scenes / "train" / "images").iterdir())
    for split, chosen in (
        ("train", evenly(names, count)),
        ("val", sorted(path.name for path in (scenes / "val" / "images").iterdir())),
    ):
        for kind in ("images", "masks"):
            for name in chosen:
                link_into(few / split / kind, scenes / split / kind / name)
    link_into(few, scenes / "classes.txt")
    return few


def _draw_all(directory: Path, run: Run, budget: Budget, whole: int) -> None:
    """Predict with the runs of the first seed, and draw the predictions."""
    scenes, seed = directory / "scenes", budget.seeds[0]
    images = min(max(budget.images), whole)
    predicted = {}
    few = directory / f"scenes-{images}"
    for task, start, kind, name, data, file in (
        ("segment", MAE, SegmentConfig, f"segment-{images}", few, "predictions"),
        ("segment", SCRATCH, SegmentConfig, f"segment-{images}", few, "predictions"),
        ("detect", MAE, DetectConfig, "detect", scenes, "predictions.json"),
    ):
        output = _folder(directory, name, start, seed)
        predicted[task, start] = output / file
        if not (output / file).exists():
            _train(run, kind, data, output, eval_only=True, predictions=output / file)
    masks = scenes / "val" / "masks"
    names = _with_most_classes(masks, 6)
    draw_masks(
        scenes / "val", names, {start: predicted["segment", start] for start in (MAE, SCRATCH)}, directory / "masks.png"
    )
    draw_objects(scenes, predicted["detect", MAE], directory / "objects.png")


def _with_most_classes(masks: Path, count: int) -> list[str]:
    """``count`` masks among the quarter with most classes, evenly spaced in the order of names."""
    classes = {path.name: len(np.unique(np.asarray(Image.open(path)))) for path in sorted(masks.glob("*.png"))}
    most = sorted(sorted(classes, key=lambda name: -classes[name])[: max(count, len(classes) // 4)])
    return evenly(most, min(count, len(most)))


# One colour for each of ``CLASSES``, and one for pixels without a class.
COLOURS = ("#2b6cb0", "#1e5631", "#a3a847", "#7bc043", "#f2c14e", "#e8eef2", "#c08552")
NO_COLOUR = "#202020"


def coloured(mask: NDArray[Any]) -> NDArray[np.uint8]:
    """Classes [H, W] as RGB [H, W, 3]."""
    from matplotlib.colors import to_rgb

    table = np.full((256, 3), to_rgb(NO_COLOUR))
    table[: len(CLASSES)] = [to_rgb(colour) for colour in COLOURS]
    drawn: NDArray[np.uint8] = (255 * table[mask]).round().astype(np.uint8)
    return drawn


def _figure(rows: int, columns: list[str]) -> tuple[Any, Any]:
    figure = new_figure(2.2 * len(columns), 2.2 * rows + 0.8)
    from matplotlib.patches import Patch

    axes = figure.subplots(rows, len(columns), squeeze=False)
    for title, axis in zip(columns, axes[0], strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    patches = [Patch(color=colour, label=name.replace("_", " ")) for colour, name in zip(COLOURS, CLASSES, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8)
    return figure, axes


def draw_masks(val: Path, names: list[str], predicted: dict[str, Path], path: Path) -> None:
    """Draw a row for each image: the image, its land cover, and the prediction of each run on labelled pixels."""
    figure, axes = _figure(len(names), ["image", "land cover", *predicted])
    for name, row in zip(names, axes, strict=True):
        truth = np.asarray(Image.open(val / "masks" / name))
        row[0].imshow(np.asarray(Image.open(val / "images" / name)))
        row[1].imshow(coloured(truth))
        for axis, folder in zip(row[2:], predicted.values(), strict=True):
            mask = np.asarray(Image.open((folder / name).with_suffix(".png")))
            axis.imshow(coloured(np.where(truth == UNLABELLED, UNLABELLED, mask)))
    figure.savefig(path, dpi=110)
    logger.info("wrote %s", path)


def draw_objects(scenes: Path, predictions: Path, path: Path, count: int = 6, least: float = 0.5) -> None:
    """Draw a row for each of ``count`` images with objects: the image, its objects, and the predicted objects.

    Args:
        least: smallest score of the predictions that are drawn.
    """
    from pycocotools import mask as coding

    coco = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    found = [each for each in json.loads(predictions.read_text()) if each["score"] >= least]
    with_objects = {each["image_id"] for each in coco["annotations"]}
    images = [each for each in coco["images"] if each["id"] in with_objects]
    images = evenly(images, min(count, len(images)))
    figure, axes = _figure(len(images), ["image", "objects", "predicted"])
    for image, row in zip(images, axes, strict=True):
        pixels = np.asarray(Image.open(scenes / "val" / "images" / image["file_name"]))
        for axis in row:
            axis.imshow(pixels)
        for axis, objects in zip(row[1:], (coco["annotations"], found), strict=True):
            for each in objects:
                if each["image_id"] == image["id"]:
                    colour = COLOURS[each["category_id"] - 1]
                    x, y, wide, high = each["bbox"]
                    axis.plot([x, x + wide, x + wide, x, x], [y, y, y + high, y + high, y], color=colour, linewidth=1.2)
                    mask = np.array(coding.decode(each["segmentation"]), bool)
                    axis.imshow(_overlay(mask, colour))
    figure.savefig(path, dpi=110)
    logger.info("wrote %s", path)


def _overlay(mask: NDArray[np.bool_], colour: str) -> NDArray[np.float64]:
    """``colour``, half transparent where ``mask`` is set, [H, W, 4]."""
    from matplotlib.colors import to_rgba

    return np.where(mask[..., None], np.array(to_rgba(colour, 0.45)), 0.0)
