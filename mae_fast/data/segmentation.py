"""Datasets of images and masks for semantic segmentation. The pixels of a mask are classes.

Shapes: N images, H x W pixels, crops of S x S pixels.
"""

import colorsys
import hashlib
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..models.segmentation import UNLABELLED
from .augment import ColorJitter, is_picture
from .decode import (
    MAX_PIXELS,
    NPY,
    TIFF,
    BadImage,
    Decoded,
    crop_resized,
    decode,
    npy_pixels,
    only_bad_images,
    read_bands,
    read_header,
    size_of,
)
from .folders import data_root, images_in, is_hidden, some, split_folder
from .loader import Batch, Key, KeyedBatches, LoaderConfig, raising, read_or_replace, shard_indices
from .pixel_format import RGB, PixelFormat
from .rng import CROP, generator
from .sources import Files, check_classes
from .workers import by_processes

logger = logging.getLogger(__name__)

ADE20K_CLASSES = 150
SCALES = (0.5, 2.0)  # random scales. At 1, the shorter side of the image is the side of the crop.
LARGEST_SHARE = 0.75  # largest share of a class among the labelled pixels of a crop, else it is drawn again
REDRAWS = 10
NARROW = 64  # largest ratio of the sides of an image in evaluation, which limits the number of windows
MEAN_COLOUR = (124, 116, 104)  # of ImageNet
MASKS = (".png", ".tif", ".tiff", ".npy")  # in order of priority, for masks with the same stem
MASK_DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


class SegmentationDataset(Files):
    """Images and their masks, see ``mask_values``.

    ``fingerprint`` depends only on the images, ``annotations`` on the masks.

    Attributes:
        root: folder of the images.
        masks: masks of the images, in the same order.
        first: smallest value of a class in masks. Smaller values and 255 mean no label.
        values: value of each class in masks.
    """

    chosen = True

    def __init__(self, root: Path, names: list[str], masks: Files, classes: list[str], first: int = 0) -> None:
        super().__init__(root, names, classes=classes)
        self.masks, self.first = masks, first
        self.table = np.full(256, -1, np.int16)  # value -> class, -1 for unknown values
        self.table[:first] = self.table[UNLABELLED] = UNLABELLED
        self.table[first : first + len(classes)] = np.arange(len(classes))
        self.values = np.arange(first, first + len(classes))

    @cached_property
    def annotations(self) -> str:
        """SHA-256 of the classes, and of the names and file sizes of the masks."""

        def size(name: str) -> int:
            try:
                return os.stat(self.masks.root / name).st_size
            except OSError:  # a broken link, which becomes a bad pair later
                return -1

        sizes = [size(name) for name in self.masks.names]
        return hashlib.sha256(repr((self.classes, self.first, self.masks.names, sizes)).encode()).hexdigest()

    def match_classes(self, classes: list[str], owner: str) -> None:
        """Number the classes as in ``classes``, by name. Names of ``classes`` that are not in the masks get new values.

        Args:
            owner: name of the owner of ``classes``, for messages.

        Raises:
            UserError: if the masks have classes that are not in ``classes``.
        """
        own = self.classes
        if own == tuple(classes):
            return
        check_classes(own, classes, f"{self.masks.root}", owner)
        listed = [*own, *(name for name in classes if name not in {*own})]  # in the order of their values
        self.values = self.first + np.array([listed.index(name) for name in classes])
        self.table[self.first : self.first + len(own)] = [classes.index(name) for name in own]
        self.classes = tuple(classes)

    def pair(self, index: int, pixels: PixelFormat = RGB) -> tuple[Decoded, np.ndarray]:
        """An image in the format ``pixels``, and the class of each pixel, uint8 [H, W], 255 without a label.

        ``pixels.exif`` rotates only the image, because masks are drawn on rotated images.

        Raises:
            BadImage: if image or mask cannot be used, or their sizes differ.
        """
        image = decode(self.read(index), pixels)
        name = self.masks.names[index]
        try:
            values = mask_values(self.masks.read(index))
        except BadImage as bad:
            raise BadImage(bad.reason, f"mask {name}: {bad.detail}") from bad
        if values.shape != (size := size_of(image)):
            sizes = f"{values.shape[0]} x {values.shape[1]} pixels, but the image has {size[0]} x {size[1]}"
            raise BadImage("broken", f"mask {name}: {sizes}")
        labels = self.table[values]
        if wrong := np.unique(values[labels < 0]).tolist():
            listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
            known = f"there are {len(self.classes)} classes"
            raise BadImage("unsupported", f"mask {name}: no class has value {listed}, {known}")
        return image, labels.astype(np.uint8)


