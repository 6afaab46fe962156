"""16-bit and float pixels with any bands are equal in the file and in the batch."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
import torch
import zoo
from batches import evaluation_batches, training_batches
from PIL import Image
from pydicom.data import get_testdata_file
from torch.nn import functional as F

from mae_fast.data.decode import BadImage, crop_resized, decode, read_header
from mae_fast.data.pixel_format import PixelFormat, band_numbers
from mae_fast.data.raw import resized_raw, statistics, stored_dtype
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError

RNG = np.random.default_rng(0)
SIDES = (20, 28)


def array(dtype: str, bands: int) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return RNG.normal(0, 300, (*SIDES, bands)).astype(dtype)
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, (*SIDES, bands), dtype=dtype, endpoint=True)


def png16(pixels: np.ndarray) -> bytes:
    """[H, W, C] uint16 as PNG. Pillow cannot write 16-bit colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    about = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = chunk(b"IHDR", about), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    """[H, W, C] as TIFF."""
    file = io.BytesIO()
    bands = pixels.shape[2]
    if bands > 1:
        options = {"planarconfig": "contig", **options}
    if options.get("planarconfig") == "separate":
        pixels = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    tifffile.imwrite(file, pixels if bands > 1 else pixels[:, :, 0], photometric="minisblack", **options)
    return file.getvalue()


TIFFS = {
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (16, 16)},
    "planar": {"planarconfig": "separate"},
    "big": {"bigtiff": True},
    "big-endian": {"byteorder": ">"},
    "compressed": {"compression": "lzw", "predictor": True},
}


def values(data: bytes, dtype: str, channels: int, **options: object) -> np.ndarray:
    made = decode(data, PixelFormat(channels=channels, dtype=dtype, **options))
    assert isinstance(made, torch.Tensor)
    return made.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("bands", [1, 3, 4, 13])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float16", "float32"])
def test_arrays_keep_their_values(dtype: str, bands: int) -> None:
    pixels = array(dtype, bands)
    assert np.array_equal(values(zoo.npy(pixels), dtype, bands), pixels)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
@pytest.mark.parametrize("kind", TIFFS)
def test_tiffs_keep_their_values(kind: str, dtype: str, bands: int) -> None:
    pixels = array(dtype, bands)
    if kind == "planar" and bands == 1:
        pytest.skip("one band has no planes")
    data = tiff(pixels, **TIFFS[kind])
    header = read_header(data)
    assert (header.height, header.width) == SIDES
    assert np.array_equal(values(data, dtype, bands), pixels)


