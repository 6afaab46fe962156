"""Determine the pixels of a run (dtype, bands, range, statistics) and its model's sizes from flags, weights, images."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.check import bands_hint
from ..data.decode import BadImage, decode
from ..data.pixel_format import PixelFormat, band_numbers
from ..data.preprocessing import Preprocessing
from ..data.raw import is_value, missing_values, statistics, stored_dtype
from ..data.rng import VALUES_OF_IMAGES, generator
from ..data.sources import Source
from ..errors import UserError
from ..pixel_dtypes import PIXEL_DTYPES
from ..weights.metadata import read_weights
from ..weights.run_reader import find_checkpoint, read_config, run_folder, run_or_checkpoint
from .config import PIXEL_FLAGS, SIZE_FLAGS, RunConfig

logger = logging.getLogger(__name__)

LOOKED_AT = 16  # images that are read to find the dtype, or decoded until one of them is usable
BYTES_ONLY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif")  # always 8 bits, so that no file is read
SAMPLED = 1000  # images to measure statistics on
ROUNDING = 1e-12  # a standard deviation below this fraction of the mean counts as 0
VALUES = 4096  # values per channel and image, for percentiles


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """The pixels of a run, and the statistics that standardise them; None: the model's defaults."""

    format: PixelFormat
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def record(self) -> dict[str, Any]:
        """The settings as JSON for ``recorded_pixels``. Empty for 8-bit RGB with the model's default statistics."""
        if self.format.is_plain and self.format.channels == 3 and self.mean is None and self.std is None:
            return {}
        stats = {name: None if x is None else list(x) for name, x in (("mean", self.mean), ("std", self.std))}
        made = {"channels": self.format.channels, **self.format.record(), **stats}
        return {"pixel_settings": made}

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments of a model for these pixels."""
        given: dict[str, Any] = {"pixel_mean": self.mean, "pixel_std": self.std, "nodata": self.format.nodata}
        given["pixel_dtype"] = None if self.format.dtype == "uint8" and self.mean is None else self.format.dtype
        made = {name: list(x) if isinstance(x, tuple) else x for name, x in given.items() if x is not None}
        return made if self.format.channels == 3 else {"in_chans": self.format.channels, **made}


def recorded_pixels(record: dict[str, Any], exif: bool) -> PixelSettings:
    """Read the result of ``PixelSettings.record``."""
    mean, std = (None if record[name] is None else tuple(record[name]) for name in ("mean", "std"))
    made = PixelFormat(channels=record["channels"], exif=exif).with_record(record)
    return PixelSettings(format=made, mean=mean, std=std)


def settle_pixels(config: RunConfig, source: Source, start: str | None) -> PixelSettings:
    """Determine the pixels of the run that ``config`` describes.

    A resumed run keeps its settings. A new run takes the settings that the weights ``start`` record, if any, and the
    given flags override them. Otherwise the settings follow from the flags and the images.

    Raises:
        UserError: if a flag is invalid or does not fit the images.
    """
    before = pixels_of_run(config.output_dir, config.exif)
    if before is not None:
        return before
    inherited = pixels_of_weights(start, config.exif) if start else None
    unchanged = inherited is not None and not any(config.was_given(name) for name in PIXEL_FLAGS)
    settings = inherited if inherited and unchanged else _from_flags(config, source, inherited)
    of_weights = inherited is not None and settings.format.channels == inherited.format.channels
    _check_images(source, settings.format, of_weights)
    if inherited and start:
        _log_inherited(config, start, settings.format, inherited.format)
    of_bytes = inherited is None or inherited.format.dtype == "uint8"  # else the weights' statistics have other units
    use_defaults = settings.format.is_plain and of_bytes and not (config.clip or config.mean or config.std)
    return settings if unchanged or use_defaults else _with_statistics(config, source, settings)


def _evenly_spaced(source: Source, most: int) -> list[int]:
    """Indices of up to ``most`` images, evenly spaced."""
    places: list[int] = np.unique(np.linspace(0, len(source) - 1, most).round().astype(int)).tolist()
    return places


def _check_images(source: Source, pixels: PixelFormat, of_weights: bool) -> None:
    """Raise ``UserError`` if none of a few images, evenly spaced, can be used."""
    first = ""
    places = _evenly_spaced(source, LOOKED_AT)
    for i in places:
        try:
            decode(source.read(i), pixels)
        except BadImage as bad:
            first = first or f"{source.names[i]!r} ({bad})"
        else:
            return
    hint = bands_hint(source, places, pixels, of_weights)
    raise UserError(f"no image of {source.root} can be used; first error: {first}", hint or "see --bands and --pixels")


def _log_inherited(config: RunConfig, start: str, pixels: PixelFormat, inherited: PixelFormat) -> None:
    """Log the settings that are taken from the weights, not from flags."""
    kept = [
        f"{flag} {value}"
        for flag, value, theirs in (
            ("pixels", pixels.dtype, inherited.dtype),
            ("bands", ",".join(map(str, pixels.bands)), ",".join(map(str, inherited.bands))),
            ("nodata", pixels.nodata, inherited.nodata),
        )
        if value == theirs and value not in (None, "", "uint8") and not config.was_given(flag)
    ]
    if kept:
        logger.info(f"using the pixel settings of {start}: {', '.join(kept)}")


def json_sides(sides: tuple[int, int]) -> int | list[int]:
    """Height and width as a constructor argument: a single number if they are equal."""
    return sides[0] if sides[0] == sides[1] else list(sides)


def settle_sizes(config: RunConfig, start: str | None) -> dict[str, Any]:
    """Sizes of the encoder as constructor arguments, from the flags, else from the run that ``start`` belongs to.

    Raises:
        UserError: if a flag is invalid.
    """
    run = run_or_checkpoint(Path(start)) if start else None
    about = find_checkpoint(run).state["model"] if run else {}
    return {name: about[name] for name in SIZE_FLAGS if name in about} | config.model_sizes()


def pixels_of_run(path: Path, exif: bool) -> PixelSettings | None:
    """The pixels that the run in ``path`` records; None if it is not a run, or reads 8-bit RGB."""
    folder = run_folder(path)
    record = read_config(folder).get("pixel_settings") if folder else None
    return recorded_pixels(record, exif) if isinstance(record, dict) else None


def pixels_of_weights(start: str, exif: bool) -> PixelSettings | None:
    """The pixels that the run, file or folder ``start`` records; None if it records none."""
    if run_or_checkpoint(Path(start)) or not Path(start).exists():
        return pixels_of_run(Path(start), exif)
    _, metadata = read_weights(Path(start))
    mean, dtype = metadata.pixel_mean, metadata.pixel_dtype or "uint8"
    if mean is None:
        return None
    made = PixelFormat(channels=len(mean), exif=exif, dtype=dtype, nodata=metadata.nodata)
    if metadata.preprocessing:
        made = replace(Preprocessing.from_record(metadata.preprocessing, start).pixels, exif=exif)
    return None if made.is_plain else PixelSettings(format=made, mean=mean, std=metadata.pixel_std)


def _from_flags(config: RunConfig, source: Source, inherited: PixelSettings | None) -> PixelSettings:
    """Settings from the flags, ``inherited`` and the images' dtype, without measured statistics."""
    base = inherited.format if inherited else PixelFormat()
    bands = band_numbers("bands", config.bands) or base.bands
    channels = config.in_chans or len(bands) or base.channels
    if bands and len(bands) != channels:
        if config.bands:
            given = f"--bands {config.bands} has {len(bands)} bands"
            raise UserError(f"--in-chans {channels}, but {given}", "leave --in-chans out")
        names = ",".join(map(str, bands))
        raise UserError(f"--in-chans {channels}, but the weights were trained on bands {names}", "add --bands")
    dtype: str = config.pixels
    if dtype == "auto":
        dtype = inherited.format.dtype if inherited else dtype_of(source)
    if inherited and dtype != base.dtype:  # values in other units
        base = replace(base, clip=(), nodata=None)
    if len(base.clip) == base.channels and (bands, channels) != (base.bands, base.channels):
        if not config.clip:
            logger.warning("values are not clipped: the limits (--clip) of the weights are for other bands")
        base = replace(base, clip=())
    nodata = base.nodata if config.nodata is None else config.nodata
    if nodata is not None and not is_value(nodata, dtype):
        raise UserError(
            f"--nodata {nodata:g} is not a value of {dtype} pixels", "give another, or change the dtype by --pixels"
        )
    made = PixelFormat(channels=channels, exif=config.exif, dtype=dtype, bands=bands, clip=base.clip, nodata=nodata)
    mean, std = (config.statistic(name, channels) for name in ("mean", "std"))
    return PixelSettings(format=made, mean=mean, std=std)