def mask_values(data: bytes) -> np.ndarray:
    """Decode a mask, uint8 [H, W].

    Masks are PNG files with 1 or 8 bits of grey or a palette, or TIFF or .npy with integers. PNG files with 2 or 4 bits
    of grey are refused, because Pillow scales their values.

    Raises:
        BadImage: if it is not such a file.
    """
    if data.startswith(NPY):
        return _as_bytes(npy_pixels(data, MASK_DTYPES))
    header = read_header(data)
    if data[:4] in TIFF:
        with only_bad_images("broken"):
            return _as_bytes(read_bands(data, as_stored=True))
    if header.format != "PNG":
        raise BadImage("unsupported", f"{header.format}: masks must be {', '.join(MASKS)}")
    depth = data[24]  # in the first chunk
    if header.mode not in ("L", "P", "1") or (header.mode == "L" and depth != 8):
        raise BadImage("unsupported", f"mode {header.mode} of {depth} bits, neither 8 bits of grey nor a palette")
    with only_bad_images("broken"), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.asarray(image).astype(np.uint8)


def _as_bytes(values: np.ndarray) -> np.ndarray:
    """Convert integers [H, W] or [H, W, 1] to uint8 [H, W].

    Raises:
        BadImage: if dtype or shape are wrong, or values are not in 0..255.
    """
    if values.dtype.name not in MASK_DTYPES or values.shape[2:] not in ((), (1,)):
        raise BadImage("unsupported", f"{values.dtype} {list(values.shape)}, expected integers [H, W]")
    if values.size and (values.min() < 0 or values.max() > UNLABELLED):
        raise BadImage("unsupported", f"values {values.min()} to {values.max()}, expected 0 to {UNLABELLED}")
    made: np.ndarray = values.reshape(values.shape[:2]).astype(np.uint8)
    return made


def open_segmentation(path: Path) -> tuple[SegmentationDataset, SegmentationDataset]:
    """The datasets for training and evaluation below ``path``.

    There are two layouts:

    * Folders "train" and "val" (in any spelling of ``folders.split_folder``), each with ``images/NAME.jpg`` (or
      another image format) and ``masks/NAME.png`` (or another of ``MASKS``). Values of masks start at 0.
      ``classes.txt`` has the names of the classes, one per line. Without it, all masks are read to find the largest
      value.
    * ADE20K in the layout of its scene parsing benchmark: ``training`` and ``validation`` in ``images`` and in
      ``annotations``. Values of masks start at 1. ``objectInfo150.txt``, if it exists, has the names.

    Images without a mask, masks without an image, and other files are left out and counted in the log.

    Raises:
        UserError: if there is no such layout, no pair in a split, or no valid list of classes.
    """
    try:
        if (path / "annotations").is_dir() and not (path / "train").is_dir():  # with train/: COCO's
            classes = _ade20k_classes(path / "objectInfo150.txt")
            ade = [(path / "images" / split, path / "annotations" / split) for split in ("training", "validation")]
            train, val = (SegmentationDataset(*_match_masks(*folders), classes, first=1) for folders in ade)
            return train, val
        path = data_root(path)
        splits = [split_folder(path, split) or path / split for split in ("train", "val")]
        found = [_match_masks(split / "images", split / "masks") for split in splits]
        listed = path / "classes.txt"
        if listed.exists():
            classes = [line.strip() for line in _text(listed).rstrip().splitlines()]
        else:
            classes = _found_classes([masks for *_, masks in found])
            logger.info(f"{path}: no classes.txt, found {len(classes)} classes in masks")
        if not 2 <= len(classes) <= UNLABELLED:
            raise UserError(f"{path} has {len(classes)} classes", f"list 2 to {UNLABELLED} in {listed}, one per line")
        train, val = (SegmentationDataset(*pairs, classes) for pairs in found)
        return train, val
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror})",
            "give a folder with images/ and masks/ in train/ and val/, or ADE20K with images/ and annotations/",
        ) from error


