"""The reference decoder: pixels of all kinds of images, and a reason for each image that cannot be used."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tv

from mae_fast.data import decode as module
from mae_fast.data.decode import BadImage, centre_box, crop_resized, decode, read_header, size_of
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.sources import Files


def rgb(data: bytes, **options: bool) -> np.ndarray:
    return np.asarray(decode(data, PixelFormat(**options)))


@pytest.mark.parametrize("name", zoo.GOOD)
def test_pixels_equal_pillows(name: str) -> None:
    data = zoo.GOOD[name]
    found = rgb(data)
    header = read_header(data)
    assert found.shape == (header.height, header.width, 3)
    assert found.dtype == np.uint8
    if "16" not in name and not name.endswith(".npy"):
        assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("name", ["16_bit.png", "16_bit.tif", "array_grey_16.npy"])
def test_16_bit_pixels_are_scaled(name: str) -> None:
    """Pillow's conversion clips: most of such an image would be white."""
    grey = zoo.photo()[:, :, :1]
    assert np.array_equal(rgb(zoo.GOOD[name]), grey.repeat(3, 2))
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    scaled = np.asarray(decode(zoo.encoded(values, "PNG"), PixelFormat(channels=1)))
    assert np.array_equal(scaled, np.rint(values / 257).astype(np.uint8))


def test_cmyk_is_converted_to_rgb() -> None:
    assert np.abs(rgb(zoo.GOOD["cmyk.jpg"]).astype(int) - zoo.photo()).mean() < 6


@pytest.mark.parametrize("number", range(1, 9))
def test_exif_orientation_is_applied_only_on_request(number: int) -> None:
    data = zoo.orientation(number)
    upright = zoo.orientation(1)
    assert np.array_equal(rgb(data), rgb(upright))
    turned = rgb(data, exif=True)
    assert np.array_equal(turned, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    header = read_header(data, exif=True)
    assert turned.shape[:2] == (header.height, header.width)
    assert header.turned == (number > 1)


@pytest.mark.parametrize("name", zoo.BAD)
def test_bad_images_have_a_reason(name: str) -> None:
    data, reason = zoo.BAD[name]
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason in module.REASONS
    assert not reason or caught.value.reason == reason
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", zoo.ODD)
def test_pipes_and_other_special_files_are_unreadable_without_blocking(kind: str, tmp_path: Path) -> None:
    zoo.ODD[kind](tmp_path / kind)
    source = Files(tmp_path, [kind])
    if kind == "deleted_meanwhile.jpg":
        (tmp_path / kind).unlink()
    with pytest.raises(BadImage, match="unreadable"):
        source.read(0)


def test_folders_and_files_without_permission_are_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(BadImage, match="unreadable: Is a directory"):
        Files(tmp_path, ["folder.jpg"]).read(0)
    (tmp_path / "x.jpg").write_bytes(zoo.jpeg())

    def forbidden(*_: object) -> int:  # as for a user who is not root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(BadImage, match="unreadable: Permission denied"):
        Files(tmp_path, ["x.jpg"]).read(0)


def test_decompression_bombs_are_refused_by_their_header() -> None:
    """They take no time and no memory."""
    import resource
    import time

    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        with pytest.raises(BadImage, match="8400 x 8400 pixels, more than 64 million"):
            decode(zoo.BAD["bomb_70_million.png"][0])
        with pytest.raises(BadImage, match="too large"):
            decode(zoo.BAD["bomb.png"][0])
    assert (time.perf_counter() - start) / 10 < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_large_files_are_refused_without_reading(tmp_path: Path) -> None:
    with (tmp_path / "sparse.tif").open("wb") as file:
        file.truncate(module.MAX_BYTES + 1)
    with pytest.raises(BadImage, match="too large"):
        Files(tmp_path, ["sparse.tif"]).read(0)


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_images_of_any_number_of_channels_are_decoded(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    files = [zoo.npy(pixels), zoo.npy(pixels.astype(np.uint16) * 257)]
    if channels > 4:
        tifffile = pytest.importorskip("tifffile")
        # Interleaved bands, and separate planes.
        for planar, order in (("contig", pixels), ("separate", pixels.transpose(2, 0, 1))):
            file = io.BytesIO()
            tifffile.imwrite(file, order, photometric="minisblack", planarconfig=planar)
            files.append(file.getvalue())
    else:
        files.append(zoo.encoded(pixels, "PNG"))
    box = (3, 5, 20, 30)
    for data in files:
        image = decode(data, PixelFormat(channels=channels))
        assert size_of(image) == (40, 50) == (read_header(data).height, read_header(data).width)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
        expected = tv.resized_crop(torch.from_numpy(pixels).permute(2, 0, 1), *box, [8, 8], 3, antialias=True)
        assert np.array_equal(crop_resized(image, box, (8, 8), False), expected.permute(1, 2, 0).numpy())
        flipped = crop_resized(image, box, (8, 8), True)
        assert np.array_equal(flipped, expected.permute(1, 2, 0).numpy()[:, ::-1])
    with pytest.raises(BadImage, match="unsupported"):
        decode(files[0], PixelFormat(channels=channels + 1))


def test_centre_box_is_the_largest_centred_window() -> None:
    assert centre_box(100, 200, (50, 50)) == (0, 50, 100, 100)
    assert centre_box(7, 7, (32, 32)) == (0, 0, 7, 7)


def test_any_bytes_give_pixels_or_a_bad_image() -> None:
    """The bytes are mutations of real files."""
    rng = np.random.default_rng(0)
    files = [zoo.GOOD[name] for name in ("plain.jpg", "plain.png", "palette.gif", "lzw.tif", "plain.webp", "array.npy")]
    decoded = 0
    for _ in range(600):
        data = bytearray(files[rng.integers(len(files))])
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] = rng.integers(256)
        with contextlib.suppress(BadImage):
            decoded += rgb(bytes(data)).ndim == 3
    assert 50 < decoded < 550  # some mutations decode, some do not


@pytest.mark.parametrize("number", [0, 9, 77, 65535])
def test_invalid_orientations_are_ignored(number: int) -> None:
    data = zoo.orientation(number)
    assert not read_header(data, exif=True).turned
    assert np.array_equal(rgb(data, exif=True), rgb(zoo.orientation(1)))


@pytest.mark.parametrize("exif", [False, True])
def test_rotated_tiff_and_png_have_the_size_of_their_header(exif: bool) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    for format in ("TIFF", "PNG"):
        data = zoo.encoded(zoo.photo(), format, exif=tags.tobytes())
        header = read_header(data, exif)
        assert rgb(data, exif=exif).shape == (header.height, header.width, 3)
        assert not header.turned


def test_postscript_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would run Ghostscript."""
    (tmp_path / "gs").write_text("#!/bin/sh\ntouch $(dirname $0)/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"
    with pytest.raises(BadImage, match="not an image"):
        decode(data)
    assert not (tmp_path / "started").exists()


def test_bands_are_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((50, 60, 100), np.uint8), photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(module, "read_bands", None)
    with pytest.raises(BadImage, match="100 bands, expected 3"):
        decode(file.getvalue())


def test_unreadable_files_leave_no_open_descriptor(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(BadImage):
            Files(tmp_path, ["folder.jpg"]).read(0)
    assert len(os.listdir("/proc/self/fd")) == before
