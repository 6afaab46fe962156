"""The pixels of a run (dtype, bands, range, statistics) and its model's sizes, as flags, weights and images say."""

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

LOOKED_AT = 16  # images whose dtype is read, or that are decoded until one can be used
BYTES_ONLY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif")  # always 8 bits: not read
SAMPLED = 1000  # images that statistics are taken of
ROUNDING = 1e-12  # of the mean: a smaller deviation is none
VALUES = 4096  # of each channel of an image, for percentiles


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """The pixels of a run, and the statistics that the model standardises them with; None: the model's own."""

    format: PixelFormat
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def record(self) -> dict[str, Any]:
        """JSON; ``recorded_pixels`` reads it. Empty for 8-bit RGB with the model's own statistics."""
        if self.format.is_plain and self.format.channels == 3 and self.mean is None and self.std is None:
            return {}
        stats = {name: None if x is None else list(x) for name, x in (("mean", self.mean), ("std", self.std))}
        made = {"channels": self.format.channels, **self.format.record(), **stats}
        return {"pixel_settings": made}

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of a model."""
        given: dict[str, Any] = {"pixel_mean": self.mean, "pixel_std": self.std, "nodata": self.format.nodata}
        given["pixel_dtype"] = None if self.format.dtype == "uint8" and self.mean is None else self.format.dtype
        made = {name: list(x) if isinstance(x, tuple) else x for name, x in given.items() if x is not None}
        return made if self.format.channels == 3 else {"in_chans": self.format.channels, **made}


def recorded_pixels(record: dict[str, Any], exif: bool) -> PixelSettings:
    """What ``PixelSettings.record`` has written as "pixel_settings"."""
    mean, std = (None if record[name] is None else tuple(record[name]) for name in ("mean", "std"))
    made = PixelFormat(channels=record["channels"], exif=exif).with_record(record)
    return PixelSettings(format=made, mean=mean, std=std)


def settle_pixels(config: RunConfig, source: Source, start: str | None) -> PixelSettings:
    """The pixels of the run that ``config`` describes.

    A run that is resumed keeps its own. Otherwise those of the weights ``start``, if they are of a run or record pixels
    of another dtype than uint8, with the flags that are given; else those that flags and images give.

    Raises:
        UserError: if a flag is wrong, or the images do not go with it.
    """
    before = pixels_of_run(config.output_dir, config.exif)
    if before is not None:
        return before
    inherited = pixels_of_weights(start, config.exif) if start else None
    as_they_are = inherited is not None and not any(config.was_given(name) for name in PIXEL_FLAGS)
    settings = inherited if inherited and as_they_are else _from_flags(config, source, inherited)
    of_weights = inherited is not None and settings.format.channels == inherited.format.channels
    _check_images(source, settings.format, of_weights)
    if inherited and start:
        _log_inherited(config, start, settings.format, inherited.format)
    of_bytes = inherited is None or inherited.format.dtype == "uint8"  # else the weights' statistics have other units
    plain = settings.format.is_plain and of_bytes and not (config.clip or config.mean or config.std)
    return settings if as_they_are or plain else _with_statistics(config, source, settings)


def _evenly_spaced(source: Source, most: int) -> list[int]:
    """Places of up to ``most`` images."""
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
    raise UserError(f"no image of {source.root} can be used, the first {first}", hint or "see --bands and --pixels")


def _log_inherited(config: RunConfig, start: str, pixels: PixelFormat, inherited: PixelFormat) -> None:
    """Log the settings that no flag has given, and the weights record."""
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
        logger.info(f"{start}: its pixel settings are used: {', '.join(kept)}")


def json_sides(sides: tuple[int, int]) -> int | list[int]:
    """Height and width as a constructor argument: one number of a square."""
    return sides[0] if sides[0] == sides[1] else list(sides)


def settle_sizes(config: RunConfig, start: str | None) -> dict[str, Any]:
    """Sizes of the encoder, as constructor arguments: those that flags give, else of the run that ``start`` is of.

    Raises:
        UserError: if a flag is wrong.
    """
    run = run_or_checkpoint(Path(start)) if start else None
    about = find_checkpoint(run).state["model"] if run else {}
    return {name: about[name] for name in SIZE_FLAGS if name in about} | config.model_sizes()


def pixels_of_run(path: Path, exif: bool) -> PixelSettings | None:
    """The pixels that the run in ``path`` has recorded; None if it is no run, or reads 8-bit RGB."""
    folder = run_folder(path)
    record = read_config(folder).get("pixel_settings") if folder else None
    return recorded_pixels(record, exif) if isinstance(record, dict) else None


def pixels_of_weights(start: str, exif: bool) -> PixelSettings | None:
    """The pixels that weights record: a run's, or in a file or folder those of other images than 8-bit pictures."""
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
    """Without what has to be measured."""
    base = inherited.format if inherited else PixelFormat()
    bands = band_numbers("bands", config.bands) or base.bands
    channels = config.in_chans or len(bands) or base.channels
    if bands and len(bands) != channels:
        if config.bands:
            raise UserError(f"--in-chans {channels}: --bands {config.bands} are {len(bands)}", "leave --in-chans out")
        names = ",".join(map(str, bands))
        raise UserError(f"--in-chans {channels}: the weights were trained on bands {names}", "give --bands, too")
    dtype: str = config.pixels
    if dtype == "auto":
        dtype = inherited.format.dtype if inherited else dtype_of(source)
    if inherited and dtype != base.dtype:  # values in other units
        base = replace(base, clip=(), nodata=None)
    if len(base.clip) == base.channels and (bands, channels) != (base.bands, base.channels):
        if not config.clip:
            logger.warning("the weights' limits of values (--clip) are of other bands: values are not limited")
        base = replace(base, clip=())
    nodata = base.nodata if config.nodata is None else config.nodata
    if nodata is not None and not is_value(nodata, dtype):
        raise UserError(
            f"--nodata {nodata:g} is no value of {dtype} pixels", "give another, or another dtype by --pixels"
        )
    made = PixelFormat(channels=channels, exif=config.exif, dtype=dtype, bands=bands, clip=base.clip, nodata=nodata)
    mean, std = (config.statistic(name, channels) for name in ("mean", "std"))
    return PixelSettings(format=made, mean=mean, std=std)


