"""Decodes images in their stored dtype, with any number of bands; band selection, clipping and resizing."""

import io
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..pixel_dtypes import PIXEL_DTYPES
from .decode import (
    AS_RGB,
    BANDS,
    DICOM,
    FORMATS,
    TIFF,
    BadImage,
    Header,
    npy_pixels,
    only_bad_images,
    read_bands,
    read_header,
)
from .pixel_format import PixelFormat

LUMA = (0.299, 0.587, 0.114)  # Pillow's weights of red, green and blue
BYTES_ONLY = ("JPEG", "MPO", "WEBP", "BMP", "GIF")  # formats with 8-bit pixels only
_GAP = rb"(?:\s|#[^\n]*\n)+"
PNM = re.compile(rb"P([2356])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s")  # width, height, maximum
PNG_DEPTH = 24  # position of the byte with the bits per sample in a PNG


def decode_raw(data: bytes, header: Header, pixels: PixelFormat) -> Tensor:
    """Decode an image to the format ``pixels``, [C, H, W].

    Raises:
        BadImage: if the image does not have the bands, or has values that the dtype cannot hold.
    """
    with only_bad_images("broken"):
        transparent = header.format not in ("NPY", DICOM, BANDS, "TIFF")  # in these formats, other bands are data
        array = _chosen_bands(_read_array(data, header), pixels, transparent)
        wanted = np.dtype(pixels.dtype)
        if not _fits(array, wanted):
            raise BadImage("unsupported", f"{array.dtype} pixels, expected {wanted}")
        with np.errstate(over="ignore"):
            if wanted.kind == "f" and pixels.nodata is not None and np.isinf(wanted.type(pixels.nodata)):
                array = np.where(array == pixels.nodata, np.nan, array)
            if pixels.clip:
                array = _clipped(array, pixels)
            if wanted.kind == "f":
                array = _finite(array, wanted)
        made = np.ascontiguousarray(np.moveaxis(array.astype(wanted, copy=False), 2, 0))
        return torch.from_numpy(made if made.flags.writeable else made.copy())


def _fits(array: np.ndarray, wanted: np.dtype) -> bool:
    """Whether a dtype can hold the values of ``array``. Rounding of floats is allowed."""
    if np.can_cast(array.dtype, wanted, "same_kind" if wanted.kind == "f" else "safe"):
        return True
    if array.dtype.kind == "f":
        return False
    info = np.iinfo(wanted)
    return bool(array.size == 0 or (info.min <= array.min() and array.max() <= info.max))


def _read_array(data: bytes, header: Header) -> np.ndarray:
    """All bands of an image, [H, W, C]."""
    if header.format == "NPY":
        array = npy_pixels(data)
    elif header.format == DICOM:
        array = dicom_pixels(data)
    elif header.format == BANDS or (data[:4] in TIFF and header.mode not in ("1", *AS_RGB)):
        array = read_bands(data)
    elif header.format == "PNG" and data[PNG_DEPTH] == 16:
        array = _png16(data)
    elif header.format == "PPM" and (found := PNM.match(data)) and int(found[4]) > 255:
        array = _pnm16(data, found)
    else:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            array = np.asarray(image.convert({"1": "L", **dict.fromkeys(AS_RGB, "RGB")}.get(image.mode, image.mode)))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[:2] != (header.height, header.width):
        raise BadImage("broken", f"{array.shape[0]} x {array.shape[1]} pixels, different from its header")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _png16(data: bytes) -> np.ndarray:
    """Decode a 16-bit PNG, [H, W] or [H, W, C] uint16. Pillow would reduce colour to 8 bits."""
    try:
        from imagecodecs import png_decode
    except ImportError as error:
        raise BadImage("unsupported", "16-bit PNG needs imagecodecs: pip install 'mae_fast[data]'") from error
    pixels: np.ndarray = png_decode(data)
    return pixels


def _pnm16(data: bytes, header: re.Match[bytes]) -> np.ndarray:
    """Decode a 16-bit PGM or PPM, [H, W, 1] or [H, W, 3] uint16. Pillow would rescale the values."""
    kind, width, height = header[1], int(header[2]), int(header[3])
    if kind in b"23":
        raise BadImage("unsupported", "16-bit pixels as text: write binary PGM or PPM")
    shape = height, width, 3 if kind == b"6" else 1
    return np.frombuffer(data, ">u2", math.prod(shape), header.end()).reshape(shape)


