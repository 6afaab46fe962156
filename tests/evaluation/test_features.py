"""Feature files: features of the model in the order of the images, their names, and no partial file after a failure."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import command

import mae_fast
from mae_fast.data.loader import LoaderConfig, evaluation_batches
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError
from mae_fast.evaluation import encoding
from mae_fast.evaluation import features as features_module
from mae_fast.models.mae import build

pq = pytest.importorskip("pyarrow.parquet")

COUNT = 7


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mae.safetensors"
    save_file(build("mae_vit_tiny_patch4", depth=3, decoder_depth=1).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(weights):
    made = build("mae_vit_tiny_patch4", depth=3, decoder_depth=1).eval()
    made.load_state_dict(load_file(weights))
    return made


@pytest.fixture
def images(tmp_path):
    """Two classes; one name has a comma and a quote."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = tmp_path / "images" / ("cat", "dög")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        name = 'a, "b".png' if i == 0 else f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), np.uint8)).save(folder / name)
    return tmp_path / "images"


def expected(model, images, **how):
    source = open_source(images)
    (batch,) = evaluation_batches(source, LoaderConfig(size=(32, 32), batch_size=64))
    with torch.no_grad():
        found = model.forward_features(batch.images, **how)
    return (torch.stack(found, 1) if isinstance(found, list) else found).numpy(), source


