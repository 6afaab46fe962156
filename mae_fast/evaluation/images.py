"""Find and decode the image files of a command line, and check and write its output."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.decode import BadImage, centre_box, crop_resized, decode, size_of
from ..data.loader import unusable_image
from ..data.pixel_format import PixelFormat
from ..data.preprocessing import Preprocessing, model_preprocessing
from ..data.sources import Files, Source, open_source
from ..errors import UserError
from ..files import atomic_write
from ..weights.create import LoadedModel

logger = logging.getLogger(__name__)

PICTURES, PAGES = (".png", ".jpg", ".jpeg", ".webp"), (".html", ".htm")
MAX_PATCHES = 4096  # per whole image, as the time for attention grows with the square of it
MAX_WARNINGS = 10  # unusable images that warnings name; more are only counted


def find_images(images: Sequence[Path]) -> list[tuple[Source, int]]:
    """Find all images in files and folders, as pairs of a source and an index in it. Folders with val/ mean val/.

    Raises:
        UserError: if there are none.
    """
    found: list[tuple[Source, int]] = []
    for path in images:
        if path.is_file() and path.suffix != ".tar":
            found.append((Files(path.parent, [path.name]), 0))
        else:
            source = open_source(path, "val", mixed=True)
            found += [(source, i) for i in range(len(source))]
    if not found:
        raise UserError("no images are given", "give image files or folders")
    return found


def check_output(output: Path, files: list[tuple[Source, int]], kinds: Sequence[str]) -> None:
    """Raise ``UserError`` unless ``output`` has one of the suffixes ``kinds`` and is not one of the images."""
    if output.suffix.lower() not in kinds:
        page = f", or of a page, such as {output.with_suffix('.html')}" if ".html" in kinds else ""
        hint = f"give the name of a picture, such as {output.with_suffix('.png')}{page}"
        raise UserError(f"--output {output}: unknown format", hint)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder", f"give the name of a file, such as {output / 'picture.png'}")
    place = os.path.realpath(output)
    for source, i in files:
        if isinstance(source, Files) and os.path.realpath(source.root / source.names[i]) == place:
            raise UserError(f"--output {output} is one of the images", "give another name")


def preprocessing_of(loaded: LoadedModel) -> Preprocessing:
    """The preprocessing that is recorded with a model, else the default preprocessing of evaluations."""
    if record := loaded.metadata.preprocessing:
        return Preprocessing.from_record(record, loaded.checkpoint.path if loaded.checkpoint else "the weights")
    model = loaded.model
    exif = bool(loaded.settings.get("exif"))
    pixels = PixelFormat(channels=model.in_chans, exif=exif, dtype=model.pixel_dtype, nodata=model.nodata)
    if earlier := loaded.settings.get("pixel_settings"):  # from a run of an earlier version
        pixels = pixels.with_record(earlier)
    return model_preprocessing(model, model.patch_embed.img_size, pixels)


def whole_image(source: Source, index: int, patch: tuple[int, int], pixels: PixelFormat) -> tuple[Tensor, bool]:
    """One image [H, W, C], cropped to whole patches, and whether it was scaled down to ``MAX_PATCHES`` patches.

    Raises:
        UserError: if the image cannot be used.
    """
    try:
        image = decode(source.read(index), pixels)
        height, width = size_of(image)
        (p, q), share = patch, min(1.0, math.sqrt(MAX_PATCHES * patch[0] * patch[1] / (height * width)))
        rows, columns = int(height * share / p), int(width * share / q)
        if share < 1:  # a narrow image keeps at least one row and column of patches
            rows, columns = min(max(1, rows), MAX_PATCHES), min(max(1, columns), MAX_PATCHES)
        if not rows or not columns:
            raise BadImage("unsupported", f"{height} x {width} pixels are smaller than a patch of {p} x {q}")
    except BadImage as bad:
        raise unusable_image(source, index, bad) from bad
    h, w = size = rows * p, columns * q
    box = ((height - h) // 2, (width - w) // 2, h, w) if share == 1 else centre_box(height, width, size)
    return torch.from_numpy(crop_resized(image, box, size, False, pixels.nodata).copy()), share < 1


class UnusableImages:
    """Counts unusable images, and logs a warning for each of the first ones."""

    count = 0

    def add(self, error: UserError) -> None:
        self.count += 1
        if self.count <= MAX_WARNINGS:
            more = "; no more warnings of this kind" if self.count == MAX_WARNINGS else ""
            logger.warning(f"{error}{more}")


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Create the folder of ``path`` and write the file by calling ``write`` with a temporary path.

    Raises:
        UserError: if the format does not support the picture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as part:
            write(part)
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the file system; Pillow's have no number
            raise
        raise UserError(f"--output {path} cannot be written ({error})", "use .png, or a lower --show") from error