def dicom_pixels(data: bytes) -> np.ndarray:
    """Decode a DICOM file, [H, W] or [H, W, C], in its physical units. Larger values are brighter. Frames are channels.

    The rescale slope and intercept are applied, for each frame if they differ, and MONOCHROME1 is inverted. The result
    has integers if slope and intercept are integers.
    """
    from pydicom import dcmread
    from pydicom.pixels.processing import apply_color_lut

    file = dcmread(io.BytesIO(data))
    try:
        stored = file.pixel_array
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        kind = file.file_meta.TransferSyntaxUID.name
        raise BadImage("unsupported", f"{kind}: pydicom needs another package, such as python-gdcm") from error
    if file.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, file)
    if int(file.get("NumberOfFrames", 1) or 1) > 1:
        stored = np.moveaxis(stored, 0, 2)
        stored = stored.reshape(*stored.shape[:2], -1)
    if file.PhotometricInterpretation == "MONOCHROME1":
        signed = file.PixelRepresentation == 1
        stored = (-1 if signed else 2 ** int(file.BitsStored) - 1) - stored  # invert within the range
    if "ModalityLUTSequence" in file:
        raise BadImage("unsupported", "its units are defined by a lookup table (ModalityLUTSequence)")
    slope, intercept = _rescale(file, stored.shape[2] if stored.ndim == 3 else 1)
    if (slope == 1).all() and (intercept == 0).all():
        return stored if stored.dtype.name in PIXEL_DTYPES else stored.astype(np.float32)
    if (slope % 1 == 0).all() and (intercept % 1 == 0).all():
        units = stored.astype(np.int64) * slope.astype(np.int64) + intercept.astype(np.int64)
        return next((units.astype(kind) for kind in (np.int16, np.uint16) if _fits(units, np.dtype(kind))), units)
    rescaled: np.ndarray = (stored * slope + intercept).astype(np.float32)
    return rescaled