KINDS = {
    "mean": ({}, {"pool": "mean"}, (128,)),
    "cls": ({"pool": "cls"}, {"pool": "cls"}, (128,)),
    "map": ({"pool": "map"}, {"pool": "map"}, (128, 8, 8)),
    "layers": ({"pool": "cls", "layers": [0, -1]}, {"pool": "cls", "layers": [0, 2]}, (2, 128)),
    "maps of layers": ({"pool": "map", "layers": [0, 1]}, {"pool": "map", "layers": [0, 1]}, (2, 128, 8, 8)),
    "one layer": ({"layers": [1]}, {"pool": "mean", "layers": [1]}, (128,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_models_features(kind, weights, model, images, tmp_path, monkeypatch):
    flags, how, shape = KINDS[kind]
    wanted, source = expected(model, images, **how)
    wanted = wanted.reshape(COUNT, *shape)
    monkeypatch.setattr(features_module, "ROW_GROUP", 3000)  # several row groups
    told = mae_fast.features(images, weights=weights, output=tmp_path / "x.npy", batch_size=3, **flags)
    assert (told.path, told.shape, told.skipped) == (tmp_path / "x.npy", (COUNT, *shape), 0)
    found = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert (found.shape, found.dtype) == ((COUNT, *shape), np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    mae_fast.features(images, weights=weights, output=tmp_path / "x.parquet", batch_size=3, **flags)
    table = pq.read_table(tmp_path / "x.parquet")
    columns = [name for name in table.column_names if name not in ("image", "label", "class")]
    layers = [i % 3 for i in flags.get("layers", [])]
    assert columns == ([f"layer_{i}" for i in layers] if len(layers) > 1 else ["features"])
    parts = [np.stack(table[name].to_numpy()) for name in columns]
    shapes = [json.loads(table.schema.field(name).metadata[b"shape"]) for name in columns]
    stacked = np.stack([part.reshape(COUNT, *one) for part, one in zip(parts, shapes, strict=True)], 1)
    np.testing.assert_array_equal(stacked.reshape(found.shape), found)
    assert table["image"].to_pylist() == list(source.names)


def test_names_and_labels_are_beside_the_features(weights, images, tmp_path):
    mae_fast.features(images, weights=weights, output=tmp_path / "x.npy")
    mae_fast.features(images, weights=weights, output=tmp_path / "x.parquet")
    source = open_source(images)
    rows = [[name, label, source.classes[label]] for name, label in zip(source.names, source.labels, strict=True)]
    with (tmp_path / "x.names.csv").open(newline="", encoding="utf-8") as file:
        header, *table = csv.reader(file)
    assert header == ["image", "label", "class"]
    assert table == [[name, str(label), kind] for name, label, kind in rows]
    columns = pq.read_table(tmp_path / "x.parquet").select(["image", "label", "class"]).to_pylist()
    assert [list(row.values()) for row in columns] == rows


def test_images_without_classes_have_only_names(weights, images, tmp_path):
    mae_fast.features(images / "cat", weights=weights, output=tmp_path / "x.npy")
    assert (tmp_path / "x.names.csv").read_text().splitlines()[0] == "image"
    mae_fast.features(images / "cat", weights=weights, output=tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet").column_names == ["image", "features"]
    one = mae_fast.features(images / "cat" / "2.png", weights=weights, output=tmp_path / "one.npy")
    assert one.shape == (1, 128)
    beside = mae_fast.features(images / "cat" / "2.png", weights=weights, output=images / "cat" / "2.parquet")
    assert beside.shape == (1, 128)
    array = images / "cat" / "array.npy"
    np.save(array, np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="is the image"):
        mae_fast.features(array, weights=weights, output=array)


def test_a_training_and_a_validation_set_are_not_mixed(weights, images, tmp_path):
    for splits, message in (
        (("train", "val"), r"contains train/ and val/.*give .*train or .*val"),
        (("Train", "test"), r"contains Train/ and test/.*give .*Train or .*test"),
        (("validation",), r"contains validation/.*give .*validation"),
    ):
        data = tmp_path / "-".join(splits)
        for split in splits:
            shutil.copytree(images, data / split)
        with pytest.raises(UserError, match=message):
            mae_fast.features(data, weights=weights, output=tmp_path / "x.npy")
    vehicles = tmp_path / "vehicles"
    for name in ("train", "bus"):
        shutil.copytree(images / "cat", vehicles / name)
    assert mae_fast.features(vehicles, weights=weights, output=tmp_path / "x.npy").shape == (8, 128)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_any_file_name_can_be_written(ending, weights, images, tmp_path):
    odd = os.fsencode(images / "cat") + b"/new\nline\xff.png"
    os.rename(os.fsencode(images / "cat" / "2.png"), odd)
    told = mae_fast.features(images, weights=weights, output=tmp_path / f"x.{ending}")
    assert told.shape[0] == COUNT
    if ending == "npy":
        with (tmp_path / "x.names.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            names = [row[0] for row in csv.reader(file)][1:]
        assert names == list(open_source(images).names)


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_bad_images_have_no_row(ending, weights, images, tmp_path, monkeypatch, capsys):
    (images / "cat" / "4.png").write_bytes(b"no image")
    line = ["features", images, "--weights", weights, "--output", tmp_path / f"x.{ending}"]
    refused = command(monkeypatch, capsys, *line)
    assert refused.returncode == 2
    assert "1 of 7 images cannot be used, more than the allowed 1.0%" in refused.stderr
    assert "--max-bad-fraction" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    done = command(monkeypatch, capsys, *line, "--max-bad-fraction", 0.5)
    assert done.returncode == 0, done.stderr
    assert "skipped 'cat/4.png' (not an image" in done.stderr
    assert "[6, 128]" in done.stdout
    assert "unusable images, without a row: 1" in done.stdout
    rows = 6
    if ending == "npy":
        assert np.load(tmp_path / "x.npy").shape == (rows, 128)
        assert len((tmp_path / "x.names.csv").read_text().splitlines()) == 1 + rows
    else:
        assert pq.read_table(tmp_path / "x.parquet").num_rows == rows


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_a_failure_keeps_the_existing_file(ending, weights, images, tmp_path, monkeypatch):
    output = tmp_path / f"x.{ending}"
    mae_fast.features(images, weights=weights, output=output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    made = features_module.usable_images

    def failing(*args):
        for i, batch in enumerate(made(*args)):
            if i == 2:
                raise OSError(28, "No space left on device")
            yield batch

    monkeypatch.setattr(features_module, "usable_images", failing)
    for where in (output, tmp_path / "new" / output.name):
        with pytest.raises(OSError, match="No space"):
            mae_fast.features(images, weights=weights, output=where, batch_size=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not list((tmp_path / "new").iterdir())


def test_output_is_checked_before_any_work(weights, images, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "usable_images", lambda *_: pytest.fail("images were read"))
    cases = [
        ("x.csv", {}, "unknown format"),
        ("images/x.npy", {}, "is in the folder of the images"),
        ("x.npy", {"layers": [3]}, "--layers must be in -3..2"),
    ]
    for name, flags, message in cases:
        with pytest.raises(UserError, match=message):
            mae_fast.features(images, weights=weights, output=tmp_path / name, **flags)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        mae_fast.features(images, weights=weights, output=tmp_path / "folder.npy")
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="MB are free"):
        mae_fast.features(images, weights=weights, output=tmp_path / "x.npy")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"x.parquet needs pyarrow; pip install .mae_fast.data"):
        mae_fast.features(images, weights=weights, output=tmp_path / "x.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "folder.npy"}


@pytest.mark.parametrize(
    ("name", "late"),
    [("x.names.csv", False), ("x.names.csv", True), ("x.npy.part", False), ("x.names.csv.part", False)],
)
def test_a_folder_with_the_name_of_an_output_file_is_an_error(name, late, weights, images, tmp_path, monkeypatch):
    made = features_module.usable_images

    def with_folder(*args):
        assert late, "images were read"
        yield from made(*args)
        (tmp_path / name).mkdir()

    (tmp_path / "x.npy").write_bytes(b"old")
    if not late:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(features_module, "usable_images", with_folder)
    with pytest.raises(UserError, match=f"/{name}, which is a folder"):
        mae_fast.features(images, weights=weights, output=tmp_path / "x.npy")
    assert (tmp_path / "x.npy").read_bytes() == b"old"


def test_the_command_line_takes_the_flags_of_the_function(weights, images, tmp_path, monkeypatch, capsys):
    flags = ["--pool", "map", "--layers", 0, -1, "--batch-size", 2, "--num-workers", 1, "--device", "cpu"]
    line = ["features", images, "--weights", weights, "--output", tmp_path / "new" / "x.npy", *flags]
    done = command(monkeypatch, capsys, *line)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "[7, 2, 128, 8, 8]" in done.stdout
    assert np.load(tmp_path / "new" / "x.npy").shape == (7, 2, 128, 8, 8)


def test_progress_is_logged(weights, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoding, "PROGRESS_EVERY", 0)
    line = ["features", images, "--weights", weights, "--output", tmp_path / "x.npy", "--batch-size", 4]
    told = command(monkeypatch, capsys, *line).stdout
    assert f"{images}: 4 of 7 images, " in told
    assert f"{images}: 7 of 7 images, " in told


def test_gathered_rows_are_one_tensor():
    parts = [(torch.full((n, 3), float(n)), torch.arange(n)) for n in (2, 1, 3)]
    found = encoding.gather(iter(parts), 10)
    for got, wanted in zip(found, zip(*parts, strict=True), strict=True):
        assert torch.equal(got, torch.cat(wanted))
    assert found[0].untyped_storage().nbytes() == 10 * 3 * 4
