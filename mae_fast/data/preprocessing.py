"""How the input of a model is made of an encoded image: all that a prediction depends on, besides the weights."""

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
    """How the input of a model is made of an encoded image, with antialiasing.

    Attributes:
        size: height and width of the input.
        resize: "center_crop": resize to just cover ``size / crop_pct``, then crop the centre. "shorter_side": keep the
            aspect ratio, the shorter side becomes ``size``. "longer_side": keep the aspect ratio, the longer side
            becomes ``size``, and pad to a square.
        crop_pct: of "center_crop"; 1 otherwise.
        pixels: what decoded pixels become.
        mean, std: of each channel, for uint8 pixels in units of 0..1, for others in the pixels' own. The models of this
            package take raw pixels and standardise them.
    """

    size: tuple[int, int]
    pixels: PixelFormat
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "center_crop"
    crop_pct: float = 1.0

    def __call__(self, data: bytes | str | Path) -> tuple[np.ndarray, tuple[int, int]]:
        """Raw pixels [h, w, C] of an encoded image or of a file, and the height and width that it has itself.

        Raises:
            BadImage: if it cannot be used.
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
        """JSON; ``from_record`` reads it."""
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
        """What ``record`` has written.

        Raises:
            UserError: naming ``origin``, if the record is damaged, or of another version.
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
    """Mean and standard deviation [C] of a model; the default ones on the meta device, where it has no values."""
    settings, (mean, std) = model.settings(), default_pixel_stats(model.in_chans)
    return tuple(settings.get("pixel_mean", mean)), tuple(settings.get("pixel_std", std))


def model_preprocessing(
    model: Encoder, size: tuple[int, int], pixels: PixelFormat, resize: Resize = "center_crop"
) -> Preprocessing:
    """The preprocessing of a model, with the statistics that it standardises pixels with."""
    mean, std = model_pixel_stats(model)
    return Preprocessing(
        size=size,
        pixels=pixels,
        mean=mean,
        std=std,
        resize=resize,
        crop_pct=default_crop_pct(size) if resize == "center_crop" else 1.0,
    )