def test_pillow_logs_no_warnings_about_many_bands(caplog: pytest.LogCaptureFixture) -> None:
    values(tiff(array("uint16", 13)), "uint16", 13)
    assert not caplog.messages


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_its_values(channels: int) -> None:
    pixels = array("uint16", channels)
    found = values(png16(pixels), "uint16", {2: 1, 4: 3}.get(channels, channels))
    assert np.array_equal(found, pixels[:, :, : found.shape[2]])  # transparency is dropped
    assert np.array_equal(values(png16(pixels), "uint16", channels, bands=tuple(range(1, channels + 1))), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_pgm_and_ppm_keep_their_values(channels: int) -> None:
    pixels = array("uint16", channels) % 4096
    kind = 6 if channels == 3 else 5
    header = f"P{kind}\n# made by hand\n{SIDES[1]} {SIDES[0]}\n4095\n".encode()
    data = header + pixels.astype(">u2").tobytes()
    assert stored_dtype(data) == "uint16"
    assert np.array_equal(values(data, "uint16", channels), pixels)
    text = header.replace(b"P%d" % kind, b"P%d" % (kind - 3)) + " ".join(map(str, pixels.ravel())).encode()
    with pytest.raises(BadImage, match="16-bit pixels as text"):
        values(text, "uint16", channels)
    small = values(b"P5 2 1 255\n\x01\x02", "uint8", 1, bands=(1,))
    assert small.ravel().tolist() == [1, 2]


def test_bands_are_selected_in_the_given_order() -> None:
    pixels = array("uint16", 13)
    found = values(zoo.npy(pixels), "uint16", 4, bands=(3, 2, 1, 7))
    assert np.array_equal(found, pixels[:, :, [2, 1, 0, 6]])
    with pytest.raises(BadImage, match="13 bands, but band 14"):
        values(zoo.npy(pixels), "uint16", 1, bands=(14,))
    with pytest.raises(BadImage, match="13 bands, expected 4"):
        values(zoo.npy(pixels), "uint16", 4)
    with pytest.raises(BadImage, match="4 bands, expected 3"):  # the fourth may be infrared
        values(zoo.npy(pixels[:, :, :4]), "uint16", 3)


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [
        ("uint8", "uint16", True), ("uint8", "float32", True), ("uint16", "float32", True),
        ("float64", "float32", True), ("int16", "uint16", False), ("uint16", "int16", False),
        ("float32", "uint16", False), ("uint16", "uint8", False),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_the_dtype_are_refused(found: str, wanted: str, fits: bool) -> None:
    pixels = array(found, 2)
    if fits:
        made = values(zoo.npy(pixels), wanted, 2)
        assert made.dtype == wanted
        assert np.array_equal(made, pixels.astype(wanted))
        return
    with pytest.raises(BadImage, match=f"{found} pixels, expected {wanted}"):
        values(zoo.npy(pixels), wanted, 2, bands=(1, 2))


def test_8_bit_images_are_accepted_for_a_16_bit_dtype() -> None:
    photo = Image.fromarray(zoo.photo())
    grey = photo.convert("L")
    found = values(zoo.encoded(np.asarray(grey), "PNG"), "uint16", 1)
    assert np.array_equal(found[:, :, 0], np.asarray(grey))
    colour = values(zoo.encoded(zoo.photo(), "PNG"), "uint16", 1)
    assert np.abs(colour[:, :, 0].astype(int) - np.asarray(grey)).max() <= 1
    assert np.array_equal(values(zoo.encoded(np.asarray(grey), "PNG"), "uint16", 3), found.repeat(3, axis=2))


def test_missing_values_stay_missing_after_clipping() -> None:
    pixels = np.array([[[-999.0, 5], [50, np.nan], [2000, 7]]], np.float32)
    found = values(zoo.npy(pixels), "float32", 2, clip=((0, 1000),), nodata=-999.0)
    assert np.array_equal(found, [[[-999, 5], [50, np.nan], [1000, 7]]], equal_nan=True)
    each = values(zoo.npy(pixels), "float32", 2, clip=((0, 1000), (6, 6.5)), nodata=-999.0)
    assert np.array_equal(each, [[[-999, 6], [50, np.nan], [1000, 6.5]]], equal_nan=True)


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [("float32", 2e5, "float16"), ("float64", 1e300, "float32"), ("float32", np.inf, "float32"),
     ("float16", -np.inf, "float16"), ("uint16", 65535, "float16")],
)  # fmt: skip
def test_values_that_become_infinite_are_refused(stored: str, value: float, dtype: str) -> None:
    pixels = np.array([[1, value, 3]], stored)
    data = zoo.npy(pixels)
    with pytest.raises(BadImage, match=f"which {dtype} cannot hold"):
        values(data, dtype, 1)
    assert values(data, dtype, 1, clip=((-50, 50),)).ravel().tolist() == [1, min(max(value, -50), 50), 3]
    if np.isfinite(value):
        for clip in ((), ((0, 2000),)):
            found = values(data, dtype, 1, nodata=value, clip=clip).ravel()
            assert np.array_equal(found, [1, np.nan, 3], equal_nan=True)


def test_big_endian_arrays_are_read() -> None:
    pixels = array("uint16", 3)
    assert np.array_equal(values(zoo.npy(pixels.astype(">u2")), "uint16", 3), pixels)
    shown, expected = (decode(zoo.npy(pixels.astype(order + "u2"))) for order in "><")
    assert np.array_equal(np.asarray(shown), np.asarray(expected))


def test_images_that_decode_to_too_many_bytes_are_refused() -> None:
    file = io.BytesIO()
    options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    tifffile.imwrite(file, np.zeros((2, 5000, 60), np.uint8), **options)
    data = file.getvalue()
    with tifffile.TiffFile(io.BytesIO(data)) as small:
        place = small.pages[0].tags["ImageLength"].valueoffset
    data = data[:place] + (5000).to_bytes(2, "little") + data[place + 2 :]  # one strip, as in a compressed file
    with pytest.raises(BadImage, match="too large: 5000 x 5000 pixels of 60 bytes: 1500 MB, more than 512"):
        read_header(data)


@pytest.mark.parametrize("dtype", ["int16", "float16", "float32"])
@pytest.mark.parametrize(("nodata", "sign"), [(0, 1), (400, -1)])
def test_a_limit_equal_to_nodata_makes_no_value_missing(dtype: str, nodata: int, sign: int) -> None:
    pixels = np.array([[-7, 0, 3, 400, 900]], dtype)
    found = values(zoo.npy(pixels), dtype, 1, clip=((0, 400),), nodata=float(nodata)).ravel()
    missing = np.flatnonzero(pixels.ravel() == nodata)
    assert np.flatnonzero(found == nodata).tolist() == missing.tolist()
    beside = (
        nodata + sign
        if dtype == "int16"
        else np.nextafter(np.dtype(dtype).type(nodata), np.dtype(dtype).type(sign * 9e3))
    )
    expected = [0, 0, 3, 400, 400]
    expected[0 if sign == 1 else 4] = beside
    assert found.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.float16, torch.float32])