def _rescale(file: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Rescale slope and intercept of a DICOM file: [1], or [C] if frames differ. Enhanced files have them in groups.

    Raises:
        BadImage: if only some frames have them.
    """

    def stated(group: Any) -> tuple[float, float] | None:
        found = group.get("PixelValueTransformationSequence") or [group]
        if "RescaleSlope" not in found[0] and "RescaleIntercept" not in found[0]:
            return None
        return float(found[0].get("RescaleSlope", 1) or 1), float(found[0].get("RescaleIntercept", 0) or 0)

    shared = (file.get("SharedFunctionalGroupsSequence") or [{}])[0]
    known = stated(file) or stated(shared)
    frames = [stated(group) for group in file.get("PerFrameFunctionalGroupsSequence") or ()]
    if known is None and any(frames):
        if None in frames or channels % len(frames):
            raise BadImage("unsupported", "some of its frames have no rescale slope")
        pairs = np.repeat(np.array(frames), channels // len(frames), axis=0)
        return pairs[:, 0], pairs[:, 1]
    slope, intercept = known or (1.0, 0.0)
    return np.array([slope]), np.array([intercept])


def _chosen_bands(array: np.ndarray, pixels: PixelFormat, transparent: bool) -> np.ndarray:
    found, wanted = array.shape[2], pixels.channels
    if pixels.bands:
        if max(pixels.bands) > found:
            raise BadImage("unsupported", f"{found} bands, but band {max(pixels.bands)} is requested")
        return array[:, :, [band - 1 for band in pixels.bands]]
    if transparent and found in (2, 4) and wanted in (1, 3):
        found -= 1
        array = array[:, :, :found]
    if found == wanted:
        return array
    if (found, wanted) == (1, 3):
        return np.repeat(array, 3, axis=2)
    if (found, wanted) == (3, 1):
        grey = (array * np.array(LUMA)).sum(2, keepdims=True)
        made: np.ndarray = (grey.round() if array.dtype.kind in "iu" else grey).astype(array.dtype)
        return made
    raise BadImage("unsupported", f"{found} bands, expected {wanted}")


def _clipped(array: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Clip to the limits of ``pixels``, and convert to its dtype. A limit that equals ``nodata`` moves by one value."""
    low, high = (np.array([limits[i] for limits in pixels.clip]) for i in (0, 1))
    wanted = np.dtype(pixels.dtype)
    clipped: np.ndarray = array.clip(low, high).astype(array.dtype).astype(wanted)  # NaN stays
    nodata = pixels.nodata
    if nodata is None:
        return clipped
    equal = clipped == nodata
    for limited, step in ((equal & (array < nodata), 1), (equal & (array > nodata), -1)):
        if limited.any():
            clipped[limited] = _beside(nodata, wanted, step)
    missing = array == nodata
    clipped[missing] = array[missing]
    return clipped


def _finite(array: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Convert to a float dtype.

    Raises:
        BadImage: if values are or would become infinite.
    """
    made: np.ndarray = array.astype(wanted)
    infinite = np.isinf(made)
    if infinite.any():
        raise BadImage("unsupported", f"value {array[infinite][0]:g}, which {wanted} cannot hold: see --nodata, --clip")
    return made


def _beside(value: float, dtype: np.dtype, step: int) -> float:
    """The next larger (``step`` 1) or smaller (``step`` -1) value of a dtype."""
    if dtype.kind in "iu":
        return value + step
    return float(np.nextafter(dtype.type(value), dtype.type(step * np.inf)))


def is_value(value: float, dtype: str) -> bool:
    """Whether an image of ``dtype`` may have ``value``. For floats, any finite value: files may have other dtypes."""
    if np.dtype(dtype).kind == "f":
        return bool(np.isfinite(value))
    info = np.iinfo(dtype)
    return info.min <= value <= info.max and value == int(value)


def missing_values(image: Tensor, nodata: float | None) -> Tensor:
    """Mask of missing values of ``image``, bool, with the same shape."""
    values = image if image.is_floating_point() else image.to(torch.float32)
    missing = values.isnan()
    return missing if nodata is None else missing | (values == nodata)


def resized_raw(image: Tensor, size: tuple[int, int], nodata: float | None) -> Tensor:
    """Resize an image [C, h, w] to ``size``, bicubic with antialiasing. Computed in fp32, returned in its dtype.

    Missing values have weight 0. A result is missing if missing values would have more than half of the weight. Other
    results are between the minimum and maximum of the image, and never equal ``nodata``.
    """
    values, missing = image.to(torch.float32), missing_values(image, nodata)
    filler = float("nan") if nodata is None else nodata
    if missing.all():
        return torch.full((image.shape[0], *size), filler, dtype=torch.float32).to(image.dtype)
    absent = bool(missing.any())
    low, high = values[~missing].min(), values[~missing].max()
    made = _bicubic(values.masked_fill(missing, 0) if absent else values, size)
    if absent:
        weight = _bicubic((~missing).float(), size)
        made = made / weight.clamp(min=0.5)
    made = made.clamp(low, high)
    if not image.is_floating_point():
        made = made.round()
    if nodata is not None:  # interpolation may give this value
        made = made.masked_fill(
            missing_values(made.to(image.dtype), nodata),
            _beside(nodata, np.dtype(str(image.dtype).removeprefix("torch.")), 1),
        )
    return (made.masked_fill(weight < 0.5, filler) if absent else made).to(image.dtype)


def _bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    resized: Tensor = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    return resized


def statistics(images: Iterable[Tensor], nodata: float | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over ``images`` [C, H, W], in one pass, without missing values."""
    count, mean, squares = (torch.zeros((), dtype=torch.float64) for _ in range(3))  # squared deviations
    for image in images:
        values, known = image.to(torch.float64), ~missing_values(image, nodata)
        found = known.sum((1, 2))
        share = found / (count + found).clamp(min=1)
        own_mean = values.masked_fill(~known, 0).sum((1, 2)) / found.clamp(min=1)
        deviations = (values - own_mean[:, None, None]).masked_fill(~known, 0)
        shift = own_mean - mean
        squares = squares + deviations.square().sum((1, 2)) + shift.square() * count * share
        mean, count = mean + shift * share, count + found
    mean = torch.where(count > 0, mean, torch.nan)
    return mean.tolist(), (squares / count).sqrt().tolist()


def stored_dtype(data: bytes) -> str:
    """The dtype of ``PixelFormat`` that keeps the values of an encoded image.

    Raises:
        BadImage: if the image cannot be read.
    """
    header = read_header(data)
    if header.format in BYTES_ONLY:
        return "uint8"
    with only_bad_images("broken"):
        dtype = _read_array(data, header).dtype
    return dtype.name if dtype.name in PIXEL_DTYPES else "float32"
