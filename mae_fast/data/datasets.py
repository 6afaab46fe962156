"""Any map-style dataset as a source of images."""

import io
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import UserError
from .decode import BadImage, only_bad_images
from .sources import Files, Source

logger = logging.getLogger(__name__)


class MapDataset(Source):
    """A dataset whose items are images, or (image, label): a ``torch.utils.data.Dataset`` with a length, or a sequence.

    An image is a PIL image, an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W]. It keeps its dtype.

    Args:
        name: tells the run that this is the same dataset when it is resumed, together with the length.
        key: of the image, where items are dicts, as torchgeo's are. The label is "label".
        exif: turn PIL images as their EXIF orientation says.
        labelled: whether items have labels. They are those of the attribute ``targets`` if it has one for each item,
            else all items are read once; the classes' names those of ``classes``.

    Raises:
        UserError: if it has no length or no items by number, or no labels where they are wanted.
    """

    def __init__(
        self, dataset: Any, name: str, key: str | None = None, labelled: bool = False, exif: bool = False
    ) -> None:
        if isinstance(dataset, IterableDataset) or not all(hasattr(dataset, x) for x in ("__len__", "__getitem__")):
            raise UserError(
                f"data: {type(dataset).__name__} gives its items one after the other",
                "give one with __len__ and __getitem__: epochs differ in order, and runs resume at any image",
            )
        if not len(dataset):
            raise UserError(f"data: the dataset {name!r} is empty", "give one with images")
        self.dataset, self.key, self.exif = dataset, key, exif
        labels, classes = self._labels() if labelled else (None, [])
        super().__init__(Path(name), [f"{name}/{i:09}" for i in range(len(dataset))], labels, classes)

    def _labels(self) -> tuple[list[int], list[str]]:
        found = getattr(self.dataset, "targets", None)
        if found is None or len(found) != len(self.dataset):
            logger.info(f"reading all {len(self.dataset)} items once for their labels")
            found = [self._label_of_item(i) for i in range(len(self.dataset))]
        values = [x.item() if isinstance(x, Tensor | np.generic | np.ndarray) and x.shape == () else x for x in found]
        kinds = {str if isinstance(x, str) else int if isinstance(x, int) else None for x in values}
        if None in kinds:
            fix = "give items (image, label), or dicts with 'label': a number or a name"
            raise UserError("data: its items have no labels", fix)
        if len(kinds) > 1:
            some = ", ".join(repr(next(x for x in values if isinstance(x, kind))) for kind in (int, str))
            raise UserError(f"data: labels are both numbers and names, such as {some}", "give either")
        known = sorted({*values})
        names = getattr(self.dataset, "classes", None)
        if names is not None and all(isinstance(x, int) and 0 <= x < len(names) for x in values):
            return [int(x) for x in values], [str(name) for name in names]
        numbers = {value: i for i, value in enumerate(known)}
        return [numbers[x] for x in values], [str(x) for x in known]

    def _label_of_item(self, index: int) -> Any:
        try:
            return self._split(self.dataset[index])[1]
        except UserError:
            raise
        except Exception as error:  # of any kind: the dataset is the user's
            why = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            hint = "leave it out, or give the dataset an attribute targets with all labels"
            raise UserError(f"data: item {index} cannot be read for its label ({why})", hint) from error

    def _split(self, item: Any) -> tuple[Any, Any]:
        """Image and label of an item."""
        if isinstance(item, Mapping):
            if self.key is None:
                raise UserError(f"data: items are dicts of {', '.join(map(str, item))}", "give the image's key=")
            if self.key not in item:
                raise UserError(f"data: items have no {self.key!r}", f"their keys are {', '.join(map(str, item))}")
            return item[self.key], item.get("label")
        if isinstance(item, tuple | list):
            if not item:
                raise BadImage("empty", f"an empty {type(item).__name__}")
            return item[0], item[1] if len(item) > 1 else None
        return item, None

    def read(self, index: int) -> bytes:
        try:
            item = self.dataset[index]
        except Exception as error:  # of any kind: the dataset is the user's
            raise BadImage("unreadable", f"{type(error).__name__}: {error}".replace("\n", " ")[:300]) from error
        return _encoded(self._split(item)[0], self.exif)


class GivenImages(Source):
    """A sequence of images: paths, PIL images, arrays [H, W] or [H, W, C], tensors [H, W] or [C, H, W].

    Args:
        exif: turn PIL images as their EXIF orientation says. Files are turned when they are decoded.
    """

    def __init__(self, images: Sequence[Any], exif: bool = False) -> None:
        names = [os.fspath(x) if isinstance(x, str | os.PathLike) else f"image {i}" for i, x in enumerate(images)]
        super().__init__(Path(), names)
        self.images, self.exif = images, exif

    def read(self, index: int) -> bytes:
        image = self.images[index]
        if isinstance(image, str | os.PathLike):
            if os.path.isdir(image):
                raise BadImage("unsupported", "a folder: give a list of its files, or use mae_fast.predict")
            return Files(Path(), [os.fspath(image)]).read(0)
        return _encoded(image, self.exif)


def _encoded(image: Any, exif: bool) -> bytes:
    """A PIL image, an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W], as .npy.

    Raises:
        BadImage: if it is none of these.
    """
    with only_bad_images("unsupported"):
        if isinstance(image, Image.Image):
            array = _array_of_picture(ImageOps.exif_transpose(image) if exif else image)
        elif isinstance(image, Tensor):
            tensor = image.detach().cpu()
            array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            array = np.moveaxis(array, 0, 2) if array.ndim == 3 else array
        elif isinstance(image, np.ma.MaskedArray) and np.ma.is_masked(image):
            if image.dtype.kind != "f":
                raise BadImage("unsupported", f"masked {image.dtype} pixels: give filled(VALUE), and nodata=VALUE")
            array = image.filled(np.nan)
        elif isinstance(image, np.ndarray):
            array = image
        else:
            raise BadImage("unsupported", f"a {type(image).__name__}: images are PIL images, arrays or tensors")
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array))
    return file.getvalue()


def _array_of_picture(image: Image.Image) -> np.ndarray:
    """[H, W] or [H, W, 3]; 32-bit integers that fit as uint16, others as float32."""
    if image.mode == "I":
        array = np.asarray(image)
        if array.min() < -(2**24) or array.max() > 2**24:
            raise BadImage("unsupported", "32-bit integers that float32 cannot hold")
        return array.astype(np.uint16 if array.min() >= 0 and array.max() < 2**16 else np.float32)
    if image.mode in ("L", "RGB", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)
        return array.astype(array.dtype.newbyteorder("="))
    return np.asarray(image.convert("RGB"))


def for_processes(source: Source) -> bool:
    """Whether worker processes can read ``source``: not a dataset of a class that only this program has."""
    if not isinstance(source, MapDataset):
        return True
    if type(source.dataset).__module__ == "__main__":
        return False
    try:
        pickle.dumps(source.dataset)
    except Exception:  # of many kinds
        return False
    return True
