"""Segmentation of 16-bit images with many bands, from pre-training to the evaluation of a run."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_fast import api
from mae_fast.data.decode import BadImage
from mae_fast.data.loader import LoaderConfig
from mae_fast.data.preprocessing import Preprocessing
from mae_fast.data.segmentation import colours, open_segmentation, scaled
from mae_fast.errors import UserError
from mae_fast.training.config import SEGMENT_PRESETS, DetectConfig, SegmentConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.tasks.detect import detect
from mae_fast.training.tasks.segment import Segmentation
from mae_fast.weights.run_reader import find_checkpoint

ALONE = DistContext(torch.device("cpu"))
RNG = np.random.default_rng(0)
BANDS, NODATA = 7, 60000
LOADING: dict[str, Any] = {"num_workers": 0, "device": "cpu", "dtype": "fp32", "lr": 2e-3, "warmup_epochs": 0}
SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
HEAD: dict[str, Any] = {"preset": "tiny", "head_channels": 8, "batch_size": 4, "drop_path": 0.0, **LOADING}


def rectangles(height: int, width: int) -> np.ndarray:
    """A mask of two classes."""
    mask = np.zeros((height, width), np.uint8)
    top, left = RNG.integers(0, height // 2), RNG.integers(0, width // 2)
    mask[top : top + height // 2, left : left + width // 2] = 1
    return mask


def write_pairs(root: Path, make: Any, counts: tuple[int, int] = (12, 4)) -> Path:
    """Write pairs of images and masks. ``make(mask)`` makes the image of a mask."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            mask = rectangles(28, 24 if i % 2 else 32)
            np.save(root / split / "images" / f"{i:02}.npy", make(mask))
            mask[:4, :4] = 255
            np.save(root / split / "masks" / f"{i:02}.npy", mask.astype(np.int64))
    return root


def many_bands(mask: np.ndarray) -> np.ndarray:
    """16-bit values from 0 to 4,000. The classes differ only in the sixth band. A corner is missing."""
    image = RNG.integers(900, 1100, (*mask.shape, BANDS)).astype(np.uint16)
    image[:, :, 5] += 1500 * mask.astype(np.uint16)
    image[:4, :4] = NODATA
    return image


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models are faster, and the results do not depend on the number of cores
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), many_bands)


