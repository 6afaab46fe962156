"""Predictions on new images from files and memory, against the evaluation after training."""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import write_scenes
from PIL import Image

import mae_fast
from mae_fast.data.sources import Files
from mae_fast.errors import UserError
from mae_fast.evaluation.predict_files import _own_names
from mae_fast.training.tasks.classifier import evaluate as evaluate_classifier
from mae_fast.training.tasks.detect import evaluate as evaluate_detector
from mae_fast.training.tasks.segment import evaluate as evaluate_segmentation

SMALL = {"preset": "tiny", "epochs": 1, "warmup_epochs": 0, "num_workers": 0, "device": "cpu", "dtype": "fp32"}
CLASSES = ("blue", "green", "red")


def photo(rng, colour, size):
    small = rng.integers(0, 150, (5, 6, 3), dtype=np.uint8)
    small[..., ("red", "green", "blue").index(colour)] += 80
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of three classes and several sizes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for colour in CLASSES:
            folder = root / split / colour
            folder.mkdir(parents=True)
            for i in range(count):
                photo(rng, colour, (61 + 9 * i, 83)).save(folder / f"{i:02}.jpg", quality=92)
    return root


@pytest.fixture(scope="module")
def classifier(photos, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "classifier"
    mae_fast.finetune(data_path=photos, output_dir=run, batch_size=16, blr=1e-2, **SMALL)
    return run


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_classifier_predictions_equal_its_evaluation(classifier, photos, tmp_path):
    from mae_fast.training.config import FINETUNE_PRESETS, FinetuneConfig

    flags = {name: value for name, value in SMALL.items() if name != "preset"}
    flags |= {"data_path": photos, "output_dir": classifier, "predictions": tmp_path / "known.csv", "eval_only": True}
    evaluate_classifier(FinetuneConfig(**{**FINETUNE_PRESETS["tiny"], **flags}))
    made = mae_fast.predict(classifier, photos / "val", tmp_path / "new.csv", top_k=3)
    assert (made.count, made.skipped) == (15, 0)
    expected, found = rows_of(tmp_path / "known.csv"), rows_of(tmp_path / "new.csv")
    assert [row["file"] for row in found] == [str(photos / "val" / row["image"]) for row in expected]
    assert [row["class_1"] for row in found] == [row["prediction"] for row in expected]
    assert [row["probability_1"] for row in found] == [row["probability"] for row in expected]
    for row in found:
        assert {row[f"class_{k}"] for k in (1, 2, 3)} == {*CLASSES}
        assert sum(float(row[f"probability_{k}"]) for k in (1, 2, 3)) == pytest.approx(1, abs=2e-6)


def test_images_in_memory_are_predicted_as_files(classifier, photos):
    predictor = mae_fast.load(classifier)
    assert predictor.classes == CLASSES
    paths = sorted((photos / "val").rglob("*.jpg"))
    from_files = predictor.predict(paths, batch_size=4)
    opened = [Image.open(path) for path in paths]
    arrays = [np.array(image) for image in opened]
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    for given in ([str(path) for path in paths], opened, arrays, tensors):
        found = predictor.predict(given, batch_size=4)
        assert all(torch.equal(a.probabilities, b.probabilities) for a, b in zip(from_files, found, strict=True))
    one = predictor.predict(opened[3])
    assert one.label == from_files[3].label == one.top(1)[0][0]
    assert [label for label, _ in one.top(9)] == [label for label, _ in from_files[3].top(3)]
    assert [p for _, p in one.top(9)] == pytest.approx([p for _, p in from_files[3].top(3)], abs=1e-6)  # another batch
    assert len(predictor.predict(np.stack([np.asarray(image.resize((40, 50))) for image in opened]))) == 15
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        predictor.predict([paths[0], "nowhere.jpg"])
    with pytest.raises(UserError, match=r"a folder: give a list of its files"):
        predictor.predict(photos)
    with pytest.raises(UserError, match="the values of black and white are unknown"):
        predictor.predict(arrays[0].astype(np.float32) / 255)


def test_files_come_from_folders_lists_and_shards(classifier, photos, tmp_path, caplog):
    mixed = tmp_path / "mixed"
    (mixed / "deep" / "er").mkdir(parents=True)
    some = sorted((photos / "val").rglob("*.jpg"))[:4]
    for path, place in zip(some, ("a.jpg", "deep/b.jpg", "deep/er/c.jpg", "deep/a.jpg"), strict=True):
        shutil.copy(path, mixed / place)
    (mixed / "deep" / "broken.jpg").write_bytes(b"no image")
    (mixed / "notes.txt").write_text("not an image")
    (mixed / "list.txt").write_text("a.jpg\ndeep/er/c.jpg\n")
    with tarfile.open(mixed.parent / "some.tar", "w") as tar:
        for path in some[:2]:
            tar.add(path, path.name)
    output = tmp_path / "table.csv"

    made = mae_fast.predict(classifier, mixed, output, num_workers=1)
    assert (made.count, made.skipped) == (4, 1)
    names = [str(mixed / name) for name in ("a.jpg", "deep/a.jpg", "deep/b.jpg", "deep/er/c.jpg")]
    assert [row["file"] for row in rows_of(output)] == names
    assert "broken.jpg" in caplog.text
    by_name = {row["file"]: row for row in rows_of(output)}

    mae_fast.predict(classifier, [mixed / "list.txt", mixed / "deep" / "a.jpg"], output)
    assert [row["file"] for row in rows_of(output)] == [names[0], names[3], names[1]]
    assert all(row == by_name[row["file"]] for row in rows_of(output))
    mae_fast.predict(classifier, tmp_path / "some.tar", output)
    assert [row["class_1"] for row in rows_of(output)] == [by_name[names[i]]["class_1"] for i in (0, 2)]
    mae_fast.predict(classifier, mixed, tmp_path / "table.parquet", top_k=2)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["file"] for row in table] == names
    assert [f"{row['probability_1']:.6f}" for row in table] == [by_name[name]["probability_1"] for name in names]

    with pytest.raises(UserError, match=r"notes\.txt is not a list of images: no line is the path of a file"):
        mae_fast.predict(classifier, [mixed / "a.jpg", mixed / "notes.txt"], output)

    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "empty", "no images in")):
        with pytest.raises(UserError, match=message):
            mae_fast.predict(classifier, [mixed / "a.jpg", path], output)
    with pytest.raises(UserError, match="no image can be used"):
        mae_fast.predict(classifier, mixed / "deep" / "broken.jpg", tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()
    with pytest.raises(UserError, match="has no head"):
        mae_fast.load(mae_fast_weights(tmp_path))


def mae_fast_weights(folder):
    from safetensors.torch import save_file

    save_file(mae_fast.mae_vit_tiny_patch4().state_dict(), folder / "mae.safetensors")
    return folder / "mae.safetensors"


def test_segmentation_predictions_equal_its_evaluation(tmp_path):
    from mae_fast.training.config import SEGMENT_PRESETS, SegmentConfig

    data, rng = tmp_path / "data", np.random.default_rng(0)
    for split, sizes in (("train", [(40, 36)] * 8), ("val", [(40, 36), (52, 33), (36, 70)])):
        for kind in ("images", "masks"):
            (data / split / kind).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            mask = np.zeros((height, width), np.uint8)
            mask[height // 3 :, : width // 2] = 1
            image = np.where(mask[..., None], (220, 60, 60), (60, 60, 200)) + rng.integers(0, 30, (height, width, 3))
            Image.fromarray(image.astype(np.uint8)).save(data / split / "images" / f"{i}.jpg")
            Image.fromarray(mask).save(data / split / "masks" / f"{i}.png")
    (data / "classes.txt").write_text("sea\nland\n")
    run, flags = tmp_path / "run", {**SMALL, "data_path": data, "input_size": 32, "batch_size": 4, "epochs": 6}
    mae_fast.segment(output_dir=run, head_channels=16, lr=5e-3, **flags)
    del flags["preset"]
    flags |= {"output_dir": run, "predictions": tmp_path / "known", "eval_only": True}
    figures = evaluate_segmentation(SegmentConfig(**{**SEGMENT_PRESETS["tiny"], **flags}))
    assert figures["val_acc"] > 80, "the test needs a model that has learnt something"

    made = mae_fast.predict(run, data / "val" / "images", tmp_path / "new", draw=tmp_path / "drawn")
    assert made.count == 3
    predictor = mae_fast.load(run)
    for i, size in enumerate([(40, 36), (52, 33), (36, 70)]):
        known = np.asarray(Image.open(tmp_path / "known" / f"{i}.png"))
        with Image.open(tmp_path / "new" / f"{i}.png") as mask:
            assert mask.mode == "P"
            assert np.array_equal(np.asarray(mask), known)
        assert known.shape == size == Image.open(tmp_path / "drawn" / f"{i}.png").size[::-1]
        found = predictor.predict(data / "val" / "images" / f"{i}.jpg")
        assert np.array_equal(found.labels.numpy(), known)
    named = rows_of(tmp_path / "new" / "classes.csv")
    assert [(row["value"], row["class"]) for row in named] == [("0", "sea"), ("1", "land")]
    listed = {row["file"]: row["mask"] for row in rows_of(tmp_path / "new" / "masks.csv")}
    assert listed == {str(data / "val" / "images" / f"{i}.jpg"): f"{i}.png" for i in range(3)}
    with pytest.raises(UserError, match="--draw and --output are both"):
        mae_fast.predict(run, data / "val" / "images", tmp_path / "other", draw=tmp_path / "other")
    with pytest.raises(UserError, match="new already exists"):
        mae_fast.predict(run, data / "val" / "images", tmp_path / "new")


def test_detector_predictions_equal_its_evaluation(tmp_path):
    from mae_fast.training.config import DETECT_PRESETS, DetectConfig

    data, run = write_scenes(tmp_path / "data", train=8, val=3), tmp_path / "run"
    flags = {**SMALL, "data_path": data, "input_size": 32, "batch_size": 4, "epochs": 2}
    mae_fast.detect(output_dir=run, **flags)
    del flags["preset"]
    flags |= {"output_dir": run, "predictions": tmp_path / "known", "eval_only": True}
    evaluate_detector(DetectConfig(**{**DETECT_PRESETS["tiny"], **flags}))
    known = json.loads((tmp_path / "known").read_text())
    (images,) = [path for path in data.iterdir() if path.name.startswith("val")]
    mae_fast.predict(run, images, tmp_path / "new.json", draw=tmp_path / "drawn")
    found = json.loads((tmp_path / "new.json").read_text())
    assert len(found) == len(known) > 0
    for ours, theirs in zip(found, known, strict=True):
        assert ours["category_id"] == theirs["category_id"]
        assert ours["category_name"] == {7: "square", 3: "disc"}[ours["category_id"]]
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["segmentation"]["size"] == theirs["segmentation"]["size"]
    assert {ours["file_name"] for ours in found} <= {str(path) for path in images.iterdir()}
    one = mae_fast.load(run).predict(found[0]["file_name"])
    assert one.masks.shape == (len(one), *one.size)
    assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()
    assert len(one.above(2.0)) == 0
    assert len([*(tmp_path / "drawn").iterdir()]) == 3
    with pytest.raises(UserError, match=r"does not write \.csv"):
        mae_fast.predict(run, images, tmp_path / "new.csv")


def test_sixteen_bit_bands_are_predicted_as_they_were_trained(tmp_path):
    """Predictions use bands, range, nodata and statistics of the run, from files, arrays and converted weights."""
    from mae_fast.weights.convert_files import convert_files

    data, rng = tmp_path / "data", np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, level in (("dark", 1000), ("light", 1060)):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(level, level + 20, (40, 36, 4)).astype(np.uint16)
                image[:4, :, 0] = 0  # missing
                np.save(data / split / name / f"{i}.npy", image)
    run = tmp_path / "run"
    flags = {"bands": "4,2,1", "nodata": 0, "clip": "900:1200", "mean": "auto", "std": "auto", "batch_size": 8}
    mae_fast.finetune(data_path=data, output_dir=run, blr=1e-2, **{**SMALL, "epochs": 6}, **flags)
    paths = sorted((data / "val").rglob("*.npy"))
    predictor = mae_fast.load(run)
    assert predictor.preprocessing.pixels.bands == (4, 2, 1)
    expected = predictor.predict(paths)
    assert [x.label for x in expected] == ["dark"] * 3 + ["light"] * 3
    arrays = [np.load(path) for path in paths]
    convert_files(run, tmp_path / "weights.safetensors", "ours")
    tensors = [torch.from_numpy(x).permute(2, 0, 1) for x in arrays]
    for model, given in (
        (predictor, arrays), (predictor, tensors), (mae_fast.load(tmp_path / "weights.safetensors"), paths)
    ):  # fmt: skip
        for ours, theirs in zip(expected, model.predict(given), strict=True):
            assert torch.equal(ours.probabilities, theirs.probabilities)
    made = mae_fast.predict(run, data / "val", tmp_path / "table.csv")
    assert made.count == 6


def test_several_labels_get_a_column_each(photos, tmp_path):
    files = sorted(path.relative_to(photos) for path in photos.rglob("*.jpg"))
    rows = [f"{file},{int('red' in str(file))},{int('green' not in str(file))}" for file in files]
    (tmp_path / "labels.csv").write_text("\n".join(["file,warm,not green", *rows]) + "\n")
    run = tmp_path / "run"
    flags = {**SMALL, "epochs": 2, "batch_size": 16, "multi_label": tmp_path / "labels.csv"}
    mae_fast.finetune(data_path=photos, output_dir=run, **flags)
    mae_fast.predict(run, photos / "val", tmp_path / "table.csv")
    predictor = mae_fast.load(run)
    for row in rows_of(tmp_path / "table.csv"):
        assert [*row] == ["file", "labels", "warm", "not green"]
        found = predictor.predict(row["file"])
        shown = [float(row["warm"]), float(row["not green"])]
        assert shown == pytest.approx(found.probabilities.tolist(), abs=2e-6)  # rounding depends on the batch size
        assert row["labels"] == "|".join(name for name in ("warm", "not green") if float(row[name]) >= 0.5)


def test_output_files_have_unique_names():
    first = Files(Path("a"), ["0.jpg", "0.png", "1.jpg", "deep/1.jpg"])
    second = Files(Path("b"), ["1.jpg", "2.jpg"])
    outside = Files(Path(), ["/x/3.jpg", "../y/4.jpg"])
    assert _own_names([first, second, outside]) == [
        ["0.jpg", "0.png", "a/1.jpg", "deep/1"], ["b/1.jpg", "2"], ["3", "4"]
    ]  # fmt: skip


def test_a_copied_file_of_weights_keeps_its_record(classifier, photos, tmp_path, caplog):
    (newest,) = sorted((classifier / "checkpoints").glob("step-*"))[-1:]
    shutil.copy(newest / "model.safetensors", tmp_path / "copied.safetensors")
    whole, copied = mae_fast.load(classifier), mae_fast.load(tmp_path / "copied.safetensors")
    assert (copied.classes, copied.preprocessing) == (whole.classes, whole.preprocessing)
    image = photos / "val" / "red" / "00.jpg"
    assert torch.equal(copied.predict(image).probabilities, whole.predict(image).probabilities)
    assert "records no preprocessing" not in caplog.text
    torch.save(whole.model.state_dict(), tmp_path / "bare.pth")
    mae_fast.load(tmp_path / "bare.pth")
    assert "records no preprocessing" in caplog.text
