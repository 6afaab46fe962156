"""Files of other programs: all values equal those of tifffile, pydicom and scikit-image."""

import io
import itertools
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder

from mae_fast.data.decode import BadImage, decode, read_header
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.raw import stored_dtype

SIDES = (40, 56)
DICOM = sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))
GEO = (  # code, dtype, count, value: scale, tie point, projection (EPSG:32633) and GDAL's value of missing pixels
    (33550, "d", 3, (10.0, 10.0, 0.0), True),
    (33922, "d", 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0), True),
    (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True),
    (42113, "s", 2, "0", True),
)
COMPRESSIONS = (None, "lzw", "deflate", "zstd", "packbits", "lzma")


def all_bands(data: bytes, dtype: str) -> np.ndarray:
    """[H, W, C], the bands of all pages."""
    bands = tuple(range(1, read_header(data).bands + 1))
    made = decode(data, PixelFormat(channels=len(bands), dtype=dtype, bands=bands))
    assert isinstance(made, torch.Tensor)
    return made.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("bands", [1, 3, 4, 13])
def test_geotiffs_of_all_layouts_and_compressions_equal_tifffile(dtype: str, bands: int) -> None:
    layouts = ("contig", "separate") if bands > 1 else ("contig",)
    pixels = np.random.default_rng(bands).integers(0, 250, (*SIDES, bands)).astype(dtype)
    for layout, tile, big, compression in itertools.product(layouts, (None, (16, 32)), (False, True), COMPRESSIONS):
        file = io.BytesIO()
        written = np.moveaxis(pixels, 2, 0) if layout == "separate" else pixels
        predictor = compression in ("lzw", "deflate")
        tifffile.imwrite(
            file, written if bands > 1 else pixels[:, :, 0], bigtiff=big, tile=tile, compression=compression,
            photometric="minisblack", planarconfig=layout if bands > 1 else None, predictor=predictor or None,
            extratags=GEO, metadata=None,
        )  # fmt: skip
        assert tifffile.TiffFile(io.BytesIO(file.getvalue())).pages[0].is_geotiff
        header = read_header(file.getvalue())
        assert (header.height, header.width, header.bands, header.pages) == (*SIDES, bands, 1)
        assert np.array_equal(all_bands(file.getvalue(), dtype), pixels), (layout, tile, big, compression)


def test_all_samples_of_pydicom_equal_pydicom() -> None:
    """In physical units. Samples that pydicom cannot read are bad images."""
    read = 0
    for path in DICOM:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                file = pydicom.dcmread(io.BytesIO(data))
                palette = file.PhotometricInterpretation == "PALETTE COLOR"
                expected = (apply_color_lut if palette else apply_modality_lut)(file.pixel_array, file)
            except Exception:  # many types
                with pytest.raises(BadImage):
                    all_bands(data, "float32")
                continue
            found = all_bands(data, "float32")
        if int(file.get("NumberOfFrames", 1) or 1) > 1:
            expected = np.moveaxis(expected, 0, 2)
        assert np.array_equal(found, expected.astype(np.float32).reshape(found.shape)), path.name
        read += 1
    assert read >= 40


def test_a_missing_decoder_of_dicom_is_named() -> None:
    path = next(path for path in DICOM if path.name == "MR_small_jpeg_ls_lossless.dcm")
    if get_decoder(pydicom.uid.JPEGLSLossless).is_available:
        pytest.skip("the decoder is installed")
    with pytest.raises(BadImage, match="unsupported: JPEG-LS Lossless Image Compression: pydicom needs another"):
        decode(path.read_bytes(), PixelFormat(channels=1, dtype="int16"))


def test_all_samples_of_scikit_image_equal_scikit_image() -> None:
    skimage = pytest.importorskip("skimage")
    from skimage.io import imread

    read = 0
    for path in sorted((Path(skimage.__file__).parent / "data").iterdir()):
        if path.suffix not in (".png", ".jpg", ".tif"):
            continue
        expected, data = imread(path), path.read_bytes()
        if path.suffix == ".tif":  # scikit-image has pages first
            expected = np.moveaxis(expected, 0, 2)
        found = all_bands(data, stored_dtype(data))
        if found.dtype == np.uint16 and expected.dtype == np.uint8:  # Pillow keeps the upper byte of 16-bit colour
            found = found >> 8
        if path.suffix == ".jpg":  # decoders of JPEG round differently
            assert np.abs(found.astype(int) - expected).max() <= 3, path.name
        else:
            assert np.array_equal(found, expected.astype(found.dtype).reshape(found.shape)), path.name
        read += 1
    assert read >= 20
