"""What the pixels of encoded images become in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UserError

Ranges = tuple[tuple[float, float], ...]


def band_numbers(flag: str, bands: str | Sequence[int] | None) -> tuple[int, ...]:
    """Band numbers from 1 on, of "4,3,2", "1-4,7" or a sequence; none of None.

    Raises:
        UserError: if they are not such numbers. It names the ``flag``.
    """
    words = bands.split(",") if isinstance(bands, str) else [str(band) for band in bands or ()]
    found: list[int] = []
    for word in words:
        first, dash, last = (part.strip() for part in word.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise UserError(f"--{flag} {','.join(words)}", "give numbers from 1 on, such as 4,3,2 or 1-4,7")
        found += range(int(first), int(last) + 1)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """What the pixels of an encoded image become.

    Attributes:
        channels: 1 or 3: grey and colour become each other. Other numbers have to be those of the image or of
            ``bands``.
        exif: turn images as their EXIF orientation says; as published, they are left as they are stored.
        dtype: one of ``PIXEL_DTYPES``. "uint8": 16-bit pixels are scaled to 8 bits, as other software shows them.
            Another dtype keeps the values of pixels, and refuses those that it cannot hold.
        bands: numbers of the image's bands, from 1 on, in the order of the channels; empty: all, as they are.
        clip: least and greatest value, of each channel or of all; empty: no limits. Missing values stay missing.
        nodata: the value of missing pixels, if there is one. NaN is another.
    """

    channels: int = 3
    exif: bool = False
    dtype: str = "uint8"
    bands: tuple[int, ...] = ()
    clip: Ranges = ()
    nodata: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether images are 8-bit pictures, which every decoder and augmentation takes."""
        return self.dtype == "uint8" and not self.bands and not self.clip and self.nodata is None

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def of_decoded(self) -> "PixelFormat":
        """The format to read images by that were decoded by this one already, and kept."""
        return replace(self, exif=False, bands=(), clip=())

    def record(self) -> dict[str, Any]:
        """JSON; ``with_record`` reads it."""
        made = {"dtype": self.dtype, "bands": list(self.bands), "clip": [list(x) for x in self.clip]}
        return {**made, "nodata": self.nodata}

    def with_record(self, record: dict[str, Any]) -> "PixelFormat":
        """This format, but dtype, bands, clip and missing value as ``record`` has them."""
        return replace(
            self,
            dtype=record["dtype"],
            bands=tuple(record["bands"]),
            clip=tuple((low, high) for low, high in record["clip"]),
            nodata=record["nodata"],
        )


RGB = PixelFormat()
