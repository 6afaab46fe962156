"""``create_model`` with weights of any origin, the hub's mixin, and runs: weights are equal, changes are logged."""

import copy
import json
import logging
from argparse import Namespace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from support import inputs, one_thread, perturb, pictures, tie_free  # noqa: F401
from torch import nn
from torch.nn import functional as F

import mae_fast
from mae_fast.errors import UserError
from mae_fast.models import MaskedAutoencoderViT, VisionTransformer
from mae_fast.models.pos_embed import sincos_2d
from mae_fast.training.checkpoint import Snapshot, write
from mae_fast.weights import LAYOUTS, convert
from mae_fast.weights.convert_files import convert_files, save_weights
from mae_fast.weights.create import create_model, load_encoder, load_run
from mae_fast.weights.files import load_weights
from mae_fast.weights.metadata import ModelMetadata
from mae_fast.weights.run_reader import EMA, MODEL, OPTIM

pytestmark = pytest.mark.usefixtures("one_thread")

MAE, VIT = "mae_vit_tiny_patch4", "vit_tiny_patch4"
ENCODER = {"img_size": 24, "embed_dim": 32, "depth": 2, "num_heads": 4}
SIZES = {**ENCODER, "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
DECODER = ("decoder_", "mask_token")
NEW_HEAD = "the head starts at random"
NEW_NORM = ["left out norm.weight, norm.bias"]


def mae(seed=0, **options):
    torch.manual_seed(seed)
    return perturb(create_model(MAE, **{**SIZES, **options}))


def vit(seed=0, **options):
    torch.manual_seed(seed)
    return perturb(create_model(VIT, **{**ENCODER, "num_classes": 5, **options}))


def probe(seed=0):
    """A classifier with the head of the published linear probe and statistics of its batch norm."""
    model = vit(seed)
    norm = nn.BatchNorm1d(32, affine=False, eps=1e-6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model.head = nn.Sequential(norm, model.head)
    return model


def encoder_of(weights):
    return {name: x for name, x in weights.items() if not name.startswith(DECODER)}


def assert_same(model, weights):
    """The state dict of the model equals ``weights`` bit by bit."""
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert not [name for name, x in weights.items() if not torch.equal(state[name], x)]


@pytest.fixture
def logged(capsys, caplog, monkeypatch):
    """A function: the notes of one level since the last call, without the path at their start."""
    monkeypatch.setattr(logging.getLogger("mae_fast"), "handlers", [])  # remove those of other tests
    caplog.set_level(logging.INFO, "mae_fast.weights.create")

    def lines(level="WARNING"):
        assert capsys.readouterr().out == ""
        found = [record.getMessage().split(": ", 1)[1] for record in caplog.records if record.levelname == level]
        caplog.clear()
        return found

    return lines


def save_run(folder, model, made, step=1, ema=None):
    tensors = {MODEL: model.state_dict(), OPTIM: {"x": torch.zeros(1)}, **({EMA: ema} if ema else {})}
    tensors = {file: {name: x.contiguous() for name, x in group.items()} for file, group in tensors.items()}
    return write(folder / "checkpoints", Snapshot(step, tensors, {"model": made}, True))


def save_as(form, model, folder):
    weights, path = model.state_dict(), folder / "weights"
    if form == "safetensors":
        save_file(weights, path := folder / "x.safetensors")
    elif form == "converted":
        save_weights(path := folder / "x.safetensors", "ours", weights, ModelMetadata.from_model(model), model)
    elif form == "published":
        torch.save({"model": weights, "epoch": 1, "args": Namespace(lr=1)}, path := folder / "x.pth")
    elif form == "state_dict":
        torch.save(weights, path := folder / "x.pth")
    elif form == "run":
        save_run(path, model, {"name": MAE, **SIZES, "norm_pix_loss": True})
    elif form == "checkpoint":
        path = save_run(path, model, {"name": MAE, **SIZES, "norm_pix_loss": True})
    elif form == "mixin":
        model.save_pretrained(path)
    elif form == "shards":
        path.mkdir()
        shards = [dict(list(weights.items())[i::2]) for i in range(2)]
        for i, shard in enumerate(shards):
            save_file(shard, path / f"model-{i}.safetensors")
        places = {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    elif form == "bin":
        path.mkdir()
        torch.save(weights, path / "pytorch_model.bin")
    return path


FORMS = ["safetensors", "converted", "published", "state_dict", "run", "checkpoint", "mixin", "shards", "bin"]
WEIGHTS_ONLY = ["safetensors", "published", "state_dict", "shards", "bin"]  # record no norm_pix_loss and heads


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_bit_by_bit(tmp_path, logged, form):
    model = mae(norm_pix_loss=True)
    path = save_as(form, model, tmp_path)
    assert mae_fast.create_model is create_model
    options = {"norm_pix_loss": True} if form in WEIGHTS_ONLY else {}
    found = create_model(MAE, str(path), **SIZES, **options)
    assert isinstance(found, MaskedAutoencoderViT)
    assert found.training
    assert_same(found, model.state_dict())
    images, noise = inputs(model)
    assert all(torch.equal(a, b) for a, b in zip(found(images, noise=noise), model(images, noise=noise), strict=True))
    assert logged() == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path, logged, layout):
    model = mae()
    save_file(convert(model.state_dict(), "ours", layout).weights, tmp_path / "x.safetensors")
    torch.manual_seed(1)
    fresh = create_model(MAE, **SIZES).state_dict()
    torch.manual_seed(1)
    found = create_model(MAE, tmp_path / "x.safetensors", **SIZES)
    notes = logged()
    if layout == "timm":  # timm has no decoder
        assert notes == ["these weights have no decoder: it starts at random"]
        assert_same(found, {**fresh, **encoder_of(model.state_dict())})
    else:
        assert_same(found, model.state_dict())
        assert len(notes) == (layout == "lightly")


def test_a_folder_of_transformers_is_read(tmp_path, logged):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = {"image_size": 24, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 128, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1,
             "decoder_num_attention_heads": 2, "decoder_intermediate_size": 96}  # fmt: skip
    torch.manual_seed(0)
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**sizes, norm_pix_loss=True, layer_norm_eps=1e-12)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    logged()
    model = create_model(MAE, tmp_path / "theirs", **SIZES)
    assert logged() == [
        "rebuilt pos_embed, which was all zero, as the sine-cosine table of 6 x 6 patches",
        "rebuilt decoder_pos_embed, which was all zero, as the sine-cosine table of 6 x 6 patches",
    ]
    assert model.norm_pix_loss
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    model, theirs = model.double(), theirs.double()
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings.copy_(model.pos_embed)
        theirs.decoder.decoder_pos_embed.copy_(model.decoder_pos_embed)
        images, noise = inputs(model)
        loss, pred, _ = model(images, noise=noise)
        output = theirs(images, noise=noise)
    torch.testing.assert_close(pred, output.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, output.loss, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match=r"num_heads=4.*2; .*or set num_heads to 4"):
        create_model(MAE, tmp_path / "theirs", **{**SIZES, "num_heads": 2})
    with pytest.raises(UserError, match=r"decoder_num_heads=2.*3; .*or set decoder_num_heads to 2"):
        create_model(MAE, tmp_path / "theirs", **{**SIZES, "decoder_num_heads": 3})


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_folder_of_timm_is_read(tmp_path, logged, pool):
    import timm
    from timm.models import save_for_hf

    sizes = {**ENCODER, "patch_size": 4, "num_classes": 5, "global_pool": pool}
    torch.manual_seed(0)
    theirs = perturb(timm.create_model("vit_base_patch16_224", **sizes)).double().eval()
    save_for_hf(theirs, tmp_path)
    model = create_model(VIT, tmp_path, **ENCODER).double().eval()
    assert logged() == []
    assert model.global_pool == (pool == "avg")
    assert (model.pixel_mean.tolist(), model.pixel_std.tolist()) == ([0.5] * 3, [0.5] * 3)  # as timm
    images = pictures(model)
    weights = {name: x.float().double() for name, x in theirs.state_dict().items()}  # rounded as ours
    theirs.load_state_dict(weights)
    torch.testing.assert_close(model(images), theirs(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["run", "mixin", "converted"])
def test_recorded_settings_replace_the_defaults_of_the_factory(tmp_path, form):
    path = save_as(form, mae(norm_pix_loss=True), tmp_path)
    assert create_model(MAE, path, **SIZES).norm_pix_loss
    assert not create_model(MAE, path, **SIZES, norm_pix_loss=False).norm_pix_loss
    with pytest.raises(UserError, match="num_heads=4, but the model has 2"):
        create_model(VIT, path, **{**ENCODER, "num_heads": 2})
    with pytest.raises(UserError, match="decoder_num_heads=2, but the model has 3"):
        create_model(MAE, path, **{**SIZES, "decoder_num_heads": 3})


@pytest.mark.parametrize("form", ["mixin", "converted"])
def test_another_eps_than_the_recorded_one_is_logged(tmp_path, logged, form):
    path = save_as(form, mae(norm_layer=partial(nn.LayerNorm, eps=1e-3)), tmp_path)
    create_model(MAE, path, **SIZES, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    assert logged() == ["its layer norms have eps 0.001, but the model was given 1e-06"]
    for options in {}, {"norm_layer": partial(nn.LayerNorm, eps=1e-3)}:
        assert create_model(MAE, path, **SIZES, **options).norm_eps == 1e-3
        assert logged() == []


@pytest.mark.parametrize("global_pool", [False, True])
def test_a_classifier_loads_a_masked_autoencoder(tmp_path, logged, global_pool):
    model = mae().eval()
    path = save_as("published", model, tmp_path)
    found = create_model(VIT, path, **ENCODER, num_classes=7, global_pool=global_pool, drop_path_rate=0.1)
    notes = logged("INFO")
    assert notes[0].startswith("left out mask_token and ")
    assert notes[0].endswith(" more: a classifier has no decoder")
    assert [note.split(":")[0] for note in notes[1:]] == [*NEW_NORM * global_pool, NEW_HEAD]
    new = {name: x for name, x in found.state_dict().items() if name.startswith(("head", "fc_norm"))}
    kept = {name: x for name, x in encoder_of(model.state_dict()).items() if not (global_pool and name in NORM)}
    assert_same(found, {**new, **kept})
    create_model(VIT, path, **ENCODER, global_pool=global_pool)
    assert [note.split(":")[0] for note in logged()] == [*NEW_NORM * global_pool, NEW_HEAD]
    assert found.pos_embed.requires_grad
    assert found.blocks[1].drop_path.drop_prob == 0.1
    if global_pool:
        assert (found.fc_norm.weight == 1).all()
    else:
        images = pictures(model)
        features = model.forward_features(images, pool="cls")
        assert torch.equal(found.eval()(images), found.forward_head(features))


NORM = ("norm.weight", "norm.bias")


def test_heads_of_other_sizes_are_replaced(tmp_path, logged):
    model = vit(num_classes=7, global_pool=True)
    path = save_as("safetensors", model, tmp_path)
    assert_same(create_model(VIT, path, **ENCODER), model.state_dict())  # classes and pooling of the weights
    assert logged() == []
    other = create_model(VIT, path, **ENCODER, num_classes=3)
    assert logged() == ["left out head.bias, head.weight: it has 7 classes, the model 3", NEW_HEAD]
    assert_same(other, {**model.state_dict(), "head.weight": other.head.weight, "head.bias": other.head.bias})
    assert other.head.weight.shape == (3, 32)
    headless = create_model(VIT, path, **ENCODER, num_classes=0)
    assert logged() == ["left out head.bias, head.weight: it has 7 classes, the model 0"]
    assert isinstance(headless.head, nn.Identity)
    lacking = (
        r"does not have norm.weight, norm.bias, it has unexpected fc_norm.bias, fc_norm.weight; give global_pool=True"
    )
    with pytest.raises(UserError, match=lacking):
        create_model(VIT, path, **ENCODER, global_pool=False)
    logged()
    pretraining = create_model(MAE, path, **SIZES)
    assert logged() == [
        "left out head.bias, head.weight: a masked autoencoder has no head",
        "left out fc_norm.bias, fc_norm.weight: a masked autoencoder has norm instead, which starts with its initial "
        "values",
        "these weights have no decoder: it starts at random",
    ]
    assert torch.equal(pretraining.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
    assert (pretraining.norm.weight == 1).all()


def test_the_head_of_a_linear_probe_is_loaded(tmp_path, logged):
    model = probe().eval()
    path = save_as("safetensors", model, tmp_path)
    found = create_model(VIT, path, **ENCODER).eval()
    assert logged() == []
    images = pictures(model)
    assert torch.equal(found(images), model(images))
    assert (found.head[0].eps, found.head[0].affine) == (1e-6, False)
    assert isinstance(create_model(VIT, path, **ENCODER, num_classes=3).head, nn.Linear)
    assert logged()[0].endswith("it has 5 classes, the model 3")
    save_run(tmp_path / "run", model, {"name": VIT, **ENCODER, "num_classes": 5, "global_pool": False})
    again, _ = load_run(tmp_path / "run")
    assert not again.training
    assert torch.equal(again(images), model(images))
    create_model(MAE, path, **SIZES)
    assert [note.split(":")[0] for note in logged()] == [
        "left out head.0.num_batches_tracked and 4 more", "these weights have no decoder"
    ]  # fmt: skip


def test_sine_cosine_tables_are_computed_again(tmp_path, logged):
    model = mae().to(torch.bfloat16)  # also recognised if rounded
    path = save_as("safetensors", model, tmp_path)
    found = create_model(MAE, path, **{**SIZES, "img_size": (32, 16)})
    assert logged() == [
        "pos_embed was computed again (sine-cosine), from 6 x 6 to 8 x 4 patches",
        "decoder_pos_embed was computed again (sine-cosine), from 6 x 6 to 8 x 4 patches",
    ]
    assert torch.equal(found.pos_embed, sincos_2d(32, (8, 4)))
    assert torch.equal(found.decoder_pos_embed, sincos_2d(24, (8, 4)))
    rest = {name: x.float() for name, x in model.state_dict().items() if not name.endswith("pos_embed")}
    assert_same(found, {**found.state_dict(), **rest})


def test_zero_tables_of_our_own_layout_are_rebuilt(tmp_path, logged):
    model = mae()
    zeros = {name: x * 0 if name.endswith("pos_embed") else x for name, x in model.state_dict().items()}
    torch.save(zeros, tmp_path / "x.pth")
    assert_same(create_model(MAE, tmp_path / "x.pth", **SIZES), model.state_dict())
    assert logged()[0] == "rebuilt pos_embed, which was all zero, as the sine-cosine table of 6 x 6 patches"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["autoencoder", "classifier", "classifier of an autoencoder"])
def test_trained_tables_are_resized(tmp_path, logged, kind, dtype):
    model = vit() if kind == "classifier" else mae()
    if kind == "autoencoder":
        with torch.no_grad():
            model.pos_embed.add_(torch.randn_like(model.pos_embed), alpha=0.02)
    path = save_as("safetensors", model.to(dtype), tmp_path)
    name, sizes = (MAE, SIZES) if kind == "autoencoder" else (VIT, ENCODER)
    found = create_model(name, path, **{**sizes, "img_size": (32, 16)})
    assert "pos_embed was resized (bicubic), from 6 x 6 to 8 x 4 patches" in logged()
    image = model.pos_embed[0, 1:].detach().float().T.reshape(1, 32, 6, 6)
    expected = F.interpolate(image, size=(8, 4), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.equal(found.pos_embed[0, 1:], expected)
    assert torch.equal(found.pos_embed[0, 0], model.pos_embed[0, 0])


@pytest.mark.parametrize("form", ["safetensors", "run", "mixin", "converted"])
def test_tables_of_another_shape_are_resized(tmp_path, logged, form):
    """8 x 4 and 4 x 8 are both 32 patches. Runs, the mixin's folders and converted files record the grid."""
    wide = {**ENCODER, "img_size": (32, 16), "num_classes": 5}
    model = vit(**wide)
    path = tmp_path / "run"
    if form == "run":
        save_run(path, model, {"name": VIT, **wide})
    else:
        path = save_as(form, model, tmp_path)
    assert_same(create_model(VIT, path, **wide), model.state_dict())
    assert logged() == []
    turned = create_model(VIT, path, **{**wide, "img_size": (16, 32)})
    if form == "safetensors":
        assert_same(turned, model.state_dict())
        with pytest.raises(UserError, match=r"has pos_embed of \[1, 33, 32\] instead of \[1, 37, 32\]"):
            create_model(VIT, path, **{**wide, "img_size": 24})
    else:
        assert logged() == ["pos_embed was resized (bicubic), from 8 x 4 to 4 x 8 patches"]
        assert not torch.equal(turned.pos_embed, model.pos_embed)


def test_a_table_of_the_models_length_is_not_resized(tmp_path, logged):
    """The file does not record its grid. 36 patches are taken as the model's 4 x 9, not as 6 x 6."""
    model = mae(img_size=(16, 36))
    path = save_as("safetensors", model, tmp_path)
    assert_same(create_model(MAE, path, **{**SIZES, "img_size": (16, 36)}), model.state_dict())
    assert logged() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "it has depth 2 instead of 3; choose a model of these sizes"),
        ({"embed_dim": 64, "patch_size": 8}, "it has patch_size (4, 4) instead of (8, 8), embed_dim 32 instead of 64;"),
        ({"decoder_depth": 0}, "it has decoder_depth 1 instead of 0; give decoder_depth=1"),
        ({"decoder_embed_dim": 48}, "it has decoder_embed_dim 24 instead of 48; give decoder_embed_dim=24"),
        ({"mlp_ratio": 2}, "it has blocks.0.mlp.fc1.weight of [128, 32] instead of [64, 32], "),
        ({"encoder_mask_token": True}, "it does not have encoder_mask_token, it has unexpected mask_token"),
    ],
)
def test_sizes_that_do_not_fit_are_named(tmp_path, options, message):
    path = save_as("safetensors", mae(), tmp_path)
    with pytest.raises(UserError) as caught:
        create_model(MAE, path, **{**SIZES, **options})
    assert str(caught.value).startswith(f"{path} does not fit the model: {message}")


def test_long_lists_of_names_are_cut_and_logged(tmp_path, caplog):
    caplog.set_level("DEBUG", "mae_fast")
    save_file({**mae().state_dict(), **{f"x{i}.y": torch.ones(1) for i in range(500)}}, tmp_path / "y.safetensors")
    with pytest.raises(UserError) as caught:
        create_model(MAE, tmp_path / "y.safetensors", **SIZES)
    message = str(caught.value)
    assert "500 names are unknown in the layout 'ours': x0.y, x1.y, " in message
    assert "and 495 more" in message
    assert len(message) < 400
    (everything,) = [line for line in caplog.messages if line.startswith("all names: ")]
    assert everything.count(".y") == 500
    with pytest.raises(UserError) as caught:
        create_model(MAE, save_as("safetensors", mae(), tmp_path), **{**SIZES, "mlp_ratio": 2})
    assert "and 6 other shapes" in str(caught.value)
    (everything,) = [line for line in caplog.messages if line.startswith("all shapes: ")]
    assert everything.count(" instead of ") == 9


@pytest.mark.parametrize(("channels", "change"), [(1, "summed"), (2, "repeated"), (7, "repeated")])
@pytest.mark.parametrize("name", [MAE, VIT])
def test_the_patch_embedding_is_adapted_to_other_channels(tmp_path, logged, name, channels, change):
    model = mae()
    path = save_as("safetensors", model, tmp_path)
    sizes = {**SIZES} if name == MAE else {**ENCODER, "num_classes": 0}
    found = create_model(name, path, **sizes, in_chans=channels).eval()
    notes = logged()
    assert f"the patch embedding of 3 channels was {change} for {channels}" in notes
    weight, theirs = found.patch_embed.proj.weight, model.patch_embed.proj.weight
    repeated = torch.stack([theirs[:, i % 3] for i in range(channels)], 1) * 3 / channels
    torch.testing.assert_close(weight, theirs.sum(1, keepdim=True) if channels == 1 else repeated)
    if name == MAE:
        predicted = f"it predicts 48 values per patch, the model {16 * channels}; it starts at random"
        assert f"left out decoder_pred.bias, decoder_pred.weight: {predicted}" in notes
        assert torch.equal(found.decoder_embed.weight, model.decoder_embed.weight)


@pytest.mark.parametrize(
    ("name", "pretrained", "options", "message"),
    [
        ("vit_giant", None, {}, "unknown model 'vit_giant'; known: mae_vit_base_patch16, .*, vit_tiny_patch4"),
        (VIT, None, {"img_size": 30}, f"model {VIT}: the image size must be a multiple of the patch size"),
        (MAE, "nowhere.pth", {}, "weights nowhere.pth: there is no such file or folder"),
        (MAE, "checkpoints/mae.pth", {}, "weights checkpoints/mae.pth: there is no such file or folder"),
        (MAE, "https://host/mae.pth", {}, "weights https://host/mae.pth: there is no such file or folder; download it"),
        (MAE, "/nowhere/at/all", {}, "weights /nowhere/at/all: there is no such file or folder"),
        (MAE, ".", {}, "no weights in the folder"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, monkeypatch, name, pretrained, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        create_model(name, pretrained, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch):
    """A server for the repository "us/mae". ``files``: its files. ``fetched``: what clients downloaded."""
    files, fetched = {}, []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.partition("/resolve/")[2].partition("/")[2]
            if name in files:
                body, kind = files[name], "application/octet-stream"
                fetched.append(name) if self.command == "GET" else None
            elif self.path.startswith("/api/models/us/mae"):
                body, kind = json.dumps(self.about()).encode(), "application/json"
            else:
                return self.send_error(404)
            self.send_response(200)
            for key, value in {"Content-Type": kind, "Content-Length": len(body), "X-Repo-Commit": "0" * 40,
                               "ETag": f'"{name}"'}.items():  # fmt: skip
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def about(self):
            if "/tree/" in self.path:
                return [{"type": "file", "path": x, "size": len(files[x]), "oid": "0" * 40} for x in files]
            return {"_id": "0" * 24, "id": "us/mae", "modelId": "us/mae", "sha": "0" * 40, "private": False,
                    "siblings": [{"rfilename": x} for x in files]}  # fmt: skip

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    yield files, fetched
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("form", ["mixin", "shards", "bin"])
def test_only_weights_and_configs_are_downloaded(tmp_path, hub, logged, form, monkeypatch):
    model = mae(norm_pix_loss=True)
    files, fetched = hub
    folder = save_as(form, model, tmp_path)
    files |= {file.name: file.read_bytes() for file in folder.iterdir()}
    files.setdefault("config.json", b'{"norm_pix_loss": true}')
    files |= {"optimizer.bin": b"x", "other.safetensors": b"x", "train.py": b"x"}
    if form != "bin":
        files["pytorch_model.bin"] = b"x"
    found = create_model(MAE, "us/mae", **SIZES)
    assert_same(found, model.state_dict())
    assert found.norm_pix_loss
    assert logged() == []
    wanted = {"mixin": {"model.safetensors"}, "bin": {"pytorch_model.bin"}}
    shards = {"model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json"}
    assert set(fetched) == {"config.json"} | wanted.get(form, shards)
    fetched.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(create_model(MAE, "us/mae", **SIZES), model.state_dict())  # from the cache
    assert fetched == []


def test_a_cache_filled_by_other_programs_is_used(tmp_path, hub, monkeypatch):
    model = mae()
    files, _ = hub
    files |= {file.name: file.read_bytes() for file in save_as("mixin", model, tmp_path).iterdir()}
    files["pytorch_model.bin"] = b"x"
    huggingface_hub.hf_hub_download("us/mae", "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(create_model(MAE, "us/mae", **SIZES), model.state_dict())


def test_all_readers_accept_a_name_on_the_hub(tmp_path, hub):
    model = mae(embed_dim=128, num_heads=4, decoder_embed_dim=96, decoder_num_heads=3)
    hub[0].update({file.name: file.read_bytes() for file in save_as("mixin", model, tmp_path).iterdir()})
    assert_same(load_encoder("us/mae").model, model.state_dict())
    assert convert_files("us/mae", tmp_path / "x.safetensors", "ours")
    assert_same(model, load_weights(tmp_path / "x.safetensors"))


def test_repositories_without_weights_are_refused(hub, tmp_path, monkeypatch):
    hub[0]["README.md"] = b"x"
    with pytest.raises(UserError, match=r"us/mae on the Hugging Face hub has no weights: neither model\.safetensors"):
        create_model(MAE, "us/mae", **SIZES)
    (tmp_path / "no" / "suchs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file or folder no/such here, and the download .* failed.*; no has suchs;"):
        create_model(MAE, "no/such", **SIZES)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_hint_names_two_solutions(cache, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        create_model(MAE, "facebook/vit-mae-base")
    message = str(caught.value)
    assert message.startswith("there is no file or folder facebook/vit-mae-base here, and the download from ")
    assert "\n" not in message
    for way in ("a local file or folder", "HF_HOME", "HF_HUB_OFFLINE=1"):
        assert way in message


def test_the_newest_good_checkpoint_of_a_run_is_loaded(tmp_path, caplog):
    made = {"name": VIT, **ENCODER, "num_classes": 5, "global_pool": True, "drop_path_rate": 0.1}
    old, new = vit(1, global_pool=True), vit(2, global_pool=True)
    averages = {name: x * 0.5 for name, x in old.state_dict().items()}
    save_run(tmp_path, old, made, 1, averages)
    newest = save_run(tmp_path, new, made, 2)
    model, found = load_run(tmp_path)
    assert_same(model, new.state_dict())
    assert (found.step, model.training, model.blocks[1].drop_path.drop_prob) == (2, False, 0.1)
    assert_same(create_model(VIT, tmp_path, **ENCODER), new.state_dict())
    assert not caplog.records
    (newest / MODEL).write_bytes(b"")
    for load in (lambda: load_run(tmp_path)[0], lambda: create_model(VIT, tmp_path, **ENCODER)):
        assert_same(load(), old.state_dict())
        assert "skipped damaged checkpoint" in caplog.text
    assert_same(load_run(tmp_path, ema=True)[0], averages)
    with pytest.raises(UserError, match="is damaged"):
        create_model(VIT, newest, **ENCODER)
    with pytest.raises(UserError, match="no usable checkpoint in"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("made", "message"),
    [({"name": "timm/beit"}, "unknown model 'timm/beit'"), ({"name": VIT, "img_size": 30}, "multiple of the patch")],
)
def test_runs_of_other_models_are_refused(tmp_path, made, message):
    save_run(tmp_path, vit(), made)
    for load in (load_run, partial(create_model, VIT)):
        with pytest.raises(UserError, match=f"step-00000001.*{message}"):
            load(tmp_path)


NO_SQUARES = {**SIZES, "num_heads": 2, "decoder_num_heads": 3, "mlp_ratio": 2.0}
del NO_SQUARES["img_size"]
MODELS = {
    "MAE": lambda: mae(norm_pix_loss=True, in_chans=1),
    "MAE, no squares": lambda: perturb(MaskedAutoencoderViT((24, 16), (4, 8), **NO_SQUARES)),
    "ViT": lambda: vit(drop_path_rate=0.1),
    "ViT, pooled": lambda: vit(global_pool=True, qkv_bias=False, norm_layer=partial(nn.LayerNorm, eps=1e-3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_and_from_pretrained_keep_the_model(tmp_path, capsys, name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    found = type(model).from_pretrained(tmp_path)
    assert not found.training
    assert_same(found, model.state_dict())
    assert str(found) == str(model)  # every layer, with its sizes and eps
    assert {m.eps for m in found.modules() if isinstance(m, nn.LayerNorm)} == {
        {"MAE, no squares": 1e-5, "ViT, pooled": 1e-3}.get(name, 1e-6)
    }
    images, noise = inputs(model)
    if isinstance(model, MaskedAutoencoderViT):
        for ours, theirs in zip(found(images, noise=noise), model(images, noise=noise), strict=True):
            assert torch.equal(ours, theirs)
        assert found.norm_pix_loss == model.norm_pix_loss
    else:
        assert torch.equal(found(images), model(images))
        assert [b.drop_path.drop_prob for b in found.blocks] == [b.drop_path.drop_prob for b in model.blocks]
    found.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_from_pretrained_is_strict(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    for changed in (
        {name: x for name, x in weights.items() if name != "blocks.1.attn.qkv.bias"},
        {**weights, "surplus": torch.ones(1)},
        {**weights, "head.bias": torch.ones(4)},
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=r"blocks.1.attn.qkv.bias|surplus|head.bias"):
            VisionTransformer.from_pretrained(tmp_path)


def test_a_copy_of_a_subclass_can_be_saved(tmp_path):
    class Mine(MaskedAutoencoderViT):
        def __init__(self, extra: int = 3, **kwargs):
            super().__init__(**kwargs)
            self.extra = nn.Linear(extra, 1)

    options = {**SIZES, "patch_size": 4, "norm_layer": partial(nn.LayerNorm, eps=1e-4)}
    model = copy.deepcopy(Mine(5, **options))
    model.save_pretrained(tmp_path)
    found = Mine.from_pretrained(tmp_path)
    assert_same(found, model.state_dict())
    assert found.blocks[0].norm1.eps == 1e-4
    assert Mine.from_pretrained(tmp_path, norm_layer=nn.LayerNorm).norm.eps == 1e-5
