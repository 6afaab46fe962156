"""Settings that tensors do not show, such as eps, are kept by each conversion, or a warning names them."""

import argparse
import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from support import command, inputs, one_thread, pictures, tiny, tiny_vit  # noqa: F401
from torch import nn

from mae_fast.data.pixel_format import PixelFormat
from mae_fast.errors import UserError
from mae_fast.evaluation.images import preprocessing_of
from mae_fast.models import MaskedAutoencoderViT, VisionTransformer
from mae_fast.models import build as build_mae
from mae_fast.models.vit import build as build_vit
from mae_fast.training.checkpoint import Snapshot, write
from mae_fast.weights import LAYOUTS, convert, convert_files, create, hub_configs
from mae_fast.weights.create import create_model, load_encoder, load_run
from mae_fast.weights.metadata import ModelMetadata, read_weights

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)
ENCODER = {"img_size": 24, "embed_dim": 32, "depth": 2, "num_heads": 4}
SIZES = {**ENCODER, "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
MAE, VIT = "mae_vit_tiny_patch4", "vit_tiny_patch4"


def faint(model):
    """Make weights so small that eps is a large part of the variance, and another eps changes the first digits."""
    with torch.no_grad():
        for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token"):
            model.get_parameter(name).mul_(0.02)
        for block in model.blocks:
            block.attn.proj.bias.zero_()
            block.mlp.fc2.bias.zero_()
    return model.eval()


def odd_mae(eps=1e-5, **options):
    """With eps 1e-5, the default class nn.LayerNorm, which JSON cannot hold."""
    norm = nn.LayerNorm if eps == 1e-5 else partial(nn.LayerNorm, eps=eps)
    options = {"norm_pix_loss": True, "pixel_mean": MEAN, "pixel_std": STD, **options}
    return faint(tiny(norm_layer=norm, **options))


def odd_vit(eps=1e-5, **options):
    norm = nn.LayerNorm if eps == 1e-5 else partial(nn.LayerNorm, eps=eps)
    return faint(tiny_vit(norm_layer=norm, **{"pixel_mean": MEAN, "pixel_std": STD, **options}))


def assert_same_outputs(found, model):
    """Features of floating and uint8 images, and loss or logits if both models have them, are equal in fp64."""
    found, model = copy.deepcopy(found).double().eval(), copy.deepcopy(model).double().eval()
    images, noise = inputs(model)
    pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pool = "tokens" if hasattr(model, "norm") else "mean"
    pairs = [(x.forward_features(images, pool=pool), x.forward_features(pixels, pool=pool)) for x in (found, model)]
    if isinstance(model, VisionTransformer) and isinstance(found, VisionTransformer):
        pairs = [(*pair, x(images)) for pair, x in zip(pairs, (found, model), strict=True)]
    elif isinstance(found, MaskedAutoencoderViT):
        pairs = [(*pair, x(images, noise=noise)[0]) for pair, x in zip(pairs, (found, model), strict=True)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * max(1.0, theirs.abs().max().item()))


@pytest.fixture
def run(monkeypatch, capsys):
    return partial(command, monkeypatch, capsys, "convert")


def test_another_eps_changes_the_outputs_of_these_models():
    """Otherwise the tests could not detect a lost eps. Outputs change by more than 1 %."""
    for make, other in ((odd_mae, 1e-6), (odd_vit, 1e-6), (partial(odd_mae, 1e-6), 1e-12)):
        model = make().double()
        changed = copy.deepcopy(model)
        for norm in (x for x in changed.modules() if isinstance(x, nn.LayerNorm)):
            norm.eps = other
        images = pictures(model)
        before, after = (x.forward_features(images) for x in (model, changed))
        assert (after - before).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("make", [odd_mae, odd_vit, partial(odd_vit, global_pool=True)], ids=["mae", "vit", "pooled"])
def test_save_pretrained_keeps_settings(tmp_path, make, eps):
    model = make(eps)
    model.save_pretrained(tmp_path)
    assert_same_outputs(type(model).from_pretrained(tmp_path), model)
    name, sizes = (MAE, SIZES) if isinstance(model, MaskedAutoencoderViT) else (VIT, ENCODER)
    for path in tmp_path, tmp_path / "model.safetensors":
        assert_same_outputs(create_model(name, path, **sizes), model)


def test_changes_after_construction_are_saved(tmp_path):
    model = tiny()
    model.norm_pix_loss = True
    for norm in (x for x in model.modules() if isinstance(x, nn.LayerNorm)):
        norm.eps = 1e-4
    model.pixel_mean.copy_(torch.tensor(MEAN))
    model.save_pretrained(tmp_path)
    found = MaskedAutoencoderViT.from_pretrained(tmp_path)
    assert found.settings() == model.settings()
    assert found.settings() == {
        "norm_layer": {"eps": 1e-4},
        "pixel_mean": list(MEAN),
        "pixel_std": [0.229, 0.224, 0.225],
        "norm_pix_loss": True,
    }


def test_a_config_json_without_eps_means_the_default_of_layer_norm(tmp_path):
    """Earlier versions left nn.LayerNorm, with eps 1e-5, out of config.json."""
    model = odd_mae()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "norm_layer"}))
    assert_same_outputs(create_model(MAE, tmp_path, **SIZES), model)