def open_pairs(split: Path) -> SegmentationDataset | None:
    """One split, "train" or "val", of the first layout of ``open_segmentation``. None if the layout is different.

    Raises:
        UserError: as ``open_segmentation``, for the folder that contains the split.
    """
    images, masks = (split.absolute() / name for name in ("images", "masks"))
    if not images.is_dir() or not masks.is_dir():
        return None
    return next((found for found in open_segmentation(images.parent.parent) if found.root == images), None)


def _match_masks(images: Path, masks: Path) -> tuple[Path, list[str], Files]:
    """The folder of the images, the names of images with a mask, and the masks."""
    names, others = images_in(images)
    listed = [name for name in sorted(os.listdir(masks)) if not is_hidden(name)]
    of: dict[str, str] = {}
    for kind in MASKS:
        for name in listed:
            if name.lower().endswith(kind):
                of.setdefault(os.path.splitext(name)[0], name)
    stems = [os.path.splitext(name)[0] for name in names]
    paired = [(name, of[stem]) for name, stem in zip(names, stems, strict=True) if stem in of]
    if not paired:
        raise UserError(
            f"no image in {images} ({some(names)}) has a mask in {masks} ({some(listed)})",
            f"name them like the images, with {', '.join(MASKS)}",
        )
    alone = len(names) - len(paired), len(of.keys() - set(stems)), len(listed) - len(of)
    kinds = "images without a mask", "masks without an image", "files that are not masks"
    left_out = [f"{count} {kind}" for count, kind in zip(alone, kinds, strict=True) if count]
    if left_out or others:
        logger.info(f"{images}: left out {', '.join([*left_out, *([others] if others else [])])}")
    return images, [name for name, _ in paired], Files(masks, [mask for _, mask in paired])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})", "write it again, one class per line") from error


def _ade20k_classes(path: Path) -> list[str]:
    if not path.exists():
        return [str(value) for value in range(1, ADE20K_CLASSES + 1)]
    rows = [line.split("\t") for line in _text(path).splitlines()[1:] if line.strip()]
    if [row[0].strip() for row in rows] != [str(value) for value in range(1, ADE20K_CLASSES + 1)]:
        raise UserError(f"{path} must have a header and rows 1 to {ADE20K_CLASSES}", "copy it again, or remove it")
    return [row[-1].strip() for row in rows]


def _found_classes(masks: list[Files]) -> list[str]:
    """Class names for all values from 0 to the largest one in the masks."""

    def largest(of: Files, index: int) -> int:
        try:
            values = np.unique(mask_values(of.read(index)))
        except BadImage:  # counted when it is loaded
            return -1
        return max((int(value) for value in values if value != UNLABELLED), default=-1)

    with ThreadPoolExecutor(8) as pool:
        found = [value for of in masks for value in pool.map(lambda i, of=of: largest(of, i), range(len(of)))]
    return [str(i) for i in range(max(found) + 1)]