@pytest.fixture(scope="module")
def pretrained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags: dict[str, Any] = {"bands": "6,3,1,2", "nodata": NODATA, "clip": "0:4000", "decoder_depth": 1, "epochs": 1}
    folder = tmp_path_factory.mktemp("pretrained")
    api.pretrain(preset="tiny", data_path=pairs / "train" / "images", output_dir=folder, patch_size="4x2",
                 input_size=20, batch_size=4, **flags, **SIZES, **LOADING)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(pairs: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmented")
    api.segment(data_path=pairs, output_dir=folder, weights=pretrained, input_size=20, epochs=12, eval_every=12, **HEAD)
    return folder


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["pixel_settings"]
    return found


def task(pairs: Path, tmp_path: Path, **flags: Any) -> Segmentation:
    small = {**SEGMENT_PRESETS["tiny"], **{name: x for name, x in HEAD.items() if name != "preset"}, "input_size": 20}
    return Segmentation(SegmentConfig(data_path=pairs, output_dir=tmp_path / "new", **{**small, **flags}), ALONE)


def test_images_are_read_as_in_pre_training(pairs: Path, pretrained: Path, run: Path) -> None:
    assert recorded(run) == recorded(pretrained)
    assert (recorded(run)["bands"], recorded(run)["dtype"], recorded(run)["nodata"]) == ([6, 3, 1, 2], "uint16", NODATA)
    assert log(run)[-1]["val_miou"] > 70
    state = find_checkpoint(run).state
    preprocessing = Preprocessing.from_record(state["preprocessing"], run)
    assert preprocessing.mean == pytest.approx(recorded(run)["mean"])
    data = (pairs / "val" / "images" / "01.npy").read_bytes()
    pixels, size = preprocessing(data)
    for path in (pairs / "val" / "images" / "01.npy", str(pairs / "val" / "images" / "01.npy")):
        assert np.array_equal(preprocessing(path)[0], pixels)
    with pytest.raises(BadImage, match="No such file"):
        preprocessing(pairs / "nosuch.npy")
    _, val = open_segmentation(pairs)
    image, _ = val.pair(1, preprocessing.pixels)
    assert (pixels.dtype, pixels.shape, size) == (np.uint16, (23, 20, 4), (28, 24))
    assert np.array_equal(pixels, scaled(image, 20, NODATA))
    assert (pixels[:2, :2] == NODATA).all()


def test_an_evaluation_takes_everything_from_the_run(pairs: Path, run: Path, tmp_path: Path) -> None:
    """It takes bands, dtype, statistics and model sizes from the run. Predictions are PNGs, whatever the masks are."""
    place: dict[str, Any] = {"data_path": pairs, "output_dir": run, "num_workers": 0, "device": "cpu", "dtype": "fp32"}
    found = api.segment(eval_only=True, predictions=tmp_path / "masks", **place).metrics
    assert found == pytest.approx({name: x for name, x in log(run)[-1].items() if name in found}, rel=1e-5)
    names = sorted(path.name for path in (tmp_path / "masks").iterdir())
    assert names == ["00.png", "01.png", "02.png", "03.png", "classes.txt"]
    truth, made = np.load(pairs / "val" / "masks" / "01.npy"), np.asarray(Image.open(tmp_path / "masks" / "01.png"))
    assert (made == truth)[truth != 255].mean() > 0.8
    predicted = api.load(run, device="cpu").predict(pairs / "val" / "images" / "01.npy")
    assert np.array_equal(predicted.labels, made)
    with pytest.raises(
        UserError, match=r"--bands 1,2: the evaluated run .* has its own pixel settings; leave --bands out"
    ):
        api.segment(eval_only=True, bands="1,2", **place)


def test_a_run_on_many_bands_is_resumed(
    pairs: Path, pretrained: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    copy = shutil.copytree(run, tmp_path / "copy")
    flags: dict[str, Any] = {"data_path": pairs, "output_dir": copy, "input_size": 20, "eval_every": 12, **HEAD}
    again = api.segment(weights=pretrained, epochs=12, **flags)
    assert again.step == 36
    assert "pixels of" not in caplog.text


def test_without_weights_the_pixels_follow_from_flags_and_images(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = task(pairs, tmp_path, bands="6,1", nodata=NODATA, **SIZES)
    assert "no colour jitter: it supports only 8-bit images" in caplog.text
    assert (made.pixels.dtype, made.pixels.channels, made.model.net.in_chans) == ("uint16", 2, 2)
    bands = np.concatenate([np.load(path)[:, :, 0].ravel() for path in (pairs / "train" / "images").iterdir()])
    assert made.model.net.pixel_mean[1] == pytest.approx(bands[bands != NODATA].mean(), rel=1e-5)
    batch = next(made.batches(made.source, LoaderConfig(size=made.size, batch_size=12, pixels=made.pixels)))
    beyond = batch.images[:, -1][batch.labels[:, -1] == 255].int()
    assert len(beyond)
    assert (beyond == made.model.net.pixel_mean.round().int()).all()  # 0 for the encoder


def test_pictures_show_the_first_bands(pairs: Path, pretrained: Path, tmp_path: Path) -> None:
    """Black and white are the limits of --clip. Missing pixels are grey. One or two bands give a grey picture."""
    made = task(pairs, tmp_path, weights=str(pretrained), input_size=28)
    draw = made.drawing()
    assert draw
    picture = np.asarray(draw())
    factor = picture.shape[0] // (4 * 28)
    picture = picture[::factor, ::factor]
    image, mask = made.val.pair(0, made.pixels)
    centred = image[:3, :, 2:30].permute(1, 2, 0).numpy()
    known = (centred != NODATA).all(-1)
    assert np.abs(picture[:28, :28][known] - centred[known] / 4000 * 255).max() <= 1
    assert np.abs(picture[:28, :28][~known].astype(int) - 128).max() <= 1
    assert np.array_equal(picture[:28, 28:56], colours(torch.from_numpy(mask[:, 2:30].copy())))
    grey = np.asarray(task(pairs, tmp_path, bands="1,2", nodata=NODATA, **SIZES).drawing()())
    assert (grey[:, : grey.shape[1] // 3, :1] == grey[:, : grey.shape[1] // 3]).all()


def test_16_bits_separate_classes_that_8_bits_do_not(tmp_path: Path) -> None:
    """The classes differ by a fifth of an 8-bit grey level."""

    def faint(mask: np.ndarray) -> np.ndarray:
        return (30040 + 50 * mask.astype(np.uint16) + RNG.integers(0, 10, mask.shape, dtype=np.uint16))[:, :, None]

    pairs = write_pairs(tmp_path / "pairs", faint)
    scores = {}
    for pixels in ("uint16", "uint8"):
        stats = {} if pixels == "uint16" else {"mean": 0.46, "std": 0.1}  # the measured std would be 0
        made = api.segment(data_path=pairs, output_dir=tmp_path / pixels, in_chans=1, pixels=pixels, input_size=20,
                           epochs=10, model="vit_tiny_patch4", eval_every=10, **stats, **SIZES, **HEAD)  # fmt: skip
        scores[pixels] = made.metrics["val_miou"]
    assert scores["uint16"] > 65
    assert scores["uint8"] < 45


@pytest.mark.parametrize("flag", [{"bands": "1,2,3"}, {"in_chans": 1}, {"nodata": 0}, {"pixels": "uint16"}])
def test_detection_reads_only_8_bit_rgb(tmp_path: Path, flag: dict[str, Any]) -> None:
    config = DetectConfig(data_path=tmp_path, output_dir=tmp_path / "run", num_workers=0, **flag)
    with pytest.raises(UserError, match=f"--{next(iter(flag)).replace('_', '-')}: detection reads 8-bit RGB; leave it"):
        detect(config)


def test_detection_refuses_weights_of_other_images(tmp_path: Path, pretrained: Path) -> None:
    config = DetectConfig(data_path=tmp_path, output_dir=tmp_path / "run", weights=str(pretrained), num_workers=0)
    with pytest.raises(UserError, match="are for uint16 images of 4 channels: detection reads 8-bit RGB"):
        detect(config)
