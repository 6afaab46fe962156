"""Batches of raw images for training and evaluation. All random numbers are keyed by (seed, epoch, sample)."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..errors import UserError
from .datasets import for_processes
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
from .pixel_format import RGB, PixelFormat
from .rng import (
    CROP,
    MASK,
    Box,
    balanced_order,
    crop_and_flip,
    epoch_order,
    fixed_size_crop,
    generator,
    mask_noise,
    replacement,
)
from .sources import Source
from .workers import by_processes, by_threads

logger = logging.getLogger(__name__)

Key = tuple[int, int]  # epoch, sample
REPEAT = 1 << 32  # added to the epoch of a key for each earlier use of its sample in this epoch
ATTEMPTS = 100  # bad images in a row before training ends


@dataclass(frozen=True)
class Batch:
    """A batch of N images.

    Attributes:
        images: [N, H, W, C], in the dtype of the run's ``PixelFormat``.
        noise: masking noise, fp32 [N, L]; [N, 0] without masking.
        ids: int64 [N], the index of each image in its source.
        labels: int64 [N], or [N, labels] of 0 and 1. None if the source has none.
        skipped: (index, error) of images that could not be used. In training, other images replace them.
    """

    images: Tensor
    noise: Tensor
    ids: Tensor
    labels: Tensor | None = None
    skipped: tuple[tuple[int, BadImage], ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device. The copy does not block if the memory is pinned."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory. ``DataLoader`` calls this method by its name."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        labels = None if self.labels is None else f(self.labels)
        return Batch(f(self.images), f(self.noise), f(self.ids), labels, self.skipped)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a source is loaded.

    Attributes:
        size: height and width of the crops.
        batch_size: crops in this rank's batch: ``repeats`` crops of each of ``batch_size / repeats`` images.
        epochs: the number of epochs.
        first_epoch: the number of the first epoch in the run, from 0.
        batches_per_epoch: batches in an epoch. None: all that the source has.
        first: the number of the first batch, counted from the start of ``first_epoch``.
        drop_last: leave out the last images of an epoch if they do not fill a batch of all ranks.
        decoder: "pil": Pillow and torchvision in ``num_workers`` processes. "dali": DALI for JPEG, in ``num_workers``
            threads on the CPU. On a CUDA ``device``, ``num_workers`` processes read the files, and DALI decodes there.
        repeats: crops of each decoded image.
        pixels: format of decoded pixels.
        bad: images that are known to be unusable, by their index in the source.
        balanced: draw the same number of images from each class, instead of each image once. Needs labels.
    """

    size: tuple[int, int]
    batch_size: int
    epochs: int = 1
    first_epoch: int = 0
    batches_per_epoch: int | None = None
    seed: int = 0
    first: int = 0
    rank: int = 0
    world: int = 1
    drop_last: bool = True
    decoder: Literal["dali", "pil"] = "pil"
    repeats: int = 1
    pixels: PixelFormat = RGB
    bad: Mapping[int, BadImage] = field(default_factory=dict)
    balanced: bool = False
    num_workers: int = 0
    device: torch.device | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether batches go to a GPU."""
        return self.device is not None and self.device.type == "cuda"


@dataclass(kw_only=True)
class Slot(Encoded):
    """One position of a batch: its key, its image, and the images that could not be used for it."""

    key: Key
    attempt: int = -1
    sample: int = -1
    skipped: list[tuple[int, BadImage]] = field(default_factory=list)


@dataclass
class Samples(Dataset[Batch]):
    """Loads the batch of a list of keys. Another image replaces a bad one, with the crop and mask of the same key."""

    source: Source
    decoder: Decoder
    config: LoaderConfig
    num_patches: int = 0
    scale: tuple[float, float] = (0.2, 1.0)
    augment: Callable[[Tensor, int, int], None] | None = None
    window: Literal["none", "crop-fixed", "crop"] = "crop"
    masking: MaskSampler | None = None

    def __getitems__(self, keys: list[Key]) -> Batch | UserError:
        try:
            return self.finish(self.prepare(keys))
        except UserError as error:
            return error  # raised in the main process, without a traceback of the worker

    def prepare(self, keys: list[Key]) -> list[Slot]:
        """The first half: read files and draw windows."""
        slots = [Slot(key=key) for key in keys]
        for slot in slots:
            self._fill(slot)
        return slots

    def finish(self, slots: list[Slot] | UserError, device: torch.device | None = None) -> Batch | UserError:
        """The second half: decode pixels to ``device``. Pass on an error of the first half."""
        if isinstance(slots, UserError):
            return slots
        config = self.config
        shape = len(slots), config.repeats, *config.size, config.pixels.channels
        images = torch.empty(shape, dtype=config.pixels.torch_dtype, device=device)
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
            ids.repeat_interleave(config.repeats),
            None if labels is None else labels.repeat_interleave(config.repeats, 0),
            tuple(skip for slot in slots for skip in slot.skipped),
        )

    def _fill(self, slot: Slot) -> None:
        """Read the next image for a slot: first that of its key, then random ones drawn by the key."""
        for attempt in range(slot.attempt + 1, ATTEMPTS):
            slot.attempt = attempt
            slot.sample = replacement(self.config.seed, *slot.key, attempt, len(self.source))
            if slot.sample in self.config.bad:
                slot.skipped.append((slot.sample, self.config.bad[slot.sample]))
                continue
            try:
                slot.data = self.source.read(slot.sample)
                slot.header = read_header(slot.data, self.config.pixels.exif)
            except BadImage as bad:
                slot.skipped.append((slot.sample, bad.bare()))
                continue
            rng = generator(self.config.seed, CROP, *slot.key)
            height, width = slot.header.height, slot.header.width
            slot.windows = [self._window(rng, height, width) for _ in range(self.config.repeats)]
            return
        raise UserError(
            f"{ATTEMPTS} images in a row cannot be used, the last {self.source.names[slot.sample]!r} ("
            f"{slot.skipped[-1][1]})",
            f"list them with 'mae-fast data check {self.source.root}'",
        )

    def _window(self, rng: np.random.Generator, height: int, width: int) -> tuple[Box, bool]:
        if self.window == "crop":
            return crop_and_flip(rng, height, width, self.scale)
        return fixed_size_crop(rng if self.window == "crop-fixed" else None, height, width, self.config.size)

    def _noise(self, key: Key) -> np.ndarray:
        """fp32 [R, L]."""
        if self.masking is None:
            return mask_noise(self.config.seed, *key, (self.config.repeats, self.num_patches))
        rng = generator(self.config.seed, MASK, *key)
        return np.stack([self.masking(rng) for _ in range(self.config.repeats)])


class KeyedBatches(Sampler[list[Key]]):
    """The keys of the batches of one rank, from batch number ``config.first`` on.

    Each epoch visits the samples in a new random order, ``world * batch_size`` per step. Each rank takes its part of
    them, so the samples of a step do not depend on the number of ranks. The last samples of an epoch, if they do not
    fill a step, are dropped. With ``drop_last=False``, they are a smaller step, divided evenly between the ranks.

    Args:
        labels: labels of the samples, for ``config.balanced``. A sample that is repeated in an epoch has another key,
            and so another crop: its epoch is raised by ``REPEAT`` each time.
    """

    def __init__(self, num_samples: int, config: LoaderConfig, labels: Sequence[int] | None = None) -> None:
        self.num_samples, self.config = num_samples, config
        self.labels = np.array(labels) if config.balanced else None
        self.files_per_step = config.batch_size // config.repeats * config.world
        whole = num_samples // self.files_per_step if config.drop_last else -(-num_samples // self.files_per_step)
        self.per_epoch = whole if config.batches_per_epoch is None else config.batches_per_epoch
        assert 0 < self.per_epoch <= whole

    def __len__(self) -> int:
        return self.per_epoch * self.config.epochs - self.config.first

    def __iter__(self) -> Iterator[list[Key]]:
        skipped, start = divmod(self.config.first, self.per_epoch)
        first_epoch = self.config.first_epoch
        for epoch in range(first_epoch + skipped, first_epoch + self.config.epochs):
            keys = self._keys(epoch)
            for batch in range(start, self.per_epoch):
                step = keys[batch * self.files_per_step : (batch + 1) * self.files_per_step]
                part = np.array_split(step, self.config.world)[self.config.rank].tolist()
                if part:
                    yield [(key, sample) for key, sample in part]
            start = 0

    def _keys(self, epoch: int) -> np.ndarray:
        """The keys of an epoch, in order, int64 [samples, 2]."""
        if self.labels is None:
            order = epoch_order(self.config.seed, epoch, self.num_samples)
            return np.stack([np.full_like(order, epoch), order], 1)
        order, times = balanced_order(self.config.seed, epoch, self.labels)
        return np.stack([epoch + REPEAT * times, order], 1)


class Preparation(Dataset[list[Slot]]):
    """The first half of ``Samples``, for worker processes that read while the main process decodes."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, keys: list[Key]) -> list[Slot] | UserError:
        try:
            return self.samples.prepare(keys)
        except UserError as error:
            return error