def dtype_of(source: Source) -> str:
    """The dtype for the values of a sample of images. A mixture of 8 and 16 bits gives uint8, as the units differ."""
    found: dict[str, str] = {}  # dtype -> an image
    for i in _evenly_spaced(source, LOOKED_AT):
        if source.names[i].lower().endswith(BYTES_ONLY):
            found["uint8"] = source.names[i]
            continue
        try:
            found[stored_dtype(source.read(i))] = source.names[i]
        except BadImage:
            continue
    if "uint8" in found and len(found) > 1:
        kinds = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(found.items()))
        logger.warning(
            f"{source.root} has images of {kinds}: all are read as uint8, 16-bit values divided by 257; see --pixels"
        )
    joined = np.result_type(*found).name if found and "uint8" not in found else "uint8"
    return joined if joined in PIXEL_DTYPES else "float32"


def _with_statistics(config: RunConfig, source: Source, settings: PixelSettings) -> PixelSettings:
    """Measure the percentiles of --clip, and the mean and std that are not given, on a sample of images."""
    made = settings.format
    percentiles, limits = config.clip_limits()
    values = []
    if percentiles:
        values = _values(source, made)
        shares = limits * made.channels
        found = [np.percentile(x, share) for x, share in zip(values, shares, strict=True)]
        limits = tuple((float(low), float(high)) for low, high in found)
        shown = "; ".join(f"{low:g} to {high:g}" for low, high in limits)
        logger.info(f"--clip {config.clip}: values are clipped to {shown}")
    if limits:
        made = replace(made, clip=limits)
    mean, std = settings.mean, settings.std
    if mean is None or std is None:
        stats, count = _statistics(source, made, values), min(SAMPLED, len(source))
        scale = 255 if made.dtype == "uint8" else 1
        if not all(np.isfinite(x) for x in (*stats[0], *stats[1])):
            raise UserError(f"a channel of {source.root} has no values in a sample of {count} images", "see --nodata")
        constant = [i + 1 for i, (mid, dev) in enumerate(zip(*stats, strict=True)) if dev <= ROUNDING * abs(mid)]
        if constant and std is None:
            raise UserError(
                f"channel {constant[0]} has the same value everywhere in a sample of {count} images of {source.root}",
                "leave it out by --bands, or give --std",
            )
        if std is None:
            std = tuple(_rounded(x / scale, x / scale) for x in stats[1])
        if mean is None:
            mean = tuple(_rounded(x / scale, deviation) for x, deviation in zip(stats[0], std, strict=True))
        logger.info(f"pixels of {count} images: mean {_listed(mean)}, standard deviation {_listed(std)}")
    return PixelSettings(format=made, mean=mean, std=std)


