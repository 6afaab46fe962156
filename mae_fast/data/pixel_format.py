"""The format of pixels in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UserError

Ranges = tuple[tuple[float, float], ...]


def band_numbers(flag: str, bands: str | Sequence[int] | None) -> tuple[int, ...]:
    """Parse band numbers, which start at 1: "4,3,2", "1-4,7" or a sequence. Empty for None.

    Raises:
        UserError: if they are invalid. The message names ``flag``.
    """
    words = bands.split(",") if isinstance(bands, str) else [str(band) for band in bands or ()]
    found: list[int] = []
    for word in words:
        first, dash, last = (part.strip() for part in word.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise UserError(
                f"--{flag} {','.join(words)} is invalid", "give numbers of at least 1, such as 4,3,2 or 1-4,7"
            )
        found += range(int(first), int(last) + 1)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """The format that pixels of encoded images are converted to.

    Attributes:
        channels: number of channels. Grey and RGB are converted to 1 or 3 channels. Other numbers must be those of the
            image or of ``bands``.
        exif: apply the EXIF orientation of images. The published code does not.
        dtype: one of ``PIXEL_DTYPES``. "uint8" scales 16-bit pixels to 8 bits. Other dtypes keep the values, and refuse
            values that do not fit.
        bands: numbers of the image's bands for the channels, starting at 1. Empty: all bands.
        clip: (lowest, highest) value, for each channel or once for all. Empty: no limits. Missing values stay missing.
        nodata: value of missing pixels, in addition to NaN. None: there is no such value.
    """

    channels: int = 3
    exif: bool = False
    dtype: str = "uint8"
    bands: tuple[int, ...] = ()
    clip: Ranges = ()
    nodata: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether images are plain 8-bit ones, which all decoders support: no bands, limits or missing values."""
        return self.dtype == "uint8" and not self.bands and not self.clip and self.nodata is None

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def of_decoded(self) -> "PixelFormat":
        """The format for reading images that were already decoded to this format, as in a cache."""
        return replace(self, exif=False, bands=(), clip=())

    def record(self) -> dict[str, Any]:
        """The format as JSON, for ``with_record``."""
        made = {"dtype": self.dtype, "bands": list(self.bands), "clip": [list(x) for x in self.clip]}
        return {**made, "nodata": self.nodata}

    def with_record(self, record: dict[str, Any]) -> "PixelFormat":
        """A copy with dtype, bands, clip and missing value of ``record``."""
        return replace(
            self,
            dtype=record["dtype"],
            bands=tuple(record["bands"]),
            clip=tuple((low, high) for low, high in record["clip"]),
            nodata=record["nodata"],
        )


RGB = PixelFormat()
