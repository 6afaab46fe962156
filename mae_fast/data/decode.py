"""Decodes images with Pillow, NumPy and torchvision. This is the reference for the other decoders.

The bytes are not trusted. The result is either pixels, or a ``BadImage`` with the reason.
"""

import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..pixel_dtypes import PIXEL_DTYPES
from .pixel_format import RGB, PixelFormat
from .rng import Box

MAX_PIXELS = 64_000_000  # of a whole image
MAX_BYTES = 8 * MAX_PIXELS  # of an encoded or decoded image: four channels of 16 bits
MAX_BANDS = 16  # a width up to this is more likely the number of bands than the width of a page
NPY_DTYPES = (*PIXEL_DTYPES, "float64")

_MODES = {1: "L", 3: "RGB"}
AS_RGB = ("P", "CMYK", "YCbCr", "LAB", "HSV")  # modes that decode to RGB
NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BANDS = "TIFF of bands"
DICOM = "DICOM"
_DICOM_MARK = slice(128, 132), b"DICM"
# Pillow reads more formats, but PostScript would run a program.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
_ORIENTATION, _SAMPLES, _PHOTOMETRIC, _MINISWHITE = 0x0112, 0x0115, 0x0106, 0  # tags of EXIF and TIFF
_TURNED = ("JPEG", "MPO", "WEBP")  # formats whose EXIF orientation is applied on request
_IMAGE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82"}