@pytest.mark.parametrize(
    ("to", "ending", "eps"),
    [
        *[(to, ending, 1e-5) for to in LAYOUTS for ending in (".safetensors", ".pth")],
        *[(to, "", 1e-5) for to in hub_configs.FOLDER_LAYOUTS],
        *[("timm", ending, 1e-3) for ending in ("", ".safetensors", ".pth")],
    ],
)
def test_convert_and_create_model_keep_settings(run, tmp_path, to, ending, eps):
    model = odd_mae(eps)
    model.save_pretrained(tmp_path / "saved")
    verify = ["--verify"] * (to != "mmpretrain")
    result = run(tmp_path / "saved", tmp_path / f"x{ending}", "--to", to, *verify)
    if to in ("transformers", "transformers5") and ending == ".pth":
        assert result.returncode == 2
        assert "cannot record layer norms with eps" in result.stderr
        assert not (tmp_path / "x.pth").exists()
        return
    assert result.returncode == 0, (result.stdout, result.stderr)
    if to != "timm":  # timm has no decoder
        assert_same_outputs(create_model(MAE, tmp_path / f"x{ending}", **SIZES), model)
    found = create_model(VIT, tmp_path / f"x{ending}", **ENCODER, num_classes=0)
    assert_same_outputs(found, model)


RAW = {"in_chans": 4, "pixel_mean": (900, 1000, 1100, 1200), "pixel_std": (300,) * 4, "nodata": 65535}


@pytest.mark.parametrize("to", ["ours", "timm", "transformers"])
def test_dtype_and_missing_value_of_pixels_are_kept(run, tmp_path, to):
    """By the hub's format, ``convert`` and an exported program, in both functions that load models."""
    model = odd_mae(**RAW, pixel_dtype="uint16")
    model.save_pretrained(tmp_path / "saved")
    target = tmp_path / ("x.safetensors" if to == "ours" else "x")
    result = run(tmp_path / "saved", target, "--to", to, "--verify")
    assert result.returncode == 0, result.stderr
    images = torch.randint(0, 4000, (2, 24, 24, 4), dtype=torch.uint16)
    images[:, :6, :6] = 65535
    found = [
        MaskedAutoencoderViT.from_pretrained(tmp_path / "saved"),
        *(create_model(VIT, path, **ENCODER, num_classes=0, in_chans=4) for path in (tmp_path / "saved", target)),
        *(load_encoder(path).model for path in (tmp_path / "saved", target)),
    ]
    expected = model.forward_features(images, pool="tokens")
    for other in found:
        assert other.settings()["pixel_dtype"] == "uint16"
        assert torch.equal(other.eval().forward_features(images, pool="tokens"), expected)
    assert preprocessing_of(load_encoder(target)).pixels == PixelFormat(channels=4, dtype="uint16", nodata=65535)
    if to == "transformers":
        processor = json.loads((target / "preprocessor_config.json").read_text())
        assert (processor["do_rescale"], processor["image_mean"]) == (False, list(RAW["pixel_mean"]))


