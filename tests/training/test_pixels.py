"""Runs on images of any dtype and bands with models of any size, and the use of their weights by other verbs."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_fast import api
from mae_fast.data.decode import decode
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError
from mae_fast.evaluation.images import preprocessing_of
from mae_fast.training import pixels as pixels_module
from mae_fast.training.config import FinetuneConfig, PretrainConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.pixels import settle_pixels, settle_sizes
from mae_fast.training.tasks.classify import Finetuning
from mae_fast.weights.convert_files import convert_files
from mae_fast.weights.create import create_model, load_encoder
from mae_fast.weights.trained import build_classifier

RNG = np.random.default_rng(0)
BANDS = 5
SHORT = {"epochs": 2, "warmup_epochs": 0, "batch_size": 8, "num_workers": 0, "lr": 1e-3, "device": "cpu"}
NODATA = 60000


def scene(label: int) -> np.ndarray:
    """Values from 0 to 4,000. The second band differs between the classes. A corner is missing."""
    pixels = RNG.integers(900, 1100, (40, 48, BANDS)).astype(np.uint16)
    pixels[:, :, 1] += 1500 * label
    pixels[:4, :4] = NODATA
    return pixels


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("bare", "green")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                np.save(folder / split / name / f"{i}.npy", scene(label))
    return folder


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    flags: dict[str, Any] = {"bands": "4,2,1", "nodata": NODATA, "clip": "0:2600", "depth": 1, "decoder_depth": 1}
    api.pretrain(preset="tiny", data_path=scenes, output_dir=folder, patch_size="8x4", embed_dim=96, num_heads=3,
                 mlp_ratio=2, img_size="32x48", **flags, **SHORT)  # fmt: skip
    return folder


def config(scenes: Path, tmp_path: Path, **flags: Any) -> PretrainConfig:
    return PretrainConfig.with_preset("tiny", data_path=scenes, output_dir=tmp_path / "new", **flags)


def settled(scenes: Path, tmp_path: Path, start: str | None = None, **flags: Any) -> Any:
    return settle_pixels(config(scenes, tmp_path, **flags), open_source(scenes, "train"), start)


def known(scenes: Path, band: int) -> np.ndarray:
    values = np.stack([np.load(path)[:, :, band] for path in sorted((scenes / "train").rglob("*.npy"))])
    return values[values != NODATA].astype(float)


def test_the_run_records_its_pixels_and_the_models_sizes(scenes: Path, run: Path) -> None:
    recorded = json.loads((run / "config.json").read_text())["pixel_settings"]
    assert recorded.pop("mean") == pytest.approx([known(scenes, band).mean() for band in (3, 1, 0)], rel=1e-5)
    assert recorded.pop("std") == pytest.approx([known(scenes, band).std() for band in (3, 1, 0)], rel=1e-5)
    assert recorded == {"channels": 3, "dtype": "uint16", "bands": [4, 2, 1], "clip": [[0, 2600]], "nodata": NODATA}
    loaded = load_encoder(run)
    pixels = PixelFormat(dtype="uint16", bands=(4, 2, 1), clip=((0, 2600),), nodata=NODATA)
    assert preprocessing_of(loaded).pixels == pixels
    model = loaded.model
    assert (model.patch_embed.patch_size, model.patch_embed.img_size) == ((8, 4), (32, 48))
    assert (len(model.blocks), model.blocks[0].attn.num_heads, model.blocks[0].mlp.fc1.out_features) == (1, 3, 192)
    assert model.nodata == NODATA
    assert model.pixel_mean.tolist() == pytest.approx([known(scenes, band).mean() for band in (3, 1, 0)], rel=1e-5)


def test_a_resumed_run_keeps_its_statistics(scenes: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    flags: dict[str, Any] = {"bands": "4,2,1", "nodata": NODATA, "clip": "0:2600", "depth": 1, "decoder_depth": 1}
    made = api.pretrain(preset="tiny", data_path=scenes, output_dir=run, patch_size="8x4", embed_dim=96, num_heads=3,
                        mlp_ratio=2, img_size="32x48", **flags, **SHORT)  # fmt: skip
    assert made.step == 6
    assert "pixels of" not in caplog.text
    with pytest.raises(UserError, match="bands: '4,2,1' in the run, '4,2,3' now"):
        api.pretrain(preset="tiny", data_path=scenes, output_dir=run, patch_size="8x4", embed_dim=96, num_heads=3,
                     mlp_ratio=2, img_size="32x48", **{**flags, "bands": "4,2,3"}, **SHORT)  # fmt: skip


def test_fine_tuning_reads_images_as_pre_training_did(scenes: Path, run: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"img_size": "32x48", **SHORT, "epochs": 8}
    made = api.finetune(preset="tiny", data_path=scenes, output_dir=tmp_path / "tuned", weights=run, **flags)
    assert made.metrics["val_acc1"] == 100
    recorded = [json.loads((x / "config.json").read_text())["pixel_settings"] for x in (run, tmp_path / "tuned")]
    assert recorded[0] == recorded[1]
    place = {"data_path": scenes, "output_dir": tmp_path / "tuned", "num_workers": 0, "device": "cpu"}
    evaluated = api.finetune(preset="tiny", eval_only=True, img_size="32x48", **place)
    assert evaluated.metrics["val_acc1"] == 100
    assert api.knn(run, data_path=scenes, device="cpu") is not None


def test_a_new_run_takes_the_pixels_that_a_file_of_weights_records(scenes: Path, run: Path, tmp_path: Path) -> None:
    """Without flags, the recorded statistics are used. For pixels of another dtype, they are measured."""
    assert convert_files(run, tmp_path / "x.safetensors", "ours")
    start = str(tmp_path / "x.safetensors")
    found = settled(scenes, tmp_path, start)
    model = load_encoder(start).model
    assert found.format == PixelFormat(dtype="uint16", bands=(4, 2, 1), clip=((0, 2600),), nodata=NODATA)
    assert found.mean == pytest.approx(model.pixel_mean.tolist(), rel=1e-6)
    assert found.std == pytest.approx(model.pixel_std.tolist(), rel=1e-6)
    (tmp_path / "photos").mkdir()
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "photos" / "x.png")
    bytes_ = settled(tmp_path / "photos", tmp_path, start, pixels="uint8", bands="1,2,3")
    assert bytes_.format == PixelFormat(bands=(1, 2, 3))
    made = create_model("mae_vit_tiny_patch4", start, **settle_sizes(config(scenes, tmp_path), str(run)),
                        img_size=(32, 48), decoder_depth=1, **bytes_.arguments())  # fmt: skip
    assert made.pixel_dtype == "uint8"
    assert max(made.pixel_mean.tolist()) < 1


@pytest.mark.parametrize("bands", ["5,3,2", "1,2"])
def test_limits_of_other_bands_are_not_inherited(
    scenes: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, bands: str
) -> None:
    assert settled(scenes, tmp_path, str(run), bands=bands).format.clip == ((0, 2600),)  # the same for all channels
    about = json.loads((run / "config.json").read_text())
    about["pixel_settings"]["clip"] = [[0, 2600], [900, 1000], [0, 1000]]
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    assert len(settled(scenes, tmp_path, str(tmp_path / "run"), mean="auto").format.clip) == 3
    assert "values are not clipped" not in caplog.text
    found = settled(scenes, tmp_path, str(tmp_path / "run"), bands=bands)
    expected = [known(scenes, int(band) - 1) for band in bands.split(",")]
    assert found.format.clip == ()
    assert found.mean == pytest.approx([x.mean() for x in expected], rel=1e-5)
    assert found.std == pytest.approx([x.std() for x in expected], rel=1e-5)
    assert "values are not clipped" in caplog.text
    with pytest.raises(UserError, match="--in-chans 1, but the weights were trained on bands 4,2,1; add --bands"):
        settled(scenes, tmp_path, str(tmp_path / "run"), in_chans=1)


def test_without_flags_16_bits_are_kept_and_measured(scenes: Path, tmp_path: Path) -> None:
    found = settled(scenes, tmp_path, in_chans=BANDS, nodata=NODATA)
    assert found.format == PixelFormat(channels=BANDS, dtype="uint16", nodata=NODATA)
    assert found.mean == pytest.approx([known(scenes, band).mean() for band in range(BANDS)], rel=1e-5)
    assert found.std == pytest.approx([known(scenes, band).std() for band in range(BANDS)], rel=1e-5)
    given = settled(scenes, tmp_path, in_chans=BANDS, mean="1000", std=[1, 2, 3, 4, 5])
    assert (given.mean, given.std) == ((1000.0,) * BANDS, (1.0, 2.0, 3.0, 4.0, 5.0))


def test_pictures_of_8_bits_keep_the_models_statistics(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    found = settled(tmp_path, tmp_path)
    assert (found.format, found.mean, found.record()) == (PixelFormat(), None, {})
    measured = settled(tmp_path, tmp_path, mean="auto")
    pixels = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(3)]) / 255
    assert measured.mean == pytest.approx(pixels.mean((0, 1, 2)), rel=1e-5)
    assert measured.std == pytest.approx(pixels.std((0, 1, 2)), rel=1e-5)
    np.save(tmp_path / "x.npy", np.ones((40, 40, 3), np.uint16))
    assert settled(tmp_path, tmp_path).format.dtype == "uint8"  # as by Pillow


def test_images_of_several_dtypes_become_floats(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((40, 40, 3), 50000, np.uint16))
    np.save(tmp_path / "y.npy", np.full((40, 40, 3), -5, np.int16))
    found = settled(tmp_path, tmp_path)
    assert (found.format.dtype, found.mean) == ("float32", pytest.approx([24997.5] * 3))


def test_limits_may_be_percentiles_of_each_channel(scenes: Path, tmp_path: Path) -> None:
    found = settled(scenes, tmp_path, bands="2,1", nodata=NODATA, clip="10%:90%")
    expected = [np.percentile(known(scenes, band), (10, 90)) for band in (1, 0)]
    assert np.allclose(found.format.clip, expected, atol=3)
    for channel, (band, limits) in enumerate(zip((1, 0), found.format.clip, strict=True)):
        clipped = known(scenes, band).clip(*limits).astype(np.uint16)
        assert found.mean[channel] == pytest.approx(clipped.mean(), rel=1e-4)
        assert found.std[channel] == pytest.approx(clipped.std(), rel=1e-4)


def test_percentiles_of_large_images_are_those_of_all_columns(tmp_path: Path) -> None:
    """1/32 of each image, on the left, is dark."""
    images = RNG.integers(1000, 4000, (2, 1024, 1024)).astype(np.uint16)
    images[:, :, :32] = 0
    for i, image in enumerate(images):
        np.save(tmp_path / f"{i}.npy", image)
    found = settled(tmp_path, tmp_path, in_chans=1, clip="5%:95%")
    assert np.allclose(found.format.clip, np.percentile(images, (5, 95)), atol=40)
    assert found.mean[0] == pytest.approx(images.mean(), rel=0.02)
    assert found == settled(tmp_path, tmp_path, in_chans=1, clip="5%:95%")


def test_a_small_deviation_far_from_zero_is_measured_and_recorded(tmp_path: Path) -> None:
    image = (RNG.normal(0, 0.02, (40, 40)) + 3e5).astype(np.float32)  # steps of 0.03
    np.save(tmp_path / "x.npy", image)
    found = settled(tmp_path, tmp_path, in_chans=1)
    assert found.mean[0] == pytest.approx(image.mean(dtype=np.float64), abs=1e-5)
    assert found.std[0] == pytest.approx(image.std(dtype=np.float64), rel=1e-5)
    np.save(tmp_path / "x.npy", np.full((40, 40), 0.1, np.float32))
    with pytest.raises(UserError, match="channel 1 has the same value everywhere"):
        settled(tmp_path, tmp_path, in_chans=1)


def test_percentiles_and_statistics_take_one_pass(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(pixels_module, "decode", lambda data, pixels: read.append(1) or decode(data, pixels))
    settled(scenes, tmp_path, bands="2,1", nodata=NODATA, clip="10%:90%", mean="auto")
    assert len(read) == 25  # 24 for the values, and one for the check that an image is usable


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bands": "0,1"}, "--bands 0,1"),
        ({"bands": "a"}, "--bands a"),
        ({"bands": "9"}, "no image of .* can be used; first error: .*5 bands, but band 9"),
        ({"bands": "1,2", "in_chans": 3}, "--in-chans 3, but --bands 1,2 has 2"),
        ({"in_chans": BANDS, "pixels": "int16"}, "uint16 pixels, expected int16"),
        ({"in_chans": BANDS, "clip": "4000"}, "--clip 4000"),
        ({"in_chans": BANDS, "clip": "9:3"}, "--clip 9:3"),
        ({"in_chans": BANDS, "clip": "2%:198%"}, "--clip 2%:198%"),
        ({"in_chans": BANDS, "mean": "1,2"}, "--mean 1,2 is invalid; give one number for each of 5 channels"),
        ({"in_chans": BANDS, "std": "0"}, "--std 0 is invalid; give one number above 0"),
        ({"in_chans": BANDS, "mean": "x"}, "--mean x"),
        ({"in_chans": BANDS, "mean": "nan"}, "--mean nan is invalid; give finite"),
        ({"in_chans": BANDS, "mean": "1e39"}, "--mean 1e39 is invalid; give finite"),
        ({"in_chans": BANDS, "std": "inf"}, "--std inf is invalid; give finite"),
        ({"in_chans": BANDS, "nodata": 70000}, "--nodata 70000 is not a value of uint16 pixels"),
        ({"in_chans": BANDS, "nodata": -1}, "--nodata -1 is not a value of uint16 pixels"),
        ({"in_chans": BANDS, "nodata": 0.5}, "--nodata 0.5 is not a value of uint16 pixels"),
        ({"in_chans": BANDS, "clip": "60000:60001"}, "channel 1 has the same value everywhere"),
    ],
)
def test_wrong_pixel_flags_are_named(scenes: Path, tmp_path: Path, flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settled(scenes, tmp_path, **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"patch_size": "8x"}, "--patch-size 8x"),
        ({"patch_size": "5"}, "the image size must be a multiple of the patch size"),
        ({"img_size": "32x"}, "--img-size 32x"),
        ({"img_size": "32x64", "input_size": 32}, "--input-size 32 has no effect with --img-size"),
        ({"num_heads": 5}, "128"),
    ],
)
def test_wrong_sizes_are_named(scenes: Path, tmp_path: Path, flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        api.pretrain(preset="tiny", data_path=scenes, output_dir=tmp_path / "new", in_chans=BANDS, **flags, **SHORT)
    assert not (tmp_path / "new").exists()


def test_adapting_weights_of_other_channels_is_logged(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mae_fast.models.mae import build

    rgb = build("mae_vit_tiny_patch4")
    torch.save({"model": rgb.state_dict()}, tmp_path / "rgb.pth")
    place = {"data_path": scenes, "output_dir": tmp_path / "run", "init": tmp_path / "rgb.pth"}
    api.pretrain(preset="tiny", in_chans=BANDS, nodata=NODATA, **place, **{**SHORT, "epochs": 1, "lr": 1e-12})
    assert "the patch embedding of 3 channels was repeated for 5" in caplog.text
    weight = load_encoder(tmp_path / "run").model.patch_embed.proj.weight
    expected = rgb.patch_embed.proj.weight.repeat(1, 2, 1, 1)[:, :BANDS] * 3 / BANDS  # as timm adapts them
    assert torch.allclose(weight, expected, atol=1e-6)


def test_augmentation_of_pictures_is_left_out_of_other_images(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    flags: dict[str, Any] = {"data_path": scenes, "output_dir": tmp_path / "x", "in_chans": BANDS, "input_size": 32}
    base = FinetuneConfig.with_preset(None, model="vit_tiny_patch4", **flags)
    task = Finetuning(base, DistContext(torch.device("cpu")))
    assert task.config.aa is None
    assert "no RandAugment" in caplog.text
    given = FinetuneConfig.with_preset(None, model="vit_tiny_patch4", aa="rand-m9", **flags)
    with pytest.raises(UserError, match="--aa rand-m9"):
        Finetuning(given, DistContext(torch.device("cpu")))


def test_timm_models_take_other_channels(scenes: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"data_path": scenes, "output_dir": tmp_path / "x", "in_chans": BANDS, "input_size": 32}
    base = FinetuneConfig.with_preset(
        None, model="timm/vit_tiny_patch16_224", nodata=NODATA, mixup=0.0, cutmix=0.0, reprob=0.0, **flags
    )
    task = Finetuning(base, DistContext(torch.device("cpu")))
    images = torch.from_numpy(np.stack([scene(0), scene(1)])[:, :32, :32])
    found = task.prepared(images)
    assert found.shape == (2, BANDS, 32, 32)
    assert (found[:, :, :4, :4] == 0).all()  # the mean stands for missing pixels
    assert (
        build_classifier("timm/vit_tiny_patch16_224", None, 2, 32, global_pool=True, in_chans=BANDS)(found)
        .isfinite()
        .all()
    )


def test_16_bits_separate_classes_that_8_bits_do_not(tmp_path: Path) -> None:
    """The classes differ by a fifth of an 8-bit grey level."""
    for split, count in (("train", 16), ("val", 8)):
        for label, name in enumerate(("flat", "waves")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                wave = np.sin(np.arange(40) / 2)[:, None] * 55 * label
                pixels = 30050 + wave + RNG.normal(0, 10, (40, 40))
                np.save(tmp_path / split / name / f"{i}.npy", pixels.clip(29980, 30120).astype(np.uint16))
    scores = {}
    for pixels in ("uint16", "uint8"):
        run = tmp_path / pixels
        flags: dict[str, Any] = {"data_path": tmp_path, "in_chans": 1, "pixels": pixels, **SHORT}
        stats = {} if pixels == "uint16" else {"std": 0.1}  # the measured std would be 0
        api.pretrain(preset="tiny", output_dir=run, **stats, **flags)
        scores[pixels], _ = api.knn(run, data_path=tmp_path, device="cpu", k=5)
    assert scores["uint16"] == 1
    assert scores["uint8"] == 0.5


@pytest.mark.exhaustive
def test_13_bands_are_learned(tmp_path: Path) -> None:
    """A quarter of an image of slopes determines the rest. The error is far below that of the mean visible colour."""
    rows, columns = np.mgrid[-1:1:32j, -1:1:32j]
    for i in range(64):
        slope = RNG.uniform(-1, 1, 2)
        plane = (slope[0] * rows + slope[1] * columns)[:, :, None] * np.linspace(200, 800, 13)
        pixels = 1000 + plane + RNG.normal(0, 5, (32, 32, 13))
        np.save(tmp_path / f"{i:02}.npy", pixels.clip(0, 4000).astype(np.uint16))
    flags: dict[str, Any] = {**SHORT, "epochs": 60, "warmup_epochs": 2, "batch_size": 16, "lr": 2e-3}
    made = api.pretrain(preset="tiny", data_path=tmp_path, output_dir=tmp_path / "run", in_chans=13, depth=2, **flags)
    (psnrs,) = api.reconstruct(made, tmp_path, tmp_path / "shown.png", show_bands="13,7,1").values()
    assert made.metrics["train_loss"] < 0.1
    assert psnrs[0] > psnrs[1] + 6


def test_float_bands_as_many_as_rows_of_pixels_are_refused(tmp_path: Path) -> None:
    """Raw [N, H, W, C] and standardised [N, C, H, W] cannot be distinguished."""
    (tmp_path / "train").mkdir()
    for i in range(4):
        np.save(tmp_path / "train" / f"{i}.npy", RNG.normal(size=(40, 40, 32)).astype(np.float32))
    flags = {"preset": "tiny", "data_path": tmp_path, "in_chans": 32, "depth": 1, **SHORT, "batch_size": 4}
    with pytest.raises(UserError, match="32 floating-point bands and a height of 32 pixels"):
        api.pretrain(output_dir=tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()
    api.pretrain(output_dir=tmp_path / "run", img_size="28", **{**flags, "epochs": 1})
    model = load_encoder(tmp_path / "run").model
    with pytest.raises(ValueError, match="could be raw"):
        model.forward_features(torch.zeros(1, 32, 28, 32))


@pytest.mark.parametrize("kind", ["raw", "pictures"])
def test_images_of_other_bands_than_the_weights_are_refused_before_a_folder_is_made(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = build_classifier("vit_tiny_patch4", None, 2, 32, global_pool=True, in_chans=8, nodata=NODATA,
                             pixel_mean=[1000.0] * 8, pixel_std=[500.0] * 8, pixel_dtype="uint16")  # fmt: skip
    model.save_pretrained(tmp_path / "weights")
    found = 4 if kind == "raw" else 3
    for split in ("train", "val"):
        for name in "ab":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                if kind == "raw":
                    np.save(folder / f"{i}.npy", RNG.integers(0, 4000, (40, 40, found)).astype(np.uint16))
                else:
                    Image.fromarray(RNG.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(folder / f"{i}.jpg")
    place: dict[str, Any] = {"data_path": tmp_path / "images", "output_dir": tmp_path / "run"}
    place["weights"] = tmp_path / "weights"
    adapt = rf"--in-chans {found} adapts the weights, --bands 1,2,3.* selects"
    hint = f"images have {found} bands, the weights have 8: {adapt}"
    with pytest.raises(UserError, match=rf"no image of .*{found} bands, expected 8.*{hint}"):
        api.finetune(preset="tiny", **place, **SHORT)
    assert not (tmp_path / "run").exists()
    caplog.clear()
    made = api.finetune(preset="tiny", in_chans=found, **place, **{**SHORT, "epochs": 1})
    assert made.step == 1
    kept = f"pixels uint16, nodata {NODATA}"
    assert f"using the pixel settings of {tmp_path / 'weights'}: {kept}" in caplog.text
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert not [x for x in warned if "left out nodata" in x or "left out pixel_" in x]
    assert any("the patch embedding of 8 channels was repeated" in x for x in warned)


def test_a_forgotten_number_of_bands_is_named(tmp_path: Path) -> None:
    for dtype in ("uint8", "uint16"):
        (tmp_path / dtype).mkdir()
        for i in range(4):
            np.save(tmp_path / dtype / f"{i}.npy", RNG.integers(0, 200, (40, 40, 8)).astype(dtype))
        with pytest.raises(UserError, match=r"8 bands, expected 3.*; --in-chans 8 takes all bands, --bands 1,2,3"):
            api.pretrain(preset="tiny", data_path=tmp_path / dtype, output_dir=tmp_path / "run", **SHORT)
        assert not (tmp_path / "run").exists()


def test_an_ordinary_transfer_warns_of_nothing(scenes: Path, run: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    flags: dict[str, Any] = {
        "data_path": scenes,
        "output_dir": tmp_path / "x",
        "img_size": "32x48",
        "weights": f"{run}",
    }
    Finetuning(FinetuneConfig.with_preset("tiny", **flags), DistContext(torch.device("cpu")))
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "a classifier has no decoder" in caplog.text
    assert "the head starts at random" in caplog.text
