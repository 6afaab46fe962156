"""Batches: pixels against torchvision, the same samples whatever the workers or the place of resumption."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from mae_fast.data.decode import centre_box, decode, load_centred
from mae_fast.data.keyed import CROP, crop_and_flip, epoch_order, generator, mask_noise
from mae_fast.data.loader import Batch, training_batches
from mae_fast.data.sources import Source, image_folder
from mae_fast.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Source:
    rng = np.random.default_rng(0)
    for i in range(11):
        pixels = rng.integers(0, 256, (40 + i, 50 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    return image_folder(tmp_path)


def batches(source: Source, first: int = 0, num_workers: int = 0, epochs: int = 3) -> list[Batch]:
    return list(
        training_batches(
            source,
            size=(32, 24),
            channels=3,
            num_patches=12,
            batch_size=4,
            batches_per_epoch=2,
            epochs=epochs,
            seed=5,
            first=first,
            num_workers=num_workers,
        )
    )


def equal(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(
        torch.equal(x, y) for p, q in pairs for x, y in [(p.images, q.images), (p.noise, q.noise), (p.ids, q.ids)]
    )


def test_pixels_are_torchvisions_and_noise_is_keyed(source: Source) -> None:
    found = batches(source)
    assert len(found) == 6
    for number, batch in enumerate(found):
        epoch, place = divmod(number, 2)
        assert batch.ids.tolist() == epoch_order(5, epoch, 11)[place * 4 : place * 4 + 4].tolist()
        assert batch.images.shape == (4, 32, 24, 3)
        for pixels, noise, sample in zip(batch.images, batch.noise, batch.ids.tolist(), strict=True):
            with Image.open(source.paths[sample]) as image:
                box, flip = crop_and_flip(generator(5, CROP, epoch, sample), image.height, image.width)
                expected = tv.resized_crop(image, *box, [32, 24], InterpolationMode.BICUBIC)
            expected = tv.hflip(expected) if flip else expected
            assert np.array_equal(pixels.numpy(), np.asarray(expected))
            assert np.array_equal(noise.numpy(), mask_noise(5, epoch, sample, 12))


def test_workers_and_resumption_change_nothing(source: Source) -> None:
    whole = batches(source)
    assert equal(whole, batches(source, num_workers=2))
    for first in range(6):
        assert equal(whole[first:], batches(source, first=first))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_named_without_a_workers_traceback(source: Source, num_workers: int) -> None:
    Path(source.paths[3]).write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(UserError, match=r"cannot read image .*03\.png .*remove"):
        batches(source, num_workers=num_workers, epochs=9)


def test_evaluation_takes_the_centre(tmp_path: Path) -> None:
    assert centre_box(100, 200, (50, 50)) == (0, 50, 100, 100)
    assert centre_box(7, 7, (32, 32)) == (0, 0, 7, 7)
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert (load_centred(str(tmp_path / "x.png"), (10, 10)) == 255).all()
    assert load_centred(str(tmp_path / "x.png"), (5, 5), channels=1).shape == (5, 5, 1)


def test_other_channel_counts_are_refused(source: Source) -> None:
    with pytest.raises(UserError, match="in_chans=4"):
        decode(source.paths[0], 4)
