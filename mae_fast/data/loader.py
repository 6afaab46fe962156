"""Batches of uint8 images, to train on and to evaluate on. What is random in them is keyed by (seed, epoch, sample)."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..errors import UserError
from .decode import (
    BadImage,
    Decoder,
    Encoded,
    PilDecoder,
    centre_box,
    centre_crop,
    crop_resized,
    decode,
    read_header,
    size_of,
)
from .masks import Sampler as MaskSampler
from .rng import CROP, MASK, Box, crop_and_flip, epoch_order, fixed_size_crop, generator, mask_noise, replacement
from .sources import Source
from .workers import by_processes, by_threads

logger = logging.getLogger(__name__)

Key = tuple[int, int]  # epoch, sample
ATTEMPTS = 100  # bad images in a row for one place in a batch


@dataclass(frozen=True)
class Batch:
    """A batch of N images.

    Attributes:
        images: uint8 [N, H, W, C].
        noise: fp32 [N, L], for the masks; [N, 0] where none are wanted.
        ids: int64 [N], each image's place in its source.
        labels: int64 [N]; None where the source has none.
        skipped: places of images that could not be used, and why. In training, others stand in for them.
    """

    images: Tensor
    noise: Tensor
    ids: Tensor
    labels: Tensor | None = None
    skipped: tuple[tuple[int, BadImage], ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device, copied without waiting where the memory allows."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Page-locked copy; the name is the one that ``DataLoader`` looks for."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        labels = None if self.labels is None else f(self.labels)
        return Batch(f(self.images), f(self.noise), f(self.ids), labels, self.skipped)


@dataclass(kw_only=True)
class Slot(Encoded):
    """One place of a batch: its key, the image that fills it, and those that could not."""

    key: Key
    attempt: int = -1
    sample: int = -1
    skipped: list[tuple[int, BadImage]] = field(default_factory=list)


@dataclass
class Samples(Dataset[Batch]):
    """Makes a batch of keys. A bad image's place goes to another image, with the crop and the mask of the place."""

    source: Source
    decoder: Decoder
    size: tuple[int, int]
    channels: int
    num_patches: int
    seed: int
    repeats: int = 1
    exif: bool = False
    scale: tuple[float, float] = (0.2, 1.0)
    augment: Callable[[Tensor, int, int], None] | None = None
    bad: Mapping[int, BadImage] = field(default_factory=dict)
    window: Literal["none", "crop-fixed", "crop"] = "crop"
    masking: MaskSampler | None = None

    def __getitems__(self, keys: list[Key]) -> Batch | UserError:
        try:
            return self.finish(self.prepare(keys))
        except UserError as error:
            return error  # raised in the main process: a worker would wrap it in its own traceback

    def prepare(self, keys: list[Key]) -> list[Slot]:
        """Encoded images and windows."""
        slots = [Slot(key=key) for key in keys]
        for slot in slots:
            self._fill(slot)
        return slots

    def finish(self, slots: list[Slot] | UserError, device: torch.device | None = None) -> Batch | UserError:
        """Pixels, on ``device``. An error of the first half is passed on."""
        if isinstance(slots, UserError):
            return slots
        images = torch.empty(len(slots), self.repeats, *self.size, self.channels, dtype=torch.uint8, device=device)
        left = list(range(len(slots)))
        while left:
            results = self.decoder([slots[i] for i in left], [images[i] for i in left])
            wrong = {i: bad for i, bad in zip(left, results, strict=True) if bad}
            for i, bad in wrong.items():
                slots[i].skipped.append((slots[i].sample, bad))
                self._fill(slots[i])
            left = list(wrong)
        if self.augment:
            for slot, crops in zip(slots, images, strict=True):
                self.augment(crops, *slot.key)
        noise = np.stack([self._noise(slot.key) for slot in slots])
        ids = torch.tensor([slot.sample for slot in slots])
        labels = None if self.source.labels is None else torch.tensor([self.source.labels[i] for i in ids.tolist()])
        return Batch(
            images.flatten(0, 1),
            torch.from_numpy(noise).flatten(0, 1),
            ids.repeat_interleave(self.repeats),
            None if labels is None else labels.repeat_interleave(self.repeats),
            tuple(skip for slot in slots for skip in slot.skipped),
        )

    def _fill(self, slot: Slot) -> None:
        """The next image for a slot: its own at first, then others that its key draws."""
        for attempt in range(slot.attempt + 1, ATTEMPTS):
            slot.attempt = attempt
            slot.sample = replacement(self.seed, *slot.key, attempt, len(self.source))
            if slot.sample in self.bad:
                slot.skipped.append((slot.sample, self.bad[slot.sample]))
                continue
            try:
                slot.data = self.source.read(slot.sample)
                slot.header = read_header(slot.data, self.exif)
            except BadImage as bad:
                slot.skipped.append((slot.sample, bad.bare()))
                continue
            rng = generator(self.seed, CROP, *slot.key)
            height, width = slot.header.height, slot.header.width
            slot.windows = [self._window(rng, height, width) for _ in range(self.repeats)]
            return
        raise UserError(
            f"{ATTEMPTS} images in a row cannot be used, the last {self.source.names[slot.sample]!r} ("
            f"{slot.skipped[-1][1]})",
            f"look at them by mae-fast data check {self.source.root}",
        )

    def _window(self, rng: np.random.Generator, height: int, width: int) -> tuple[Box, bool]:
        if self.window == "crop":
            return crop_and_flip(rng, height, width, self.scale)
        return fixed_size_crop(rng if self.window == "crop-fixed" else None, height, width, self.size)

    def _noise(self, key: Key) -> np.ndarray:
        """fp32 [R, L]."""
        if self.masking is None:
            return mask_noise(self.seed, *key, (self.repeats, self.num_patches))
        rng = generator(self.seed, MASK, *key)
        return np.stack([self.masking(rng) for _ in range(self.repeats)])


