"""Datasets in COCO's format (Lin et al., ECCV 2014): images with boxes, classes and masks of objects.

Training uses large-scale jitter (Ghiasi et al., CVPR 2021), evaluation whole images.

Shapes: N images, M objects of an image, S side of the square that images are scaled to.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..errors import UserError
from ..models.features import IMAGENET_MEAN
from .decode import MAX_PIXELS, BadImage, decode, size_of
from .folders import SPLITS
from .loader import Batch, Key, KeyedBatches, LoaderConfig, raising, read_or_replace, shard_indices
from .pixel_format import PixelFormat
from .rng import CROP, generator
from .sources import Files, Source, check_classes
from .workers import by_processes

SCALE = (0.1, 2.0)  # range of the jitter. At 1, the image's longer side is that of the square.
FILL = [round(255 * mean) for mean in IMAGENET_MEAN]  # colour of the padding, zero after standardisation


class Coco(Files):
    """One split of the dataset in ``folder``.

    Annotations are in ``annotations/instances_SPLIT2017.json`` or ``annotations/instances_SPLIT.json``, images in
    ``SPLIT2017/``, ``SPLIT/images/`` or ``SPLIT/``. SPLIT may have any of its usual spellings.

    Invalid entries are left out and counted. Boxes are clipped to their image. The split "train" also leaves out images
    without objects, where crowds are not counted as objects.

    Args:
        masks: require a mask for each object.

    Attributes:
        classes: names of the categories, in the order of their ids. Label 1 is the first one, 0 the background.
        categories: ids of the categories.
        predicted: after ``match_classes``, the category id of each class of the model. None: no such category.
        image_ids: the id of each image in the file.
        sizes: height and width of each image.
        left_out: a message with the entries that are left out. Empty if there are none.

    Raises:
        UserError: if there is no such split, or no usable image in it.
    """

    chosen = True

    def __init__(self, folder: Path, split: str, masks: bool = True) -> None:
        try:
            import pycocotools  # noqa: F401  # for masks and metrics
        except ImportError as error:
            raise UserError("datasets in COCO's format need pycocotools", "pip install 'mae_fast[transfer]'") from error
        spellings = SPLITS[split]
        files = [f"annotations/instances_{name}{year}.json" for name in spellings for year in ("2017", "")]
        path = _first(folder, files, Path.is_file)
        places = [place for name in spellings for place in (f"{name}2017", f"{name}/images", name)]
        root = _first(folder, places, Path.is_dir)
        found = _load(path)
        categories = _categories(path, found["categories"])
        bad_images: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        images: dict[int, dict[str, Any]] = {}
        for image in found["images"]:
            if why := _wrong_image(image, images):
                bad_images[why] += 1
            else:
                images[image["id"]] = image
        objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        seen: set[int] = set()
        for annotation in found["annotations"]:
            if why := _wrong(annotation, images, categories, seen, masks):
                bad[why] += 1
            else:
                seen.add(annotation["id"])
                objects[annotation["image_id"]].append(_cleaned(annotation, images[annotation["image_id"]], masks))
        for number, listed in list(objects.items()):
            if split == "train" and all(x["iscrowd"] for x in listed):
                bad_images["without objects"] += 1
                del objects[number]
        self.image_ids = tuple(objects)
        names = [images[number]["file_name"] for number in objects]
        super().__init__(root, names, classes=list(categories.values()))
        self.categories = tuple(categories)
        self.predicted: tuple[int | None, ...] = self.categories
        self.sizes = tuple((int(images[number]["height"]), int(images[number]["width"])) for number in objects)
        left_out = [
            f"{sum(counts.values())} of {of} {what} ({', '.join(f'{why}: {n}' for why, n in counts.most_common())})"
            for counts, of, what in (
                (bad, len(found["annotations"]), "annotations"),
                (bad_images, len(found["images"]), "images"),
            )
            if counts
        ]
        self.left_out = f"{path}: left out {' and '.join(left_out)}" if left_out else ""
        if not seen or not objects:
            hint = "train on boxes with --no-masks" if bad[_NO_MASK] else "give another instances_*.json file"
            raise UserError(f"{self.left_out}: no image is left" if left_out else f"{path} is empty", hint)
        # One block of bytes: pages with many small Python objects would be copied into each process that reads them.
        kept = [json.dumps(listed).encode() for listed in objects.values()]
        self._ends = np.array([0, *accumulate(map(len, kept))])
        self._kept = b"".join(kept)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the list of images and their annotations."""
        content = f"{super().fingerprint} {self.categories} {self.classes} {self.image_ids} {self.sizes}"
        return hashlib.sha256(content.encode() + self._kept).hexdigest()

    def match_classes(self, classes: Sequence[str], owner: str) -> None:
        """Match the classes of a model with the categories, by name. Classes without a category are logged.

        Args:
            owner: name of the owner of ``classes``, for messages.

        Raises:
            UserError: if there are categories that the model does not have.
        """
        if self.classes == tuple(classes):
            return
        check_classes(self.classes, classes, f"{self.root}", owner)
        numbers = dict(zip(self.classes, self.categories, strict=True))
        self.predicted = tuple(numbers.get(name) for name in classes)

    def objects(self, index: int) -> list[dict[str, Any]]:
        """The objects of an image, with crowds, in the format of the file.

        The keys are "id", "image_id", "category_id", "bbox" (left, top, width, height), "area", "iscrowd" (0 or 1) and,
        with masks, "segmentation".
        """
        start, end = self._ends[index : index + 2].tolist()
        listed: list[dict[str, Any]] = json.loads(self._kept[start:end])
        return listed

    def targets(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The objects of an image, without crowds, as (boxes, labels, masks).

        Boxes are fp32 [M, 4] (left, top, right, bottom), labels int64 [M], masks uint8 [M, H, W] or None.
        """
        from pycocotools import mask

        listed = [x for x in self.objects(index) if not x["iscrowd"]]
        boxes = torch.tensor([x["bbox"] for x in listed], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([1 + self.categories.index(x["category_id"]) for x in listed], dtype=torch.int64)
        if not listed or "segmentation" not in listed[0]:
            return boxes.float(), labels, None
        decoded = mask.decode([rle(x["segmentation"], *self.sizes[index]) for x in listed])  # [H, W, M]
        return boxes.float(), labels, torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))

    def pixels(self, source: Source, index: int, exif: bool) -> Tensor:
        """Decode an image, uint8 [3, H, W]. ``source`` is this dataset or a cache of it.

        Raises:
            BadImage: if the image cannot be used, or its size differs from that in the annotations.
        """
        image = decode(source.read(index), PixelFormat(exif=exif))
        (h, w), (height, width) = size_of(image), self.sizes[index]
        if (h, w) != (height, width):
            raise BadImage("unsupported", f"{h} x {w} pixels, but the annotations have {height} x {width}")
        pixels: Tensor = tv.pil_to_tensor(image)
        return pixels


def _first(folder: Path, names: list[str], is_there: Callable[[Path], bool]) -> Path:
    for name in names:
        if is_there(folder / name):
            return folder / name
    raise UserError(f"{folder} has none of {', '.join(names)}", "give a folder with the layout of COCO")


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})", "download it again") from error
    lists = ("images", "annotations", "categories")
    missing = [name for name in lists if not isinstance(found, dict) or not isinstance(found.get(name), list)]
    if missing:
        raise UserError(
            f"{path} has no list of {' or '.join(missing)}", "give a file in the format of COCO's instances_*.json"
        )
    return {name: found[name] for name in lists}


def _categories(path: Path, listed: list[Any]) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    found = {x["id"]: x["name"] for x in listed if isinstance(x, dict) and _has(x, id=int, name=str)}
    if not found or len(found) < len(listed):
        raise UserError(
            f"{path} must list categories, each with a unique id and a name",
            "fix its categories",
        )
    return dict(sorted(found.items()))


def _has(entry: dict[str, Any], **kinds: type) -> bool:
    """Whether ``entry`` has values of exactly these types. True is not an int here."""
    return all(type(entry.get(name)) is kind for name, kind in kinds.items())


def _numbers(values: Any, count: int) -> bool:
    """Whether ``values`` is a list of ``count`` finite numbers below 1e9."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(x) in (int, float) and abs(x) < 1e9 for x in values)  # false for NaN
    )


