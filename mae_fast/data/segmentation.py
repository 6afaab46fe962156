"""Images with a mask each, whose pixels are classes, for training and evaluation of semantic segmentation.

Shapes: N images, H x W pixels, S x S pixels of a crop.
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
SCALES = (0.5, 2.0)  # of an image whose shorter side has the crop's length at 1
LARGEST_SHARE = 0.75  # of a class among a crop's labelled pixels, or another crop is drawn
REDRAWS = 10
NARROW = 64  # ratio of the sides of a whole image; each part of it as long as the other side is a window or two
MEAN_COLOUR = (124, 116, 104)  # ImageNet's
MASKS = (".png", ".tif", ".tiff", ".npy")  # of several masks with the same stem the first kind is read
MASK_DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


class SegmentationDataset(Files):
    """Images, and a mask of each, see ``mask_values``.

    ``fingerprint`` is the images' alone, ``annotations`` that of the masks.

    Attributes:
        root: the images' folder.
        masks: of each image, in the same order.
        first: the smallest value of a class in masks; those below it are not labelled, nor is 255.
        values: the value of each class in masks.
    """

    chosen = True

    def __init__(self, root: Path, names: list[str], masks: Files, classes: list[str], first: int = 0) -> None:
        super().__init__(root, names, classes=classes)
        self.masks, self.first = masks, first
        self.table = np.full(256, -1, np.int16)  # of each value its class, -1: it is none
        self.table[:first] = self.table[UNLABELLED] = UNLABELLED
        self.table[first : first + len(classes)] = np.arange(len(classes))
        self.values = np.arange(first, first + len(classes))

    @cached_property
    def annotations(self) -> str:
        """SHA-256 of the classes, and of the masks' names and sizes in bytes."""

        def size(name: str) -> int:
            try:
                return os.stat(self.masks.root / name).st_size
            except OSError:  # a link to nothing: a bad pair
                return -1

        sizes = [size(name) for name in self.masks.names]
        return hashlib.sha256(repr((self.classes, self.first, self.masks.names, sizes)).encode()).hexdigest()

    def match_classes(self, classes: list[str], owner: str) -> None:
        """Number the classes as in ``classes``, by name. Those that are not among them get the values after the others.

        Args:
            owner: has ``classes``, for messages.

        Raises:
            UserError: if there are classes that ``owner`` does not have.
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
        """The image as ``pixels`` says, and the class of each pixel, uint8 [H, W], 255 where it is not labelled.

        ``pixels.exif`` turns the image alone: masks are drawn of what viewers show.

        Raises:
            BadImage: if one of them cannot be used, or they do not fit each other.
        """
        image = decode(self.read(index), pixels)
        name = self.masks.names[index]
        try:
            values = mask_values(self.masks.read(index))
        except BadImage as bad:
            raise BadImage(bad.reason, f"mask {name}: {bad.detail}") from bad
        if values.shape != (size := size_of(image)):
            sizes = f"{values.shape[0]} x {values.shape[1]} pixels, its image {size[0]} x {size[1]}"
            raise BadImage("broken", f"mask {name}: {sizes}")
        labels = self.table[values]
        if wrong := np.unique(values[labels < 0]).tolist():
            listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
            raise BadImage("unsupported", f"mask {name}: no class has value {listed}; there are {len(self.classes)}")
        return image, labels.astype(np.uint8)


def mask_values(data: bytes) -> np.ndarray:
    """The values of an encoded mask, uint8 [H, W].

    It is a PNG of one channel, grey of 8 bits or 1, or a palette's indices; or a TIFF or .npy of integers. (PNG with
    fewer bits of grey is read as shades between black and white, no numbers.)

    Raises:
        BadImage: if it is something else.
    """
    if data.startswith(NPY):
        return _as_bytes(npy_pixels(data, MASK_DTYPES))
    header = read_header(data)
    if data[:4] in TIFF:
        with only_bad_images("broken"):
            return _as_bytes(read_bands(data, as_stored=True))
    if header.format != "PNG":
        raise BadImage("unsupported", f"{header.format}: masks are {', '.join(MASKS)}")
    depth = data[24]  # in the header's chunk, which comes first
    if header.mode not in ("L", "P", "1") or (header.mode == "L" and depth != 8):
        raise BadImage("unsupported", f"mode {header.mode} of {depth} bits, neither 8 bits of grey nor a palette")
    with only_bad_images("broken"), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.asarray(image).astype(np.uint8)


def _as_bytes(values: np.ndarray) -> np.ndarray:
    """Integers [H, W] or [H, W, 1] as uint8 [H, W].

    Raises:
        BadImage: if they are others, or not in 0 to 255.
    """
    if values.dtype.name not in MASK_DTYPES or values.shape[2:] not in ((), (1,)):
        raise BadImage("unsupported", f"{values.dtype} {list(values.shape)}, masks are integers [H, W]")
    if values.size and (values.min() < 0 or values.max() > UNLABELLED):
        raise BadImage("unsupported", f"values {values.min()} to {values.max()}, masks have 0 to {UNLABELLED}")
    made: np.ndarray = values.reshape(values.shape[:2]).astype(np.uint8)
    return made


def open_segmentation(path: Path) -> tuple[SegmentationDataset, SegmentationDataset]:
    """The images to train on and to evaluate on below ``path``, and their masks.

    Either "train" and "val" (in any spelling of ``folders.split_folder``) with ``images/NAME.jpg`` (or another format)
    and ``masks/NAME.png`` each (or another of ``MASKS``), values from 0, and the classes' names in ``classes.txt``, one
    a line; without it every mask is read, and there are as many classes as the greatest value asks for. Or ADE20K as
    its scene parsing benchmark has it: ``training`` and ``validation`` in ``images`` and in ``annotations``, values
    from 1, names in ``objectInfo150.txt`` if it is there.

    Images without a mask, masks without an image, and files that are neither are left out; their numbers are logged.

    Raises:
        UserError: if there is neither, or no pair in a split, or no good list of classes.
    """
    try:
        if (path / "annotations").is_dir() and not (path / "train").is_dir():  # beside train/ they may be COCO's
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
            logger.info(f"{path}: no classes.txt, masks hold {len(classes)} classes")
        if not 2 <= len(classes) <= UNLABELLED:
            raise UserError(f"{path} has {len(classes)} classes", f"list 2 to {UNLABELLED} in {listed}, one a line")
        train, val = (SegmentationDataset(*pairs, classes) for pairs in found)
        return train, val
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror})",
            "give a folder with images/ and masks/ in train/ and in val/, or ADE20K's with images/ and annotations/",
        ) from error


def open_pairs(split: Path) -> SegmentationDataset | None:
    """One split of the first layout of ``open_segmentation``, "train" or "val"; None if it does not have that layout.

    Raises:
        UserError: if ``open_segmentation`` refuses the folder that the split is in.
    """
    images, masks = (split.absolute() / name for name in ("images", "masks"))
    if not images.is_dir() or not masks.is_dir():
        return None
    return next((found for found in open_segmentation(images.parent.parent) if found.root == images), None)


def _match_masks(images: Path, masks: Path) -> tuple[Path, list[str], Files]:
    """The images' folder, the names of those with a mask, and the masks."""
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
            f"they go by the same name, masks with {', '.join(MASKS)}",
        )
    alone = len(names) - len(paired), len(of.keys() - set(stems)), len(listed) - len(of)
    kinds = "images without a mask", "masks without an image", "files that are no masks"
    left_out = [f"{count} {kind}" for count, kind in zip(alone, kinds, strict=True) if count]
    if left_out or others:
        logger.info(f"{images}: left out {', '.join([*left_out, *([others] if others else [])])}")
    return images, [name for name, _ in paired], Files(masks, [mask for _, mask in paired])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason})", "write it again, one class a line") from error