class KeyedBatches(Sampler[list[Key]]):
    """The keys of the batches of one rank, from batch number ``first`` of the run on.

    Each epoch visits the samples in a fresh order, ``world * batch_size`` at a time, of which every rank takes its
    part: the same samples make up a step whatever the number of ranks. The last samples that fill no step are dropped;
    or, ``drop_last=False``, make a smaller one, each of them once, the ranks' parts as equal as can be.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        epochs: int,
        seed: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        per_epoch: int | None = None,
    ) -> None:
        self.num_samples, self.epochs, self.seed, self.first = num_samples, epochs, seed, first
        self.batch_size, self.rank, self.world = batch_size, rank, world
        together = batch_size * world
        whole = num_samples // together if drop_last else -(-num_samples // together)
        self.per_epoch = whole if per_epoch is None else per_epoch
        assert 0 < self.per_epoch <= whole

    def __len__(self) -> int:
        return self.per_epoch * self.epochs - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        together = self.batch_size * self.world
        for epoch in range(self.first // self.per_epoch, self.epochs):
            order = epoch_order(self.seed, epoch, self.num_samples)
            start = self.first % self.per_epoch if epoch == self.first // self.per_epoch else 0
            for batch in range(start, self.per_epoch):
                parts = np.array_split(order[batch * together : (batch + 1) * together], self.world)
                if len(parts[self.rank]):
                    yield [(epoch, int(sample)) for sample in parts[self.rank]]


class Preparation(Dataset[list[Slot]]):
    """The first half of ``Samples``, for processes that read while this one decodes."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, keys: list[Key]) -> list[Slot] | UserError:
        try:
            return self.samples.prepare(keys)
        except UserError as error:
            return error


Made = TypeVar("Made")


def by_ranges(dataset: Dataset[Any], indices: range, length: int, workers: int) -> Iterator[tuple[range, Any]]:
    """``indices`` in runs of ``length``, each with what ``dataset`` makes of it, in order, by ``workers`` processes."""
    ranges = [indices[i : i + length] for i in range(0, len(indices), length)]
    return zip(ranges, by_processes(dataset, ranges, workers), strict=True)


