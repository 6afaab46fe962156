"""Names equal those of transformers in memory and on disk, and its models with our weights give equal outputs."""

import json
from dataclasses import replace

import pytest
import torch
from interop_cases import assert_same
from support import tiny, tiny_vit

from mae_fast.errors import UserError
from mae_fast.models.pos_embed import sincos_2d
from mae_fast.weights import convert, detect
from mae_fast.weights.convert_files import save_weights
from mae_fast.weights.files import load_weights
from mae_fast.weights.hub_configs import transformers_config
from mae_fast.weights.metadata import ModelMetadata, build_model, read_weights

SIZES = {
    "image_size": 24,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 96,
}
MODELS = {
    "full": lambda: tiny(norm_pix_loss=True),
    "grey, wide patch": lambda: tiny(in_chans=1, img_size=32, patch_size=8, mlp_ratio=2.0),
    "encoder": lambda: tiny_vit(num_classes=0),
    "class token": tiny_vit,
    "no qkv bias": lambda: tiny_vit(qkv_bias=False),
}


def theirs_from_scratch(name):
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**SIZES, **DECODER) if "MAE" in name else transformers.ViTConfig(**SIZES)
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("layout", ["transformers", "transformers5"])
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_equal_transformers_in_float64(kind, layout, outputs_differ_by):
    model = MODELS[kind]().double().eval()
    found = outputs_differ_by(model, layout)
    assert found.keys() == {
        "features",
        *(("loss", "pred") if hasattr(model, "decoder_pred") else ()),
        *(("logits",) if getattr(model, "num_classes", 0) else ()),
    }
    assert all(x <= 1e-12 for x in found.values()), found


@pytest.mark.parametrize("layout", ["transformers", "transformers5"])
def test_a_wrong_weight_changes_the_outputs(layout, outputs_differ_by):
    model = tiny().eval()
    weights = convert(model.state_dict(), "ours", layout).weights
    layers = {"transformers": "vit.encoder.layer.1.attention.attention.", "transformers5": "vit.layers.1.attention."}
    letters = {"transformers": ("query", "key"), "transformers5": ("q_proj", "k_proj")}
    one, other = (f"{layers[layout]}{letter}.weight" for letter in letters[layout])
    weights[one], weights[other] = weights[other], weights[one]
    assert outputs_differ_by(model, layout, weights)["features"] > 1e-4


@pytest.mark.parametrize("name", ["ViTMAEForPreTraining", "ViTMAEModel", "ViTForImageClassification", "ViTModel"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_models_of_transformers_convert_to_ours_and_back(name, place, tmp_path):
    """New models of transformers. No bit changes, but zero tables are rebuilt."""
    theirs = theirs_from_scratch(name)
    weights = theirs.state_dict()
    if place == "disk":
        theirs.save_pretrained(tmp_path)
        weights = load_weights(tmp_path)
    layout = detect(weights)
    assert layout == {"memory": "transformers5", "disk": "transformers"}[place]
    converted = convert(weights, layout, "ours")
    back = convert(converted.weights, "ours", "transformers5").weights
    base = "" if name.startswith(("ViTMAEFor", "ViTFor")) else "vit."
    expected = {base + key: x for key, x in theirs.state_dict().items() if "pooler" not in key}
    if name == "ViTMAEForPreTraining":
        for key, width in (("vit.embeddings.position_embeddings", 32), ("decoder.decoder_pos_embed", 24)):
            expected[key] = sincos_2d(width, (6, 6))
    elif name == "ViTMAEModel":
        expected["vit.embeddings.position_embeddings"] = sincos_2d(32, (6, 6))
    zero = [key for key, x in theirs.state_dict().items() if "pos" in key and not x.any()]
    assert len([note for note in converted.notes if "all zero" in note]) == len(zero)
    assert bool(zero) == ("MAE" in name)
    assert any("pooler" in note for note in converted.notes) == (name == "ViTModel")
    assert_same(back, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_folders_load_without_warnings(kind, tmp_path):
    import transformers

    model = MODELS[kind]().eval()
    for layout in ("transformers", "transformers5"):
        folder = tmp_path / layout
        weights = convert(model.state_dict(), "ours", layout).weights
        save_weights(folder, layout, weights, ModelMetadata.from_model(model), model)
        name = transformers_config(model)["architectures"][0]
        loaded, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert_same(convert(loaded.state_dict(), "transformers5", "ours").weights, model.state_dict())
        assert replace(read_weights(folder)[1], mask_ratio=None) == ModelMetadata.from_model(model)


def test_an_encoder_loads_into_vit_model(tmp_path):
    """ViTModel has no masks: it returns features of all patches in image order."""
    import transformers

    model = tiny_vit(num_classes=0).eval()
    save_weights(
        tmp_path / "x",
        "transformers",
        convert(model.state_dict(), "ours", "transformers").weights,
        ModelMetadata(),
        model,
    )
    loaded, report = transformers.ViTModel.from_pretrained(
        tmp_path / "x", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report
    images = torch.randn(2, 3, 24, 24)
    with torch.inference_mode():
        expected = model.forward_features(images, pool="tokens")
        assert (loaded.eval()(images).last_hidden_state - expected).abs().max() < 1e-5 * expected.abs().max()


def test_number_of_heads_and_eps_are_read_from_config_json(tmp_path):
    """transformers' default eps is 1e-12. With our default, 1e-6, the features would differ."""
    theirs = theirs_from_scratch("ViTMAEForPreTraining")
    theirs.save_pretrained(tmp_path)
    metadata = read_weights(tmp_path)[1]
    assert metadata == ModelMetadata(4, 2, (24, 24), 1e-12, False, mask_ratio=0.75)
    model = build_model(convert(load_weights(tmp_path), "transformers", "ours").weights, metadata)
    assert ModelMetadata.from_model(model).norm_eps == 1e-12


@pytest.mark.parametrize("shape", [{"img_size": (24, 16)}, {"patch_size": (4, 8)}], ids=str)
def test_images_and_patches_must_be_square(shape):
    with pytest.raises(UserError, match="square images and patches, got"):
        transformers_config(tiny(**shape))


def test_the_configuration_is_json():
    for make in MODELS.values():
        config = transformers_config(make())
        assert json.loads(json.dumps(config)) == config
