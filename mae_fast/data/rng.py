"""Random numbers as a function of (seed, stream, epoch, sample). There is no state to save.

Order, crop, flip and mask of a sample do not depend on workers, processes, batch size, or where a run was resumed.
"""

import math

import numpy as np

# One stream per use, so that a change of one, such as the number of draws for a crop, does not change the others.
ORDER, CROP, MASK, REPLACEMENT, AUGMENT, MIX, LAYERS, VALUES_OF_IMAGES = range(8)

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def generator(seed: int, stream: int, epoch: int, sample: int = 0) -> np.random.Generator:
    """A Philox generator keyed by the arguments. The lowest word of the counter is reserved for the draws."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, sample, epoch, stream]))


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of the samples in an epoch, a permutation [num_samples]."""
    return generator(seed, ORDER, epoch).permutation(num_samples)


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of the samples in an epoch with the same number of samples per class.

    Images of smaller classes are repeated. Larger classes are subsampled, differently in each epoch. If the number of
    samples is not a multiple of the number of classes, random classes get one more.

    Returns:
        Indices of samples [n], and for each, how often it occurred before, from 0.
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
    """Masking noise of one image, fp32, uniform in 0..1. ``shape``: num_patches, or (crops, num_patches)."""
    return generator(seed, MASK, epoch, sample).random(shape, dtype=np.float32)


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """The sample to try: ``sample`` itself at attempt 0, then random ones drawn by its key."""
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
    """Draw the window of a random resized crop, and whether to flip it.

    The distribution is that of torchvision's ``RandomResizedCrop``: area uniform in ``scale``, log-uniform aspect
    ``ratio``, ten attempts, then the largest centred window with an allowed ratio. The published linear probe makes
    only one attempt. Here, it uses this distribution, too.
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
    """The window of a crop of fixed size, and whether to flip it.

    It has the aspect ratio of ``size`` (height, width), and 224 / 256 of the side of the largest such window. This
    equals a crop of 224 pixels after resizing the shorter side to 256. ``rng`` draws position and flip. Without
    ``rng``, the window is the centre, not flipped, as in evaluation at up to 224 pixels.
    """
    scale = 224 / 256 * min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    if rng is None:
        return ((height - h) // 2, (width - w) // 2, h, w), False
    return (int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w), bool(rng.random() < 0.5)
