"""Verbs on images."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

from ..errors import UserError
from ..pixel_dtypes import PixelDtype
from .checks import at_least
from .old_names import current_flags


def data(args: list[str]) -> None:
    """Make datasets, find bad images, write smaller copies: 'mae-fast data {demo,scenes,fashion-mnist,check,pack}'."""
    verbs: dict[str, Callable[..., None]] = {
        "demo": _demo, "scenes": _scenes, "fashion-mnist": _fashion_mnist, "check": _check, "pack": _pack
    }  # fmt: skip
    if args and args[0] in verbs:
        words = current_flags(args[1:], {"channels": "in-chans"}) if args[0] == "check" else args[1:]
        tyro.cli(verbs[args[0]], prog=f"mae-fast data {args[0]}", args=words)
    elif args[:1] not in (["-h"], ["--help"]):
        raise UserError(f"data{''.join(f' {word}' for word in args[:1])}", f"known are {', '.join(verbs)}")
    else:
        tyro.extras.subcommand_cli_from_dict(verbs, prog="mae-fast data", args=args)


def _demo(directory: tyro.conf.Positional[Path]) -> None:
    """Build the demo set, satellite tiles with land-cover classes, from two packages of the index.

    Args:
        directory: Where to put train/ and val/.
    """
    from ..studies.demo_data import build_demo

    print(build_demo(directory))


def _scenes(directory: tyro.conf.Positional[Path]) -> None:
    """Build the transfer set: satellite images with a class for each pixel, and with objects in COCO's format.

    Args:
        directory: Where to put train/, val/ and annotations/.
    """
    from ..studies.scenes import build_scenes

    for split, counts in build_scenes(directory).items():
        print(f"{directory / split}: {counts['images']:,} images with masks, {counts['objects']:,} objects")


def _fashion_mnist(directory: tyro.conf.Positional[Path], source: Path | None = None) -> None:
    """Write Fashion-MNIST as class folders of grey PNGs, 28 x 28 pixels: 60,000 to train on, 10,000 held out.

    Args:
        directory: Where to put train/ and val/.
        source: Folder with the four IDX files. If not given, they are downloaded: Debian's package
            dataset-fashion-mnist if apt has it, else with torchvision.
    """
    from ..studies.fashion_mnist import build_fashion_mnist

    for split, counts in build_fashion_mnist(directory, source).items():
        print(f"{directory / split}: {sum(counts.values()):,} images in {len(counts)} classes")


def _check(
    path: tyro.conf.Positional[Path],
    output: Path | None = None,
    in_chans: int | None = None,
    pixels: Literal["auto", PixelDtype] = "auto",
    bands: str | None = None,
    nodata: float | None = None,
    every_pixel: bool = False,
    max_bad_fraction: float = 0.01,
    num_workers: int = 0,
) -> None:
    """List unusable images in bad.jsonl; training skips them. Run the line again to resume.

    Args:
        path: What is to be checked: images, tar shards, a saved Hugging Face dataset, images/ and masks/.
        output: Where to write the list; training looks for PATH/bad.jsonl.
        in_chans: Channels of the model; none: one for each of --bands, else 3.
        pixels: Dtype of the pixels, as in training; auto: that of the images.
        bands: Numbers of the bands to use, from 1 on, as in training: 4,3,2 or 1-4,7.
        nodata: Value of missing pixels, as in training. The printed ranges leave it out.
        every_pixel: Decode all images; else only those whose headers do not show whether they can be used.
        max_bad_fraction: Fail if the share of bad images is larger.
        num_workers: Processes that look.
    """
    import time

    from ..data.check import bad_file, bands_hint, summary
    from ..data.check import check as run
    from ..data.pixel_format import PixelFormat, band_numbers
    from ..data.segmentation import open_pairs
    from ..data.sources import open_source
    from ..training.pixels import LOOKED_AT, dtype_of, value_ranges

    chosen = band_numbers("bands", bands)
    channels = (len(chosen) or 3) if in_chans is None else in_chans
    at_least(in_chans=(channels, 1), num_workers=(num_workers, 0))
    source = open_pairs(path) or open_source(_without_splits(path))
    dtype = dtype_of(source) if pixels == "auto" else pixels
    wanted = PixelFormat(channels=channels, dtype=dtype, bands=chosen, nodata=nodata)
    start = time.perf_counter()
    bad = run(source, output, wanted, every_pixel, num_workers)
    print(f"{summary(source, bad, time.perf_counter() - start)}\nwrote {output or bad_file(source)}")
    if wanted.dtype != "uint8" and len(bad) < len(source):
        ranges = "; ".join(f"{low:g} to {high:g}" for low, high in value_ranges(source, wanted))
        print(f"{wanted.dtype} values of each channel: {ranges}")
    if len(bad) > max_bad_fraction * len(source):
        hint = bands_hint(source, list(bad)[:LOOKED_AT], wanted) if len(bad) == len(source) else None
        raise UserError(
            f"{len(bad)} of {len(source)} images are bad, more than --max-bad-fraction {max_bad_fraction:g}",
            hint or f"mend or remove those in {output or bad_file(source)}, or give a larger --max-bad-fraction",
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
    """Write smaller copies of images as WebDataset tar shards of JPEGs, and say what that buys.

    Args:
        path: Images, tar shards, a saved Hugging Face dataset.
        output: New folder for the shards.
        size: The shorter side is at most this, in pixels.
        quality: Of the JPEGs, 1 to 95.
        per_shard: Images per shard.
        exif: Turn images as their EXIF orientation says.
        num_workers: Processes that write.
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
        raise UserError(f"{path} has {dtype} images: JPEG has 8 bits", "train on the images themselves")
    run(source, output, size, quality, per_shard, exif, num_workers)
    packed = open_source(output)
    print(f"{len(source)} images: {len(packed)} packed, {len(source) - len(packed)} left out as bad")
    for name, images in (("before", source), ("packed", packed)):
        print(f"{name}: {size_of_all(images) / 1e6:.1f} MB, {rate(images):.0f} augmented images/s by one process")


def _without_splits(path: Path) -> Path:
    from ..data.folders import split_folder

    if train := split_folder(path, "train"):
        raise UserError(f"{path} holds {train.name}/, which training reads by itself", f"give {train}")
    return path
