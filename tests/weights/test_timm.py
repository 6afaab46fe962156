"""Our encoders and classifiers in ``timm.create_model``, by each way to load weights, equal our models."""

import json
from functools import partial

import pytest
import timm
import torch
from interop_cases import KINDS, assert_same
from support import pictures, tiny, tiny_vit
from torch import nn

from mae_fast.weights import convert, detect
from mae_fast.weights.convert_files import save_weights
from mae_fast.weights.hub_configs import timm_arguments
from mae_fast.weights.metadata import ModelMetadata

MODELS = {
    "full": tiny,
    "encoder": lambda: tiny_vit(num_classes=0),
    "class token": tiny_vit,
    "mean": lambda: tiny_vit(global_pool=True),
    "mean without head": lambda: tiny_vit(global_pool=True, num_classes=0),
    "no qkv bias, oblong, grey": lambda: tiny_vit(qkv_bias=False, img_size=(24, 16), in_chans=1),
    "other eps": lambda: tiny_vit(norm_layer=nn.LayerNorm),
}


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_equal_timms_in_float64(kind, outputs_differ_by):
    model = MODELS[kind]().double().eval()
    found = outputs_differ_by(model, "timm")
    assert found.keys() == {"features", *(("logits",) if getattr(model, "num_classes", 0) else ())}
    assert all(x <= 1e-12 for x in found.values()), found


@pytest.mark.parametrize("way", ["checkpoint_path", ".pth", "overlay", "folder"])
@pytest.mark.parametrize("kind", ["full", "class token", "mean", "no qkv bias, oblong, grey"])
def test_timm_create_model_loads_converted_files(kind, way, tmp_path):
    """Loading is strict: no key is missing or left over."""
    model = MODELS[kind]().eval()
    weights = convert(model.state_dict(), "ours", "timm").weights
    path = tmp_path / {"folder": "x", ".pth": "x.pth"}.get(way, "x.safetensors")
    save_weights(path, "timm", weights, ModelMetadata.from_model(model), model)
    arguments = timm_arguments(model)
    if way == "folder":
        theirs = timm.create_model(f"local-dir:{path}", pretrained=True)
    elif way == "overlay":
        overlay = {"file": str(path), "num_classes": arguments["num_classes"]}  # timm drops heads of other sizes
        theirs = timm.create_model("vit_base_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    else:
        theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=str(path), **arguments)
    assert_same(theirs.state_dict(), weights)
    images = pictures(model)
    with torch.inference_mode():
        if getattr(model, "num_classes", 0):
            found, expected = theirs.eval()(images), model(images)
        else:
            found, expected = theirs.eval().forward_features(images), model.forward_features(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_timm_cannot_load_a_checkpoint_with_decoder(tmp_path):
    """So the conversion leaves the decoder out: timm takes weights with a mask token for DINOv2's."""
    model = tiny()
    save_weights(tmp_path / "x.safetensors", "ours", model.state_dict(), ModelMetadata.from_model(model), model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        timm.create_model(
            "vit_base_patch16_224", checkpoint_path=str(tmp_path / "x.safetensors"), **timm_arguments(model)
        )


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_models_of_timm_convert_to_ours(pool):
    theirs = timm.create_model(
        "vit_base_patch16_224",
        img_size=24,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=5,
        global_pool=pool,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    weights = theirs.state_dict()
    assert detect(weights) == "ours"
    ours = tiny_vit(global_pool=pool == "avg")
    ours.load_state_dict(convert(weights, "timm", "ours").weights)
    assert_same(convert(ours.state_dict(), "ours", "timm").weights, weights)


def test_a_round_trip_of_an_encoder_changes_no_bit():
    encoder = KINDS["encoder"]()
    assert_same(convert(convert(encoder, "ours", "timm").weights, "timm", "ours").weights, encoder)


def test_a_folder_records_architecture_and_preprocessing(tmp_path):
    model = tiny_vit(global_pool=True)
    save_weights(
        tmp_path / "x",
        "timm",
        convert(model.state_dict(), "ours", "timm").weights,
        ModelMetadata.from_model(model),
        model,
    )
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (config["num_classes"], config["model_args"]["global_pool"]) == (5, "avg")
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True))
    assert tuple(data["input_size"]) == (3, 24, 24)
    assert data["mean"] == pytest.approx((0.485, 0.456, 0.406))
