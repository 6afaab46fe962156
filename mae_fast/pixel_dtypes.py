"""The dtypes of raw pixels, by name."""

from typing import Literal, get_args

PixelDtype = Literal["uint8", "uint16", "int16", "float16", "float32"]
PIXEL_DTYPES: tuple[str, ...] = get_args(PixelDtype)
