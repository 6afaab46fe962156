"""``mae-fast convert``: files, folders, ``--verify``, and errors that name the cause."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from interop_cases import KINDS, assert_same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import command, tiny, tiny_vit
from torch import nn

import mae_fast
from mae_fast.errors import UserError
from mae_fast.models import build as build_mae
from mae_fast.models.vit import build as build_vit
from mae_fast.training.checkpoint import Snapshot, write
from mae_fast.weights import LAYOUTS, convert, convert_files, verify
from mae_fast.weights.convert_files import save_weights
from mae_fast.weights.files import load_weights
from mae_fast.weights.metadata import ModelMetadata, build_model, read_weights


@pytest.fixture
def run(monkeypatch, capsys):
    return partial(command, monkeypatch, capsys, "convert")


@pytest.fixture
def weights(tmp_path):
    """A file of a masked autoencoder with unusual sizes."""
    save_file(tiny().state_dict(), tmp_path / "mae.safetensors")
    return tmp_path / "mae.safetensors"


HEADS = ("--num-heads", 4, "--decoder-num-heads", 2)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "timm"])
def test_files_convert_to_each_layout_and_back(run, weights, tmp_path, layout, ending):
    there, back = tmp_path / f"there{ending}", tmp_path / f"back{ending}"
    assert run(weights, there, "--to", layout).returncode == 0
    if ending == ".safetensors":
        with safe_open(there, "pt") as file:
            assert file.metadata()["format"] == "pt"  # transformers 4.x requires it
    assert run(there, back, "--to", "ours").returncode == 0  # the layout is detected from the names
    assert_same(load_weights(back), tiny().state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([weights.name, there.name, back.name])


def test_a_pth_file_has_the_key_of_the_published_code(run, weights, tmp_path):
    run(weights, tmp_path / "x.pth", "--to", "ours")
    found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(found) == ["model"]
    assert_same(found["model"], tiny().state_dict())


def test_a_published_checkpoint_is_converted(run, tmp_path):
    """The file also has optimizer state and the arguments of the training."""
    checkpoint = {"model": tiny().state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1, model="x")}
    torch.save(checkpoint, tmp_path / "x.pth")
    result = run(tmp_path / "x.pth", tmp_path / "y.safetensors", "--to", "timm")
    assert result.returncode == 0
    assert "note: left out mask_token, decoder_pos_embed, decoder_embed" in result.stdout
    assert f"wrote 30 tensors of layout ours to {tmp_path / 'y.safetensors'} as timm" in result.stdout
    assert_same(load_file(tmp_path / "y.safetensors"), KINDS["encoder"]())


def test_a_conversion_from_python_gives_no_warnings(weights, tmp_path, recwarn):
    assert mae_fast.convert(weights, tmp_path / "y.safetensors", to="timm")
    assert not recwarn.list


@pytest.mark.slow
@pytest.mark.parametrize("to", ["timm", "transformers", "transformers5"])
def test_verified_folders_convert_back(run, weights, tmp_path, to):
    result = run(weights, tmp_path / "x", "--to", to, "--verify", *HEADS)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if f"{to} and mae_fast agree, relative to" in line]
    assert "features" in line
    assert ("loss" in line, "pred" in line) == (to != "timm",) * 2
    names = ["config.json", "model.safetensors", *["preprocessor_config.json"] * (to != "timm")]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == names
    # And back: the folder records the number of heads.
    if to != "timm":
        back = run(tmp_path / "x", tmp_path / "back.safetensors", "--to", "ours", "--verify")
        assert "transformers" in back.stdout
        assert back.returncode == 0, back.stderr
        assert_same(load_weights(tmp_path / "back.safetensors"), tiny().state_dict())
        with safe_open(tmp_path / "back.safetensors", "pt") as file:
            assert json.loads(file.metadata()["mae_fast"])["num_heads"] == 4
        again = run(tmp_path / "back.safetensors", tmp_path / "again", "--to", "transformers")
        assert again.returncode == 0, again.stderr


def test_a_folder_of_timm_records_heads_and_image_size(run, tmp_path):
    """The number of heads is unusual for the width, and the image is not square."""
    weights = tiny_vit(img_size=(16, 24)).state_dict()
    save_file(weights, tmp_path / "x.safetensors", {"mae_fast": '{"num_heads": 4, "img_size": [16, 24]}'})
    assert run(tmp_path / "x.safetensors", tmp_path / "timm", "--to", "timm").returncode == 0
    verify = ("--from", "timm", "--to", "ours", "--verify")
    result = run(tmp_path / "timm", tmp_path / "back.safetensors", *verify)
    assert result.returncode == 0, result.stderr
    assert "timm and mae_fast agree" in result.stdout
    _, metadata = read_weights(tmp_path / "back.safetensors")
    assert (metadata.num_heads, metadata.img_size) == (4, (16, 24))
    assert_same(load_weights(tmp_path / "back.safetensors"), weights)


@pytest.mark.parametrize("kind", ["class token", "linear probe"])
def test_a_run_of_a_classifier_is_converted(run, tmp_path, kind):
    model = build_vit("vit_tiny_patch4", num_classes=5)
    if kind == "linear probe":
        model.head = nn.Sequential(nn.BatchNorm1d(128, affine=False, eps=1e-6), model.head)
        model.head[0](torch.randn(9, 128))
    tensors = {"model.safetensors": model.state_dict(), "optim.safetensors": {}}
    state = {"model": {"name": "vit_tiny_patch4", "num_classes": 5}}
    write(tmp_path / "run" / "checkpoints", Snapshot(5, tensors, state, True))
    result = run(tmp_path / "run", tmp_path / "x", "--to", "transformers", "--verify")
    assert result.returncode == 0, result.stderr
    assert "transformers and mae_fast agree" in result.stdout
    assert "logits" in result.stdout
    assert ("folded the linear probe's batch norm" in result.stdout) == (kind == "linear probe")
    assert result.stderr == ""
    assert json.loads((tmp_path / "x" / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]


def test_source_and_target_are_both_verified(run, tmp_path):
    save_file(convert(tiny_vit().state_dict(), "ours", "transformers5").weights, tmp_path / "x.safetensors")
    result = run(tmp_path / "x.safetensors", tmp_path / "y.pth", "--to", "timm", "--verify", "--num-heads", 4)
    assert "transformers5 and mae_fast agree" in result.stdout
    assert "timm and mae_fast agree" in result.stdout
    assert "logits" in result.stdout


def test_nothing_is_written_if_one_of_two_libraries_differs(run, tmp_path, monkeypatch):
    save_file(convert(tiny_vit().state_dict(), "ours", "transformers").weights, tmp_path / "x.safetensors")
    monkeypatch.setattr(verify, "differences", lambda _, layout, *__: {"logits": float(layout != "timm")})
    result = run(tmp_path / "x.safetensors", tmp_path / "y.pth", "--to", "timm", "--verify", "--num-heads", 4)
    assert result.returncode == 1
    assert "transformers and mae_fast DIFFER" in result.stdout
    assert "timm and mae_fast agree" in result.stdout
    assert not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize("difference", [2e-5, float("nan")])
def test_nothing_is_written_if_outputs_differ(run, weights, tmp_path, monkeypatch, difference):
    monkeypatch.setattr(verify, "differences", lambda *_: {"features": 1e-7, "loss": difference})
    result = run(weights, tmp_path / "x.pth", "--to", "transformers", "--verify", *HEADS)
    assert result.returncode == 1
    assert "transformers and mae_fast DIFFER" in result.stdout
    assert "nothing written" in result.stdout
    assert "agree" not in result.stdout
    assert not (tmp_path / "x.pth").exists()


def test_a_library_that_is_not_installed_cannot_verify(run, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run(weights, tmp_path / "x.pth", "--to", "timm", "--verify", *HEADS)
    assert result.returncode == 2
    assert "not verified: timm cannot be imported" in result.stderr
    assert "agree" not in result.stdout
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True])
def test_a_run_is_converted(run, tmp_path, ema):
    model = build_mae("mae_vit_tiny_patch4", norm_pix_loss=True)
    average = {name: x * 0.75 for name, x in model.state_dict().items() if "pos_embed" not in name}
    tensors = {"model.safetensors": model.state_dict(), "ema.safetensors": average, "optim.safetensors": {}}
    state = {"model": {"name": "mae_vit_tiny_patch4", "norm_pix_loss": True}, "mask_ratio": 0.75}
    write(tmp_path / "run" / "checkpoints", Snapshot(5, tensors, state, True))
    result = run(tmp_path / "run", tmp_path / "x", "--to", "transformers", "--verify", *(["--ema"] if ema else []))
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (config["norm_pix_loss"], config["num_attention_heads"], config["image_size"]) == (True, 4, 32)
    found = convert(load_weights(tmp_path / "x"), "transformers", "ours").weights
    assert_same(found, model.state_dict() | (average if ema else {}))


# The mistake: the arguments, where {tmp} has mae.safetensors and others, and a part of the message.
BAD = {
    "no such file": (["{tmp}/none.pth", "{tmp}/x.pth", "--to", "timm"], "none.pth: there is no such file"),
    "existing file": (
        ["{tmp}/mae.safetensors", "{tmp}/there.pth", "--to", "timm"],
        "there.pth exists\nhint: give another",
    ),
    "existing folder": (["{tmp}/mae.safetensors", "{tmp}/folder", "--to", "timm"], "folder exists\n"),
    "itself": (["{tmp}/mae.safetensors", "{tmp}/mae.safetensors", "--to", "timm"], "mae.safetensors exists"),
    "dangling link": (["{tmp}/mae.safetensors", "{tmp}/link.pth", "--to", "timm"], "link.pth exists"),
    "no folder of ours": (["{tmp}/mae.safetensors", "{tmp}/x", "--to", "ours"], "to files only\n"),
    "folder without weights": (["{tmp}/folder", "{tmp}/x.pth", "--to", "timm"], "no weights in the folder"),
    "damaged": (["{tmp}/damaged.safetensors", "{tmp}/x.pth", "--to", "timm"], "are damaged"),
    "no ViT": (["{tmp}/cnn.safetensors", "{tmp}/x.pth", "--to", "timm"], "not weights of a ViT or MAE"),
    "wrong layout": (
        ["{tmp}/mae.safetensors", "{tmp}/x.pth", "--from", "lightly", "--to", "timm"],
        "unknown in the layout 'lightly'",
    ),
    "unknown layout": (["{tmp}/mae.safetensors", "{tmp}/x.pth", "--to", "keras"], "keras"),
    "no target layout": (["{tmp}/mae.safetensors", "{tmp}/x.pth"], "--to"),
    "unknown heads": (["{tmp}/mae.safetensors", "{tmp}/x", "--to", "transformers"], "for a width of 32"),
    "unknown decoder heads": (
        ["{tmp}/mae.safetensors", "{tmp}/x", "--to", "transformers", "--num-heads", "4"],
        "is unknown for a width of 24\nhint: give --decoder-num-heads",
    ),
    "heads that do not fit": (
        ["{tmp}/mae.safetensors", "{tmp}/x", "--to", "transformers", "--num-heads", "5", "--decoder-num-heads", "2"],
        "got 32 and 5",
    ),
    "zero heads": (
        ["{tmp}/mae.safetensors", "{tmp}/x", "--to", "timm", "--num-heads", "0"],
        "--num-heads 0 is out of range",
    ),
    "negative heads": (
        ["{tmp}/mae.safetensors", "{tmp}/x", "--to", "timm", "--num-heads", "-4"],
        "--num-heads -4 is out of range",
    ),
    "no decoder heads": (
        ["{tmp}/mae.safetensors", "{tmp}/x", "--to", "transformers", "--num-heads", "4", "--decoder-num-heads", "0"],
        "--decoder-num-heads 0 is out of range",
    ),
    "other heads than the file records": (
        ["{tmp}/heads.safetensors", "{tmp}/x.pth", "--to", "timm", "--num-heads", "8"],
        "--num-heads 8: {tmp}/heads.safetensors records 4",
    ),
    "infinite eps": (
        ["{tmp}/infinite.safetensors", "{tmp}/x.pth", "--to", "timm"],
        "norm_eps cannot be inf",
    ),
    "folder with a file's name": (["{tmp}/mae.safetensors", "{tmp}/x.bin", "--to", "timm"], "give a folder, or a file"),
    "averages of a file": (
        ["{tmp}/mae.safetensors", "{tmp}/x.pth", "--to", "timm", "--ema"],
        "--ema needs a training run",
    ),
    "eps of nothing": (
        ["{tmp}/mae.safetensors", "{tmp}/x.pth", "--to", "ours", "--norm-eps", "0"],
        "--norm-eps 0.0 is out of range",
    ),
    "another eps than the file records": (
        ["{tmp}/eps.safetensors", "{tmp}/x.pth", "--to", "timm", "--norm-eps", "1e-6"],
        "--norm-eps 1e-06: {tmp}/eps.safetensors records 1e-05",
    ),
    "eps that the file cannot record": (
        ["{tmp}/eps.safetensors", "{tmp}/x.pth", "--to", "transformers"],
        "x.pth: a .pth file of transformers cannot record layer norms with eps 1e-05",
    ),
    "mmpretrain verified": (
        ["{tmp}/mae.safetensors", "{tmp}/x.pth", "--to", "mmpretrain", "--verify", *map(str, HEADS)],
        "--verify does not support the layout mmpretrain",
    ),
    "folder under a file": (["{tmp}/mae.safetensors", "{tmp}/mae.safetensors/x.pth", "--to", "timm"], "File exists"),
    "shapes that do not fit": (
        ["{tmp}/odd.safetensors", "{tmp}/x", "--to", "timm", "--num-heads", "4"],
        "the weights do not fit each other",
    ),
    "shapes that do not fit, to a file": (["{tmp}/odd.safetensors", "{tmp}/x.pth", "--to", "timm"], "do not fit each"),
    "heads that do not fit, to a file": (
        ["{tmp}/mae.safetensors", "{tmp}/x.pth", "--to", "timm", "--num-heads", "7"],
        "got 32 and 7",
    ),
    "no name": (["", "{tmp}/x.pth", "--to", "timm"], "the name is empty"),
    "metadata that is not JSON": (["{tmp}/meta.safetensors", "{tmp}/x", "--to", "timm"], "is damaged"),
    "invalid metadata": (["{tmp}/nonsense.safetensors", "{tmp}/x", "--to", "timm"], "num_heads cannot be 'many'"),
    "classifier on mean-pooled patches": (["{tmp}/mean.pth", "{tmp}/x", "--to", "transformers"], "convert to timm"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_give_a_message_and_status_2(run, weights, tmp_path, case):
    words, expected = BAD[case]
    (tmp_path / "there.pth").write_text("precious")
    (tmp_path / "link.pth").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(weights.read_bytes()[:-100])
    save_file({"conv1.weight": torch.ones(1)}, tmp_path / "cnn.safetensors")
    save_file({**KINDS["encoder"](), "blocks.1.mlp.fc1.weight": torch.ones(7, 32)}, tmp_path / "odd.safetensors")
    save_file(KINDS["encoder"](), tmp_path / "meta.safetensors", {"mae_fast": "{"})
    save_file(KINDS["encoder"](), tmp_path / "nonsense.safetensors", {"mae_fast": '{"num_heads": "many"}'})
    save_file(KINDS["encoder"](), tmp_path / "heads.safetensors", {"mae_fast": '{"num_heads": 4}'})
    save_file(KINDS["encoder"](), tmp_path / "eps.safetensors", {"mae_fast": '{"norm_eps": 1e-5}'})
    save_file(KINDS["encoder"](), tmp_path / "infinite.safetensors", {"mae_fast": '{"norm_eps": 1e400}'})
    torch.save(KINDS["mean"](), tmp_path / "mean.pth")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}
    result = run(*(word.format(tmp=tmp_path) for word in words))
    assert result.returncode == 2
    assert expected.format(tmp=tmp_path) in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 2
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x"])
def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch, name):
    """The disk fills up while the file is written."""
    from safetensors import SafetensorError

    def fail(what, path, *_):
        Path(path).write_bytes(b"half")
        raise SafetensorError("no space left") if "safetensors" in str(path) else RuntimeError("no space left")

    monkeypatch.setattr(convert_files, "save_file", fail)
    monkeypatch.setattr(convert_files.torch, "save", fail)
    model = tiny_vit(num_classes=0)
    with pytest.raises(UserError, match=f"{name} cannot be written .no space left"):
        save_weights(tmp_path / name, "timm", KINDS["encoder"](), ModelMetadata.from_model(model), model)
    assert list(tmp_path.iterdir()) == []


def sharded(folder, weight_map=None, **files):
    folder.mkdir()
    for name, part in files.items():
        save_file(part, folder / f"{name}.safetensors")
    if weight_map is None:
        weight_map = {key: f"{name}.safetensors" for name, part in files.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_folders_are_read(tmp_path):
    weights = list(convert(tiny().state_dict(), "ours", "transformers").weights.items())
    sharded(tmp_path / "x", one=dict(weights[:20]), two=dict(weights[20:]))
    assert_same(load_weights(tmp_path / "x"), dict(weights))


def test_shards_of_transformers_are_read(tmp_path):
    import transformers

    config = transformers.ViTMAEConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32)
    theirs = transformers.ViTMAEModel(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert len(load_weights(tmp_path)) == len(theirs.state_dict())


def test_pytorch_model_bin_is_read(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(load_weights(tmp_path), tiny().state_dict())


@pytest.mark.parametrize(
    "place",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "",
        ".",
        "..",
        3,
        None,
        "x.txt",
        "a\0.safetensors",
        "\ud800.bin",
    ],
    ids=ascii,
)
def test_shards_in_other_folders_are_refused(tmp_path, place):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    sharded(tmp_path / "x", {"a": place})
    with pytest.raises(UserError, match=r"not a file of weights in the same folder|cannot be read"):
        load_weights(tmp_path / "x")


@pytest.mark.parametrize(
    "weight_map", [{"a": "one.safetensors"}, {"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}]
)
def test_shards_that_differ_from_the_index_are_refused(tmp_path, weight_map):
    sharded(tmp_path / "x", weight_map, one={"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(UserError, match=r"do not agree on [bc]$"):
        load_weights(tmp_path / "x")


def test_a_shard_that_is_a_folder_is_refused(tmp_path):
    sharded(tmp_path / "x", {"a": "again.safetensors"})
    (tmp_path / "x" / "again.safetensors").symlink_to(".")
    with pytest.raises(UserError, match=r"again\.safetensors', which is a folder"):
        load_weights(tmp_path / "x")


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path / "x", {"a": "one.safetensors"})
    with pytest.raises(UserError, match=r"one\.safetensors cannot be read"):
        load_weights(tmp_path / "x")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', "[" * 100000])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is not an index of weights"):
        load_weights(tmp_path)


def test_a_model_is_built_from_its_weights():
    """The shapes show all settings except the number of heads, eps and the loss."""
    for make in (
        lambda: tiny(norm_pix_loss=True, mlp_ratio=2.0, in_chans=2),
        lambda: tiny(img_size=(24, 16), patch_size=(8, 4)),
        lambda: tiny(mlp_ratio=1.06),  # 33 hidden values for width 32, 25 for width 24
        lambda: tiny_vit(global_pool=True, num_classes=0, qkv_bias=False),
        tiny_vit,
    ):
        model = make()
        made = build_model(model.state_dict(), ModelMetadata.from_model(model))
        assert type(made) is type(model)
        assert str(made) == str(model)
        assert ModelMetadata.from_model(made) == ModelMetadata.from_model(model)
        assert_same(made.state_dict(), model.state_dict())


def test_unknown_settings_are_as_in_the_paper():
    model = tiny()  # eps 1e-6, plain pixels
    assert str(build_model(model.state_dict(), ModelMetadata(4, 2))) == str(model)
    assert ModelMetadata.from_model(build_model(model.state_dict(), ModelMetadata(4, 2))) == ModelMetadata.from_model(
        model
    )


def test_images_that_are_not_square_need_a_recorded_size():
    model = tiny(img_size=(24, 16))
    with pytest.raises(UserError, match="24 patches are not a square"):
        build_model(model.state_dict(), ModelMetadata(4, 2))


@pytest.mark.parametrize("width", range(1, 60))
def test_mlp_ratio_is_exact_for_any_width(width):
    from mae_fast.weights.metadata import mlp_ratio

    assert all(int(width * mlp_ratio(hidden, width)) == hidden for hidden in range(1, 300))
