"""The transfer dataset: images from the mosaic of the demo, with a class for each pixel and with objects.

The objects are connected regions of water and of ice. ``mae-fast segment`` and ``mae-fast detect`` read these files:

    {train,val}/images/r0000_c0000.png
    {train,val}/masks/r0000_c0000.png (values 0 to 6; 255: no class)
    classes.txt
    annotations/instances_{train,val}.json (COCO)

The split of an image is that of the demo's block around it. So an encoder that was pre-trained on the train tiles of
the demo has not seen the val images.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from .demo_data import MAPS, Pixels, Recipe, build_once, download, on_mosaic, val_cells

DEMO = Recipe()
SIDE = 64  # side of an image, in pixels of 1/15 degree
UNLABELLED = 255
# The 17 IGBP classes are merged into these: MODIS distinguishes several of them only by the height of trees.
CLASSES = ("water", "forest", "shrubs_and_savannas", "grasslands", "croplands", "snow_and_ice", "barren")
MERGED = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, UNLABELLED, 4, UNLABELLED, 4, 5, 6], np.uint8)
LEAST_SHARE = 0.1  # smallest share of an image that its second most frequent class covers
# Classes with a visible border, by COCO category.
OBJECTS = {CLASSES.index(name) + 1: name for name in ("water", "snow_and_ice")}
OBJECT_PIXELS = 64  # size of the smallest object


def build_scenes(
    root: Path, recipe: Recipe = DEMO, load: Callable[[Path], tuple[Pixels, Pixels]] = download
) -> dict[str, dict[str, int]]:
    """Make the dataset in ``root``, completely or not at all, unless it exists.

    Returns:
        The number of images and objects of each split.

    Raises:
        UserError: if ``root`` contains something else or cannot be written.
    """
    try:
        import pycocotools.mask  # noqa: F401
        import scipy.ndimage  # noqa: F401
    except ImportError as error:
        raise UserError(f"scenes data: {error.name} is not installed", "pip install 'mae_fast[transfer]'") from error
    record = recipe.record() | {"side": SIDE, "classes": list(CLASSES), "objects": list(OBJECTS.values())}

    def fill(folder: Path, scratch: Path) -> Any:
        return _write(folder, *load(scratch), recipe)

    counts: dict[str, dict[str, int]] = build_once(root, "scenes", record | {"sources": MAPS}, fill, _found)
    return counts


def squares(mosaic: Pixels, classes: Pixels, recipe: Recipe) -> Iterator[tuple[str, int, int]]:
    """Split, row and column of each image, from mosaic [H, W, 3] and classes [H, W].

    Images do not overlap. Their distance to the edge of their block is at least half a tile of the demo.
    """
    cell = recipe.tile // 2
    shape = (mosaic.shape[0] // cell, mosaic.shape[1] // cell)
    in_val = val_cells(shape, recipe)
    block = 2 * recipe.block * cell
    places = range(cell, block - cell - SIDE + 1, SIDE)
    for top in range(0, mosaic.shape[0] - block + 1, block):
        for left in range(0, mosaic.shape[1] - block + 1, block):
            for row in (top + place for place in places):
                for col in (left + place for place in places):
                    here = classes[row : row + SIDE, col : col + SIDE]
                    counts = np.bincount(here[here != UNLABELLED], minlength=len(CLASSES))
                    if np.sort(counts)[-2] >= LEAST_SHARE * SIDE**2:
                        yield ("val" if in_val[row // cell, col // cell] else "train"), row, col


def objects(classes: Pixels) -> Iterator[dict[str, Any]]:
    """COCO annotations, without ids, of the 4-connected regions of the classes ``OBJECTS`` in ``classes`` [H, W]."""
    import pycocotools.mask
    from scipy import ndimage

    for category in OBJECTS:
        regions, _ = ndimage.label(classes == category - 1)
        sizes = np.bincount(regions.ravel())
        for number in np.flatnonzero(sizes >= OBJECT_PIXELS):
            if number == 0:  # the background
                continue
            region = np.asfortranarray(regions == number, np.uint8)
            rle = pycocotools.mask.encode(region)
            yield {
                "category_id": category,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                "bbox": pycocotools.mask.toBbox(rle).tolist(),
                "area": int(sizes[number]),
                "iscrowd": 0,
            }


def _write(folder: Path, mosaic: Pixels, labels: Pixels, recipe: Recipe) -> dict[str, dict[str, int]]:
    classes = MERGED[on_mosaic(labels, mosaic.shape[:2])]
    categories = [{"id": category, "name": name} for category, name in OBJECTS.items()]
    coco: dict[str, Any] = {
        split: {"images": [], "annotations": [], "categories": categories} for split in ("train", "val")
    }
    for split in coco:
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
    for split, row, col in squares(mosaic, classes, recipe):
        here = (slice(row, row + SIDE), slice(col, col + SIDE))
        name, annotated = f"r{row:04}_c{col:04}.png", coco[split]
        for kind, pixels in (("images", mosaic[here]), ("masks", classes[here])):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            (folder / split / kind / name).write_bytes(png.getvalue())
        image = len(annotated["images"]) + 1
        annotated["images"].append({"id": image, "file_name": name, "height": SIDE, "width": SIDE})
        for each in objects(classes[here]):
            annotated["annotations"].append({"id": len(annotated["annotations"]) + 1, "image_id": image, **each})
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (folder / "annotations").mkdir()
    for split, annotated in coco.items():
        if not annotated["images"]:
            raise UserError(f"scenes data: no part of {split} contains two classes", "use a larger map")
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotated))
    return {split: {"images": len(x["images"]), "objects": len(x["annotations"])} for split, x in coco.items()}


def _found(root: Path) -> dict[str, dict[str, int]] | None:
    counts = {}
    for split in ("train", "val"):
        names = [{path.name for path in (root / split / kind).glob("*.png")} for kind in ("images", "masks")]
        try:
            coco = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
            listed = {image["file_name"] for image in coco["images"]}
            counts[split] = {"images": len(listed), "objects": len(coco["annotations"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if names != [listed, listed]:
            return None
    return counts