def test_resizing_makes_no_value_missing(dtype: torch.dtype) -> None:
    image = torch.tensor([[2, 18], [18, 2]], dtype=dtype).repeat(1, 8, 8)
    made = resized_raw(image, (4, 4), 10.0).float()
    assert (made != 10).all()
    assert (made - 10).abs().max() <= 1


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_crops_equal_torchs_bicubic_in_fp32(dtype: str) -> None:
    pixels = torch.from_numpy(array(dtype, 5)).permute(2, 0, 1)
    found = torch.from_numpy(crop_resized(pixels, (2, 3, 14, 20), (8, 8), True).copy())
    window = pixels[:, 2:16, 3:23].float()
    expected = F.interpolate(window[None], (8, 8), mode="bicubic", antialias=True)[0].clamp(window.min(), window.max())
    expected = (expected if dtype == "float32" else expected.round()).flip(2).to(pixels.dtype)
    assert torch.equal(found.permute(2, 0, 1), expected)


@pytest.mark.parametrize("nodata", [None, 0.0])
def test_missing_values_do_not_change_others(nodata: float | None) -> None:
    """A constant image stays constant where known values have most of the weight, and is missing elsewhere."""
    image = torch.full((1, 32, 32), 700.0)
    image[:, :, :16] = float("nan") if nodata is None else nodata
    made = resized_raw(image, (8, 8), nodata)
    missing = made.isnan() if nodata is None else made == nodata
    assert missing[0, :, :4].all()
    assert not missing[0, :, 4:].any()
    assert torch.equal(made[0, :, 4:], torch.full((8, 4), 700.0))
    gone = resized_raw(torch.full((1, 4, 4), float("nan") if nodata is None else nodata), (8, 8), nodata)
    assert (gone.isnan() if nodata is None else gone == nodata).all()