_MALFORMED, _DUPLICATE, _NO_MASK = "malformed", "duplicate id", "no mask that fits the image"


def _wrong_image(image: Any, seen: Mapping[int, Any]) -> str | None:
    """The reason why an entry for an image cannot be used, or None."""
    if not isinstance(image, dict) or not _has(image, id=int, file_name=str):
        return _MALFORMED
    name, sides = image["file_name"], [image.get("height", 0), image.get("width", 0)]
    if not name.isprintable() or not _numbers(sides, 2) or min(sides) < 1 or math.prod(sides) > MAX_PIXELS:
        return _MALFORMED
    return _DUPLICATE if image["id"] in seen else None


def _wrong(
    annotation: Any, images: Mapping[int, Any], categories: Mapping[int, str], seen: set[int], masks: bool
) -> str | None:
    """The reason why an annotation cannot be used, or None."""
    if not isinstance(annotation, dict) or not _has(annotation, id=int, image_id=int, category_id=int):
        return _MALFORMED
    if annotation["id"] in seen:
        return _DUPLICATE
    if annotation["image_id"] not in images:
        return "unknown image"
    if annotation["category_id"] not in categories:
        return "unknown category"
    image = images[annotation["image_id"]]
    if not _numbers(annotation.get("bbox"), 4) or min(_clipped(annotation["bbox"], image)[2:]) <= 0:
        return "no box inside the image"
    if masks and not _is_mask(annotation.get("segmentation"), int(image["height"]), int(image["width"])):
        return _NO_MASK
    return None