@dataclass
class Crops(Dataset[Batch]):
    """Loads the batch of a list of keys: random scale, crop, flip, colour jitter for 8-bit images, and padding.

    This is the usual recipe for UPerNet. The shorter side of the image is scaled to 0.5 to 2 times the side of the
    crop. If one class has more than 75 % of the labelled pixels of a crop, or no pixel is labelled, the crop is drawn
    again, up to ten times. Images are scaled bicubically, masks by nearest neighbour. The padding, below and at the
    right, has the values ``fill`` and no label. Another pair replaces a bad one.
    """

    source: SegmentationDataset
    config: LoaderConfig
    fill: Sequence[float] = MEAN_COLOUR

    def __post_init__(self) -> None:
        self.size, self.pixels = self.config.size[0], self.config.pixels
        self.jitter = ColorJitter(self.config.seed, self.pixels.channels) if has_jitter(self.pixels) else None

    def __getitems__(self, keys: list[Key]) -> Batch | UserError:
        n, size = len(keys), self.size
        images = in_dtype(self.fill, self.pixels.torch_dtype).repeat(n, size, size, 1)  # [N, S, S, C]
        labels = torch.full((n, size, size), UNLABELLED)
        ids: list[int] = []
        skipped: list[tuple[int, BadImage]] = []
        for i, key in enumerate(keys):
            try:
                index, (image, mask) = read_or_replace(
                    self.config, key, self.source, lambda i: self.source.pair(i, self.pixels), skipped,
                    f"check {self.source.root} and {self.source.masks.root}",
                )  # fmt: skip
            except UserError as error:
                return error  # raised in the main process, without a traceback of the worker
            ids.append(index)
            pixels, classes = self._crop(image, mask, key)
            h, w = classes.shape
            images[i, :h, :w], labels[i, :h, :w] = torch.from_numpy(pixels), torch.from_numpy(classes)
            if self.jitter:
                self.jitter(images[i : i + 1, :h, :w], *key)
        return Batch(images, torch.empty(n, 0), torch.tensor(ids), labels, tuple(skipped))

    def _crop(self, image: Decoded, labels: np.ndarray, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Crop an image and its mask: [h, w, C] and uint8 [h, w], with sides of at most the crop's."""
        rng, mask = generator(self.config.seed, CROP, *key), Image.fromarray(labels)
        scale = self.size * rng.uniform(*SCALES) / min(labels.shape)
        height, width = (max(1, round(side * scale)) for side in labels.shape)  # sides of the scaled image
        h, w = min(self.size, height), min(self.size, width)
        for _ in range(1 + REDRAWS):
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            # The part of the original image under the crop. Only this part is scaled.
            x, y = mask.width / width, mask.height / height
            box = left * x, top * y, min((left + w) * x, mask.width), min((top + h) * y, mask.height)
            if isinstance(image, Tensor):
                box = _whole_pixels(box, mask.size)
            cut = np.asarray(mask.resize((w, h), Image.Resampling.NEAREST, box))
            counts = np.bincount(cut[cut != UNLABELLED])
            if len(counts) and counts.max() <= LARGEST_SHARE * counts.sum():
                break
        if isinstance(image, Tensor):
            x0, y0, x1, y1 = map(int, box)
            pixels = crop_resized(image, (y0, x0, y1 - y0, x1 - x0), (h, w), False, self.pixels.nodata)
        else:
            pixels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC, box))
            pixels = pixels.reshape(h, w, -1)  # add the channel axis of grey images
        if rng.random() < 0.5:
            pixels, cut = pixels[:, ::-1], cut[:, ::-1]
        return pixels.copy(), cut.copy()


def has_jitter(pixels: PixelFormat) -> bool:
    """Whether training uses colour jitter: only for 8-bit images."""
    return pixels.is_plain and is_picture(pixels)