def test_statistics_leave_missing_values_out() -> None:
    images = [torch.from_numpy(array("int16", 3)).permute(2, 0, 1).clone() for _ in range(3)]
    for image in images:
        image[0, :5] = -32768
    mean, std = statistics(images, -32768.0)
    for channel in range(3):
        known = torch.cat([image[channel][image[channel] != -32768].double() for image in images])
        assert mean[channel] == pytest.approx(known.mean().item())
        assert std[channel] == pytest.approx(known.std(unbiased=False).item())


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Images with 13 bands of 16 bits, as of Sentinel-2, in TIFF and .npy."""
    for i in range(6):
        pixels = RNG.integers(0, 4000, (40, 48, 13), dtype=np.uint16)
        if i % 2:
            np.save(tmp_path / f"{i}.npy", pixels)
        else:
            (tmp_path / f"{i}.tif").write_bytes(tiff(pixels, tile=(16, 16)))
    return tmp_path


@pytest.mark.parametrize("decoder", ["pil", "dali"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_dtype_and_the_bands(scenes: Path, workers: int, decoder: str) -> None:
    options = {"size": (16, 16), "channels": 4, "dtype": "uint16", "bands": (4, 3, 2, 8), "num_workers": workers}
    source = open_source(scenes)
    batch = next(training_batches(source, batch_size=6, decoder=decoder, **options))
    assert (batch.images.dtype, batch.images.shape) == (torch.uint16, (6, 16, 16, 4))
    assert batch.images.int().max() > 255
    (held_out,) = evaluation_batches(source, batch_size=6, **options)
    assert (held_out.images.dtype, held_out.images.shape) == (torch.uint16, (6, 16, 16, 4))
    stored = np.load(scenes / "1.npy")[:, :, [3, 2, 1, 7]]
    (whole,) = evaluation_batches(source, **{**options, "size": (40, 48)}, batch_size=6, crop_pct=1.0)
    assert np.array_equal(whole.images[1].numpy(), stored)  # not resized, because the size is that of the image


def test_float_images_in_an_8_bit_format_are_refused() -> None:
    with pytest.raises(BadImage, match="float32 pixels"):
        decode(zoo.npy(array("float32", 3)))
    picture = io.BytesIO()
    Image.fromarray(array("float32", 1)[:, :, 0]).save(picture, "TIFF")
    with pytest.raises(BadImage, match="black and white"):
        decode(picture.getvalue())
    assert values(picture.getvalue(), "float32", 1).dtype == np.float32


def pages(*arrays: np.ndarray, **options: object) -> bytes:
    """A TIFF with one page for each array."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in arrays:
            writer.write(page, photometric="minisblack", metadata=None, **options)
    return file.getvalue()


def pillow_pages(*arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    first, *rest = map(Image.fromarray, arrays)
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("made", [pages, pillow_pages], ids=["tifffile", "Pillow"])
def test_pages_are_bands_on_request(dtype: str, made: Callable[..., bytes]) -> None:
    pixels = array(dtype, 4)
    data = made(*np.moveaxis(pixels, 2, 0))
    assert np.array_equal(values(data, dtype, 4), pixels)
    assert np.array_equal(values(data, dtype, 2, bands=(4, 1)), pixels[:, :, [3, 0]])
    assert np.array_equal(values(data, dtype, 1, bands=(2,)), pixels[:, :, [1]])
    for channels in (1, 3):
        with pytest.raises(BadImage, match="4 pages of 20 x 28 pixels: --bands 1,2,3"):
            values(data, dtype, channels)
    with pytest.raises(BadImage, match="4 bands, but band 5"):
        values(data, dtype, 1, bands=(5,))


def test_three_pages_are_not_read_as_rgb() -> None:
    data = pages(*np.moveaxis(array("uint16", 3), 2, 0))
    for dtype in ("uint8", "uint16"):
        with pytest.raises(BadImage, match="3 pages"):
            values(data, dtype, 3)


def test_channels_of_ome_tiff_are_bands() -> None:
    pixels, found = array("uint16", 4), {}
    for axes in ("CYX", "ZYX"):
        file = io.BytesIO()
        planes = np.moveaxis(pixels, 2, 0)
        tifffile.imwrite(file, planes, ome=True, photometric="minisblack", metadata={"axes": axes})
        found[axes] = read_header(file.getvalue()).pages
        assert np.array_equal(values(file.getvalue(), "uint16", 4), pixels)
    assert found == {"CYX": 1, "ZYX": 4}


def test_pages_of_other_sizes_are_refused_but_overviews_are_ignored() -> None:
    page = array("uint16", 1)[:, :, 0]
    for options in ({"channels": 1}, {"channels": 2, "bands": (1, 2)}):
        with pytest.raises(BadImage, match="2 pages of different sizes"):
            values(pages(page, page[:10]), "uint16", **options)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(page, photometric="minisblack", metadata=None)
        writer.write(page[::2, ::2], photometric="minisblack", metadata=None, subfiletype=1)
    assert np.array_equal(values(file.getvalue(), "uint16", 1)[:, :, 0], page)
    assert values(file.getvalue(), "uint16", 3).shape == (*SIDES, 3)


def pillow_tiff(image: Image.Image, **tags: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "TIFF", **({"tiffinfo": {0x0112: tags["orientation"]}} if tags else {}))
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "L", "RGB"])
def test_8_bit_tiffs_are_converted_as_by_pillow(mode: str) -> None:
    image = Image.fromarray(zoo.photo()).convert(mode)
    data = pillow_tiff(image)
    assert stored_dtype(data) == "uint8"
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(values(data, "uint16", 3), expected)
    if mode == "P":
        assert np.array_equal(values(data, "uint8", 2, bands=(3, 1)), expected[:, :, [2, 0]])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int16"])
