"""Keyed random numbers: crops have torchvision's distribution, and draws depend only on the key."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomCrop, RandomResizedCrop

from mae_fast.data.decode import centre_box
from mae_fast.data.rng import (
    AUGMENT,
    CROP,
    LAYERS,
    MASK,
    MIX,
    ORDER,
    REPLACEMENT,
    crop_and_flip,
    epoch_order,
    fixed_size_crop,
    generator,
    mask_noise,
    replacement,
)


def test_draws_depend_only_on_the_key() -> None:
    assert np.array_equal(mask_noise(1, 2, 3, 64), mask_noise(1, 2, 3, 64))
    others = [mask_noise(*key, 64) for key in [(0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 3, 2)]]
    assert all(not np.array_equal(mask_noise(1, 2, 3, 64), other) for other in others)
    assert not np.array_equal(mask_noise(1, 2, 3, 64), generator(1, CROP, 2, 3).random(64, dtype=np.float32))


def test_draws_equal_those_of_earlier_versions() -> None:
    """Runs are resumed and compared across versions, so the draws of a key must not change."""
    assert epoch_order(5, 2, 12).tolist() == [10, 3, 11, 0, 6, 8, 2, 4, 5, 1, 9, 7]
    noise = [3955001, 8319070, 9528725, 4670391, 7230461, 11177619]  # times 2 ** 24, the precision of fp32
    assert (mask_noise(5, 2, 7, 6) * 2**24).tolist() == noise
    rng = generator(5, CROP, 2, 7)
    first, second = (crop_and_flip(rng, 480, 640) for _ in range(2))
    assert (first, second) == (((39, 96, 311, 293), True), ((68, 87, 398, 327), True))
    rng = generator(5, CROP, 2, 7)
    first, second = (fixed_size_crop(rng, 480, 640, (224, 224)) for _ in range(2))
    assert (first, second) == (((26, 194, 420, 420), False), ((28, 26, 420, 420), True))
    assert [replacement(5, 2, 7, attempt, 1000) for attempt in range(4)] == [7, 248, 159, 823]
    streams = ORDER, CROP, MASK, REPLACEMENT, AUGMENT, MIX, LAYERS
    assert streams == tuple(range(7))


def test_replacements_are_keyed() -> None:
    drawn = [replacement(0, 1, 2, attempt, 10**6) for attempt in range(1, 50)]
    assert replacement(0, 1, 2, 0, 10**6) == 2
    assert len(set(drawn)) == 49
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert replacement(*other, 1, 10**6) not in drawn


def test_noise_of_adjacent_samples_does_not_overlap() -> None:
    """Key and draws use different words of the counter."""
    draws = np.concatenate([mask_noise(0, 0, sample, 1024) for sample in range(50)])
    assert len(np.unique(draws)) > 0.99 * len(draws)


def test_each_epoch_has_a_new_permutation() -> None:
    first, second = epoch_order(0, 0, 1000), epoch_order(0, 1, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("least", [0.2, 0.08])
@pytest.mark.parametrize("size", [(480, 640), (32, 32), (300, 200), (100, 1000)], ids=str)
def test_crops_have_torchvisions_distribution(size: tuple[int, int], least: float) -> None:
    height, width = size
    image = torch.empty(1, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [least, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    drawn = [crop_and_flip(generator(0, CROP, 0, i), height, width, (least, 1.0)) for i in range(4000)]
    ours = np.array([box for box, _ in drawn])
    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):  # top, left, height, width. At 1e-4, five tests per size rarely fail by chance.
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4, column
    flips = np.mean([flip for _, flip in drawn])
    assert abs(flips - 0.5) < 0.04


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 1)], ids=str)
def test_images_that_are_too_narrow_give_a_centre_crop(size: tuple[int, int]) -> None:
    """As in torchvision after ten attempts."""
    height, width = size
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), [2.0, 2.0], [3 / 4, 4 / 3])
    box, _ = crop_and_flip(generator(0, CROP, 0), height, width, scale=(2.0, 2.0))
    assert box == tuple(expected)


SIZES = [(224, 224), (224, 160), (96, 336), (7, 5)]
IMAGES = [(256, 256), (480, 640), (640, 480), (90, 1000), (37, 41), (3, 2), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_fixed_crops_have_seven_eighths_of_the_largest_side(image: tuple[int, int], size: tuple[int, int]) -> None:
    """They have the aspect ratio of the crop and are inside the image. Without a generator, they are centred."""
    _, _, most_h, most_w = centre_box(*image, size)
    found = [fixed_size_crop(generator(0, CROP, 0, i), *image, size) for i in range(100)]
    (top, left, h, w), flip = fixed_size_crop(None, *image, size)
    assert not flip
    assert {box[2:] for box, _ in found} == {(h, w)}
    assert (h, w) == (max(1, round(0.875 * most_h)), max(1, round(0.875 * most_w))) or min(image) < 100
    exact = 0.875 * min(image[0] / size[0], image[1] / size[1])
    assert abs(h - exact * size[0]) <= 0.5 + (exact * size[0] < 0.5) / 2
    assert abs(w - exact * size[1]) <= 0.5 + (exact * size[1] < 0.5) / 2
    for (y, x, _, _), _ in found:
        assert 0 <= y <= image[0] - h
        assert 0 <= x <= image[1] - w
    assert abs(2 * top + h - image[0]) <= 1
    assert abs(2 * left + w - image[1]) <= 1


@pytest.mark.parametrize("image", [(256, 256), (256, 341), (341, 256)], ids=str)
def test_fixed_crops_have_the_distribution_of_crops_of_224_from_256(image: tuple[int, int]) -> None:
    found = [fixed_size_crop(generator(0, CROP, 0, i), *image, (224, 224)) for i in range(4000)]
    ours = np.array([box for box, _ in found])
    torch.manual_seed(0)
    theirs = np.array([RandomCrop.get_params(torch.empty(1, *image), (224, 224)) for _ in range(4000)])
    assert np.array_equal(ours[:, 2:], theirs[:, 2:])
    for column in range(2):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4, column
        assert {ours[:, column].min(), ours[:, column].max()} == {0, image[column] - 224}
    flips = np.array([flip for _, flip in found])
    assert abs(flips.mean() - 0.5) < 0.04
    assert abs(np.corrcoef(ours[:, 0], ours[:, 1])[0, 1]) < 0.08
    assert abs(np.corrcoef(ours[:, 0], flips)[0, 1]) < 0.08
