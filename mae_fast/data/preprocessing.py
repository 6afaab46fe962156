"""The preprocessing of images for a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ..errors import UserError
from ..models.features import Encoder, default_pixel_stats
from ..pixel_dtypes import PIXEL_DTYPES
from .coco import padded_square
from .decode import centre_crop, decode, size_of
from .loader import default_crop_pct
from .pixel_format import PixelFormat
from .segmentation import scaled
from .sources import Files

Resize = Literal["center_crop", "shorter_side", "longer_side"]
INTERPOLATION = {"center_crop": "bicubic", "shorter_side": "bicubic", "longer_side": "bilinear"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Turns an encoded image into the input of a model. Images are resized with antialiasing.

    Attributes:
        size: height and width of the input.
        resize: "center_crop": resize to just cover ``size / crop_pct``, then crop the centre. "shorter_side": keep the
            aspect ratio, the shorter side becomes ``size``. "longer_side": keep the aspect ratio, the longer side
            becomes ``size``, and pad to a square.
        crop_pct: crop ratio of "center_crop"; 1 otherwise.
        pixels: format of decoded pixels.
        mean, std: statistics of each channel, in 0..1 for uint8 pixels, in raw units for other dtypes. The models of
            this package get raw pixels and standardise them.
    """

    size: tuple[int, int]
    pixels: PixelFormat
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "center_crop"
    crop_pct: float = 1.0

    def __call__(self, data: bytes | str | Path) -> tuple[np.ndarray, tuple[int, int]]:
        """Raw pixels [h, w, C] of an encoded image or a file, and the original height and width.

        Raises:
            BadImage: if the image cannot be used.
        """
        if isinstance(data, str | Path):
            data = Files(Path(), [str(data)]).read(0)
        image = decode(data, self.pixels)
        if self.resize == "center_crop":
            made = centre_crop(image, self.size, self.crop_pct, self.pixels.nodata)
        elif self.resize == "shorter_side":
            made = scaled(image, min(self.size), self.pixels.nodata)
        else:
            made = padded_square(image if isinstance(image, Tensor) else pil_to_tensor(image), max(self.size))
        return made, size_of(image)

    def record(self) -> dict[str, Any]:
        """The preprocessing as JSON, for ``from_record``."""
        return {
            "size": list(self.size),
            "resize": self.resize,
            "crop_pct": self.crop_pct,
            "interpolation": INTERPOLATION[self.resize],
            "channels": self.pixels.channels,
            "exif": self.pixels.exif,
            **self.pixels.record(),
            "rescale_factor": 1 / 255 if self.pixels.dtype == "uint8" else 1.0,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any], origin: object) -> "Preprocessing":
        """The preprocessing of a record.

        Raises:
            UserError: if the record is damaged or of another version. The message names ``origin``.
        """
        try:
            channels, exif, resize = int(record["channels"]), bool(record["exif"]), record["resize"]
            if record["interpolation"] != INTERPOLATION[resize] or record["dtype"] not in PIXEL_DTYPES:
                raise ValueError(f"{record['interpolation']} interpolation of {record['dtype']}")
            height, width = map(int, record["size"])
            return cls(
                size=(height, width),
                resize=resize,
                crop_pct=float(record["crop_pct"]),
                pixels=PixelFormat(channels=channels, exif=exif).with_record(record),
                mean=tuple(map(float, record["mean"])),
                std=tuple(map(float, record["std"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{origin}: its preprocessing cannot be read ({why})", "write the file again") from error


def model_pixel_stats(model: Encoder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation [C] of a model. On the meta device, where buffers have no values, the defaults."""
    settings, (mean, std) = model.settings(), default_pixel_stats(model.in_chans)
    return tuple(settings.get("pixel_mean", mean)), tuple(settings.get("pixel_std", std))


def model_preprocessing(
    model: Encoder, size: tuple[int, int], pixels: PixelFormat, resize: Resize = "center_crop"
) -> Preprocessing:
    """The preprocessing for a model, with its pixel statistics."""
    mean, std = model_pixel_stats(model)
    return Preprocessing(
        size=size,
        pixels=pixels,
        mean=mean,
        std=std,
        resize=resize,
        crop_pct=default_crop_pct(size) if resize == "center_crop" else 1.0,
    )