def test_tiffs_whose_smaller_values_are_brighter_are_inverted(dtype: str) -> None:
    pixels = array("int16", 1)[:, :, 0].astype(dtype)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="miniswhite")
    found = values(file.getvalue(), dtype.replace("bool", "uint8"), 1, bands=(1,))[:, :, 0]
    expected = np.where(pixels, 0, 255) if dtype == "bool" else ~pixels
    assert np.array_equal(found, expected)
    if dtype == "uint16":
        shown = np.asarray(decode(file.getvalue(), PixelFormat(channels=1)))
        assert np.abs(shown - expected / 257).max() <= 0.5
        file = io.BytesIO()
        tifffile.imwrite(file, pixels.astype(np.float32), photometric="miniswhite")
        with pytest.raises(BadImage, match="smaller values are brighter"):
            values(file.getvalue(), "float32", 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bands", [1, 5])
def test_the_orientation_of_tiffs_is_applied(bands: int, orientation: int) -> None:
    pixels = array("uint16", bands)
    data = tiff(pixels, extratags=[(0x0112, 3, 1, orientation, True)])
    with Image.open(io.BytesIO(pillow_tiff(Image.fromarray(pixels[:, :, 0]), orientation=orientation))) as image:
        expected = np.asarray(image)
    header = read_header(data)
    assert (header.height, header.width) == expected.shape
    assert np.array_equal(values(data, "uint16", bands)[:, :, 0], expected)


def test_pages_of_palette_indices_are_refused() -> None:
    file = io.BytesIO()
    page = Image.fromarray(zoo.photo()).convert("P")
    page.save(file, "TIFF", save_all=True, append_images=[page])
    with pytest.raises(BadImage, match="pages of palette indices"):
        values(file.getvalue(), "uint8", 2, bands=(1, 2))


def test_frames_of_dicom_are_bands_on_request() -> None:
    file = pydicom.dcmread(get_testdata_file("rtdose.dcm"))
    stored, data = file.pixel_array, dicom("rtdose.dcm")
    frames = len(stored)
    found = values(data, "float32", 2, bands=(1, frames))
    assert np.array_equal(found[:, :, 1], values(data, "float32", frames)[:, :, -1])
    assert np.array_equal(found[:, :, 0], stored[0])
    with pytest.raises(BadImage, match=f"{frames} pages"):
        values(data, "float32", 1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations_are_read_as_their_first_frame(kind: str) -> None:
    frames = [Image.fromarray(np.full((20, 28, 3), shade, np.uint8)) for shade in (40, 200)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    found = decode(file.getvalue())
    assert abs(int(np.asarray(found).mean()) - 40) <= 2


def dicom(name: str, **changes: object) -> bytes:
    """A sample of pydicom with changed attributes."""
    file = pydicom.dcmread(get_testdata_file(name))
    for attribute, value in changes.items():
        setattr(file, attribute, value)
    out = io.BytesIO()
    file.save_as(out)
    return out.getvalue()


def test_computed_tomography_is_in_hounsfield_units() -> None:
    stored = pydicom.dcmread(get_testdata_file("CT_small.dcm")).pixel_array
    data = dicom("CT_small.dcm")
    assert (read_header(data).height, read_header(data).width, read_header(data).format) == (128, 128, "DICOM")
    assert np.array_equal(values(data, "int16", 1)[:, :, 0], stored - 1024)
    halves = values(dicom("CT_small.dcm", RescaleSlope="0.5"), "float32", 1)
    assert np.array_equal(halves[:, :, 0], (stored * 0.5 - 1024).astype(np.float32))
    with pytest.raises(BadImage, match="int16 pixels, expected uint16"):
        values(data, "uint16", 1)


def rescaling(slope: int, intercept: int) -> pydicom.Dataset:
    """A functional group, as in enhanced files."""
    group, transformation = pydicom.Dataset(), pydicom.Dataset()
    transformation.RescaleSlope, transformation.RescaleIntercept = str(slope), str(intercept)
    transformation.RescaleType = "HU"
    group.PixelValueTransformationSequence = pydicom.Sequence([transformation])
    return group


def test_rescaling_of_enhanced_dicom_is_read_from_groups() -> None:
    stored = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array.astype(np.int64)
    shared = dicom("MR_small.dcm", SharedFunctionalGroupsSequence=pydicom.Sequence([rescaling(2, -1000)]))
    assert np.array_equal(values(shared, "int16", 1)[:, :, 0], 2 * stored - 1000)
    frames = pydicom.Sequence([rescaling(1, 0), rescaling(3, 5)])
    pixels = np.stack([stored, stored + 1]).astype(np.int16).tobytes()
    changes = {"NumberOfFrames": 2, "PixelData": pixels, "PerFrameFunctionalGroupsSequence": frames}
    found = values(dicom("MR_small.dcm", **changes), "int16", 2)
    assert np.array_equal(found[:, :, 0], stored)
    assert np.array_equal(found[:, :, 1], 3 * (stored + 1) + 5)
    frames[0] = pydicom.Dataset()
    with pytest.raises(BadImage, match="some of its frames have no rescale slope"):
        values(dicom("MR_small.dcm", **changes), "int16", 2)
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4, 0, 16], "US", b"12345678"
    with pytest.raises(BadImage, match="ModalityLUTSequence"):
        values(dicom("MR_small.dcm", ModalityLUTSequence=pydicom.Sequence([table])), "int16", 1)


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm"])
def test_compressed_dicom_equals_uncompressed(name: str) -> None:
    plain = values(dicom("MR_small.dcm"), "int16", 1)
    assert plain.max() > 255
    assert np.array_equal(values(dicom(name), "int16", 1), plain)


def test_monochrome1_is_inverted() -> None:
    """In MONOCHROME1, the smallest stored value is white."""
    stored = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    data = dicom("MR_small.dcm", PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(values(data, "int16", 1)[:, :, 0], -1 - stored)
    unsigned = dicom("MR_small.dcm", PhotometricInterpretation="MONOCHROME1", PixelRepresentation=0, BitsStored=12)
    assert np.array_equal(values(unsigned, "uint16", 1)[:, :, 0], 4095 - stored)


def test_colour_dicom_is_rgb() -> None:
    for name in ("examples_rgb_color.dcm", "examples_palette.dcm"):
        data = dicom(name)
        found = values(data, "uint16", 3)
        assert found.shape[2] == 3
        assert len({found[:, :, i].mean() for i in range(3)}) == 3


def test_the_hint_recognises_an_array_written_as_pages() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((64, 48, 8), np.uint16))
    message = "64 pages of 48 x 8 pixels: .*8 bands, .*planarconfig='contig'"
    with pytest.raises(BadImage, match=message):
        values(file.getvalue(), "uint16", 8)
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((64, 48, 8), np.uint16), planarconfig="contig")
    assert values(file.getvalue(), "uint16", 8).shape == (64, 48, 8)


def test_band_numbers_may_be_ranges() -> None:
    assert band_numbers("bands", "1-4,7") == (1, 2, 3, 4, 7)
    assert band_numbers("bands", "2-2, 1") == (2, 1)
    for wrong in ("3-1", "0-2", "1-", "-2", "1-2-3"):
        with pytest.raises(UserError, match="such as 4,3,2 or 1-4,7"):
            band_numbers("bands", wrong)
