"""A fine-tuned classifier predicts the same from its run and from every format that it is exported to."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mae_fast
from mae_fast.data.preprocessing import Preprocessing
from mae_fast.weights.convert_files import convert_files
from mae_fast.weights.create import load_encoder
from mae_fast.weights.export import export_onnx, save_program

CLASSES = ("blue", "green", "red")
# The Pillow processors of transformers round a crop margin of half a pixel down, torchvision to the next even number.
# With these sizes, both round to the same margin, so that the pixels must be equal.
SIZES = [(64, 100), (90, 64), (70, 70), (120, 85)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for k, colour in enumerate(CLASSES):
            folder = root / split / colour
            folder.mkdir(parents=True)
            for i in range(count):
                small = rng.integers(0, 190, (5, 6, 3), dtype=np.uint8)
                small[..., 2 - k] += 60
                image = Image.fromarray(small).resize(SIZES[i % 4], Image.Resampling.BICUBIC)
                image.save(folder / f"{i:02}.jpg", quality=92)
    return root


def finetuned(photos, run, **flags):
    small = {"epochs": 1, "warmup_epochs": 0, "num_workers": 0, "device": "cpu", "dtype": "fp32", "batch_size": 12}
    mae_fast.finetune(preset="tiny", data_path=photos, output_dir=run, blr=5e-3, mean="0.4,0.5,0.6", **small, **flags)
    return run


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return finetuned(photos, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def class_token_run(photos, tmp_path_factory):
    return finetuned(photos, tmp_path_factory.mktemp("run") / "run", global_pool=False)


@pytest.fixture(scope="module")
def images(photos):
    return sorted((photos / "val").rglob("*.jpg"))


def predicted(weights, images):
    """Probabilities [N, K]."""
    return torch.stack([x.probabilities for x in mae_fast.load(weights).predict(images)])


@pytest.fixture(scope="module")
def expected(run, images):
    return predicted(run, images)


def assert_equal_up_to_rounding(found, expected):
    assert (expected.max(1).values - expected.min(1).values).min() > 0.05, "predictions are not all alike"
    assert (found - expected).abs().max() < 2e-6


@pytest.mark.parametrize("form", ["ours.safetensors", "ours.pth", "timm", "transformers"])
def test_our_reader_gives_the_same_from_every_format(run, class_token_run, images, tmp_path, form):
    layout = form.partition(".")[0]
    run = class_token_run if layout == "transformers" else run
    assert convert_files(run, tmp_path / form, layout)
    predictor = mae_fast.load(tmp_path / form)
    assert predictor.classes == CLASSES
    assert predictor.preprocessing == mae_fast.load(run).preprocessing
    assert predictor.preprocessing.mean == (0.4, 0.5, 0.6)
    assert_equal_up_to_rounding(predicted(tmp_path / form, images), predicted(run, images))


def test_timm_gives_the_same_with_its_own_transform(run, images, expected, tmp_path):
    timm = pytest.importorskip("timm")
    convert_files(run, tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert tuple(model.pretrained_cfg["label_names"]) == CLASSES
    settings = timm.data.resolve_model_data_config(model)
    assert (settings["crop_pct"], list(settings["mean"])) == (0.875, [0.4, 0.5, 0.6])
    transform = timm.data.create_transform(**settings, is_training=False)
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in images])
    with torch.inference_mode():
        assert_equal_up_to_rounding(model(batch).softmax(1), expected)


def test_transformers_gives_the_same_with_its_own_processor(class_token_run, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert_files(class_token_run, tmp_path / "hf", "transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert tuple(model.config.id2label[i] for i in range(3)) == CLASSES
    pixels = processor(images=[Image.open(path) for path in images], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        assert_equal_up_to_rounding(model(pixels).logits.softmax(1), predicted(class_token_run, images))


@pytest.mark.parametrize("raw", [False, True])
def test_onnx_gives_the_same_by_its_metadata(run, images, expected, tmp_path, raw):
    """Only the metadata of the file is used: resize, crop and, unless pixels are raw, standardise."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    words = [run, path, "--what", "classifier", *(["--raw-pixels"] if raw else [])]
    subprocess.run([sys.executable, "-m", "mae_fast", "export", *map(str, words)], check=True, capture_output=True)
    session = onnxruntime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map["mae_fast"])
    made = about["preprocessing"]
    assert about["classes"] == list(CLASSES)
    assert (made["resize"], made["interpolation"], made["dtype"]) == ("center_crop", "bicubic", "uint8")
    height, width = made["size"]
    batch = []
    for file in images:
        image = Image.open(file).convert("RGB")
        scale = int(height / made["crop_pct"]) / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        batch.append(np.asarray(image)[top : top + height, left : left + width])
    pixels = np.stack(batch)
    if not raw:
        scaled = pixels * np.float32(made["rescale_factor"])
        pixels = (scaled - np.float32(made["mean"])) / np.float32(made["std"])
        pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    (logits,) = session.run(None, {"images": pixels})
    assert_equal_up_to_rounding(torch.from_numpy(logits).softmax(1), expected)


def test_an_exported_program_gives_the_same(run, images, expected, tmp_path):
    loaded = load_encoder(run)
    path = tmp_path / "model.pt2"
    save_program(loaded.model, path, "classifier", raw_pixels=True, recorded=loaded.metadata)
    files = {"mae_fast.json": ""}
    program = torch.export.load(path, extra_files=files).module()
    made = Preprocessing.from_record(json.loads(files["mae_fast.json"])["preprocessing"], path)
    pixels = torch.stack([torch.from_numpy(made(file.read_bytes())[0].copy()) for file in images])
    with torch.inference_mode():
        assert_equal_up_to_rounding(program(images=pixels).softmax(1), expected)


@pytest.mark.parametrize(("dtype", "nodata"), [("uint16", 7.0), ("int16", None), ("float32", -1.0)])
def test_onnx_standardises_raw_pixels_of_any_dtype(tmp_path, dtype, nodata):
    onnxruntime = pytest.importorskip("onnxruntime")
    stats = {"pixel_mean": [900.0] * 5, "pixel_std": [300.0] * 5, "pixel_dtype": dtype, "nodata": nodata}
    torch.manual_seed(0)
    model = mae_fast.vit_tiny_patch4(num_classes=3, in_chans=5, depth=2, **stats).eval()
    export_onnx(model, tmp_path / "model.onnx", "classifier", raw_pixels=True)
    images = np.random.default_rng(0).integers(0, 2000, (4, 32, 32, 5)).astype(dtype)
    if nodata is not None:
        images[:, 3:9, :, 1] = nodata
    if dtype == "float32":
        images[:, :, 20:22] = np.nan
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {"images": images})
    with torch.inference_mode():
        expected = model(torch.from_numpy(images))
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()


def test_weights_of_a_run_keep_their_record(run):
    loaded = load_encoder(run)
    assert loaded.metadata.classes == CLASSES
    assert loaded.metadata.preprocessing["resize"] == "center_crop"
