"""Image files of many kinds, usable and unusable, with the reasons."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64


def photo(height: int = SIDE, width: int = SIDE + 16, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c) + c) * np.cos(y / (7 - c)) for c in range(3)]
    return (127 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(seed: int = 0, **options: object) -> bytes:
    return encoded(photo(seed=seed), "JPEG", quality=90, **options)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_rows(side: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A square PNG of these rows, each after its filter byte."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows, 9)) + png_chunk(b"IEND", b"")


def bomb_png(side: int = 30000) -> bytes:
    """A few kilobytes that decode to gigabytes."""
    return png_of_rows(side, 8, 2, bytes(10**6))


def orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return jpeg(exif=exif.tobytes())


def npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def _pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def _gif(frames: int) -> bytes:
    images = [Image.fromarray(photo(seed=i)).quantize(64) for i in range(frames)]
    return encoded(images[0], "GIF", save_all=True, append_images=images[1:])


def _flipped() -> bytes:
    data = bytearray(jpeg())
    for place in (len(data) // 2, len(data) * 2 // 3):
        data[place] ^= 0x55
    return bytes(data)


_WHOLE = jpeg()
_GREY16 = (photo()[:, :, 0].astype(np.uint16) * 257).astype(np.uint16)
_PALETTE = Image.fromarray(photo()).quantize(32)
_RGBA = np.dstack([photo(), photo(seed=1)[:, :, :1]])

# Name -> contents of images that are usable as RGB.
GOOD: dict[str, bytes] = {
    "plain.jpg": _WHOLE,
    "progressive.jpg": jpeg(progressive=True),
    "444.jpg": jpeg(subsampling=0),
    "422.jpg": jpeg(subsampling=1),
    "grey.jpg": encoded(photo()[:, :, 0], "JPEG"),
    "cmyk.jpg": encoded(Image.fromarray(photo()).convert("CMYK"), "JPEG"),
    "trailing_bytes.jpg": _WHOLE + b"\0" * 100,
    "huge_exif.jpg": jpeg(exif=b"Exif\0\0" + bytes(60000)),
    "broken_icc.jpg": jpeg(icc_profile=b"no profile" * 50),
    "bits_flipped.jpg": _flipped(),  # decodes without an error, because no decoder can detect this
    "a_png.jpg": encoded(photo(), "PNG"),
    "plain.png": encoded(photo(), "PNG"),
    "rgba.png": encoded(_RGBA, "PNG"),
    "grey_alpha.png": encoded(Image.fromarray(photo()).convert("LA"), "PNG"),
    "palette.png": encoded(_PALETTE, "PNG"),
    "palette_transparent.png": encoded(_PALETTE, "PNG", transparency=3),
    "one_bit.png": encoded(Image.fromarray(photo()).convert("1"), "PNG"),
    "16_bit.png": encoded(_GREY16, "PNG"),
    "16_bit.tif": encoded(_GREY16, "TIFF"),
    "1x1.png": encoded(photo(1, 1), "PNG"),
    "1x8000.png": encoded(photo(1, 8000), "PNG"),
    "8000x1.jpg": encoded(photo(8000, 1), "JPEG"),
    "palette.gif": _gif(1),
    "animated.gif": _gif(5),
    "animated.webp": encoded(
        Image.fromarray(photo()), "WEBP", save_all=True, append_images=[Image.fromarray(photo(seed=1))]
    ),
    "plain.webp": encoded(photo(), "WEBP", quality=90),
    "plain.bmp": encoded(photo(), "BMP"),
    "lzw.tif": encoded(photo(), "TIFF", compression="tiff_lzw"),
    "plain.ppm": encoded(photo(), "PPM"),
    "array.npy": npy(photo()),
    "array_grey_16.npy": npy(_GREY16),
    **{f"orientation_{i}.jpg": orientation(i) for i in range(1, 9)},
}

# Name -> contents and reason of unusable images.
BAD: dict[str, tuple[bytes, str]] = {
    **{
        f"cut_at_{percent}.jpg": (_WHOLE[: len(_WHOLE) * percent // 100], "broken" if percent > 30 else "")
        for percent in (1, 5, 10, 20, 30, 40, 50, 70, 90, 99)
    },
    "without_end.jpg": (_WHOLE[:-2], "broken"),
    "empty.jpg": (b"", "empty"),
    "zeros.jpg": (bytes(5000), "not an image"),
    "text.jpg": (b"not really an image\n" * 20, "not an image"),
    "404.jpg": (b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>", "not an image"),
    "noise.png": (np.random.default_rng(0).bytes(3000), "not an image"),
    "cut.png": (encoded(photo(), "PNG")[:-3000], "broken"),
    "cut.gif": (_gif(1)[:400], "broken"),
    "cut.webp": (encoded(photo(), "WEBP")[:300], ""),
    "cut.tif": (encoded(photo(), "TIFF", compression="tiff_lzw")[:2000], ""),
    "bomb.png": (bomb_png(), "too large"),
    "bomb_70_million.png": (bomb_png(8400), "too large"),
    "float.tif": (encoded(Image.fromarray(photo()[:, :, 0].astype(np.float32)), "TIFF"), "unsupported"),
    "pickled.npy": (_pickled(), "unsupported"),
    "float.npy": (npy(photo().astype(np.float32)), "unsupported"),
    "cut.npy": (npy(photo())[:500], "broken"),
    "four_channels.npy": (npy(_RGBA), "unsupported"),
}


def _absent(path: Path) -> None:
    path.write_bytes(_WHOLE)  # the test removes it again after the folder is listed


# Functions that make an entry that is not a regular, non-empty file.
ODD: dict[str, Callable[[Path], None]] = {
    "loop.jpg": lambda path: path.symlink_to(path.name),
    "dangling.jpg": lambda path: path.symlink_to("nowhere"),
    "pipe.jpg": lambda path: os.mkfifo(path),
    "deleted_meanwhile.jpg": _absent,
}
NOT_UTF8 = b"caf\xe9.jpg"  # a good image


def make(folder: Path) -> tuple[set[str], set[str]]:
    """Write all images, and a folder named like an image, to ``folder``. Returns the usable and the unusable names."""
    for name, data in GOOD.items():
        (folder / name).write_bytes(data)
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    for name, put in ODD.items():
        put(folder / name)
    (folder / "folder.jpg").mkdir()
    (folder / os.fsdecode(NOT_UTF8)).write_bytes(_WHOLE)
    return {*GOOD, os.fsdecode(NOT_UTF8)}, {*BAD, *ODD}