def dtype_of(source: Source) -> str:
    """The dtype that holds the values of a sample of images. Of pictures of 8 and 16 bits uint8: their units differ."""
    found = set()
    for i in _evenly_spaced(source, LOOKED_AT):
        if source.names[i].lower().endswith(BYTES_ONLY):
            found.add("uint8")
            continue
        try:
            found.add(stored_dtype(source.read(i)))
        except BadImage:
            continue
    if "uint8" in found and len(found) > 1:
        logger.warning(f"{source.root} has images of {', '.join(sorted(found))}: all become uint8; see --pixels")
    joined = np.result_type(*found).name if found and "uint8" not in found else "uint8"
    return joined if joined in PIXEL_DTYPES else "float32"


def _with_statistics(config: RunConfig, source: Source, settings: PixelSettings) -> PixelSettings:
    """With the clip's percentiles, and the mean and deviation that no flag gives, measured on a sample."""
    made = settings.format
    percentiles, limits = config.clip_limits()
    values = []
    if percentiles:
        values = _values(source, made)
        shares = limits * made.channels
        found = [np.percentile(x, share) for x, share in zip(values, shares, strict=True)]
        limits = tuple((float(low), float(high)) for low, high in found)
        shown = "; ".join(f"{low:g} to {high:g}" for low, high in limits)
        logger.info(f"--clip {config.clip}: values are limited to {shown}")
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
    """Mean and standard deviation of each channel: of the ``values`` that are at hand, or else of a sample."""
    if not values:
        return statistics(sample(source, pixels), pixels.nodata)
    clipped = [
        torch.from_numpy(x.clip(*limits).astype(pixels.dtype).astype(np.float64))[None, None]
        for x, limits in zip(values, pixels.clip, strict=True)
    ]
    found = [statistics([x], None) for x in clipped]
    return [mean for (mean,), _ in found], [std for _, (std,) in found]


def _rounded(value: float, deviation: float) -> float:
    """To six digits of the standard deviation."""
    return round(value, 5 - math.floor(math.log10(deviation)))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.9g}" for x in values)


def sample(source: Source, pixels: PixelFormat) -> Iterator[Tensor]:
    """Up to ``SAMPLED`` usable images [C, H, W], evenly spaced.

    Raises:
        UserError: if none can be used.
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
        raise UserError(f"no image of {source.root} can be used, the first {worst}", "see --bands and --pixels")


def value_ranges(source: Source, pixels: PixelFormat) -> list[tuple[float, float]]:
    """Least and greatest value of each channel in a sample of images."""
    found: list[tuple[float, float]] = []
    for image in sample(source, pixels):
        values = [plane[known] for plane, known in zip(image, ~missing_values(image, pixels.nodata), strict=True)]
        limits = [(float(x.min()), float(x.max())) if len(x) else (np.inf, -np.inf) for x in map(Tensor.double, values)]
        found = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(found or limits, limits, strict=True)]
    return found


def _values(source: Source, pixels: PixelFormat) -> list[np.ndarray]:
    """Values of each channel in a sample of images, up to ``VALUES`` of each image; without missing ones.

    Raises:
        UserError: if a channel has none.
    """
    values: list[list[np.ndarray]] = [[] for _ in range(pixels.channels)]
    for number, image in enumerate(sample(source, pixels)):
        known = ~missing_values(image, pixels.nodata)
        for channel, (plane, there) in enumerate(zip(image, known, strict=True)):
            found = plane.to(torch.float32)[there].numpy()
            if len(found) > VALUES:  # at random: every n-th would be a few columns only
                found = found[generator(0, VALUES_OF_IMAGES, channel, number).integers(len(found), size=VALUES)]
            values[channel].append(found)
    joined = [np.concatenate(of_channel) for of_channel in values]
    if any(not len(of_channel) for of_channel in joined):
        raise UserError(f"a channel of {source.root} has no values", "see --nodata")
    return joined
