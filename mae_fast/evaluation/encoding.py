"""Load all images of a source to encode them, for k-NN, the probes and ``mae-fast features``.

Shapes: N images, C channels, D width.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ..data.check import known_bad
from ..data.loader import Batch, LoaderConfig, Skipped, evaluation_batches
from ..data.sources import Source
from ..errors import UserError
from ..weights.create import LoadedModel
from .images import preprocessing_of

logger = logging.getLogger(__name__)

AnyBatch = TypeVar("AnyBatch", bound="HasPlaces")
PROGRESS_EVERY = 10.0  # seconds between progress messages


class HasPlaces(Protocol):
    """A batch with the indices of its images in their source."""

    @property
    def ids(self) -> Sized: ...

    @property
    def skipped(self) -> Sized: ...


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for loading and encoding images. Raises ``UserError`` for values out of range.

    Attributes:
        batch_size: images per batch.
        num_workers: processes that load images.
        device: the device of the encoder; "auto": a GPU if there is one.
        max_bad_fraction: it is an error if more than this share of the images is unusable.
    """

    batch_size: int = 64
    num_workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        for name, value, least in (("batch-size", self.batch_size, 1), ("num-workers", self.num_workers, 0)):
            if value < least:
                raise UserError(f"--{name} {value} is out of range", f"give {least} or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {self.max_bad_fraction:g} is out of range", "give 0 to 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here", "use --device cpu")

    def torch_device(self) -> torch.device:
        """The device; "auto" is resolved."""
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")


def usable_images(
    loaded: LoadedModel, source: Source, options: LoadOptions, crop_pct: float | None = None
) -> Iterator[Batch]:
    """Yield all usable images of ``source`` once, in order, in the image size of the model.

    The model and the images are moved to the device of ``options``. Images are rotated by their EXIF orientation if the
    run did so. As in training, unusable images and those listed in ``bad.jsonl`` are skipped. Progress is logged.

    Args:
        crop_pct: see ``evaluation_batches``.

    Raises:
        UserError: if too many images cannot be used, or none can.
    """
    encoder, device = loaded.model, options.torch_device()
    encoder.to(device)
    skipped, pixels = Skipped(source, options.max_bad_fraction), preprocessing_of(loaded).pixels
    loader = LoaderConfig(
        size=encoder.patch_embed.img_size,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        pixels=pixels,
        bad=known_bad(source, pixels),
    )
    for batch in with_progress(evaluation_batches(source, loader, crop_pct), source):
        skipped.add(batch)
        if len(batch.ids):
            yield batch.to(device)
    if len(skipped) == len(source):
        hint = f"run 'mae-fast data check {source.root}' to see why"
        raise UserError(f"no image of {source.root} can be used", hint)


def gather(parts: Iterable[tuple[Tensor, ...]], most: int) -> tuple[Tensor, ...]:
    """Concatenate the tensors [n, ...] of each position in the tuples ``parts``, on the CPU, up to ``most`` rows.

    The result is allocated first. Keeping small tensors between the large ones of each batch would fragment the heap,
    by gigabytes after a thousand batches.
    """
    whole: tuple[Tensor, ...] = ()
    count = 0
    for part in parts:
        if not whole:
            whole = tuple(torch.empty(most, *x.shape[1:], dtype=x.dtype) for x in part)
        for rows, x in zip(whole, part, strict=True):
            rows[count : count + len(x)] = x
        count += len(part[0])
    return tuple(rows[:count] for rows in whole)


def with_progress(batches: Iterator[AnyBatch], source: Source) -> Iterator[AnyBatch]:
    """Yield the batches, and log the progress every ``PROGRESS_EVERY`` seconds."""
    start = last = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.ids) + len(batch.skipped)
        now = time.perf_counter()
        if now - last >= PROGRESS_EVERY:
            rate, last = done / (now - start), now
            left = (len(source) - done) / rate
            logger.info(f"{source.root}: {done:,} of {len(source):,} images, {rate:.0f} images/s, ETA {left:.0f} s")
