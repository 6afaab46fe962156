"""Batches: pixels equal torchvision's. Samples do not depend on workers or on where a run was resumed."""

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import evaluation_batches, training_batches
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from mae_fast.data.decode import BadImage, crop_resized
from mae_fast.data.loader import Batch, KeyedBatches, LoaderConfig, Skipped, centred_image, choose_decoder
from mae_fast.data.masks import sampler
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.rng import (
    CROP,
    MASK,
    crop_and_flip,
    epoch_order,
    fixed_size_crop,
    generator,
    mask_noise,
    replacement,
)
from mae_fast.data.sources import Source, open_source
from mae_fast.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Source:
    rng = np.random.default_rng(0)
    for i in range(11):
        pixels = rng.integers(0, 256, (40 + i, 50 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.jpg")
    return open_source(tmp_path)


def batches(source: Source, first: int = 0, num_workers: int = 0, epochs: int = 3, **options: Any) -> list[Batch]:
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
            **options,
        )
    )


def equal(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(
        torch.equal(x, y) for p, q in pairs for x, y in [(p.images, q.images), (p.noise, q.noise), (p.ids, q.ids)]
    )


def test_pixels_equal_torchvisions_and_noise_is_keyed(source: Source) -> None:
    found = batches(source)
    assert len(found) == 6
    for number, batch in enumerate(found):
        epoch, place = divmod(number, 2)
        assert batch.ids.tolist() == epoch_order(5, epoch, 11)[place * 4 : place * 4 + 4].tolist()
        assert batch.images.shape == (4, 32, 24, 3)
        for pixels, noise, sample in zip(batch.images, batch.noise, batch.ids.tolist(), strict=True):
            with Image.open(source.root / source.names[sample]) as image:
                box, flip = crop_and_flip(generator(5, CROP, epoch, sample), image.height, image.width)
                expected = tv.resized_crop(image, *box, [32, 24], InterpolationMode.BICUBIC)
            expected = tv.hflip(expected) if flip else expected
            assert np.array_equal(pixels.numpy(), np.asarray(expected))
            assert np.array_equal(noise.numpy(), mask_noise(5, epoch, sample, 12))


def test_workers_and_resuming_do_not_change_batches(source: Source) -> None:
    whole = batches(source)
    assert equal(whole, batches(source, num_workers=2))
    for first in range(6):
        assert equal(whole[first:], batches(source, first=first))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_replaced_and_listed(source: Source, num_workers: int) -> None:
    """The rest of the batch does not change, and the replacement has the same mask."""
    whole = batches(source, epochs=9)
    (source.root / "03.jpg").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    seen = 0
    for number, (before, after) in enumerate(
        zip(whole, batches(source, epochs=9, num_workers=num_workers), strict=True)
    ):
        assert torch.equal(before.noise, after.noise)
        for place, sample in enumerate(before.ids.tolist()):
            if sample != 3:
                assert after.ids[place] == sample
                assert torch.equal(before.images[place], after.images[place])
                continue
            seen += 1
            drawn = [replacement(5, number // 2, 3, attempt, 11) for attempt in range(1, 20)]
            assert after.ids[place] == next(i for i in drawn if i != 3)
            assert {(i, bad.reason) for i, bad in after.skipped} == {(3, "not an image")}
            image = Image.open(source.root / source.names[after.ids[place]])
            box, flip = crop_and_flip(generator(5, CROP, number // 2, 3), image.height, image.width)
            assert np.array_equal(after.images[place].numpy(), crop_resized(image, box, (32, 24), flip))
    assert seen > 3


def test_skipped_images_are_counted_and_limited(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    (source.root / "03.jpg").write_bytes(b"")
    (source.root / "04.jpg").write_bytes(b"")
    skipped = Skipped(source, 0.1)
    found = batches(source, epochs=9)
    with pytest.raises(UserError, match=r"2 of 11 images.*10.0%"):
        list(map(skipped.add, found))
    told = caplog.messages
    allowed = Skipped(source, 2 / 11)  # exactly at the limit
    list(map(allowed.add, found))
    assert len(skipped) == len(allowed) == 2
    assert sorted(told) == [f"skipped {name!r} (empty: 0 bytes)" for name in ("03.jpg", "04.jpg")]


def test_listed_images_do_not_count_as_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    skipped = Skipped(open_source(tmp_path), 0.25)
    bad = tuple((i, pickle.loads(pickle.dumps(BadImage("empty", "0 bytes", listed=i < 2)))) for i in range(3))
    skipped.add(Batch(torch.empty(0), torch.empty(0), torch.empty(0), skipped=bad))
    assert len(skipped) == 3
    assert caplog.messages == ["skipped '2.jpg' (empty: 0 bytes)"]
    last = ((3, BadImage("empty", "0 bytes")),)
    with pytest.raises(UserError, match="2 of 4 images cannot be used"):
        skipped.add(Batch(torch.empty(0), torch.empty(0), torch.empty(0), skipped=last))


def test_only_the_first_ten_skipped_images_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(14):
        (tmp_path / f"{i:02}.jpg").write_bytes(b"")
    skipped = Skipped(open_source(tmp_path), 1.0)
    bad = tuple((i, BadImage("empty", "0 bytes")) for i in range(14))
    skipped.add(Batch(torch.empty(0), torch.empty(0), torch.empty(0), skipped=bad))
    assert (len(caplog.messages), len(skipped)) == (10, 14)
    assert "others are counted" in caplog.messages[-1]


def test_a_class_without_usable_images_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    skipped = Skipped(open_source(tmp_path), 1.0)
    bad = tuple((i, BadImage("empty", "0 bytes")) for i in range(3))
    for _ in range(2):
        skipped.add(Batch(torch.empty(0), torch.empty(0), torch.empty(0), skipped=bad))
    assert [line for line in caplog.messages if "class" in line] == [f"class cat has no usable image in {tmp_path}"]


def test_evaluation_takes_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")  # lossless, so the centre is exactly white
    (tmp_path / "y.png").write_bytes(b"")
    source = open_source(tmp_path)
    assert (centred_image(source, 0, (10, 10)) == 255).all()
    assert centred_image(source, 0, (5, 5), PixelFormat(channels=1)).shape == (5, 5, 1)
    with pytest.raises(UserError, match=r"cannot use image '.*y\.png' \(empty: 0 bytes\); repair or remove it"):
        centred_image(source, 1, (10, 10))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("num_samples", "batch_size", "world"), [(103, 8, 4), (64, 8, 2), (33, 4, 8), (12, 3, 4)])
def test_ranks_together_have_the_steps_of_one_process(
    num_samples: int, batch_size: int, world: int, drop_last: bool
) -> None:
    def keys(rank: int, world: int, batch_size: int, first: int = 0) -> list[list[tuple[int, int]]]:
        config = LoaderConfig(
            size=(8, 8), batch_size=batch_size, epochs=2, seed=7, first=first, rank=rank, world=world,
            drop_last=drop_last,
        )  # fmt: skip
        return list(KeyedBatches(num_samples, config))

    alone = keys(0, 1, batch_size * world)
    ranks = [keys(rank, world, batch_size) for rank in range(world)]
    if drop_last:
        assert {len(batch) for rank in ranks for batch in rank} == {batch_size}
        for number, together in enumerate(alone):
            assert [key for rank in ranks for key in rank[number]] == together
    else:
        sizes = [sum(map(len, rank)) for rank in ranks]
        assert max(sizes) - min(sizes) <= 2  # one per epoch
        for epoch in range(2):
            visited = [sample for rank in ranks for batch in rank for e, sample in batch if e == epoch]
            assert sorted(visited) == list(range(num_samples))
    assert keys(1, world, batch_size, first=1) == ranks[1][1:]


def test_repeats_are_different_crops_of_an_image(source: Source) -> None:
    options = {"size": (32, 24), "channels": 3, "num_patches": 12, "epochs": 1, "seed": 5}
    [one] = training_batches(source, batch_size=4, batches_per_epoch=1, **options)
    [three] = training_batches(source, batch_size=12, batches_per_epoch=1, repeats=3, **options)
    assert three.ids.tolist() == one.ids.repeat_interleave(3).tolist()
    assert torch.equal(three.images[::3], one.images)  # the first crop is the same as without repeats
    assert torch.equal(three.noise[::3], one.noise)
    assert len({x.numpy().tobytes() for x in three.images}) == 12
    assert len({x.numpy().tobytes() for x in three.noise}) == 12
    with pytest.raises(UserError, match="--crops-per-image, got 4 and 3"):
        next(training_batches(source, batch_size=4, repeats=3, **options))


def test_labels_follow_their_images(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / "abc"[i % 3]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "abc"[i % 3] / f"{i}.jpg")
    (tmp_path / "a" / "0.jpg").write_bytes(b"bad")
    source = open_source(tmp_path)
    options = {"size": (8, 8), "channels": 3, "num_patches": 4, "epochs": 9, "seed": 0}
    for repeats in (1, 2):
        found = list(training_batches(source, batch_size=4, repeats=repeats, **options))
        assert any(batch.skipped for batch in found)
        for batch in found:
            assert batch.labels is not None
            assert batch.labels.tolist() == [source.labels[i] for i in batch.ids.tolist()]


def test_auto_chooses_dali_if_it_is_installed(monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", types.ModuleType("nvidia.dali"))
    assert choose_decoder() == ("dali", "")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    decoder, why = choose_decoder()
    assert decoder == "pil"
    assert why.startswith("DALI is not installed: ")
    with pytest.raises(UserError, match=r"pip install .*--image-decoder pil"):
        next(
            training_batches(
                source, size=(8, 8), channels=3, num_patches=4, batch_size=2, epochs=1, seed=0, decoder="dali"
            )
        )


def test_all_tensors_of_a_batch_move_to_the_device(source: Source) -> None:
    batch = batches(source)[0]
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.images, moved.noise, moved.ids)} == {"meta"}
    assert moved.labels is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_does_not_change_the_global_generators(source: Source, num_workers: int) -> None:
    """The draws of the model must not depend on the start of a loader."""
    before = torch.get_rng_state()
    batches(source, num_workers=num_workers, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_scale_of_crops_can_be_set_and_noise_left_out(source: Source) -> None:
    for scale in ((0.2, 1.0), (0.08, 1.0)):
        options = {"size": (32, 24), "channels": 3, "batch_size": 11, "epochs": 1, "seed": 5, "scale": scale}
        [batch] = training_batches(source, **options)
        assert batch.noise.shape == (11, 0)
        for pixels, sample in zip(batch.images, batch.ids.tolist(), strict=True):
            with Image.open(source.root / source.names[sample]) as image:
                box, flip = crop_and_flip(generator(5, CROP, 0, sample), image.height, image.width, scale)
                assert np.array_equal(pixels.numpy(), crop_resized(image, box, (32, 24), flip))


# --- windows of fixed size, other masks


@pytest.mark.parametrize("window", ["crop-fixed", "none"])
def test_pixels_of_other_windows_equal_torchvisions(source: Source, window: str) -> None:
    flips = []
    for number, batch in enumerate(batches(source, epochs=9, window=window)):
        for pixels, sample in zip(batch.images, batch.ids.tolist(), strict=True):
            with Image.open(source.root / source.names[sample]) as image:
                rng = generator(5, CROP, number // 2, sample) if window == "crop-fixed" else None
                box, flip = fixed_size_crop(rng, image.height, image.width, (32, 24))
                expected = tv.resized_crop(image, *box, [32, 24], InterpolationMode.BICUBIC)
            assert np.array_equal(pixels.numpy(), np.asarray(tv.hflip(expected) if flip else expected))
            flips.append(flip)
    assert 0.25 < np.mean(flips) < 0.75 if window == "crop-fixed" else not any(flips)


@pytest.mark.parametrize(
    ("image", "size"), [((256, 256), (224, 224)), ((256, 300), (224, 224)), ((320, 128), (112, 112))]
)
def test_without_a_crop_the_window_is_that_of_evaluation(
    tmp_path: Path, image: tuple[int, int], size: tuple[int, int]
) -> None:
    """Equal if nothing is resized, else up to rounding, except at the border, where evaluation sees more pixels."""
    for scale in (1, 2):
        folder = tmp_path / str(scale)
        folder.mkdir()
        shape = image[0] * scale, image[1] * scale, 3
        pixels = np.random.default_rng(0).integers(64, 192, shape, dtype=np.uint8)  # no clipping
        Image.fromarray(pixels).save(folder / "x.png")  # lossless, so values stay in 64..192
        source = open_source(folder)
        options: dict[str, Any] = {"size": size, "channels": 3, "batch_size": 1}
        [trained] = training_batches(source, epochs=1, seed=0, window="none", **options)
        [judged] = evaluation_batches(source, **options)
        difference = (trained.images.int() - judged.images.int()).abs()[0]
        assert difference[4:-4, 4:-4].max() <= 2
        if scale == 1:
            assert difference.max() == 0


def test_repeats_of_fixed_windows_differ(source: Source) -> None:
    for window, distinct in (("crop-fixed", 12), ("none", 4)):
        options: dict[str, Any] = {"size": (16, 8), "channels": 3, "num_patches": 4, "epochs": 1, "seed": 6}
        options |= {"batches_per_epoch": 1, "window": window}
        [one] = training_batches(source, batch_size=4, **options)
        [three] = training_batches(source, batch_size=12, repeats=3, **options)
        assert torch.equal(three.images[::3], one.images)
        assert len({x.numpy().tobytes() for x in three.images}) == distinct


def test_masks_are_keyed(source: Source) -> None:
    """By seed, epoch and sample, as random masks are. Crop r of a sample has its mask number r."""
    draw = sampler("block", (4, 3), 0.5)
    for number, b in enumerate(batches(source, masking=draw, repeats=2)):
        assert b.noise.shape == (4, 12)
        assert b.noise.dtype == torch.float32
        assert ((b.noise >= 1).sum(1) == 6).all()
        for place, sample in enumerate(b.ids.tolist()[::2]):
            rng = generator(5, MASK, number // 2, sample)
            for noise in b.noise[2 * place : 2 * place + 2]:
                assert np.array_equal(noise.numpy(), draw(rng))
    for a, b in zip(batches(source), batches(source, masking=draw), strict=True):
        assert torch.equal(a.images, b.images)  # other draws do not change


def test_a_random_sampler_gives_the_default_masks(source: Source) -> None:
    for repeats in (1, 2, 4):
        draw = sampler("random", (4, 3), 0.75)
        assert equal(batches(source, repeats=repeats), batches(source, repeats=repeats, masking=draw))


@pytest.mark.parametrize("window", ["crop-fixed", "none"])
def test_workers_batch_sizes_and_resuming_do_not_change_masks_or_windows(source: Source, window: str) -> None:
    options: dict[str, Any] = {"window": window, "color_jitter": True, "masking": sampler("block", (4, 3), 0.75)}
    whole = batches(source, **options)
    assert equal(whole, batches(source, num_workers=2, **options))
    for first in range(6):
        assert equal(whole[first:], batches(source, first=first, **options))
    options |= {"size": (32, 24), "channels": 3, "num_patches": 12, "seed": 5}
    single = list(training_batches(source, batch_size=1, epochs=3, batches_per_epoch=8, **options))
    for a, four in zip(whole, (single[i : i + 4] for i in range(0, len(single), 4)), strict=True):
        for name in ("images", "noise", "ids"):
            assert torch.equal(getattr(a, name), torch.cat([getattr(b, name) for b in four]))


def test_the_replacement_of_a_bad_image_has_its_mask(source: Source) -> None:
    options: dict[str, Any] = {"epochs": 9, "window": "crop-fixed", "masking": sampler("block", (4, 3), 0.75)}
    whole = batches(source, **options)
    (source.root / "03.jpg").write_bytes(b"")
    after = batches(source, **options)
    assert any(batch.skipped for batch in after)
    for a, b in zip(whole, after, strict=True):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.images[a.ids == b.ids], b.images[a.ids == b.ids])