class BadImage(Exception):
    """An image that cannot be used.

    Args:
        reason: one of ``REASONS``.
        detail: the finding in this image.
        listed: whether ``bad.jsonl`` lists the image.
    """

    def __init__(self, reason: str, detail: str, listed: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.listed = reason, detail, listed

    def bare(self) -> "BadImage":
        """A copy without a traceback. A traceback would keep the image in memory."""
        return BadImage(self.reason, self.detail, self.listed)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


REASONS = ("unreadable", "empty", "not an image", "too large", "broken", "unsupported")

Decoded = Image.Image | Tensor  # 8-bit image with 1 or 3 channels; or [C, H, W] with any channels and dtype


@dataclass(frozen=True)
class Header:
    """The header of an encoded image. ``height`` and ``width`` are those after decoding."""

    height: int
    width: int
    format: str
    """The format: Pillow's name, "NPY", ``BANDS`` or ``DICOM``."""
    mode: str
    """Pillow's mode, or the dtype of an array."""
    bands: int
    """The number of bands in the file, the sum over pages."""
    turned: bool
    """Whether decoding rotates or mirrors the image, by its EXIF orientation."""
    whole: bool
    """Whether the file has the end marker of its format. A file without it may be truncated."""
    pages: int = 1
    """The number of pages or frames. They are bands only on request. Animations are read as their first frame."""


@cache
def _ignore_pillow_warnings() -> None:
    """Silence Pillow's warnings, which are about unusual metadata and bands. Broken pixels are errors."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


@contextmanager
def only_bad_images(reason: str) -> Iterator[None]:
    """Context that turns any error of a decoder (struct.error, KeyError, RuntimeError ...) into a ``BadImage``."""
    _ignore_pillow_warnings()
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image", "no known image format") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large", str(error)) from error
    except Exception as error:
        raise BadImage(reason, f"{type(error).__name__}: {error}".replace("\n", " ")[:300]) from error


def read_header(data: bytes, exif: bool = False) -> Header:
    """Read the header of an encoded image, without decoding pixels. ``exif``: apply its EXIF orientation.

    Raises:
        BadImage: if the header shows that the image cannot be used.
    """
    if not data:
        raise BadImage("empty", "0 bytes")
    with only_bad_images("not an image"):
        if data.startswith(NPY):
            shape, dtype, *_ = _npy_header(data)
            bands = shape[2] if len(shape) == 3 else 1
            return Header(_checked(*shape[:2]), shape[1], "NPY", dtype.name, bands, False, True)
        if data[_DICOM_MARK[0]] == _DICOM_MARK[1]:
            return _dicom_header(data)
        try:
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            if data[:4] not in TIFF:
                raise
            return _tiff_header(data)  # has more bands than Pillow supports
        with opened as image:
            bands = 3 if image.mode in AS_RGB else len(image.getbands())
            if image.format == "TIFF":
                tiff: Any = image
                bands = tiff.tag_v2.get(_SAMPLES, 1)
                if bands != len(image.getbands()) or tiff.n_frames > 1:
                    found = _tiff_header(data)
                    if found.bands != len(image.getbands()):  # otherwise, the other pages are smaller copies
                        return found
                bands = 3 if image.mode in AS_RGB else bands
            _checked(image.height, image.width)
            # Pillow rotates TIFF by itself, and would decode a PNG to find the tag.
            orientation: Any = image.getexif().get(_ORIENTATION) if exif and image.format in _TURNED else None
            turned = isinstance(orientation, int) and 2 <= orientation <= 8
            height, width = image.height, image.width
            if turned and orientation >= 5:
                height, width = width, height
            whole = data.endswith(_IMAGE_ENDS.get(image.format or "", b""))
            return Header(height, width, image.format or "", image.mode, bands, turned, whole)


def _checked(height: int, width: int, bytes_per_pixel: int = 1) -> int:
    if height < 1 or width < 1:
        raise BadImage("broken", f"{height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise BadImage("too large", f"{height} x {width} pixels, more than {MAX_PIXELS / 1e6:g} million")
    if (size := height * width * bytes_per_pixel) > MAX_BYTES:
        what = f"{height} x {width} pixels of {bytes_per_pixel} bytes"
        raise BadImage("too large", f"{what}: {size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f}")
    return height


def npy_pixels(data: bytes, dtypes: Sequence[str] = NPY_DTYPES) -> np.ndarray:
    """Decode .npy to an array [H, W] or [H, W, C] of one of ``dtypes``, without a copy if possible."""
    with only_bad_images("broken"):
        shape, dtype, fortran, offset = _npy_header(data, dtypes)
        pixels = np.frombuffer(data, dtype, count=math.prod(shape), offset=offset)
        ordered = pixels.astype(dtype.newbyteorder("="), copy=False)
        return ordered.reshape(shape, order="F" if fortran else "C")


def _npy_header(data: bytes, dtypes: Sequence[str] = NPY_DTYPES) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise BadImage("unsupported", f".npy of version {version}")
    shape, fortran, dtype = read(file)
    if len(shape) not in (2, 3) or dtype.newbyteorder("=") not in dtypes:
        raise BadImage("unsupported", f"{dtype} {list(shape)}: expected [H, W] or [H, W, C] of {', '.join(dtypes)}")
    return shape, dtype, fortran, file.tell()


def decode(data: bytes, pixels: PixelFormat = RGB) -> Decoded:
    """Decode an image to the format ``pixels``. Transparency is dropped.

    Pages of a TIFF and frames of a DICOM file are bands if ``pixels`` has bands, or if their number equals its number
    of channels. Animations are read as their first frame.

    Raises:
        BadImage: if the image cannot be decoded to this format.
    """
    channels = pixels.channels
    header = read_header(data, pixels.exif)
    check_bands(header, pixels)
    with only_bad_images("broken"):
        if not pixels.is_plain:
            from .raw import decode_raw  # it imports this module

            return decode_raw(data, header, pixels)
        if header.format == "NPY":
            return _as_image(npy_pixels(data), channels)
        if header.format == DICOM:
            from .raw import dicom_pixels

            return _as_image(dicom_pixels(data), channels)
        if header.format == BANDS:
            return _as_image(read_bands(data), channels)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            turned = ImageOps.exif_transpose(image) if header.turned else image
            if (turned.height, turned.width) != (header.height, header.width):
                raise BadImage("broken", f"{turned.height} x {turned.width} pixels, different from its header")
            if turned.mode == "F":
                raise BadImage("unsupported", "floating-point pixels: the values of black and white are unknown")
            if turned.mode.startswith("I"):
                return _as_image(_as_uint16(turned), channels)
            if channels not in _MODES:
                return _as_image(np.asarray(turned), channels)
            with only_bad_images("unsupported"):
                return turned.convert(_MODES[channels])


def check_bands(header: Header, pixels: PixelFormat) -> None:
    """Raise ``BadImage`` if the image cannot give the channels and bands of ``pixels``."""
    found, wanted = header.bands, pixels.channels
    if header.pages > 1 and not pixels.bands and (found != wanted or wanted in _MODES):
        size = f"{header.pages} pages of {header.height} x {header.width} pixels"
        fix = "--bands 1,2,3 reads pages as bands; otherwise, write each page to its own file"
        if header.width <= MAX_BANDS < header.pages:  # probably [H, W, C] written as H pages
            fix = f"if it should have {header.width} bands, write it with planarconfig='contig' (tifffile)"
        raise BadImage("unsupported", f"{size}: {fix}")
    if pixels.bands:
        if max(pixels.bands) > found:
            raise BadImage("unsupported", f"{found} bands, but band {max(pixels.bands)} is requested")
        return
    if wanted in _MODES and header.format not in ("NPY", DICOM, BANDS):
        if pixels.is_plain:
            return  # Pillow converts all its modes to grey and RGB
        found -= found in (2, 4) and header.format != "TIFF"  # transparency
    if found != wanted and not (found in _MODES and wanted in _MODES):
        raise BadImage("unsupported", f"{found} bands, expected {wanted}")


def _as_uint16(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.dtype == np.int32 and (pixels.min() < 0 or pixels.max() > 65535):
        raise BadImage("unsupported", f"mode {image.mode} with values of more than 16 bits")
    pixels = pixels.astype(np.uint16)
    inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _MINISWHITE  # Pillow ignores it
    return 65535 - pixels if inverted else pixels


def _dicom_header(data: bytes) -> Header:
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise BadImage("unsupported", "DICOM needs pydicom: pip install 'mae_fast[medical]'") from error
    file = dcmread(io.BytesIO(data), stop_before_pixels=True)
    height, width, pages = int(file.Rows), int(file.Columns), int(file.get("NumberOfFrames", 1) or 1)
    samples = 3 if file.PhotometricInterpretation == "PALETTE COLOR" else int(file.SamplesPerPixel)
    mode = f"{file.BitsAllocated} bits"
    size = pages * samples * int(file.BitsAllocated) // 8
    return Header(_checked(height, width, size), width, DICOM, mode, pages * samples, False, True, pages)


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise BadImage(
            "unsupported", "TIFF of several bands or pages needs tifffile: pip install 'mae_fast[data]'"
        ) from error
    return tifffile


def _tiff_header(data: bytes) -> Header:
    """Read the header of a TIFF with all its pages. Smaller copies and transparency masks do not count as pages.

    Raises:
        BadImage: if the pages differ in size or dtype.
    """
    with _tifffile().TiffFile(io.BytesIO(data)) as file:
        series, *others = (x for x in file.series if not (x.keyframe.is_reduced or x.keyframe.is_mask))
        if others:
            raise BadImage("unsupported", f"{len(file.pages)} pages of different sizes or dtypes")
        sizes = dict(zip(series.axes, series.shape, strict=True))
        height, width = sizes.pop("Y"), sizes.pop("X")
        if _tiff_orientation(series.keyframe) >= 5:
            height, width = width, height
        pages = math.prod(size for axis, size in sizes.items() if axis not in "SC")  # samples and channels are bands
        bands = math.prod(sizes.values())
        return Header(
            _checked(height, width, bands * series.dtype.itemsize),
            width,
            BANDS,
            str(series.dtype),
            bands,
            False,
            True,
            pages,
        )


def read_bands(data: bytes, as_stored: bool = False) -> np.ndarray:
    """Read all bands of a TIFF in any layout, [H, W, C], rotated by its orientation.

    Values are converted so that larger ones are brighter, and values of less than 8 bits are scaled to 0..255.
    ``as_stored``: do not convert values.
    """
    with _tifffile().TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        pixels = np.moveaxis(series.asarray(), (series.axes.index("Y"), series.axes.index("X")), (0, 1))
        bands: np.ndarray = pixels.reshape(*pixels.shape[:2], -1)
        page = series.keyframe
        orientation = _tiff_orientation(page)
        if orientation >= 5:
            bands = bands.swapaxes(0, 1)
        rows, columns = (
            slice(None, None, -1 if orientation in flipped else 1) for flipped in ((3, 4, 7, 8), (2, 3, 6, 7))
        )
        bands = bands[rows, columns]
        return bands if as_stored else _as_shown(bands, page.photometric.name, page.bitspersample)


def _tiff_orientation(page: Any) -> int:
    tag = page.tags.get(_ORIENTATION)
    return int(tag.value) if tag else 1


def _as_shown(pixels: np.ndarray, photometric: str, bits: int) -> np.ndarray:
    if photometric == "PALETTE":
        raise BadImage("unsupported", "pages of palette indices")
    kind = pixels.dtype.kind
    if kind == "b":
        pixels = pixels.astype(np.uint8)
    if photometric == "MINISWHITE":
        if kind not in "bui":
            raise BadImage("unsupported", f"{pixels.dtype} pixels whose smaller values are brighter")
        pixels = np.invert(pixels) if kind == "i" else (2**bits - 1) - pixels
    if bits < 8 and kind in "bu":
        pixels = pixels * pixels.dtype.type(255 // (2**bits - 1))
    return pixels


def _as_image(pixels: np.ndarray, channels: int) -> Decoded:
    """Convert an array [H, W] or [H, W, C] of 8 or 16 bits to an image with ``channels`` channels."""
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise BadImage("unsupported", f"{pixels.dtype} pixels: the values of black and white are unknown")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    found = pixels.shape[2]
    if channels in _MODES and found in _MODES:
        image = Image.fromarray(pixels[:, :, 0] if found == 1 else np.ascontiguousarray(pixels))
        return image.convert(_MODES[channels])
    if found != channels:
        raise BadImage("unsupported", f"{found} channels, expected {channels}")
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)


def size_of(image: Decoded) -> tuple[int, int]:
    """Height and width."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[1], image.shape[2])


def crop_resized(
    image: Decoded, box: Box, size: tuple[int, int], flip: bool, nodata: float | None = None
) -> np.ndarray:
    """Crop ``box`` and resize it (bicubic, antialiased) to ``size`` (height, width), [H, W, C]. ``flip``: mirror it.

    ``nodata``: the value of missing pixels, see ``PixelFormat``.
    """
    if is_raw(image, nodata):
        from .raw import resized_raw

        top, left, h, w = box
        made = resized_raw(image[:, top : top + h, left : left + w], size, nodata)
        pixels = _pixels(made)
        return pixels[:, ::-1] if flip else pixels  # torch 2.10 cannot flip uint16
    resized = tv.resized_crop(image, *box, size=list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return _pixels(tv.horizontal_flip(resized) if flip else resized)


def is_raw(image: Decoded, nodata: float | None) -> TypeGuard[Tensor]:
    """Whether an image is resized in fp32: it has more than 8 bits, or values may be missing."""
    return isinstance(image, Tensor) and (image.dtype != torch.uint8 or nodata is not None)


def centre_crop(image: Decoded, size: tuple[int, int], crop_pct: float, nodata: float | None = None) -> np.ndarray:
    """The centre crop of ``size`` (height, width), [H, W, C].

    The image is first resized (bicubic, antialiased) to the smallest size that covers ``size / crop_pct``.

    Raises:
        BadImage: if the image is so narrow that it would have more than ``MAX_PIXELS`` after resizing.
    """
    h, w = (int(side / crop_pct) for side in size)
    height, width = size_of(image)
    resized = (h, h * width // height) if height * w <= width * h else (w * height // width, w)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise BadImage("too large", f"{height} x {width} pixels, resized to {resized[0]} x {resized[1]}")
    if is_raw(image, nodata):
        from .raw import resized_raw

        image = resized_raw(image, resized, nodata)
        top, left = (round((a - b) / 2) for a, b in zip(resized, size, strict=True))
        return _pixels(image[:, top : top + size[0], left : left + size[1]])
    image = tv.resize(image, list(resized), InterpolationMode.BICUBIC, antialias=True)
    return _pixels(tv.center_crop(image, list(size)))


def _pixels(image: Decoded) -> np.ndarray:
    """[H, W, C]."""
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0).numpy()
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def centre_box(height: int, width: int, size: tuple[int, int]) -> Box:
    """The largest centred window with the aspect ratio of ``size`` (height, width)."""
    scale = min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(kw_only=True)
class Encoded:
    """An encoded image and its windows, as (box, flipped)."""

    data: bytes = b""
    header: Header | None = None
    windows: list[tuple[Box, bool]] = field(default_factory=list)


class Decoder(Protocol):
    """Decodes the windows of each image and resizes them into ``out`` [R, H, W, C].

    Returns an error for each image, or None.
    """

    def __call__(self, images: Sequence[Encoded], out: Sequence[Tensor]) -> list[BadImage | None]: ...


class PilDecoder:
    """Decodes with Pillow and torchvision, one image at a time."""

    def __init__(self, pixels: PixelFormat) -> None:
        self.pixels = pixels

    def __call__(self, images: Sequence[Encoded], out: Sequence[Tensor]) -> list[BadImage | None]:
        return [self._decode(*pair) for pair in zip(images, out, strict=True)]

    def _decode(self, encoded: Encoded, crops: Tensor) -> BadImage | None:
        size = crops.shape[1], crops.shape[2]
        try:
            image = decode(encoded.data, self.pixels)
        except BadImage as bad:
            return bad.bare()
        for crop, (box, flip) in zip(crops, encoded.windows, strict=True):
            crop.copy_(torch.from_numpy(crop_resized(image, box, size, flip, self.pixels.nodata).copy()))
        return None
