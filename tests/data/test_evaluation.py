"""Evaluation batches: pixels equal torchvision's, each image once on any number of ranks, bad images are listed."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from batches import evaluation_batches
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mae_fast.data.decode import centre_crop, decode
from mae_fast.data.loader import Batch
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.sources import Source, open_source

SIZES = [(64, 80), (90, 61), (300, 40), (33, 33), (64, 97), (31, 200), (50, 51)]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for i, (height, width) in enumerate(SIZES):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = zoo.photo(height, width, seed=i)
        (tmp_path / "ab"[i % 2] / f"{i}.jpg").write_bytes(zoo.encoded(pixels, "JPEG"))
    return open_source(tmp_path)


def batches(source: Source, **options: Any) -> list[Batch]:
    return list(evaluation_batches(source, **{"size": (32, 32), "channels": 3, "batch_size": 3, **options}))


@pytest.mark.parametrize(
    ("side", "crop_pct", "resized"),
    [(32, None, 36), (224, None, 256), (225, None, 225), (32, 0.9, 35), (32, 1.0, 32)],
    ids=str,
)
def test_pixels_equal_torchvisions(source: Source, side: int, crop_pct: float | None, resized: int) -> None:
    theirs = transforms.Compose([transforms.Resize(resized, InterpolationMode.BICUBIC), transforms.CenterCrop(side)])
    found = torch.cat([b.images for b in batches(source, size=(side, side), crop_pct=crop_pct)])
    for pixels, name in zip(found, source.names, strict=True):
        with Image.open(source.root / name) as image:
            assert np.array_equal(pixels.numpy(), np.asarray(theirs(image)))


@pytest.mark.parametrize("size", [(16, 48), (48, 16), (20, 21)], ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_the_crop_is_covered_for_any_size(size: tuple[int, int], crop_pct: float) -> None:
    """There is no padding, and the image keeps its aspect ratio."""
    for i, (height, width) in enumerate([*SIZES, (7, 5), (1, 1)]):
        white = Image.fromarray(np.full((height, width, 3), 255, np.uint8))
        made = centre_crop(white, size, crop_pct)
        assert made.shape == (*size, 3)
        assert made.min() == 255, i
    rows = np.repeat(np.linspace(0, 255, 100)[:, None], 100, 1).astype(np.uint8)
    seen = centre_crop(Image.fromarray(rows), size, crop_pct)[:, 0, 0].astype(float)
    assert np.ptp(seen) == pytest.approx(255 * crop_pct * min(1, size[0] / size[1]), rel=0.15)


def test_grey_images_and_bands_equal_torchvisions(tmp_path: Path) -> None:
    pixels = np.concatenate([zoo.photo(60, 70, seed=i) for i in range(2)], 2)[:, :, :5]
    made = centre_crop(decode(zoo.npy(pixels), PixelFormat(channels=5)), (32, 32), 0.875)
    for c in range(5):
        alone = centre_crop(Image.fromarray(pixels[:, :, c]), (32, 32), 0.875)
        assert alone.shape == (32, 32, 1)
        difference = np.abs(made[:, :, c].astype(int) - alone[:, :, 0])
        assert difference.mean() < 0.2  # torch and Pillow round differently
        assert difference.max() <= 7


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("batch_size", "world"), [(3, 1), (1, 1), (2, 3), (100, 2), (1, 10)])
def test_each_image_comes_once_in_order(source: Source, batch_size: int, world: int, num_workers: int) -> None:
    if num_workers and world > 3:
        pytest.skip("starts twenty processes")
    options = {"batch_size": batch_size, "world": world, "num_workers": num_workers}
    ranks = [batches(source, rank=rank, **options) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    sizes = [[len(batch.images) for batch in rank] for rank in ranks]
    assert max(map(max, sizes)) <= batch_size
    together = [batch for rank in ranks for batch in rank]
    [whole] = batches(source, batch_size=100)
    assert torch.cat([batch.ids for batch in together]).tolist() == list(range(len(SIZES)))
    assert torch.cat([batch.labels for batch in together]).tolist() == list(source.labels)
    assert torch.equal(torch.cat([batch.images for batch in together]), whole.images)
    assert all(batch.noise.shape == (len(batch.ids), 0) for batch in together)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_left_out_and_listed(source: Source, num_workers: int) -> None:
    (source.root / source.names[2]).write_bytes(b"")
    found = batches(source, num_workers=num_workers)
    assert torch.cat([batch.ids for batch in found]).tolist() == [0, 1, 3, 4, 5, 6]
    assert [(i, str(bad)) for batch in found for i, bad in batch.skipped] == [(2, "empty: 0 bytes")]
    assert torch.cat([batch.labels for batch in found]).tolist() == [source.labels[i] for i in (0, 1, 3, 4, 5, 6)]
    known = {i: bad for batch in found for i, bad in batch.skipped}
    (source.root / source.names[2]).write_bytes(zoo.jpeg())  # known bad images are not read
    again = batches(source, num_workers=num_workers, bad=known)
    assert [batch.ids.tolist() for batch in again] == [batch.ids.tolist() for batch in found]
    assert [(i, str(bad)) for batch in again for i, bad in batch.skipped] == [(2, "empty: 0 bytes")]
    alone = batches(source, batch_size=1, bad=known)[2]
    assert (alone.images.shape, alone.labels.tolist()) == ((0, 32, 32, 3), [])


def test_narrow_images_that_would_fill_the_memory_are_bad(source: Source) -> None:
    """An image of 1 x 60000 pixels would be resized to 36 x 2160000, for a crop of 32 x 32."""
    (source.root / source.names[2]).write_bytes(zoo.encoded(Image.new("RGB", (60000, 1)), "JPEG"))
    [batch] = batches(source, batch_size=10)
    assert batch.ids.tolist() == [0, 1, 3, 4, 5, 6]
    expected = "too large: 1 x 60000 pixels, resized to 36 x 2160000"
    assert [(i, str(bad)) for i, bad in batch.skipped] == [(2, expected)]


def test_exif_orientation_is_applied_and_labels_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(zoo.orientation(6))
    source = open_source(tmp_path)
    stored, upright = (batches(source, exif=exif)[0] for exif in (False, True))
    assert stored.labels is None
    assert not torch.equal(stored.images, upright.images)
    assert np.array_equal(
        upright.images[0].numpy(), centre_crop(decode(zoo.orientation(6), PixelFormat(exif=True)), (32, 32), 0.875)
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_draws_no_random_numbers(source: Source, num_workers: int) -> None:
    """An evaluation must not change the next epoch."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    batches(source, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
