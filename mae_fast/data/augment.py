"""Augmentations other than crop and flip: colour jitter, and timm's RandAugment, random erasing, Mixup and CutMix.

timm draws from the global generators of Python, NumPy and torch. For each use, they are seeded from a key and restored
afterwards. So the draws depend only on the key, and do not change other draws.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError
from ..ops.patches import is_raw, without_missing
from .pixel_format import PixelFormat
from .rng import AUGMENT, MIX, generator

PICTURES_ONLY = "it needs 8-bit images with 1 or 3 channels"


def is_picture(pixels: PixelFormat) -> bool:
    """Whether Pillow's augmentations support images of this format."""
    return pixels.dtype == "uint8" and pixels.channels in (1, 3)


@contextmanager
def seeded(rng: np.random.Generator, device: torch.device) -> Iterator[None]:
    """Context in which the global generators of Python, NumPy and torch (of ``device``) are seeded from ``rng``.

    Their states are restored afterwards. The generators are global, so no other thread may draw inside the context.
    """
    index = device.index if device.type == "cuda" else None
    torchs = torch.default_generator if index is None else torch.cuda.default_generators[index]
    states = random.getstate(), np.random.get_state(), torchs.get_state()  # noqa: NPY002
    random.seed(int(rng.integers(2**63)))
    np.random.seed(rng.integers(2**32, size=4))  # noqa: NPY002
    torchs.manual_seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torchs.set_state(states[2])


class ColorJitter:
    """Multiplies brightness, contrast and saturation by factors uniform in 0.6..1.4, in random order.

    This is torchvision's ``ColorJitter(0.4, 0.4, 0.4)``, as in the pre-training of BEiT (Bao et al., 2022), but keyed
    by (seed, epoch, sample).

    Args:
        channels: 3, or 1 (without saturation).

    Raises:
        UserError: if images have another number of channels.
    """

    def __init__(self, seed: int, channels: int) -> None:
        if channels not in (1, 3):
            raise UserError(
                f"colour jitter needs images with 1 or 3 channels, got {channels}",
                "train with --augmentation crop",
            )
        self.seed = seed

    def __call__(self, crops: Tensor, epoch: int, sample: int) -> None:
        """Change uint8 ``crops`` [R, H, W, C] of one image in place, on their device. This is thread-safe."""
        from torchvision.transforms.v2 import functional as tv

        adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
        rng = generator(self.seed, AUGMENT, epoch, sample)
        for crop in crops.permute(0, 3, 1, 2):  # [C, H, W] each
            factors = rng.uniform(0.6, 1.4, len(adjust))
            changed = crop
            for i in rng.permutation(len(adjust)):
                changed = adjust[i](changed, float(factors[i]))
            crop.copy_(changed)


class RandAugment:
    """timm's RandAugment (Cubuk et al., 2019) of cropped and flipped images, keyed by (seed, epoch, sample).

    Args:
        policy: string in timm's format, such as ``rand-m9-mstd0.5-inc1``.
        channels: 1 or 3.

    Raises:
        UserError: if timm does not know the policy, or images have another number of channels.
    """

    def __init__(self, policy: str, seed: int, channels: int) -> None:
        from timm.data import IMAGENET_DEFAULT_MEAN
        from timm.data.auto_augment import posterize, rand_augment_transform

        if channels not in (1, 3):
            raise UserError(f"RandAugment needs images with 1 or 3 channels, got {channels}", "train without --aa")
        # The fill colour of rotation and translation.
        grey = tuple(round(255 * x) for x in IMAGENET_DEFAULT_MEAN) if channels == 3 else 128
        settings = {"img_mean": grey, "interpolation": Image.Resampling.BICUBIC}
        try:
            self.transform: Any = rand_augment_transform(policy, settings)
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"--aa {policy}: not a RandAugment policy of timm", "give one such as rand-m9-mstd0.5-inc1"
            ) from error
        for op in self.transform.ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
        self.seed = seed

    def __call__(self, crops: Tensor, epoch: int, sample: int) -> None:
        """Change uint8 ``crops`` [R, H, W, C] of one image, on the CPU, in place. Not thread-safe, see ``seeded``."""
        with seeded(generator(self.seed, AUGMENT, epoch, sample), crops.device):
            for crop in crops.numpy():
                image = Image.fromarray(crop[:, :, 0] if crop.shape[2] == 1 else crop)
                crop[:] = np.asarray(self.transform(image)).reshape(crop.shape)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize. At the largest magnitude, 0 bits are left: black. Pillow 13 refuses 0 bits."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class Mixing:
    """Random erasing, then Mixup or CutMix, for a batch and its labels. Keyed by (seed, step, rank).

    Erasing (Zhong et al., 2017) replaces a rectangle of some images by normal noise. Mixup (Zhang et al., 2017)
    averages a batch with itself in reverse order. CutMix (Yun et al., 2019) copies a rectangle from there. Targets are
    mixed with the same ratio. If both are enabled, each batch gets one of them, with equal probability.

    Args:
        pixel_stats: mean and standard deviation [C] to standardise raw images, see ``ops.patches``.
        nodata: raw value of missing pixels. None: there is no such value.
        rank: rank of this process.
        mixup, cutmix: alpha of the ratio's beta distribution. 0: disabled.
        smoothing: label smoothing, the share of a target that is spread over all classes.
        reprob: probability that a rectangle of an image is erased.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        seed: int,
        pixel_stats: tuple[Tensor, Tensor],
        nodata: float | None = None,
        rank: int = 0,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        smoothing: float = 0.1,
        reprob: float = 0.25,
    ) -> None:
        from timm.data.mixup import Mixup

        self.seed, self.rank, self.reprob = seed, rank, reprob
        (self.mean, self.std), self.nodata = pixel_stats, nodata
        self.num_classes, self.smoothing = num_classes, smoothing
        mixes = mixup > 0 or cutmix > 0
        self.mixup: Any = Mixup(mixup, cutmix, prob=float(mixes))  # type: ignore[no-untyped-call]

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Augment a batch. Returns standardised images [N, C, H, W] and targets fp32 [N, num_classes].

        Args:
            images: raw pixels [N, H, W, C], which become fp32; or standardised, floating [N, C, H, W].
            labels: int64 [N]. Without Mixup and CutMix, also targets, fp32 [N, num_classes].
            step: number of the batch in the run.
        """
        from timm.data.mixup import mixup_target
        from timm.data.random_erasing import RandomErasing

        if is_raw(images, len(self.mean)):
            # Keep a copy on the device: copying in each step would make the host wait for the GPU.
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
            images = without_missing(images, self.mean, self.std, self.nodata).contiguous()
        else:
            images = images.clone()
        with seeded(generator(self.seed, MIX, step, self.rank), images.device):
            if self.reprob:
                erase: Any = RandomErasing(  # type: ignore[no-untyped-call]
                    self.reprob, mode="pixel", device=images.device
                )
                erase(images)
            # As in timm's Mixup, which refuses odd batches. Here, the middle image is mixed with itself.
            ratio = self.mixup._mix_batch(images)
        if labels.is_floating_point():
            return images, labels
        targets: Tensor = mixup_target(labels, self.num_classes, ratio, self.smoothing)  # type: ignore[no-untyped-call]
        return images, targets
