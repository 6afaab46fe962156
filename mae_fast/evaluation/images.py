"""Image files on the command line, and the picture or page that a verb writes."""

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
MAX_PATCHES = 4096  # of a whole image: the time for attention grows with their square
MAX_WARNINGS = 10  # images that are named in a warning; more are only counted


def find_images(images: Sequence[Path]) -> list[tuple[Source, int]]:
    """The images in files and folders (in their val/ where there is one): sources, and places in them.

    Raises:
        UserError: if there are none.
    """
    found: list[tuple[Source, int]] = []
    for path in images:
        if path.is_file() and path.suffix != ".tar":
            found.append((Files(path.parent, [path.name]), 0))
        else:
            source = open_source(path, "val")
            found += [(source, i) for i in range(len(source))]
    if not found:
        raise UserError("no images are given", "give image files or folders")
    return found


def check_output(output: Path, files: list[tuple[Source, int]], kinds: Sequence[str]) -> None:
    """Raise ``UserError`` unless ``output`` is a name of one of the ``kinds`` of files, and none of the images."""
    if output.suffix.lower() not in kinds:
        page = f", or a page's, such as {output.with_suffix('.html')}" if ".html" in kinds else ""
        raise UserError(f"--output {output}", f"give a picture's name, such as {output.with_suffix('.png')}{page}")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder", f"give a file's name, such as {output / 'picture.png'}")
    place = os.path.realpath(output)
    for source, i in files:
        if isinstance(source, Files) and os.path.realpath(source.root / source.names[i]) == place:
            raise UserError(f"--output {output} is one of the images", "give another name")


def preprocessing_of(loaded: LoadedModel) -> Preprocessing:
    """How images become the input of a model: as recorded with it, else as evaluation does it by default."""
    if record := loaded.metadata.preprocessing:
        return Preprocessing.from_record(record, loaded.checkpoint.path if loaded.checkpoint else "the weights")
    model = loaded.model
    exif = bool(loaded.settings.get("exif"))
    pixels = PixelFormat(channels=model.in_chans, exif=exif, dtype=model.pixel_dtype, nodata=model.nodata)
    if earlier := loaded.settings.get("pixel_settings"):  # of a run of an earlier version
        pixels = pixels.with_record(earlier)
    return model_preprocessing(model, model.patch_embed.img_size, pixels)


def whole_image(source: Source, index: int, patch: tuple[int, int], pixels: PixelFormat) -> tuple[Tensor, bool]:
    """One image, [H, W, C], cropped to whole patches, and whether it was reduced to ``MAX_PATCHES`` patches.

    Raises:
        UserError: naming the image, if it cannot be used.
    """
    try:
        image = decode(source.read(index), pixels)
        height, width = size_of(image)
        (p, q), share = patch, min(1.0, math.sqrt(MAX_PATCHES * patch[0] * patch[1] / (height * width)))
        rows, columns = int(height * share / p), int(width * share / q)
        if share < 1:  # a narrow strip may be less than a patch high now: it keeps one row
            rows, columns = min(max(1, rows), MAX_PATCHES), min(max(1, columns), MAX_PATCHES)
        if not rows or not columns:
            raise BadImage("unsupported", f"{height} x {width} pixels are less than a patch of {p} x {q}")
    except BadImage as bad:
        raise unusable_image(source, index, bad) from bad
    h, w = size = rows * p, columns * q
    box = ((height - h) // 2, (width - w) // 2, h, w) if share == 1 else centre_box(height, width, size)
    return torch.from_numpy(crop_resized(image, box, size, False, pixels.nodata).copy()), share < 1


class UnusableImages:
    """Counts images that are left out. The first ones are named in a warning."""

    count = 0

    def add(self, error: UserError) -> None:
        self.count += 1
        if self.count <= MAX_WARNINGS:
            more = "; no more warnings of this kind" if self.count == MAX_WARNINGS else ""
            logger.warning(f"{error}{more}")


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write the file of ``--output`` by ``write``, which gets a temporary path. Makes its folder.

    Raises:
        UserError: if its format cannot hold the picture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as part:
            write(part)
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # not Pillow's, which have no number
            raise
        raise UserError(f"--output {path} cannot be written ({error})", "use .png, or a lower --show") from error