def _clipped(box: list[float], image: dict[str, Any]) -> list[float]:
    """The part of a box inside the image: left, top, width, height. Width or height is <= 0 if there is none."""
    left, top, width, height = box
    x, y = max(left, 0), max(top, 0)
    return [x, y, min(left + width, image["width"]) - x, min(top + height, image["height"]) - y]


def _is_mask(segmentation: Any, height: int, width: int) -> bool:
    """Whether ``segmentation`` is polygons or run lengths (RLE) that are safe for pycocotools."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        longest = max(height, width)
        return bool(segmentation) and all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and _numbers(polygon, len(polygon))
            # pycocotools visits every pixel of an outline, so points far outside take very long.
            and max(map(abs, polygon)) <= 3 * longest
            for polygon in segmentation
        )
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        return all(type(x) is int and x >= 0 for x in counts) and sum(counts) == height * width
    if not isinstance(counts, str) or not counts.isascii():
        return False
    runs = {"size": [height, width], "counts": counts.encode()}
    try:
        # If runs end too early, pycocotools leaves the other pixels uninitialized.
        return bool(mask.encode(np.asfortranarray(mask.decode(runs)))["counts"] == runs["counts"])
    except ValueError:
        return False


def _cleaned(annotation: dict[str, Any], image: dict[str, Any], masks: bool) -> dict[str, Any]:
    box = _clipped(annotation["bbox"], image)
    area = annotation.get("area")
    kept = {name: annotation[name] for name in ("id", "image_id", "category_id")}
    kept |= {"bbox": box, "area": area if _numbers([area], 1) else box[2] * box[3]}
    kept["iscrowd"] = int(bool(annotation.get("iscrowd")))
    return kept | {"segmentation": annotation["segmentation"]} if masks else kept


def rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A mask in the RLE format of pycocotools."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        joined: dict[str, Any] = mask.merge(mask.frPyObjects(segmentation, height, width))
        return joined
    if isinstance(segmentation["counts"], list):
        made: dict[str, Any] = mask.frPyObjects(segmentation, height, width)
        return made
    return {**segmentation, "counts": segmentation["counts"].encode()}


@dataclass(frozen=True)
class DetectionBatch(Batch):
    """A batch of N images of S x S pixels.

    Attributes:
        targets: for each image, "boxes" fp32 [M, 4] (left, top, right, bottom), "labels" int64 [M] from 1 and, if
            objects have masks, "masks" uint8 [M, S, S]. Empty in evaluation.
    """

    targets: tuple[dict[str, Tensor], ...] = ()

    def _map(self, f: Callable[[Tensor], Tensor]) -> "DetectionBatch":
        moved = tuple({name: f(x) for name, x in target.items()} for target in self.targets)
        return replace(self, images=f(self.images), noise=f(self.noise), ids=f(self.ids), targets=moved)


def jittered(
    rng: np.random.Generator,
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    size: int,
    scale: tuple[float, float] = SCALE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Large-scale jitter of an image and its objects: random scale, flip, and crop of S x S pixels, padded.

    Objects with less than a pixel of width or height in the crop are dropped. The box of a cut object becomes that of
    the rest of its mask.

    Args:
        image: uint8 [3, H, W].
        boxes, labels, masks: from ``Coco.targets``.
        size: S.
        scale: smallest and largest factor.

    Returns:
        The image, uint8 [S, S, 3], and its entry of ``DetectionBatch.targets``.
    """
    height, width = image.shape[1:]
    factor = rng.uniform(*scale) * min(size / height, size / width)
    scaled = max(1, int(height * factor)), max(1, int(width * factor))
    top, left = (int(rng.integers(max(0, side - size) + 1)) for side in scaled)
    h, w = (min(side, size) for side in scaled)
    flip = rng.random() < 0.5

    def moved(x: Any, fill: Any = 0, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> Any:
        x = tv.resize(x, list(scaled), interpolation, antialias=True)
        x = tv.crop(x, top, left, h, w)
        return tv.pad(tv.horizontal_flip(x) if flip else x, [0, 0, size - w, size - h], fill=fill)

    pixels = moved(image, FILL)
    put = moved(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))).as_subclass(Tensor)
    whole = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor([scaled[1] / width, scaled[0] / height])
    target = {"boxes": put, "labels": labels}
    kept = (put[:, 2:] - put[:, :2] >= 1).all(1)
    if masks is not None:
        # Not ``tv_tensors.Mask``: its "nearest" interpolation is off by up to half a pixel.
        target["masks"] = moved(masks, 0, InterpolationMode.NEAREST_EXACT)
        kept &= (target["masks"] > 0).flatten(1).any(1)
        cut = kept & (whole - (put[:, 2:] - put[:, :2]) > 0.01).any(1)
        put[cut] = masks_to_boxes(target["masks"][cut]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return pixels.permute(1, 2, 0).contiguous(), {name: x[kept] for name, x in target.items()}


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image after its longer side is scaled to ``size``."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def padded_square(image: Tensor, size: int) -> np.ndarray:
    """Image uint8 [3, H, W] -> [S, S, 3]: the longer side is resized to ``size``, and the rest padded."""
    height, width = image.shape[1:]
    h, w = fitted(height, width, size)
    resized = tv.resize(image, [h, w], InterpolationMode.BILINEAR, antialias=True)
    padded = tv.pad(resized, [0, 0, size - w, size - h], fill=FILL)
    return np.ascontiguousarray(padded.permute(1, 2, 0).numpy())


def _batch(
    images: list[Tensor],
    ids: list[int],
    skipped: list[tuple[int, BadImage]],
    targets: list[dict[str, Tensor]],
    size: int,
) -> DetectionBatch:
    stacked = torch.stack(images) if images else torch.empty(0, size, size, 3, dtype=torch.uint8)
    placed = torch.tensor(ids, dtype=torch.int64)
    return DetectionBatch(stacked, torch.empty(len(ids), 0), placed, None, tuple(skipped), tuple(targets))


@dataclass
class _Jittered(Dataset[DetectionBatch]):
    """Loads the batch of a list of keys. Another image replaces a bad one."""

    source: Source
    coco: Coco
    config: LoaderConfig
    scale: tuple[float, float]

    def __getitems__(self, keys: list[Key]) -> DetectionBatch | UserError:
        skipped: list[tuple[int, BadImage]] = []
        try:
            made = [self._one(key, skipped) for key in keys]
        except UserError as error:
            return error  # raised in the main process, without a traceback of the worker
        ids, images, targets = (list(x) for x in zip(*made, strict=True))
        return _batch(images, ids, skipped, targets, self.config.size[0])

    def _one(self, key: Key, skipped: list[tuple[int, BadImage]]) -> tuple[int, Tensor, dict[str, Tensor]]:
        config = self.config
        i, pixels = read_or_replace(
            config, key, self.coco, lambda i: self.coco.pixels(self.source, i, config.pixels.exif), skipped,
            f"list them with 'mae-fast data check {self.coco.root}'",
        )  # fmt: skip
        rng = generator(config.seed, CROP, *key)
        return i, *jittered(rng, pixels, *self.coco.targets(i), config.size[0], self.scale)


def training_detections(
    source: Source, coco: Coco, config: LoaderConfig, scale: tuple[float, float] = SCALE
) -> Iterator[DetectionBatch]:
    """Batches of ``jittered`` images for all epochs, from batch ``config.first`` on.

    A batch depends only on its number, the seed and the source. Pillow decodes the images.

    Args:
        source: reads the images of ``coco``: ``coco`` itself, or a cache of it.
        scale: smallest and largest factor of the jitter.

    Raises:
        UserError: if too many images in a row cannot be used.
    """
    keys = KeyedBatches(len(coco), config)
    samples = _Jittered(source, coco, config, scale)
    yield from raising(by_processes(samples, keys, config.num_workers, config.on_gpu, coco.root))


@dataclass
class _Fitted(Dataset[DetectionBatch]):
    """Loads the batch of a list of indices. Bad images are left out."""

    coco: Coco
    size: int
    exif: bool

    def __getitems__(self, indices: list[int]) -> DetectionBatch:
        ids, images, skipped = [], [], []
        for i in indices:
            try:
                pixels = self.coco.pixels(self.coco, i, self.exif)
            except BadImage as bad:
                skipped.append((i, bad.bare()))
                continue
            images.append(torch.from_numpy(padded_square(pixels, self.size)))
            ids.append(i)
        return _batch(images, ids, skipped, [], self.size)


def evaluation_detections(coco: Coco, config: LoaderConfig) -> Iterator[DetectionBatch]:
    """Every image once, ``fitted`` and padded. Ranks and bad images are handled as in ``evaluation_batches``."""
    indices = shard_indices(len(coco), config.batch_size, config)
    yield from by_processes(
        _Fitted(coco, config.size[0], config.pixels.exif), indices, config.num_workers, of=coco.root
    )
