"""Files to uint8 pixels with Pillow and torchvision: the reference that every other decoder is held to."""

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..errors import UserError
from .keyed import Box

_MODES = {1: "L", 3: "RGB"}


def decode(path: str, channels: int = 3) -> Image.Image:
    """The image in ``path`` with 1 (grey) or 3 (RGB) channels.

    Raises:
        UserError: naming the file, if it cannot be read.
    """
    if channels not in _MODES:
        raise UserError(f"images are read with 1 or 3 channels, got in_chans={channels}")
    try:
        with Image.open(path) as image:
            converted: Image.Image = image.convert(_MODES[channels])
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError and ValueError, too, on files that are broken
        raise UserError(f"cannot read image {path} ({error}); repair or remove the file") from error
    return converted


def crop_resized(image: Image.Image, box: Box, size: tuple[int, int], flip: bool) -> np.ndarray:
    """``box`` of the image, bicubic (antialiased) to ``size`` (height, width), flipped if asked; uint8 [H, W, C]."""
    resized = tv.resized_crop(image, *box, size=list(size), interpolation=InterpolationMode.BICUBIC)
    pixels = np.asarray(tv.horizontal_flip(resized) if flip else resized)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def centre_box(height: int, width: int, size: tuple[int, int]) -> Box:
    """The largest centred window with the aspect ratio of ``size`` (height, width)."""
    scale = min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return (height - h) // 2, (width - w) // 2, h, w


def load_centred(path: str, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """One image for evaluation: largest centred window, resized to ``size`` (height, width); uint8 [H, W, C]."""
    image = decode(path, channels)
    return crop_resized(image, centre_box(image.height, image.width, size), size, flip=False)
