"""Batches of uint8 images with their masking noise, keyed by (seed, epoch, sample)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .decode import crop_resized, decode
from .keyed import CROP, crop_and_flip, epoch_order, generator, mask_noise
from .sources import Source

Key = tuple[int, int]  # epoch, sample


@dataclass(frozen=True)
class Batch:
    """``images`` uint8 [N, H, W, C], ``noise`` fp32 [N, L], ``ids`` int64 [N]: each sample's place in its source."""

    images: Tensor
    noise: Tensor
    ids: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device, copied without waiting where the memory allows."""
        return Batch(*(t.to(device, non_blocking=True) for t in (self.images, self.noise, self.ids)))

    def pin_memory(self) -> "Batch":
        """Page-locked copy; the name is the one that ``DataLoader`` looks for."""
        return Batch(self.images.pin_memory(), self.noise.pin_memory(), self.ids)


class _Samples(Dataset[Batch]):
    def __init__(self, source: Source, size: tuple[int, int], channels: int, num_patches: int, seed: int) -> None:
        self.source, self.size, self.channels = source, size, channels
        self.num_patches, self.seed = num_patches, seed

    def _pixels(self, epoch: int, sample: int) -> np.ndarray:
        image = decode(self.source.paths[sample], self.channels)
        box, flip = crop_and_flip(generator(self.seed, CROP, epoch, sample), image.height, image.width)
        return crop_resized(image, box, self.size, flip)

    def __getitems__(self, keys: list[Key]) -> Batch | UserError:
        try:
            pixels = np.stack([self._pixels(*key) for key in keys])
        except UserError as error:
            return error  # raised in the main process: a worker would wrap it in its own traceback
        noise = np.stack([mask_noise(self.seed, *key, self.num_patches) for key in keys])
        ids = torch.tensor([sample for _, sample in keys])
        return Batch(torch.from_numpy(pixels), torch.from_numpy(noise), ids)


class _KeyedBatches(Sampler[list[Key]]):
    def __init__(self, num_samples: int, batch_size: int, per_epoch: int, epochs: int, seed: int, first: int) -> None:
        self.num_samples, self.batch_size, self.per_epoch = num_samples, batch_size, per_epoch
        self.epochs, self.seed, self.first = epochs, seed, first

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.per_epoch
        for epoch in range(self.first // per_epoch, self.epochs):
            order = epoch_order(self.seed, epoch, self.num_samples)
            start = self.first % per_epoch if epoch == self.first // per_epoch else 0
            for batch in range(start, per_epoch):
                samples = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                yield [(epoch, int(sample)) for sample in samples]


def _as_it_is(batch: Any) -> Any:
    """``DataLoader``'s collate function: ``__getitems__`` has already made the batch."""
    return batch


def training_batches(
    source: Source,
    *,
    size: tuple[int, int],
    channels: int,
    num_patches: int,
    batch_size: int,
    batches_per_epoch: int,
    epochs: int,
    seed: int,
    first: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Augmented batches (random resized crop, flip) of all ``epochs``, from batch number ``first`` on.

    An epoch visits ``batches_per_epoch * batch_size`` images of a fresh order and drops the few left over; workers
    live for the whole run.

    Raises:
        UserError: if an image cannot be read.
    """
    assert 0 < batches_per_epoch * batch_size <= len(source)
    loader = DataLoader(
        _Samples(source, size, channels, num_patches, seed),
        batch_sampler=_KeyedBatches(len(source), batch_size, batches_per_epoch, epochs, seed, first),
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