def training_batches(
    source: Source,
    *,
    size: tuple[int, int],
    channels: int,
    num_patches: int = 0,
    batch_size: int,
    epochs: int,
    seed: int,
    batches_per_epoch: int | None = None,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = True,
    decoder: Literal["dali", "pil"] = "pil",
    repeats: int = 1,
    exif: bool = False,
    window: Literal["none", "crop-fixed", "crop"] = "crop",
    scale: tuple[float, float] = (0.2, 1.0),
    color_jitter: bool = False,
    auto_augment: str | None = None,
    masking: MaskSampler | None = None,
    bad: Mapping[int, BadImage] | None = None,
    num_workers: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Augmented batches (by default: random resized crop, flip) of all ``epochs``, from batch number ``first`` on.

    A batch depends on its number, the seed and the source alone, not on workers or where a run was resumed; and on the
    decoder by the rounding of pixels. (But damage that leaves a JPEG's end intact may be bad to Pillow, good to DALI.)

    Args:
        size: height and width of the crops.
        num_patches: of which each gets a masking noise; 0: none is wanted.
        batch_size: images of this rank's batch: ``batch_size / repeats`` files, ``repeats`` crops of each.
        batches_per_epoch: where not all that the source has.
        decoder: "pil": Pillow and torchvision in ``num_workers`` processes. "dali": DALI for JPEG, in ``num_workers``
            threads on the CPU; on a CUDA ``device``, in pixels on that device, read by ``num_workers`` processes.
        exif: turn images as their EXIF orientation says; as published, they are left as they are stored.
        window: what is taken of an image. "crop": a window of random size and shape, flipped or not. "crop-fixed": one
            of a size that the image's decides, at a random place, flipped or not. "none": the same size, in the centre,
            never flipped (``data.rng`` has both).
        scale: least and greatest share of an image's area that a "crop" takes.
        color_jitter: change brightness, contrast and saturation of the crops (``data.augment.ColorJitter``).
        auto_augment: RandAugment of the crops, in timm's words (``data.augment.RandAugment``). It draws from the
            process's generators, so ``num_workers`` processes decode and augment; "dali" then decodes on the CPU,
            whatever the ``device``. Not together with ``color_jitter``.
        masking: draws the noise of each crop, [num_patches] (``data.masks``); None: uniform noise, for random masks.
        bad: images that are known not to be usable.

    Raises:
        UserError: if images cannot be used and no others are found for them; if there is no such ``auto_augment``, or
            none for as many channels.
    """
    if batch_size % repeats:
        raise UserError(f"the batch size must be a multiple of the repeats, got {batch_size} and {repeats}")
    files = batch_size // repeats
    keys = KeyedBatches(len(source), files, epochs, seed, first, rank, world, drop_last, batches_per_epoch)
    gpu = device if device is not None and device.type == "cuda" else None
    augment: Callable[[Tensor, int, int], None] | None = None
    if auto_augment is not None:
        from .augment import RandAugment

        assert not color_jitter
        augment = RandAugment(auto_augment, seed, channels)
    elif color_jitter:
        from .augment import ColorJitter

        augment = ColorJitter(seed, channels)
    if gpu and gpu.index is None:  # give it its number: another thread has another current device
        gpu = torch.device("cuda", torch.cuda.current_device())
    made: Decoder
    if decoder == "pil":
        made = PilDecoder(channels, exif)
    else:
        from .dali import DaliDecoder

        device_id = gpu.index if gpu and auto_augment is None else None
        made = DaliDecoder(channels, exif, size, files, repeats, device_id)
    samples = Samples(
        source, made, size, channels, num_patches, seed, repeats, exif, scale, augment, bad or {}, window, masking
    )

    batches: Iterable[Batch | UserError]
    of = source.root
    if decoder == "pil" or auto_augment is not None:
        batches = by_processes(samples, keys, num_workers, gpu is not None, of)
    elif gpu:
        prepared = by_processes(Preparation(samples), keys, num_workers, of=of)
        batches = by_threads(prepared, lambda slots: samples.finish(slots, gpu), 1, of)
    else:
        batches = by_threads(keys, samples.__getitems__, num_workers, of)
    yield from raising(batches)


def raising(batches: Iterable[Made | UserError]) -> Iterator[Made]:
    """The batches; an error that a worker has handed over in the place of one is raised."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def read_or_replace(
    seed: int,
    key: Key,
    source: Source,
    bad: Mapping[int, BadImage],
    read: Callable[[int], Made],
    skipped: list[tuple[int, BadImage]],
    hint: str,
) -> tuple[int, Made]:
    """The place of the first of the images that ``key`` draws which ``read`` can make something of, and that.

    Args:
        bad: images that are known not to be usable.
        skipped: those that were not are added to it.
        hint: what the error says is to be done.

    Raises:
        UserError: after many that could not be used.
    """
    for attempt in range(ATTEMPTS):
        i = replacement(seed, *key, attempt, len(source))
        try:
            if i in bad:
                raise bad[i].bare()
            return i, read(i)
        except BadImage as error:
            skipped.append((i, error.bare()))
    raise UserError(
        f"{ATTEMPTS} images in a row cannot be used, the last {source.names[i]!r} ({skipped[-1][1]})",
        f"{hint}",
    )


@dataclass
class Centred(Dataset[Batch]):
    """Makes a batch of places in the source; a bad image is left out of it."""

    source: Source
    size: tuple[int, int]
    channels: int
    crop_pct: float
    exif: bool
    bad: Mapping[int, BadImage]

    def __getitems__(self, indices: list[int]) -> Batch:
        ids, images, skipped = [], [], []
        for i in indices:
            if i in self.bad:
                skipped.append((i, self.bad[i]))
                continue
            try:
                image = decode(self.source.read(i), self.channels, self.exif)
                pixels = centre_crop(image, self.size, self.crop_pct)
            except BadImage as bad:
                skipped.append((i, bad.bare()))
                continue
            images.append(torch.from_numpy(pixels.copy()))
            ids.append(i)
        labels = self.source.labels
        return Batch(
            torch.stack(images) if images else torch.empty(0, *self.size, self.channels, dtype=torch.uint8),
            torch.empty(len(ids), 0),
            torch.tensor(ids, dtype=torch.int64),
            None if labels is None else torch.tensor([labels[i] for i in ids], dtype=torch.int64),
            tuple(skipped),
        )


def evaluation_batches(
    source: Source,
    *,
    size: tuple[int, int],
    channels: int,
    batch_size: int,
    crop_pct: float | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    exif: bool = False,
    bad: Mapping[int, BadImage] | None = None,
) -> Iterator[Batch]:
    """Every image once, in the source's order, one rank's after the other's: resized, and its centre.

    Bad images are left out and told of (``Batch.skipped``). All ranks get the same number of batches, of nearly the
    same number of images, none where there are fewer images than ranks or all of a batch are bad.

    Args:
        size: height and width of the centre.
        crop_pct: share of the resized image's side that the centre is; None: 0.875 up to 224 pixels, else 1, as
            published.
        bad: images that are known not to be usable.
    """
    if crop_pct is None:
        crop_pct = 0.875 if max(size) <= 224 else 1.0
    keys = shard_indices(len(source), batch_size, rank, world)
    yield from by_processes(
        Centred(source, size, channels, crop_pct, exif, bad or {}), keys, num_workers, of=source.root
    )


def shard_indices(count: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """One rank's share of ``count`` places, in batches. All ranks get as many, of nearly the same size; some empty."""
    share = np.array_split(np.arange(count), world)
    number = max(1, -(-len(share[0]) // batch_size))  # of batches: share[0] is the largest
    return [part.tolist() for part in np.array_split(share[rank], number)]


def choose_decoder() -> tuple[Literal["dali", "pil"], str]:
    """The faster decoder that is there, and why it is not the other one."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return "pil", f"DALI is not there: {error}"
    return "dali", ""


class Skipped:
    """The images that could not be used. The first ten are logged.

    Args:
        limit: share of the source's images; beyond it, ``add`` raises ``UserError``.
    """

    def __init__(self, source: Source, limit: float) -> None:
        self.source, self.limit = source, limit
        self.bad: dict[int, BadImage] = {}

    def __len__(self) -> int:
        return len(self.bad)

    def add(self, batch: Batch) -> None:
        """Count what ``batch`` has skipped."""
        for i, bad in batch.skipped:
            if i in self.bad:
                continue
            self.bad[i] = bad
            if len(self.bad) <= 10:
                more = "; more will be counted, not listed" if len(self.bad) == 10 else ""
                logger.warning(f"skipped {self.source.names[i]!r} ({bad}){more}")
        if len(self.bad) > self.limit * len(self.source):
            raise UserError(
                f"{len(self.bad)} of {len(self.source)} images cannot be used, more than the allowed {self.limit:.1%}",
                f"look at them by mae-fast data check {self.source.root}, or raise --max-bad-fraction",
            )


def centred_image(source: Source, index: int, size: tuple[int, int], channels: int = 3) -> Tensor:
    """One image for evaluation: largest centred window, resized to ``size`` (height, width); uint8 [H, W, C].

    Raises:
        UserError: naming the image, if it cannot be used.
    """
    try:
        image = decode(source.read(index), channels)
    except BadImage as bad:
        name = str(source.root / source.names[index])
        raise UserError(f"cannot use image {name!r} ({bad})", "repair or remove it") from bad
    return torch.from_numpy(crop_resized(image, centre_box(*size_of(image), size), size, flip=False).copy())
