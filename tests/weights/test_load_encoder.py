"""``load_encoder`` loads runs, files and folders without the name of a model."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support import perturb, pictures

from mae_fast.errors import UserError
from mae_fast.models import MaskedAutoencoderViT, VisionTransformer
from mae_fast.training.checkpoint import Snapshot, write
from mae_fast.weights import convert
from mae_fast.weights.create import create_model, load_encoder
from mae_fast.weights.metadata import ModelMetadata, build_model
from mae_fast.weights.run_reader import EMA, MODEL, OPTIM

MAE, VIT = "mae_vit_tiny_patch4", "vit_tiny_patch4"


def features(model):
    with torch.no_grad():
        return model.forward_features(pictures(model), pool="mean")


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return perturb(create_model(MAE)).eval()


@pytest.fixture
def run(tmp_path, mae):
    average = {name: x * 0.75 for name, x in mae.state_dict().items() if "pos_embed" not in name}
    tensors = {MODEL: mae.state_dict(), OPTIM: {"x": torch.zeros(1)}, EMA: average}
    state = {"model": {"name": MAE}, "mask_ratio": 0.6}
    write(tmp_path / "run" / "checkpoints", Snapshot(1, tensors, state, True))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"exif": True, "input_size": 32}))
    return tmp_path / "run"


def test_a_run_gives_its_model_and_settings(run, mae):
    for path in run, run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000001" / MODEL:
        found = load_encoder(str(path))
        assert torch.equal(features(found.model), features(mae))
        assert (found.settings["exif"], found.checkpoint.state["mask_ratio"]) == (True, 0.6)
    averaged = load_encoder(run, ema=True).model
    assert torch.equal(averaged.cls_token, 0.75 * mae.cls_token)
    as_classifier = load_encoder(run, VIT)
    assert isinstance(as_classifier.model, VisionTransformer)
    assert as_classifier.settings["exif"]


def test_a_checkpoint_outside_of_a_run_has_no_settings(run):
    moved = (run / "checkpoints" / "step-00000001").rename(run.parent / "step-00000001")
    assert load_encoder(moved).settings == {}


@pytest.mark.parametrize("layout", ["ours", "timm", "transformers", "transformers5", "lightly", "mmpretrain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_file_of_any_layout_shows_its_sizes(tmp_path, mae, layout, dtype):
    mae = mae.to(dtype)
    save_file(convert(mae.state_dict(), "ours", layout).weights, tmp_path / "x.safetensors")
    found = load_encoder(tmp_path / "x.safetensors")
    assert isinstance(found.model, VisionTransformer if layout == "timm" else MaskedAutoencoderViT)
    assert not found.model.training
    assert torch.equal(features(found.model), features(mae.float()))
    assert (found.checkpoint, found.settings, found.metadata) == (None, {}, ModelMetadata())


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch16", "mae_vit_small_patch16"])
def test_the_weights_of_a_factory_show_the_number_of_heads(name):
    with torch.device("meta"):
        model = create_model(name)
        found = build_model(model.state_dict(), ModelMetadata())
    assert [found.blocks[0].attn.num_heads, found.decoder_blocks[0].attn.num_heads] == [
        model.blocks[0].attn.num_heads,
        model.decoder_blocks[0].attn.num_heads,
    ]


def test_an_unknown_number_of_heads_needs_a_model_name(tmp_path):
    model = create_model(MAE, embed_dim=64, num_heads=2)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="attention heads is unknown for a width of 64; give --model"):
        load_encoder(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="does not fit the model"):
        load_encoder(tmp_path / "x.safetensors", VIT)


@pytest.mark.parametrize("model", [None, VIT])
def test_ema_needs_a_run_and_no_model_name(tmp_path, mae, run, model):
    save_file(mae.state_dict(), tmp_path / "x.safetensors")
    for weights in (tmp_path / "x.safetensors", *([run] if model else [])):
        with pytest.raises(UserError, match="--ema"):
            load_encoder(weights, model, ema=True)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_damaged_settings_are_refused(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_encoder(run)


def test_assumed_heads_are_logged_unless_a_factory_has_these_widths(tmp_path, mae, caplog):
    path = tmp_path / "x.safetensors"
    save_file(mae.state_dict(), path)
    load_encoder(path)
    assert not caplog.text
    save_file(create_model(MAE, embed_dim=192, num_heads=6).state_dict(), path)
    load_encoder(path)
    assert "number of attention heads: assuming 3 in the encoder and 3 in the decoder" in caplog.text
