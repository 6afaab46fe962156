"""Randomness as a function of (seed, stream, epoch, sample), with no state to save.

Order, crop, flip and mask of a sample do not depend on workers, processes, batch size or on where a run was resumed.
"""

import math

import numpy as np

# One stream per use, so that a change in one (say, the number of draws of a crop) leaves the others alone.
ORDER, CROP, MASK, REPLACEMENT, AUGMENT, MIX, LAYERS, VALUES_OF_IMAGES = range(8)

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def generator(seed: int, stream: int, epoch: int, sample: int = 0) -> np.random.Generator:
    """Philox generator keyed by its arguments; the lowest counter word is left for the draws themselves."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, sample, epoch, stream]))


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The permutation [num_samples] in which an epoch visits the samples."""
    return generator(seed, ORDER, epoch).permutation(num_samples)


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many samples as there are labels [n], as many of each class: the order [n], and which time each comes, from 0.

    A class with fewer images gives each of them again and again; one with more gives some of them, others in each
    epoch. Where the classes do not divide the samples, drawn ones get one more.
    """
    rng = generator(seed, ORDER, epoch)
    classes = rng.permutation(np.unique(labels))
    order, times = [], []
    for part, label in zip(np.array_split(labels, len(classes)), classes, strict=True):
        members = np.flatnonzero(labels == label)
        rounds = -(-len(part) // len(members))
        order.append(np.concatenate([rng.permutation(members) for _ in range(rounds)])[: len(part)])
        times.append(np.repeat(np.arange(rounds), len(members))[: len(part)])
    places = rng.permutation(len(labels))
    return np.concatenate(order)[places], np.concatenate(times)[places]


def mask_noise(seed: int, epoch: int, sample: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Masking noise, fp32, uniform in 0..1; of ``shape`` [num_patches], or [crops, num_patches] of one image."""
    return generator(seed, MASK, epoch, sample).random(shape, dtype=np.float32)


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """The sample to try instead of ``sample``: itself at attempt 0, then others that its key draws."""
    if attempt == 0:
        return sample
    return int(generator(seed, REPLACEMENT, epoch, sample).integers(num_samples, size=attempt)[-1])


def crop_and_flip(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Box, bool]:
    """Window of a random resized crop, and whether to flip it.

    The law of torchvision's ``RandomResizedCrop``: area uniform in ``scale``, log-uniform aspect ``ratio``, ten
    attempts, then the largest centred window of an allowed ratio. (The published linear probe makes one attempt only;
    here it has this law, too.)
    """
    box = None
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            box = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
            break
    if box is None:
        w = min(width, max(1, round(height * ratio[1])))
        h = min(height, max(1, round(width / ratio[0])))
        box = (height - h) // 2, (width - w) // 2, h, w
    return box, bool(rng.random() < 0.5)


def fixed_size_crop(
    rng: np.random.Generator | None, height: int, width: int, size: tuple[int, int]
) -> tuple[Box, bool]:
    """Window of the aspect ratio of ``size`` (height, width), 224 / 256 as long as the largest; and whether to flip it.

    That is a crop of 224 pixels once the shorter side has 256: at a place drawn by ``rng``; without it the centre, not
    flipped, which is what evaluation takes of images up to 224 pixels.
    """
    scale = 224 / 256 * min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    if rng is None:
        return ((height - h) // 2, (width - w) // 2, h, w), False
    return (int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w), bool(rng.random() < 0.5)
