"""The transfer set: squares of the demo's mosaic with a class for each pixel; connected regions of water and of ice are
the objects in them.

Folders as ``mae-fast segment`` and ``mae-fast detect`` read them:

    {train,val}/images/r0000_c0000.png, {train,val}/masks/ of the same names (values 0..6; 255: no class), classes.txt,
    annotations/instances_{train,val}.json (COCO)

A square is in the split of the demo's block that it is in, so that an encoder pre-trained on the demo's train tiles has
not seen the squares of val.
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

DEMO = Recipe()  # its blocks
SIDE = 64  # of a square, in pixels of 1/15 degree
UNLABELLED = 255
# The classes that stand for the 17 IGBP classes; those that MODIS distinguishes by the height of trees are merged.
CLASSES = ("water", "forest", "shrubs_and_savannas", "grasslands", "croplands", "snow_and_ice", "barren")
TAKEN_FOR = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, UNLABELLED, 4, UNLABELLED, 4, 5, 6], np.uint8)
LEAST_SHARE = 0.1  # of a square that its second class covers
# Classes with a visible border, by category.
OBJECTS = {CLASSES.index(name) + 1: name for name in ("water", "snow_and_ice")}
OBJECT_PIXELS = 64  # the smallest object


def build_scenes(
    root: Path, recipe: Recipe = DEMO, load: Callable[[Path], tuple[Pixels, Pixels]] = download
) -> dict[str, dict[str, int]]:
    """Make the set in ``root``, whole or not at all; one that is there is left as it is.

    Returns:
        Of each split, how many images and objects it has.

    Raises:
        UserError: if something else is there, or it cannot be made.
    """
    try:
        import pycocotools.mask  # noqa: F401
        import scipy.ndimage  # noqa: F401
    except ImportError as error:
        raise UserError(f"scenes data: {error.name} is not there", "pip install 'mae_fast[transfer]'") from error
    record = recipe.record() | {"side": SIDE, "classes": list(CLASSES), "objects": list(OBJECTS.values())}

    def fill(folder: Path, scratch: Path) -> Any:
        return _write(folder, *load(scratch), recipe)

    counts: dict[str, dict[str, int]] = build_once(root, "scenes", record | {"sources": MAPS}, fill, _found)
    return counts


def squares(mosaic: Pixels, classes: Pixels, recipe: Recipe) -> Iterator[tuple[str, int, int]]:
    """Split, row and column of each square, from mosaic [H, W, 3] and classes [H, W].

    They do not overlap, and lie half a tile of the demo's or more within their block.
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
    """COCO's annotations (without ids) of the regions of a class in ``OBJECTS``, 4-connected, in ``classes`` [H, W]."""
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
    classes = TAKEN_FOR[on_mosaic(labels, mosaic.shape[:2])]
    categories = [{"id": category, "name": name} for category, name in OBJECTS.items()]
    coco: dict[str, Any] = {
        split: {"images": [], "annotations": [], "categories": categories} for split in ("train", "val")
    }
    for split in coco:
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
    for split, row, col in squares(mosaic, classes, recipe):
        here = (slice(row, row + SIDE), slice(col, col + SIDE))
        name, told = f"r{row:04}_c{col:04}.png", coco[split]
        for kind, pixels in (("images", mosaic[here]), ("masks", classes[here])):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            (folder / split / kind / name).write_bytes(png.getvalue())
        image = len(told["images"]) + 1
        told["images"].append({"id": image, "file_name": name, "height": SIDE, "width": SIDE})
        for each in objects(classes[here]):
            told["annotations"].append({"id": len(told["annotations"]) + 1, "image_id": image, **each})
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (folder / "annotations").mkdir()
    for split, told in coco.items():
        if not told["images"]:
            raise UserError(f"scenes data: there is no square of two classes in {split}")
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(told))
    return {split: {"images": len(told["images"]), "objects": len(told["annotations"])} for split, told in coco.items()}


def _found(root: Path) -> dict[str, dict[str, int]] | None:
    counts = {}
    for split in ("train", "val"):
        names = [{path.name for path in (root / split / kind).glob("*.png")} for kind in ("images", "masks")]
        try:
            told = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
            listed = {image["file_name"] for image in told["images"]}
            counts[split] = {"images": len(listed), "objects": len(told["annotations"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if names != [listed, listed]:
            return None
    return counts