def test_a_run_keeps_dtype_and_missing_value_of_pixels(run, tmp_path):
    model = odd_vit(**RAW, pixel_dtype="int16")
    state = {"model": {"name": VIT, **ENCODER, "num_classes": 5, "in_chans": 4, **model.settings()}}
    tensors = {"model.safetensors": model.state_dict(), "optim.safetensors": {}}
    write(tmp_path / "run" / "checkpoints", Snapshot(5, tensors, state, True))
    assert run(tmp_path / "run", tmp_path / "x.safetensors", "--to", "ours", "--verify").returncode == 0
    for path in tmp_path / "run", tmp_path / "x.safetensors":
        found = create_model(VIT, path, **ENCODER, in_chans=4)
        assert (found.pixel_dtype, found.nodata, found.pixel_mean.tolist()) == ("int16", 65535, list(RAW["pixel_mean"]))
    line = run(tmp_path / "run", tmp_path / "y.safetensors", "--to", "timm").stderr
    assert "standardise int16 pixels in their own units with mean [900.0, " in line


def test_settings_for_other_pixel_dtypes_or_channels_are_left_out(tmp_path, caplog):
    odd_mae(**RAW, pixel_dtype="uint16").save_pretrained(tmp_path / "saved")
    usual = [0.5] * 4
    for name, given in {"uint8": {"in_chans": 4}, "float32": {"in_chans": 4, "pixel_mean": (0.5,) * 4}}.items():
        found = create_model(VIT, tmp_path / "saved", **ENCODER, pixel_dtype=name, **given)
        assert (found.pixel_dtype, found.nodata, found.pixel_mean.tolist()) == (name, None, usual)
        assert f"left out pixel_std of uint16 pixels: the model takes {name}" in caplog.text
    found = create_model(VIT, tmp_path / "saved", **ENCODER, in_chans=3)
    assert (found.pixel_dtype, found.nodata) == ("uint8", None)
    assert "left out pixel_mean of 4 channels: the model has 3" in caplog.text
    assert "left out pixel_dtype uint16" in caplog.text


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-3])
def test_the_library_reads_the_folder_with_equal_outputs(run, tmp_path, to, eps):
    """timm's config.json can hold two values of eps. For others, the line in the warning works."""
    model = odd_vit(eps)
    model.save_pretrained(tmp_path / "saved")
    result = run(tmp_path / "saved", tmp_path / "x", "--to", to)
    model.double()
    images = pictures(model)
    if to == "timm":
        import timm

        if eps == 1e-3:
            assert f"timm's config.json cannot record layer norms with eps {eps}" in result.stderr
            line = result.stderr.partition("Load the folder with ")[2]
            theirs = eval(line, {"timm": timm, "torch": torch, "partial": partial})
        else:
            assert result.stderr == ""
            theirs = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
        found = theirs.double().eval()(images)
        data = timm.data.resolve_model_data_config(theirs)
        assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN, STD)
    else:
        import transformers

        assert result.stderr == ""
        found = transformers.ViTForImageClassification.from_pretrained(tmp_path / "x").double().eval()(images).logits
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "x")
        pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
        theirs = processor(list(pixels.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
        ours = ((pixels / 255 - model.pixel_mean.float()) / model.pixel_std.float()).permute(0, 3, 1, 2)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, model(images), rtol=0, atol=1e-12)


FILES = {
    "timm": ["norm_layer=partial(torch.nn.LayerNorm, eps=0.001)", "num_heads=8"],
    "transformers": ["layer_norm_eps=0.001", "num_attention_heads=8", "norm_pix_loss=True"],
    "lightly": ["norm_layer=partial(torch.nn.LayerNorm, eps=0.001)", "num_heads=8"],
    "mmpretrain": ["norm_cfg=dict(type='LN', eps=0.001)", "num_heads=8", "norm_pix=True"],
}


@pytest.mark.parametrize("to", FILES)
def test_settings_that_a_file_does_not_record_give_a_warning(run, tmp_path, to):
    """One line names all settings that differ from the library's defaults."""
    usual = {"embed_dim": 128, "decoder_embed_dim": 96, "decoder_num_heads": 3}
    model = odd_mae(1e-3, **usual, num_heads=8)
    model.save_pretrained(tmp_path / "saved")
    result = run(tmp_path / "saved", tmp_path / "x.safetensors", "--to", to)
    (line,) = result.stderr.splitlines()
    for words in (*FILES[to], f"standardise images with mean {list(MEAN)} and std {list(STD)}"):
        assert words in line
    eps = 1e-12 if to == "transformers" else 1e-6
    plain = tiny(**usual, num_heads=4, norm_layer=partial(nn.LayerNorm, eps=eps))
    plain.save_pretrained(tmp_path / "plain")
    assert run(tmp_path / "plain", tmp_path / "y.safetensors", "--to", to).stderr == ""


def test_no_warning_names_a_decoder_that_is_left_out(run, tmp_path):
    """timm's file of a masked autoencoder also records the loss, for this package."""
    usual = {"embed_dim": 128, "num_heads": 4, "decoder_embed_dim": 96, "decoder_num_heads": 6}
    tiny(**usual, norm_pix_loss=True, norm_layer=partial(nn.LayerNorm, eps=1e-12)).save_pretrained(tmp_path / "saved")
    run(tmp_path / "saved", tmp_path / "x.safetensors", "--to", "timm")
    assert read_weights(tmp_path / "x.safetensors")[1].norm_pix_loss
    assert run(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--to", "transformers").stderr == ""


def test_another_eps_in_a_published_file_gives_a_warning(run, tmp_path):
    odd_mae().save_pretrained(tmp_path / "saved")
    line = run(tmp_path / "saved", tmp_path / "x.pth", "--to", "ours").stderr
    assert "the published code has other defaults: build its model with " in line
    assert "norm_layer=partial(torch.nn.LayerNorm, eps=1e-05), norm_pix_loss=True" in line
    assert run(tmp_path / "saved", tmp_path / "x.safetensors", "--to", "ours").stderr == ""


@pytest.mark.parametrize("args", [argparse.Namespace, dict], ids=["Namespace", "dict"])
def test_norm_pix_loss_is_read_from_args_of_a_published_file(run, tmp_path, args):
    weights = tiny().state_dict()
    torch.save({"model": weights, "args": args(norm_pix_loss=True, mask_ratio=0.5, lr=0.1)}, tmp_path / "x.pth")
    assert create_model(MAE, tmp_path / "x.pth", **SIZES).norm_pix_loss
    assert not create_model(MAE, tmp_path / "x.pth", **SIZES, norm_pix_loss=False).norm_pix_loss
    heads = ("--num-heads", 4, "--decoder-num-heads", 2)
    assert run(tmp_path / "x.pth", tmp_path / "y", "--to", "transformers", "--verify", *heads).returncode == 0
    config = json.loads((tmp_path / "y" / "config.json").read_text())
    assert (config["norm_pix_loss"], config["mask_ratio"]) == (True, 0.5)
    torch.save({"model": weights, "args": args(norm_pix_loss="yes")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad.pth: norm_pix_loss cannot be 'yes'"):
        create_model(MAE, tmp_path / "bad.pth", **SIZES)


def test_flags_of_convert_set_unrecorded_settings(run, tmp_path):
    model = odd_mae(pixel_mean=None, pixel_std=None)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    words = ("--to", "transformers", "--verify", "--num-heads", 4, "--decoder-num-heads", 2)
    result = run(tmp_path / "x.pth", tmp_path / "y", *words, "--norm-eps", 1e-5, "--norm-pix-loss")
    assert result.returncode == 0, result.stderr
    assert "does not record" not in result.stdout
    assert_same_outputs(create_model(MAE, tmp_path / "y", **SIZES), model)
    result = run(tmp_path / "x.pth", tmp_path / "z", *words)
    assert "does not record the eps of its layer norms: using 1e-06" in result.stdout


@pytest.mark.parametrize("kind", ["mae", "vit"])
def test_settings_in_state_json_are_read(run, tmp_path, kind):
    """``settings`` is JSON in ``state.json``. Each way to load the run reads it."""
    model = odd_mae() if kind == "mae" else odd_vit()
    made = {"name": MAE, **SIZES} if kind == "mae" else {"name": VIT, **ENCODER, "num_classes": 5}
    state = {"model": {**made, **model.settings()}, "mask_ratio": 0.5}
    tensors = {"model.safetensors": model.state_dict(), "optim.safetensors": {}}
    checkpoint = write(tmp_path / "run" / "checkpoints", Snapshot(5, tensors, state, True))
    assert_same_outputs(load_run(tmp_path / "run")[0], model)
    name, sizes = (MAE, SIZES) if kind == "mae" else (VIT, ENCODER)
    for path in tmp_path / "run", checkpoint, checkpoint / "model.safetensors":
        assert_same_outputs(create_model(name, path, **sizes), model)
    assert run(checkpoint / "model.safetensors", tmp_path / "y", "--to", "timm", "--verify").returncode == 0
    assert_same_outputs(create_model(VIT, tmp_path / "y", **ENCODER), model)
    assert (build_mae if kind == "mae" else build_vit)(**state["model"]).settings() == model.settings()
    result = run(tmp_path / "run", tmp_path / "x", "--to", "transformers", "--verify")
    assert result.returncode == 0, result.stderr
    assert_same_outputs(create_model(name, tmp_path / "x", **sizes), model)
    if kind == "mae":
        assert json.loads((tmp_path / "x" / "config.json").read_text())["mask_ratio"] == 0.5


def test_pixel_statistics_are_read_from_folders_of_other_libraries(tmp_path):
    """ViT of transformers and many models of timm have mean 0.5, not ImageNet's."""
    weights = convert(tiny_vit().state_dict(), "ours", "transformers").weights
    convert_files.save_weights(tmp_path / "x", "transformers", weights, ModelMetadata(), tiny_vit())
    path = tmp_path / "x" / "preprocessor_config.json"
    path.write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    found = create_model(VIT, tmp_path / "x", **ENCODER)
    assert (found.pixel_mean.tolist(), found.pixel_std.tolist()) == ([0.5] * 3, [0.25] * 3)
    assert create_model(VIT, tmp_path / "x", **ENCODER, pixel_mean=MEAN).pixel_mean.tolist() == list(MEAN)
    path.write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "do_normalize": false}')
    found = create_model(VIT, tmp_path / "x", **ENCODER)
    assert (found.pixel_mean.tolist(), found.pixel_std.tolist()) == ([0.0] * 3, [1.0] * 3)
    path.write_text('{"image_mean": [0.5], "image_std": [0.25]}')
    assert create_model(VIT, tmp_path / "x", **ENCODER).pixel_mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    for text in ("{", '{"image_mean": [0.5, 0.5, "x"]}', '{"image_std": [0, 1, 1]}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"is damaged|pixel_(mean|std) cannot be"):
            create_model(VIT, tmp_path / "x", **ENCODER)


def test_a_model_of_ours_that_timm_saved_is_read(run, tmp_path):
    """timm saves only weights and its config.json, so eps is known from the architecture.

    timm 1.0.26 does not know the arguments of a model that it loaded.
    """
    import timm
    from timm.models import save_for_hf

    model = odd_vit()
    model.save_pretrained(tmp_path / "saved")
    run(tmp_path / "saved", tmp_path / "x", "--to", "timm")
    arguments = json.loads((tmp_path / "x" / "config.json").read_text())["model_args"]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    save_for_hf(theirs, tmp_path / "theirs", model_args=arguments)
    assert_same_outputs(create_model(VIT, tmp_path / "theirs", **ENCODER), model)
    result = run(tmp_path / "theirs", tmp_path / "y.safetensors", "--to", "ours", "--verify")
    assert result.returncode == 0
    assert "timm and mae_fast agree" in result.stdout
    assert_same_outputs(create_model(VIT, tmp_path / "y.safetensors", **ENCODER), model)


def test_missing_settings_of_a_transformers_config_are_its_defaults(tmp_path):
    """The defaults are those of the config class, as for a config.json written by hand."""
    from transformers import ViTConfig

    save_file(tiny_vit().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    default = ViTConfig()
    assert read_weights(tmp_path)[1] == ModelMetadata(default.num_attention_heads, norm_eps=default.layer_norm_eps)


def test_another_activation_is_refused(tmp_path):
    weights = convert(tiny_vit().state_dict(), "ours", "transformers").weights
    convert_files.save_weights(tmp_path / "x", "transformers", weights, ModelMetadata(), tiny_vit())
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"the activation is 'relu', our models only have gelu"):
        create_model(VIT, tmp_path / "x", **ENCODER)


@pytest.mark.parametrize("value", [(0.5,), (0.5, 0.5, 0.5, 0.5)])
def test_pixel_statistics_need_a_value_for_each_channel(value):
    for name in "pixel_mean", "pixel_std":
        with pytest.raises(ValueError, match=f"{name} must have one (positive )?value for each of 3 channels"):
            tiny(**{name: value})
    with pytest.raises(ValueError, match="pixel_std must have one positive value"):
        tiny_vit(pixel_std=(0.1, 0.1, 0))


def test_layer_norms_that_differ_in_eps_are_refused(tmp_path):
    """Files record one eps."""
    model = tiny()
    model.decoder_norm.eps = 1e-5
    assert model.norm_eps is None
    with pytest.raises(UserError, match="layer norms of this model differ in eps"):
        ModelMetadata.from_model(model)
    from mae_fast.weights.export import export_program

    with pytest.raises(UserError, match="layer norms of this model differ in eps"):
        export_program(model, "encoder")


@pytest.mark.parametrize("what", ["encoder", "reconstruction", "classifier"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_exported_models_keep_their_eps(tmp_path, what, eps):
    from mae_fast.weights.export import export_onnx, save_program

    model = odd_vit(eps) if what == "classifier" else odd_mae(eps)
    save_program(model, tmp_path / "x.pt2", what)
    exact = copy.deepcopy(model).double()
    extra = {"mae_fast.json": ""}
    program = torch.export.load(tmp_path / "x.pt2", extra_files=extra)
    images, noise = inputs(model)
    given = {"images": images, **({"noise": noise} if what == "reconstruction" else {})}

    def outputs(model, images, noise):
        if what == "encoder":
            return model.forward_features(images)
        return model(images) if what == "classifier" else model(images, noise=noise)[1]

    truth, eager = outputs(exact, images.double(), noise), outputs(model, images, noise)
    allowed = 2 * (eager - truth).abs().max() + 1e-6 * truth.abs().max()
    found = program.module()(**given)
    found = found[0] if what == "reconstruction" else found
    assert (found - truth).abs().max() <= allowed
    about = json.loads(extra["mae_fast.json"])
    assert (about["norm_eps"], about["pixel_mean"], about["pixel_std"]) == (eps, list(MEAN), list(STD))
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_onnx(model, tmp_path / "x.onnx", what)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    found = torch.from_numpy(session.run(None, {name: x.numpy() for name, x in given.items()})[0])
    assert (found - truth).abs().max() <= allowed
    assert json.loads(session.get_modelmeta().custom_metadata_map["mae_fast"]) == about


def losing(name, value):
    """Wrap ``ModelMetadata.from_model`` or a reader: setting ``name`` gets another value."""

    def lose(found):
        if isinstance(found, tuple):
            return found[0], lose(found[1])
        return replace(found, **{name: value})

    return lose


LOST = {
    "the reader of the source loses eps": (convert_files, "read_weights", losing("norm_eps", 1e-6)),
    "the reader of the source loses the loss": (convert_files, "read_weights", losing("norm_pix_loss", False)),
    "the reader of the source loses the mean": (convert_files, "read_weights", losing("pixel_mean", None)),
    "transformers' config.json loses eps": (
        convert_files, "transformers_config", lambda config: {**config, "layer_norm_eps": 1e-6}
    ),
    "transformers' config.json loses the loss": (
        convert_files, "transformers_config", lambda config: {**config, "norm_pix_loss": False}
    ),
    "transformers' config.json loses the mask ratio": (
        convert_files, "transformers_config", lambda config: {**config, "mask_ratio": 0.5}
    ),
    "transformers' preprocessor_config.json loses the mean": (
        convert_files, "processor_config", lambda config: {**config, "image_mean": [0.485, 0.456, 0.406]}
    ),
    "timm's config.json loses eps": (
        convert_files, "timm_config", lambda config: {**config, "architecture": "vit_base_patch16_224"}
    ),
    "timm's config.json loses the std": (
        convert_files, "timm_config", lambda config: config["pretrained_cfg"].update(std=[1, 1, 1]) or config
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", LOST)
def test_verify_detects_lost_settings(run, tmp_path, monkeypatch, fault):
    """It compares with the saved model, without this package's readers of weights."""
    module, name, lose = LOST[fault]
    odd_mae().save_pretrained(tmp_path / "saved")
    to = "timm" if "timm" in fault else "transformers"
    words = (tmp_path / "saved", tmp_path / "x", "--to", to, "--verify")
    intact = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: lose(intact(*given)))
    result = run(*words)
    assert result.returncode == 1, result.stdout
    assert f"{to} and mae_fast DIFFER" in result.stdout
    assert "nothing written" in result.stdout
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(module, name, intact)
    assert run(*words).returncode == 0


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_verify_detects_a_file_that_does_not_record_eps(run, tmp_path, monkeypatch, ending):
    odd_mae().save_pretrained(tmp_path / "saved")
    to_dict = ModelMetadata.to_dict
    monkeypatch.setattr(ModelMetadata, "to_dict", lambda self: {**to_dict(self), "norm_eps": 1e-6})
    for to in "ours", "timm":
        result = run(tmp_path / "saved", tmp_path / f"x{ending}", "--to", to, "--verify")
        assert result.returncode == 1
        assert "the source and mae_fast's reader DIFFER" in result.stdout


def test_verify_of_a_run_compares_with_its_own_model(run, tmp_path, monkeypatch):
    model = odd_vit()
    state = {"model": {"name": VIT, **ENCODER, "num_classes": 5, **model.settings()}}
    tensors = {"model.safetensors": model.state_dict(), "optim.safetensors": {}}
    write(tmp_path / "run" / "checkpoints", Snapshot(5, tensors, state, True))
    from_model = ModelMetadata.from_model
    monkeypatch.setattr(ModelMetadata, "from_model", lambda model: replace(from_model(model), norm_eps=1e-6))
    assert run(tmp_path / "run", tmp_path / "x", "--to", "timm", "--verify").returncode == 1


def test_verify_of_a_vision_transformer_without_head(run, tmp_path):
    """The source is a ViTModel of transformers, which has no masks."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    ViTModel(ViTConfig(**sizes, image_size=24, patch_size=4)).save_pretrained(tmp_path / "theirs")
    result = run(tmp_path / "theirs", tmp_path / "x.safetensors", "--to", "ours", "--verify")
    assert result.returncode == 0, result.stderr
    assert "transformers and mae_fast agree" in result.stdout
    assert read_weights(tmp_path / "x.safetensors")[1].norm_eps == 1e-12


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_verify_reads_the_source_with_its_own_library(run, tmp_path, monkeypatch, library):
    """This package is made to misread the configuration of the folder."""
    model = odd_vit()
    weights = convert(model.state_dict(), "ours", library).weights
    convert_files.save_weights(tmp_path / "theirs", library, weights, ModelMetadata.from_model(model), model)
    words = (tmp_path / "theirs", tmp_path / "x.safetensors", "--to", "ours", "--verify")
    monkeypatch.setattr(convert_files, "read_weights", lambda path: losing("norm_eps", 1e-6)(read_weights(path)))
    result = run(*words)
    assert result.returncode == 1
    assert f"{library} and mae_fast DIFFER" in result.stdout
    monkeypatch.setattr(convert_files, "read_weights", read_weights)
    assert run(*words).returncode == 0
    assert_same_outputs(create_model(VIT, tmp_path / "x.safetensors", **ENCODER), model)


def test_downloads_from_the_hub_include_the_preprocessor(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: asked.extend(allow_patterns) or tmp_path
    )
    create._download("us/mae")
    assert {"config.json", "preprocessor_config.json", "model.safetensors"} <= set(asked)
