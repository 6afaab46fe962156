"""COCO datasets with squares and discs in different colours, for the tests of detection."""

import json

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "square"}, {"id": 3, "name": "disc"}]  # sorted by id: disc, square
COLOURS = {3: (250, 40, 40), 7: (40, 60, 250)}


def outlined(left, top, side):
    """The outline of a disc."""
    angles = np.arange(24) * np.pi / 12
    middle = np.array([left + side / 2, top + side / 2])
    return (middle + side / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)).reshape(-1).round(2).tolist()


def drawn(height, width, objects):
    """A grey image with ``objects``: (category, left, top, side)."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    rows, columns = np.mgrid[:height, :width] + 0.5
    for category, left, top, side in objects:
        inside = np.maximum(abs(columns - left - side / 2), abs(rows - top - side / 2)) < side / 2
        if category == 3:
            inside = np.hypot(columns - left - side / 2, rows - top - side / 2) < side / 2
        pixels[inside] = COLOURS[category]
    return Image.fromarray(pixels)


def annotated(number, image_id, category, left, top, side):
    """A COCO annotation."""
    right, bottom = left + side, top + side
    outline = outlined(left, top, side) if category == 3 else [left, top, right, top, right, bottom, left, bottom]
    return {
        "id": number, "image_id": image_id, "category_id": category, "bbox": [left, top, side, side],
        "area": side * side, "iscrowd": 0, "segmentation": [outline],
    }  # fmt: skip


def write_split(root, split, images, annotations, categories=CATEGORIES, year="2017", folder=None):
    """Write images and annotations of a split.

    Args:
        images: COCO image entries with the additional key "pixels"; without it, the image file is missing.
    """
    folder = root / (folder or f"{split}{year}")
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    entries = []
    for image in images:
        image = dict(image)
        pixels = image.pop("pixels", None)
        if pixels is not None:
            pixels.save(folder / image["file_name"])
        entries.append(image)
    listed = {"images": entries, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}{year}.json").write_text(json.dumps(listed))


def scenes(count, seed=0, height=28, width=32, objects=2):
    """``count`` images with annotations. Their ids start at 100."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(count):
        number = 100 + i
        put = []
        for j in range(objects):
            side = int(rng.integers(9, 14))
            # One object in each half of the image.
            left = int(rng.integers(j * width // objects, (j + 1) * width // objects - side + 2))
            put.append((int(rng.choice([3, 7])), min(left, width - side), int(rng.integers(0, height - side)), side))
        for one in put:
            annotations.append(annotated(len(annotations) + 1, number, *one))
        pixels = drawn(height, width, put)
        images.append({"id": number, "file_name": f"{i:03}.jpg", "height": height, "width": width, "pixels": pixels})
    return images, annotations


def write_scenes(root, train=8, val=4):
    """Write both splits."""
    write_split(root, "train", *scenes(train))
    write_split(root, "val", *scenes(val, seed=1))
    return root