def _ade20k_classes(path: Path) -> list[str]:
    if not path.exists():
        return [str(value) for value in range(1, ADE20K_CLASSES + 1)]
    rows = [line.split("\t") for line in _text(path).splitlines()[1:] if line.strip()]
    if [row[0].strip() for row in rows] != [str(value) for value in range(1, ADE20K_CLASSES + 1)]:
        raise UserError(f"{path} must have a header and rows 1 to {ADE20K_CLASSES}", "copy it again, or remove it")
    return [row[-1].strip() for row in rows]


def _found_classes(masks: list[Files]) -> list[str]:
    """Numbers from 0 to the greatest value."""

    def greatest(of: Files, index: int) -> int:
        try:
            values = np.unique(mask_values(of.read(index)))
        except BadImage:  # counted when its turn comes
            return -1
        return max((int(value) for value in values if value != UNLABELLED), default=-1)

    with ThreadPoolExecutor(8) as pool:
        found = [value for of in masks for value in pool.map(lambda i, of=of: greatest(of, i), range(len(of)))]
    return [str(i) for i in range(max(found) + 1)]


@dataclass
class Crops(Dataset[Batch]):
    """Makes a batch of keys: of each pair a part, scaled, cropped, flipped, colours of pictures changed, padded.

    The recipe of UperNet's users: the image is scaled so that its shorter side is 0.5 to 2 times the crop's; a crop in
    which one class has more than 75 % of the labelled pixels, or none is labelled, is drawn anew up to ten times.
    Images are scaled bicubically, masks take the nearest pixel. The area beyond the image, below and at the right, has
    the values ``fill`` of the channels and no label. A bad pair's place goes to another pair.
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
                    f"look at {self.source.root} and {self.source.masks.root}",
                )  # fmt: skip
            except UserError as error:
                return error  # raised in the main process: a worker would wrap it in its own traceback
            ids.append(index)
            pixels, classes = self._crop(image, mask, key)
            h, w = classes.shape
            images[i, :h, :w], labels[i, :h, :w] = torch.from_numpy(pixels), torch.from_numpy(classes)
            if self.jitter:
                self.jitter(images[i : i + 1, :h, :w], *key)
        return Batch(images, torch.empty(n, 0), torch.tensor(ids), labels, tuple(skipped))

    def _crop(self, image: Decoded, labels: np.ndarray, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """[h, w, C] and uint8 [h, w], sides up to the crop's."""
        rng, mask = generator(self.config.seed, CROP, *key), Image.fromarray(labels)
        scale = self.size * rng.uniform(*SCALES) / min(labels.shape)
        height, width = (max(1, round(side * scale)) for side in labels.shape)  # of the scaled image
        h, w = min(self.size, height), min(self.size, width)
        for _ in range(1 + REDRAWS):
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            # The crop's part of the unscaled image: only this part is scaled.
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
            pixels = pixels.reshape(h, w, -1)  # grey has no last axis
        if rng.random() < 0.5:
            pixels, cut = pixels[:, ::-1], cut[:, ::-1]
        return pixels.copy(), cut.copy()


