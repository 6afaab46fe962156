"""DALI equals Pillow: the same windows, pixels equal up to rounding, and the same bad images."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from batches import training_batches

from mae_fast.data import dali
from mae_fast.data.dali import DaliDecoder, graph
from mae_fast.data.decode import BadImage, Encoded, PilDecoder, read_header
from mae_fast.data.loader import Batch
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.rng import CROP, crop_and_flip, generator
from mae_fast.data.sources import Files, Source, open_source


def batches(source: Source, decoder: str, **options: Any) -> list[Batch]:
    options = {"size": (96, 96), "channels": 3, "num_patches": 36, "batch_size": 8, "epochs": 2, "seed": 3} | options
    return list(training_batches(source, decoder=decoder, **options))


def photos(folder: Path) -> Source:
    """Windows of two photographs as JPEG files of several kinds."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for i in range(24):
        photo = load_sample_images().images[i % 2]
        h, w = rng.integers(150, 427), rng.integers(150, 640)
        y, x = rng.integers(427 - h + 1), rng.integers(640 - w + 1)
        pixels = photo[y : y + h, x : x + w]
        options = ({}, {"progressive": True}, {"subsampling": 0}, {"quality": 97})[i % 4]
        grey = i % 8 == 5
        (folder / f"{i:02}.jpg").write_bytes(
            zoo.encoded(pixels[:, :, 0] if grey else np.ascontiguousarray(pixels), "JPEG", **options)
        )
    return open_source(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("repeats", [1, 2])
def test_pixels_differ_by_rounding_only(source: Source, repeats: int, channels: int) -> None:
    pil, dali = (batches(source, d, repeats=repeats, channels=channels) for d in ("pil", "dali"))
    differences = []
    for a, b in zip(pil, dali, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.noise, b.noise)
        assert a.images.shape == b.images.shape == (8, 96, 96, channels)
        differences.append((a.images.int() - b.images.int()).abs().flatten())
    difference = torch.cat(differences).double()
    assert difference.mean() <= 0.2
    assert np.quantile(difference.numpy(), 0.999) <= 2
    assert difference.max() <= 12
    theirs, ours = (torch.cat([x.images for x in found]).double().flatten(0, 2) for found in (pil, dali))
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=5e-3, atol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=5e-3, atol=0)


@pytest.mark.parametrize("window", ["crop", "crop-fixed", "none"])
@pytest.mark.parametrize("size", [(96, 96), (96, 64), (40, 112)], ids=str)
def test_every_window_of_any_shape_differs_by_rounding_only(source: Source, size: tuple[int, int], window: str) -> None:
    difference = []
    for repeats in (1, 2):
        options = {"size": size, "window": window, "repeats": repeats, "epochs": 1}
        for a, b in zip(*(batches(source, d, **options) for d in ("pil", "dali")), strict=True):
            assert torch.equal(a.ids, b.ids)
            assert a.images.shape == b.images.shape == (8, *size, 3)
            difference.append((a.images.int() - b.images.int()).abs().flatten())
    assert torch.cat(difference).double().mean() <= 0.2
    assert torch.cat(difference).max() <= 12


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_any_number_of_channels_equal_pillows(tmp_path: Path, channels: int) -> None:
    for i in range(8):
        bands = [zoo.photo(60, 70, seed=i * channels + c)[:, :, 0] for c in range(channels)]
        pixels = np.stack(bands, -1)
        (tmp_path / f"{i}.npy").write_bytes(zoo.npy(pixels if i % 2 else pixels.astype(np.uint16) * 257))
    source = open_source(tmp_path)
    for a, b in zip(*(batches(source, d, channels=channels) for d in ("pil", "dali")), strict=True):
        assert a.images.shape == (8, 96, 96, channels)
        assert torch.equal(a.images, b.images)


def test_the_tolerance_detects_a_window_one_pixel_off(source: Source) -> None:
    """The tolerance above is far below the difference of such a window."""
    slots = []
    for off in (0, 1):
        (y, x, h, w), flip = crop_and_flip(generator(0, CROP, 0, 0), 140, 140)
        slots.append(Encoded(data=source.read(0), windows=[((y, x + off, h, w), flip)]))
    out = torch.empty(2, 1, 96, 96, 3, dtype=torch.uint8)
    assert PilDecoder(PixelFormat())(slots, list(out)) == [None, None]
    assert (out[0].int() - out[1].int()).abs().double().mean() > 0.5


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_and_resuming_do_not_change_batches(source: Source, threads: int) -> None:
    for options in ({}, {"window": "crop-fixed", "color_jitter": True, "repeats": 2}):
        whole = batches(source, "dali", num_workers=threads, **options)
        for first in (0, 1, 4):
            for a, b in zip(whole[first:], batches(source, "dali", first=first, **options), strict=True):
                assert torch.equal(a.images, b.images)