def in_dtype(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Convert pixel values to their dtype. For integers, round and clamp."""
    made = torch.tensor(values, dtype=torch.float64)
    if not dtype.is_floating_point:
        made = made.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return made.to(dtype)


Edges = tuple[float, float, float, float]  # left, top, right and bottom


def _whole_pixels(box: Edges, size: tuple[int, int]) -> Edges:
    """Round ``box`` to whole pixels of an image of ``size`` (width, height). It keeps at least one pixel."""
    left, top = (min(round(edge), side - 1) for edge, side in zip(box[:2], size, strict=True))
    return left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))


def training_segmentation(
    source: SegmentationDataset, config: LoaderConfig, fill: Sequence[float] = MEAN_COLOUR
) -> Iterator[Batch]:
    """Batches of square ``Crops`` for all epochs, from batch ``config.first`` on, with ``labels`` int64 [N, S, S].

    A batch depends only on its number, the seed and the source. Pillow decodes the images.

    Args:
        fill: value of each channel in the padding, in raw units (for uint8, 0 to 255).

    Raises:
        UserError: if too many pairs in a row cannot be used.
    """
    keys = KeyedBatches(len(source), config)
    yield from raising(by_processes(Crops(source, config, fill), keys, config.num_workers, config.on_gpu, source.root))


@dataclass
class FullImageDataset(Dataset[Batch]):
    """Loads the batch of at most one index. A bad pair is left out."""

    source: SegmentationDataset
    size: int
    pixels: PixelFormat

    def __getitems__(self, indices: list[int]) -> Batch:
        for index in indices:
            try:
                image, labels = self.source.pair(index, self.pixels)
                images = torch.from_numpy(scaled(image, self.size, self.pixels.nodata).copy())[None]
            except BadImage as bad:
                return self._none(((index, bad.bare()),))
            return Batch(images, torch.empty(1, 0), torch.tensor([index]), torch.from_numpy(labels)[None].long())
        return self._none(())

    def _none(self, skipped: tuple[tuple[int, BadImage], ...]) -> Batch:
        images = torch.empty(0, 1, 1, self.pixels.channels, dtype=self.pixels.torch_dtype)
        ids = torch.empty(0, dtype=torch.int64)
        return Batch(images, torch.empty(0, 0), ids, ids.reshape(0, 1, 1), skipped)


def scaled(image: Decoded, size: int, nodata: float | None = None) -> np.ndarray:
    """Resize a whole image for a segmentation model: raw pixels [H, W, C], with a shorter side of ``size``.

    It is resized as in ``crop_resized``.

    Raises:
        BadImage: if the result would have more than ``MAX_PIXELS``, or one side is more than ``NARROW`` times the
            other.
    """
    sides = size_of(image)
    if max(sides) > NARROW * min(sides):
        raise BadImage("unsupported", f"{sides[0]} x {sides[1]} pixels: a side is more than {NARROW} times the other")
    scale = size / min(sides)
    height, width = (max(size, round(side * scale)) for side in sides)
    if width * height > MAX_PIXELS:
        raise BadImage("too large", f"{sides[0]} x {sides[1]} pixels, scaled to {height} x {width}")
    return crop_resized(image, (0, 0, *sides), (height, width), False, nodata)


def evaluation_segmentation(source: SegmentationDataset, config: LoaderConfig) -> Iterator[Batch]:
    """All pairs, each once, one per batch. The image's shorter side is ``config.size[0]``; labels keep the mask's size.

    Bad pairs are left out and listed in ``Batch.skipped``. All ranks get the same number of batches. Some may be empty.
    """
    indices = shard_indices(len(source), 1, config)
    dataset = FullImageDataset(source, config.size[0], config.pixels)
    yield from by_processes(dataset, indices, config.num_workers, of=source.root)


def colours(labels: Tensor) -> Tensor:
    """Colours of labels [...] as uint8 [..., 3]: one for each class, black without a label."""
    golden = (math.sqrt(5) - 1) / 2  # hue steps that keep successive classes distinct
    hsv = ((i * golden % 1, 0.5 + i % 3 * 0.25, 1 - i // 3 % 3 * 0.2) for i in range(UNLABELLED))
    palette = torch.tensor([*(colorsys.hsv_to_rgb(*colour) for colour in hsv), (0, 0, 0)])
    return (palette * 255).round().byte()[labels.long().cpu()]