def has_jitter(pixels: PixelFormat) -> bool:
    """Whether the colours of images in training are changed: those of 8-bit pictures."""
    return pixels.is_plain and is_picture(pixels)


def in_dtype(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Values of pixels in their dtype: rounded to whole numbers that it has, or floating."""
    made = torch.tensor(values, dtype=torch.float64)
    if not dtype.is_floating_point:
        made = made.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return made.to(dtype)


Edges = tuple[float, float, float, float]  # left, top, right and bottom


def _whole_pixels(box: Edges, size: tuple[int, int]) -> Edges:
    """``box`` in an image of ``size`` (width, height), moved to the nearest whole pixels; at least one pixel."""
    left, top = (min(round(edge), side - 1) for edge, side in zip(box[:2], size, strict=True))
    return left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))


def training_segmentation(
    source: SegmentationDataset, config: LoaderConfig, fill: Sequence[float] = MEAN_COLOUR
) -> Iterator[Batch]:
    """``Crops``, squares, of all epochs, from batch ``config.first`` on; ``labels`` int64 [N, S, S].

    A batch depends on its number, the seed and the source alone. Pillow decodes.

    Args:
        fill: value of each channel beyond the image, in the pixels' units (of uint8: 0 to 255).

    Raises:
        UserError: if pairs cannot be used and no others are found for them.
    """
    keys = KeyedBatches(len(source), config)
    yield from raising(by_processes(Crops(source, config, fill), keys, config.num_workers, config.on_gpu, source.root))


@dataclass
class FullImageDataset(Dataset[Batch]):
    """Makes a batch of one place in the source, or of none; a bad pair is left out of it."""

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
    """The raw pixels [H, W, C] that a segmentation model takes of a whole image: its shorter side is ``size`` pixels.

    It is resized as in ``crop_resized``.

    Raises:
        BadImage: if it is so long and narrow that it grows beyond ``MAX_PIXELS``, or that one side is more than
            ``NARROW`` times the other.
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
    """Every pair once, a batch each: the image's shorter side is ``config.size[0]``, labels have the mask's size.

    Bad pairs are left out and listed in ``Batch.skipped``. All ranks get the same number of batches; some are empty.
    """
    indices = shard_indices(len(source), 1, config)
    dataset = FullImageDataset(source, config.size[0], config.pixels)
    yield from by_processes(dataset, indices, config.num_workers, of=source.root)


def colours(labels: Tensor) -> Tensor:
    """uint8 [..., 3] to show labels [...]: a colour for each class, black where there is none."""
    golden = (math.sqrt(5) - 1) / 2  # steps of hue that leave neighbours far apart
    hsv = ((i * golden % 1, 0.5 + i % 3 * 0.25, 1 - i // 3 % 3 * 0.2) for i in range(UNLABELLED))
    palette = torch.tensor([*(colorsys.hsv_to_rgb(*colour) for colour in hsv), (0, 0, 0)])
    return (palette * 255).round().byte()[labels.long().cpu()]