def _statistics(source: Source, pixels: PixelFormat, values: list[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel: of ``values`` if there are any, else of a sample of images."""
    if not values:
        return statistics(sample(source, pixels), pixels.nodata)
    clipped = [
        torch.from_numpy(x.clip(*limits).astype(pixels.dtype).astype(np.float64))[None, None]
        for x, limits in zip(values, pixels.clip, strict=True)
    ]
    found = [statistics([x], None) for x in clipped]
    return [mean for (mean,), _ in found], [std for _, (std,) in found]


def _rounded(value: float, deviation: float) -> float:
    """Round to six digits of the standard deviation."""
    return round(value, 5 - math.floor(math.log10(deviation)))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.9g}" for x in values)


def sample(source: Source, pixels: PixelFormat) -> Iterator[Tensor]:
    """Decode up to ``SAMPLED`` usable images [C, H, W], evenly spaced.

    Raises:
        UserError: if none is usable.
    """
    worst, usable = "", 0
    for i in _evenly_spaced(source, SAMPLED):
        try:
            image = decode(source.read(i), pixels)
        except BadImage as bad:
            worst = worst or f"{source.names[i]!r} ({bad})"
            continue
        usable += 1
        if isinstance(image, Tensor):
            yield image
        else:
            array = np.array(image)
            yield torch.from_numpy(array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0))
    if not usable:
        raise UserError(f"no image of {source.root} can be used; first error: {worst}", "see --bands and --pixels")


def value_ranges(source: Source, pixels: PixelFormat) -> list[tuple[float, float]]:
    """Smallest and largest value of each channel in a sample of images."""
    found: list[tuple[float, float]] = []
    for image in sample(source, pixels):
        values = [plane[known] for plane, known in zip(image, ~missing_values(image, pixels.nodata), strict=True)]
        limits = [(float(x.min()), float(x.max())) if len(x) else (np.inf, -np.inf) for x in map(Tensor.double, values)]
        found = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(found or limits, limits, strict=True)]
    return found


def _values(source: Source, pixels: PixelFormat) -> list[np.ndarray]:
    """Values of each channel in a sample of images, up to ``VALUES`` per image, without missing values.

    Raises:
        UserError: if a channel has no values.
    """
    values: list[list[np.ndarray]] = [[] for _ in range(pixels.channels)]
    for number, image in enumerate(sample(source, pixels)):
        known = ~missing_values(image, pixels.nodata)
        for channel, (plane, there) in enumerate(zip(image, known, strict=True)):
            found = plane.to(torch.float32)[there].numpy()
            if len(found) > VALUES:  # chosen at random: every n-th value could come from a few columns only
                found = found[generator(0, VALUES_OF_IMAGES, channel, number).integers(len(found), size=VALUES)]
            values[channel].append(found)
    joined = [np.concatenate(of_channel) for of_channel in values]
    if any(not len(of_channel) for of_channel in joined):
        raise UserError(f"a channel of {source.root} has no values", "see --nodata")
    return joined