Made = TypeVar("Made")


def by_ranges(dataset: Dataset[Any], indices: range, length: int, workers: int) -> Iterator[tuple[range, Any]]:
    """Apply ``dataset`` to ranges of ``length`` indices, by ``workers`` processes. Yields (range, result) in order."""
    ranges = [indices[i : i + length] for i in range(0, len(indices), length)]
    return zip(ranges, by_processes(dataset, ranges, workers), strict=True)


def training_batches(
    source: Source,
    config: LoaderConfig,
    *,
    num_patches: int = 0,
    masking: MaskSampler | None = None,
    window: Literal["none", "crop-fixed", "crop"] = "crop",
    scale: tuple[float, float] = (0.2, 1.0),
    color_jitter: bool = False,
    auto_augment: str | None = None,
) -> Iterator[Batch]:
    """Augmented batches for all epochs, from batch ``config.first`` on. The default is random resized crop and flip.

    A batch depends only on its number, the seed and the source, not on workers or on where a run was resumed. Decoders
    differ in the rounding of pixels. (Pillow may refuse a damaged JPEG that DALI decodes, if its end is intact.)

    Args:
        num_patches: patches of an image, for masking noise. 0: no noise.
        masking: function that draws the noise of a crop, [num_patches] (``data.masks``). None: uniform noise.
        window: part of the image. "crop": random size and shape, random flip. "crop-fixed": size given by that of the
            image, random position, random flip. "none": the same size, centre, no flip (see ``data.rng``).
        scale: smallest and largest share of the image's area for "crop".
        color_jitter: change brightness, contrast and saturation of the crops (``data.augment.ColorJitter``).
        auto_augment: policy of RandAugment, in timm's format (``data.augment.RandAugment``). It draws from global
            generators, so ``num_workers`` processes decode and augment, and "dali" decodes on the CPU, whatever the
            ``device``. It excludes ``color_jitter``.

    Raises:
        UserError: if too many images in a row cannot be used, if the policy is unknown, or if it does not support this
            number of channels.
    """
    if config.batch_size % config.repeats:
        raise UserError(
            f"--batch-size must be a multiple of --crops-per-image, got {config.batch_size} and {config.repeats}"
        )
    keys, workers, root = KeyedBatches(len(source), config, source.labels), config.num_workers, source.root
    augment = _augmentation(config, color_jitter, auto_augment)
    gpu = config.device if config.on_gpu else None
    if gpu and gpu.index is None:  # set the index, because the current device is per thread
        gpu = torch.device("cuda", torch.cuda.current_device())
    decoder = _decoder(config, gpu.index if gpu and auto_augment is None else None)
    samples = Samples(source, decoder, config, num_patches, scale, augment, window, masking)
    batches: Iterable[Batch | UserError]
    if not for_processes(source):
        if auto_augment is not None:  # it draws from global generators
            workers = 0
        batches = by_threads(keys, samples.__getitems__, workers, root)
    elif config.decoder == "pil" or auto_augment is not None:
        batches = by_processes(samples, keys, workers, gpu is not None, root)
    elif gpu:
        prepared = by_processes(Preparation(samples), keys, workers, of=root)
        batches = by_threads(prepared, lambda slots: samples.finish(slots, gpu), 1, root)
    else:
        batches = by_threads(keys, samples.__getitems__, workers, root)
    yield from raising(batches)


