"""Map-style datasets and sequences of images as sources."""

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
    """A map-style ``torch.utils.data.Dataset`` or a sequence, with items ``image`` or ``(image, label)``, or dicts.

    An image is a PIL image, an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W]. It keeps its dtype.

    Args:
        name: together with the length, identifies the dataset when a run is resumed.
        key: key of the image, if items are dicts, as in torchgeo. The key of the label is "label".
        exif: apply the EXIF orientation of PIL images.
        labelled: read labels. They are the dataset's attribute ``targets``, if it has one for each item. Otherwise, all
            items are read once. The names of classes are the attribute ``classes``, if it exists.
        argument: name of the caller's argument, for messages.

    Raises:
        UserError: if the dataset has no ``__len__`` or ``__getitem__``, or with ``labelled``, no labels.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        key: str | None = None,
        labelled: bool = False,
        exif: bool = False,
        argument: str = "data",
    ) -> None:
        if isinstance(dataset, IterableDataset) or not all(hasattr(dataset, x) for x in ("__len__", "__getitem__")):
            raise UserError(
                f"{argument}: {type(dataset).__name__} has no __len__ and __getitem__",
                "give a map-style dataset: epochs have a random order, and runs resume at any image",
            )
        if not len(dataset):
            raise UserError(f"{argument}: the dataset {name!r} is empty", "give one with images")
        self.dataset, self.key, self.exif, self.argument = dataset, key, exif, argument
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
            fix = "give items (image, label) or dicts with 'label'; a label is an integer or a string"
            raise UserError(f"{self.argument}: its items have no labels", fix)
        if len(kinds) > 1:
            some = ", ".join(repr(next(x for x in values if isinstance(x, kind))) for kind in (int, str))
            message = f"{self.argument}: labels are both integers and strings, such as {some}"
            raise UserError(message, "give one kind")
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
        except Exception as error:  # any type, from the user's dataset
            why = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            hint = "remove the item, or give the dataset an attribute 'targets' with all labels"
            raise UserError(f"{self.argument}: the label of item {index} cannot be read ({why})", hint) from error

    def _split(self, item: Any) -> tuple[Any, Any]:
        """Image and label of an item."""
        if isinstance(item, Mapping):
            if self.key is None:
                keys = ", ".join(map(str, item))
                raise UserError(f"{self.argument}: items are dicts of {keys}", "give the key of the image as key=")
            if self.key not in item:
                keys = ", ".join(map(str, item))
                raise UserError(f"{self.argument}: items have no key {self.key!r}", f"give one of {keys}")
            return item[self.key], item.get("label")
        if isinstance(item, tuple | list):
            if not item:
                raise BadImage("empty", f"an empty {type(item).__name__}")
            return item[0], item[1] if len(item) > 1 else None
        return item, None

    def read(self, index: int) -> bytes:
        try:
            item = self.dataset[index]
        except Exception as error:  # any type, from the user's dataset
            raise BadImage("unreadable", f"{type(error).__name__}: {error}".replace("\n", " ")[:300]) from error
        return _encoded(self._split(item)[0], self.exif)


class GivenImages(Source):
    """A sequence of images: paths, PIL images, arrays [H, W] or [H, W, C], tensors [H, W] or [C, H, W].

    Args:
        exif: apply the EXIF orientation of PIL images. For files, decoding applies it.
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
    """Encode an image as .npy: a PIL image, an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W].

    Raises:
        BadImage: if ``image`` is of another type.
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
                raise BadImage("unsupported", f"masked {image.dtype} pixels: give filled(VALUE) and nodata=VALUE")
            array = image.filled(np.nan)
        elif isinstance(image, np.ndarray):
            array = image
        else:
            raise BadImage("unsupported", f"a {type(image).__name__}: expected a PIL image, an array or a tensor")
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array))
    return file.getvalue()


def _array_of_picture(image: Image.Image) -> np.ndarray:
    """A PIL image as an array [H, W] or [H, W, 3]. 32-bit integers become uint16 if they fit, else float32."""
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
    """Whether worker processes can unpickle ``source``. They cannot if its class is local to this program."""
    if not isinstance(source, MapDataset):
        return True
    if type(source.dataset).__module__ == "__main__":
        return False
    try:
        pickle.dumps(source.dataset)
    except Exception:  # many types
        return False
    return True