def test_dali_decodes_jpeg_without_pillow(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(dali, "decode", refuse)
    batches(source, "dali", epochs=1)


@pytest.mark.parametrize("exif", [False, True])
def test_both_decoders_refuse_the_same_images(tmp_path: Path, exif: bool) -> None:
    good, bad = zoo.make(tmp_path)
    source = open_source(tmp_path)
    (tmp_path / "deleted_meanwhile.jpg").unlink()
    assert set(source.names) == good | bad
    found = {}
    for decoder in ("pil", "dali"):
        options = {"size": (32, 32), "num_patches": 4, "epochs": 1, "exif": exif, "drop_last": False}
        found[decoder] = batches(source, decoder, **options)
    difference = []
    for a, b in zip(found["pil"], found["dali"], strict=True):
        assert torch.equal(a.ids, b.ids)
        assert [(i, str(x)) for i, x in a.skipped] == [(i, str(x)) for i, x in b.skipped]
        difference.append((a.images.int() - b.images.int()).abs().flatten())
    assert torch.cat(difference).double().mean() <= 0.2
    assert torch.cat(difference).max() <= 12
    # Each image was used, or skipped with a reason.
    used = {source.names[i] for batch in found["dali"] for i in batch.ids.tolist()}
    skipped = {source.names[i]: x.reason for batch in found["dali"] for i, x in batch.skipped}
    assert used == good
    assert set(skipped) == bad
    assert sum(Counter(skipped.values()).values()) + len(used) == len(source)


def test_an_image_that_only_dali_refuses_is_decoded_by_pillow(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failed pipeline is replaced."""
    broken = Files(source.root, source.names)
    expected = batches(source, "dali", epochs=1)
    monkeypatch.setattr(dali.DaliDecoder, "_takes", lambda decoder, slot: True)
    read = Files.read

    def hostile(self: Files, index: int) -> bytes:
        data = read(self, index)
        return data[: len(data) // 2] if index == 5 else data

    monkeypatch.setattr(Files, "read", hostile)
    for a, b in zip(expected, batches(broken, "dali", epochs=1), strict=True):
        assert 5 not in b.ids
        keep = a.ids == b.ids
        assert torch.equal(a.images[keep], b.images[keep]) or [i for i, _ in b.skipped] == [5]
    skipped = [bad for batch in batches(broken, "dali", epochs=1) for _, bad in batch.skipped]
    assert {bad.reason for bad in skipped} == {"broken"}


@pytest.mark.parametrize("name", ["cut_at_99.jpg", "without_end.jpg"])
def test_images_truncated_below_the_window_are_bad(name: str) -> None:
    """DALI decodes only up to the window, but the crop must not decide whether an image is bad."""
    data, reason = zoo.BAD[name]
    encoded = Encoded(data=data, header=read_header(data), windows=[((0, 0, 8, 8), False)])
    [bad] = DaliDecoder(PixelFormat(), (8, 8), 1)([encoded], [torch.empty(1, 8, 8, 3, dtype=torch.uint8)])
    assert bad is not None
    assert bad.reason == reason


def test_a_failure_of_dali_on_good_images_gives_a_warning(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DaliDecoder, "_run", lambda *_: "out of memory")
    with pytest.warns(UserWarning, match="DALI failed.*out of memory"):
        found = batches(source, "dali", epochs=1)
    assert sum(len(batch.ids) for batch in found) == len(source)


def test_a_bad_image_ends_only_its_own_pipeline(source: Source) -> None:
    decoder = DaliDecoder(PixelFormat(), (32, 32), 4)
    good, bad = source.read(0), zoo.BAD["cut_at_50.jpg"][0]

    def run(*files: bytes) -> list[BadImage | None]:
        header = read_header(good)
        slots = [Encoded(data=data, header=header, windows=[((0, 0, 40, 40), False)]) for data in files]
        out = torch.zeros(len(files), 1, 32, 32, 3, dtype=torch.uint8)
        errors = decoder(slots, list(out))
        for error, pixels in zip(errors, out, strict=True):
            assert (error is None) == bool(pixels.any())
        return errors

    first = run(good, good)
    (pipeline,) = decoder.idle
    assert first == [None, None]
    assert [error is None for error in run(good, bad, good)] == [True, False, True]
    assert not decoder.idle
    assert run(good) == [None]
    assert decoder.idle != [pipeline]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gpu_graph_is_built_and_serialised(repeats: int, channels: int) -> None:
    """DALI checks operators, arguments and devices. The results can only be checked on a GPU."""
    text = graph((224, 224), channels, repeats, 64, "mixed", None, True).serialize()
    assert b"mixed" in text
    for operator in (b"Slice", b"Resize", b"Flip"):
        assert text.count(bytes([len(operator)]) + operator) == repeats


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gpu_graph_on_a_cpu_equals_pillow(
    source: Source, monkeypatch: pytest.MonkeyPatch, repeats: int, channels: int
) -> None:
    """DALI makes the crops, too. On a GPU, only the device of the operators differs."""
    made = DaliDecoder.__init__

    def with_crops(self: DaliDecoder, *args: Any) -> None:
        made(self, *args)
        self.crops = True

    options = {"repeats": repeats, "channels": channels, "batch_size": 12, "epochs": 1}
    expected = batches(source, "pil", **options)
    monkeypatch.setattr(DaliDecoder, "__init__", with_crops)
    if channels == 3:  # DALI decodes all of these images
        monkeypatch.setattr(dali, "resize", None)
    for a, b in zip(expected, batches(source, "dali", **options), strict=True):
        difference = (a.images.int() - b.images.int()).abs().double()
        assert difference.mean() <= 0.3
        assert difference.max() <= 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_on_a_gpu_equal_pillows(source: Source) -> None:
    device = torch.device("cuda")
    for repeats in (1, 2):
        pil, dali = (batches(source, d, repeats=repeats, device=device) for d in ("pil", "dali"))
        for a, b in zip(pil, dali, strict=True):
            assert b.images.is_cuda
            difference = (a.images.int() - b.images.cpu().int()).abs().double()
            assert difference.mean() <= 0.5  # nvJPEG has another inverse transform