def _augmentation(
    config: LoaderConfig, color_jitter: bool, auto_augment: str | None
) -> Callable[[Tensor, int, int], None] | None:
    if (auto_augment is not None or color_jitter) and config.pixels.dtype != "uint8":
        raise UserError(
            f"colour augmentations need 8-bit images, got {config.pixels.dtype}",
            "use --augmentation crop for pre-training, or --aa none for fine-tuning",
        )
    if auto_augment is not None:
        from .augment import RandAugment

        assert not color_jitter
        return RandAugment(auto_augment, config.seed, config.pixels.channels)
    if color_jitter:
        from .augment import ColorJitter

        return ColorJitter(config.seed, config.pixels.channels)
    return None


def _decoder(config: LoaderConfig, device_id: int | None) -> Decoder:
    if config.decoder == "pil" or not config.pixels.is_plain:
        return PilDecoder(config.pixels)
    from .dali import DaliDecoder

    files = config.batch_size // config.repeats
    return DaliDecoder(config.pixels, config.size, files, config.repeats, device_id)


def raising(batches: Iterable[Made | UserError]) -> Iterator[Made]:
    """Yield the batches. Raise an error that a worker returned instead of a batch."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def read_or_replace(
    config: LoaderConfig,
    key: Key,
    source: Source,
    read: Callable[[int], Made],
    skipped: list[tuple[int, BadImage]],
    hint: str,
) -> tuple[int, Made]:
    """Read the image of ``key``, or another one that the key draws. Returns its index and the result of ``read``.

    Args:
        skipped: list that gets the images that could not be used.
        hint: hint of the error.

    Raises:
        UserError: if ``ATTEMPTS`` images in a row cannot be used.
    """
    for attempt in range(ATTEMPTS):
        i = replacement(config.seed, *key, attempt, len(source))
        try:
            if i in config.bad:
                raise config.bad[i].bare()
            return i, read(i)
        except BadImage as error:
            skipped.append((i, error.bare()))
    raise UserError(f"{ATTEMPTS} images in a row cannot be used, the last {source.names[i]!r} ({skipped[-1][1]})", hint)


@dataclass
class Centred(Dataset[Batch]):
    """Loads the batch of a list of indices. Bad images are left out."""

    source: Source
    config: LoaderConfig
    crop_pct: float

    def __getitems__(self, indices: list[int]) -> Batch:
        config, pixels = self.config, self.config.pixels
        ids, images, skipped = [], [], []
        for i in indices:
            if i in config.bad:
                skipped.append((i, config.bad[i]))
                continue
            try:
                image = decode(self.source.read(i), pixels)
                crop = centre_crop(image, config.size, self.crop_pct, pixels.nodata)
            except BadImage as bad:
                skipped.append((i, bad.bare()))
                continue
            images.append(torch.from_numpy(crop.copy()))
            ids.append(i)
        labels = self.source.labels
        none = torch.empty(0, *config.size, pixels.channels, dtype=pixels.torch_dtype)
        return Batch(
            torch.stack(images) if images else none,
            torch.empty(len(ids), 0),
            torch.tensor(ids, dtype=torch.int64),
            None if labels is None else torch.tensor([labels[i] for i in ids], dtype=torch.int64),
            tuple(skipped),
        )


def default_crop_pct(size: Sequence[int]) -> float:
    """The crop ratio of evaluation: 0.875 for sizes up to 224, else 1, as published."""
    return 0.875 if max(size) <= 224 else 1.0


def evaluation_batches(source: Source, config: LoaderConfig, crop_pct: float | None = None) -> Iterator[Batch]:
    """Centre crops of all images, each once, in the order of the source. Each rank has a contiguous part.

    Bad images are left out and listed in ``Batch.skipped``. All ranks get the same number of batches, of nearly equal
    size. Batches may be empty.

    Args:
        crop_pct: share of the side of the resized image that is cropped. None: ``default_crop_pct``.
    """
    if crop_pct is None:
        crop_pct = default_crop_pct(config.size)
    indices = shard_indices(len(source), config.batch_size, config)
    workers = config.num_workers if for_processes(source) else 0
    yield from by_processes(Centred(source, config, crop_pct), indices, workers, of=source.root)


def shard_indices(count: int, batch_size: int, config: LoaderConfig) -> list[list[int]]:
    """The indices of one rank's share of ``count`` images, in batches.

    All ranks get the same number of batches, of nearly equal size. Some may be empty.
    """
    share = np.array_split(np.arange(count), config.world)
    number = max(1, -(-len(share[0]) // batch_size))  # share[0] is the largest
    return [part.tolist() for part in np.array_split(share[config.rank], number)]


def choose_decoder(pixels: PixelFormat = RGB) -> tuple[Literal["dali", "pil"], str]:
    """The fastest available decoder for these pixels, and the reason if that is not DALI."""
    if not pixels.is_plain:
        return "pil", "DALI decodes only 8-bit images"
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return "pil", f"DALI is not installed: {error}"
    return "dali", ""


class Skipped:
    """Counts images that could not be used. Logs the first ten, and each class that has no usable image.

    Images that ``bad.jsonl`` lists do not count towards the limit, and only their classes are logged.

    Args:
        limit: largest allowed share of the source's images. Beyond it, ``add`` raises ``UserError``.
    """

    def __init__(self, source: Source, limit: float) -> None:
        self.source, self.limit = source, limit
        self.unexpected = 0  # bad images that are not listed
        self.bad: dict[int, BadImage] = {}
        self.usable = Counter(source.labels or ())  # number of usable images of each class

    def __len__(self) -> int:
        return len(self.bad)

    def add(self, batch: Batch) -> None:
        """Count the images that ``batch`` skipped."""
        for i, bad in batch.skipped:
            if i in self.bad:
                continue
            self.bad[i] = bad
            if not bad.listed:
                self.unexpected += 1
                if self.unexpected <= 10:
                    more = "; others are counted, but not listed" if self.unexpected == 10 else ""
                    logger.warning(f"skipped {self.source.names[i]!r} ({bad}){more}")
            if self.source.labels is not None:
                label = self.source.labels[i]
                self.usable[label] -= 1
                if not self.usable[label]:
                    logger.warning(f"class {self.source.classes[label]} has no usable image in {self.source.root}")
        images = len(self.source)
        if self.unexpected > self.limit * images:
            raise UserError(
                f"{self.unexpected} of {images} images cannot be used, more than the allowed {self.limit:.1%}",
                f"list them with 'mae-fast data check {self.source.root}' to skip them, or raise --max-bad-fraction",
            )


def unusable_image(source: Source, index: int, bad: BadImage) -> UserError:
    """An error that names an image that cannot be used."""
    name = str(source.root / source.names[index])
    return UserError(f"cannot use image {name!r} ({bad})", "repair or remove it")


def centred_image(source: Source, index: int, size: tuple[int, int], pixels: PixelFormat = RGB) -> Tensor:
    """One image for evaluation: the largest centred window, resized to ``size`` (height, width), [H, W, C].

    Raises:
        UserError: if the image cannot be used.
    """
    try:
        image = decode(source.read(index), pixels)
    except BadImage as bad:
        raise unusable_image(source, index, bad) from bad
    return torch.from_numpy(crop_resized(image, centre_box(*size_of(image), size), size, False, pixels.nodata).copy())


def sample_images(
    source: Source, count: int, size: tuple[int, int], pixels: PixelFormat = RGB
) -> tuple[list[int], Tensor]:
    """Up to ``count`` usable images, evenly spaced. Returns their indices, and their ``centred_image``, stacked.

    Raises:
        UserError: if no image can be used.
    """
    places, images, error = [], [], None
    for i in np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int).tolist():
        try:
            images.append(centred_image(source, i, size, pixels))
        except UserError as bad:
            error = bad
            continue
        places.append(i)
    if error and not images:
        raise error
    return places, torch.stack(images)
