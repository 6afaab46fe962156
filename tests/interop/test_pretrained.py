"""Models with weights of any origin: the values arrive, what was left out or made anew is told, the rest is refused."""

import argparse
import copy
import json
import warnings
from functools import partial

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import inputs, one_thread, perturb, pictures, tiny, tiny_vit  # noqa: F401
from torch import nn

import mae_fast
from mae_fast.errors import UserError
from mae_fast.interop import convert
from mae_fast.interop.pretrained import of_run
from mae_fast.models import MaskedAutoencoderViT, VisionTransformer, build, vit
from mae_fast.models.position import resized, sincos_2d
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw

MAE, VIT = "mae_vit_tiny_patch4", "vit_tiny_patch4"
SMALL = {"depth": 1, "img_size": 16}
SMALL_MAE = {**SMALL, "decoder_depth": 1}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return perturb(build(MAE, **SMALL_MAE))


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return perturb(vit.build(VIT, **SMALL, num_classes=7, global_pool=True))


def told(name, pretrained, **kwargs):
    """The model, and what the user was told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = mae_fast.create_model(name, pretrained, **kwargs)
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    return model, [str(w.message) for w in caught]


def saved(weights, path):
    save_file({name: x.contiguous() for name, x in weights.items()}, path)
    return path


def encoder_of(model):
    return {k: x for k, x in model.state_dict().items() if not k.startswith(("decoder_", "mask_token", "head", "fc_"))}


def same(model, expected):
    """All of ``expected`` is in ``model``, bit by bit."""
    own = model.state_dict()
    return all(torch.equal(own[name], x) for name, x in expected.items())


def of_layout(model, layout):
    return convert(model.state_dict(), "ours", layout).weights


@pytest.mark.parametrize("layout", ["ours", "transformers", "transformers5", "lightly", "mmpretrain"])
def test_a_whole_file_of_any_layout(tmp_path, mae, layout):
    path = saved(of_layout(mae, layout), tmp_path / "x.safetensors")
    model, notes = told(MAE, path, **SMALL_MAE)
    assert same(model, mae.state_dict())
    assert [note for note in notes if "mask_token" not in note] == []  # lightly has one besides
    images, noise = inputs(mae)
    assert torch.equal(model(images, 0.75, noise)[1], mae(images, 0.75, noise)[1])


def test_a_published_file(tmp_path, mae):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": mae.state_dict(), "epoch": 1, "args": argparse.Namespace(lr=1)}, path)
    model, notes = told("mae_vit_tiny_patch4_dec96d2b", str(path), **SMALL_MAE)
    assert (same(model, mae.state_dict()), notes) == (True, [])


def test_a_file_of_the_encoder_alone_leaves_the_decoder_random_and_says_so(tmp_path, mae):
    path = saved(of_layout(mae, "timm"), tmp_path / "x.safetensors")
    torch.manual_seed(1)
    fresh = build(MAE, **SMALL_MAE)
    torch.manual_seed(1)
    model, notes = told(MAE, path, **SMALL_MAE)
    assert notes == [f"{path}: these weights have no decoder: it starts at random"]
    assert same(model, encoder_of(mae))
    assert same(model, {k: x for k, x in fresh.state_dict().items() if k.startswith("decoder_") or k == "mask_token"})


@pytest.mark.parametrize("global_pool", [True, False])
def test_a_classifier_of_a_masked_autoencoder(tmp_path, mae, global_pool):
    path = saved(mae.state_dict(), tmp_path / "x.safetensors")
    model, notes = told(VIT, path, **SMALL, num_classes=3, global_pool=global_pool)
    expected = {k: x for k, x in encoder_of(mae).items() if not (global_pool and k.startswith("norm."))}
    assert same(model, expected)
    said = "\n".join(notes)
    assert " and 19 more: a classifier has no decoder" in said
    assert "the head starts at random" in said
    assert ("left out norm.bias, norm.weight: with global_pool, fc_norm" in said) == global_pool
    assert len(notes) == 2 + global_pool


def test_a_classifier_has_the_files_classes_and_pooling_unless_told_otherwise(tmp_path, classifier):
    path = saved(classifier.state_dict(), tmp_path / "x.safetensors")
    model, notes = told(VIT, path, **SMALL)
    assert (notes, model.num_classes, model.global_pool) == ([], 7, True)
    images = pictures(classifier)
    assert torch.equal(model.eval()(images), classifier.eval()(images))

    model, notes = told(VIT, path, **SMALL, num_classes=3)
    assert (model.num_classes, model.head.weight.shape) == (3, (3, 128))
    assert notes == [
        f"{path}: left out head.bias, head.weight: it is of 7 classes, the model of 3",
        f"{path}: the head starts at random",
    ]
    bare, notes = told(VIT, path, **SMALL, num_classes=0)
    assert notes == [f"{path}: left out head.bias, head.weight: it is of 7 classes, the model of 0"]
    assert torch.equal(bare(images), classifier.forward_features(images))

    with pytest.raises(UserError, match=r"lacks norm\.weight, lacks norm\.bias, has fc_norm.*give global_pool=True"):
        told(VIT, path, **SMALL, global_pool=False)
    with pytest.raises(UserError, match="norm"):  # a masked autoencoder's encoder has a norm
        told(MAE, path, **SMALL_MAE)


def test_a_head_means_nothing_to_a_masked_autoencoder(tmp_path, mae):
    torch.manual_seed(0)
    other = perturb(vit.build(VIT, **SMALL, num_classes=7))
    path = saved(other.state_dict(), tmp_path / "x.safetensors")
    model, notes = told(MAE, path, **SMALL_MAE)
    assert same(model, encoder_of(other))
    assert "left out head.bias, head.weight: a masked autoencoder has no head" in notes[0]


def probed(**options):
    """A classifier with the published linear probe's head."""
    torch.manual_seed(0)
    model = perturb(vit.build(VIT, **SMALL, num_classes=7, **options))
    norm = nn.BatchNorm1d(128, affine=False, eps=1e-6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model.head = nn.Sequential(norm, model.head)
    return model.eval()


def test_a_linear_probe_keeps_its_batch_norm(tmp_path):
    model = probed()
    path = saved(model.state_dict(), tmp_path / "x.safetensors")
    got, notes = told(VIT, path, **SMALL)
    assert notes == []
    images = pictures(model)
    assert torch.equal(got.eval()(images), model(images))
    got, notes = told(VIT, path, **SMALL, num_classes=3)
    assert isinstance(got.head, nn.Linear)
    assert len(notes) == 2


def test_tables_of_another_grid(tmp_path, mae):
    """A masked autoencoder's are made anew, others resized as the published code does."""
    path = saved(mae.state_dict(), tmp_path / "x.safetensors")
    model, notes = told(MAE, path, **SMALL_MAE | {"img_size": (16, 32)})
    assert torch.equal(model.pos_embed, sincos_2d(128, (4, 8)))
    assert torch.equal(model.decoder_pos_embed, sincos_2d(96, (4, 8)))
    assert notes == [
        f"{path}: {name} of 4 x 4 patches was made anew for 4 x 8: sine-cosine"
        for name in ("pos_embed", "decoder_pos_embed")
    ]
    model, notes = told(VIT, path, depth=1, img_size=32)
    assert torch.equal(model.pos_embed, resized(mae.pos_embed, (4, 4), (8, 8)))
    assert f"{path}: pos_embed of 4 x 4 patches was resized to 8 x 8: bicubic" in notes

    with torch.no_grad():
        mae.pos_embed.add_(0.1)
    path = saved(mae.state_dict(), tmp_path / "y.safetensors")
    model, notes = told(MAE, path, **SMALL_MAE | {"img_size": 32})
    assert torch.equal(model.pos_embed, resized(mae.pos_embed, (4, 4), (8, 8)))
    assert f"{path}: pos_embed of 4 x 4 patches was resized to 8 x 8: bicubic" in notes

    half = {name: x.bfloat16() for name, x in tiny(img_size=16).state_dict().items()}
    model, notes = told_of(saved(half, tmp_path / "z.safetensors"))
    assert torch.equal(model.pos_embed, sincos_2d(32, (8, 8)))


def told_of(path):
    options = {"embed_dim": 32, "num_heads": 4, "depth": 2, "decoder_embed_dim": 24, "decoder_depth": 1}
    return told(MAE, path, img_size=32, **options, decoder_num_heads=2)


def test_tables_that_are_not_square_are_refused(tmp_path):
    other = build(MAE, **SMALL_MAE | {"img_size": (16, 32)})
    path = saved(other.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"pos_embed of \[1, 33, 128\] for \[1, 17, 128\].*decoder_pos_embed of"):
        told(MAE, path, **SMALL_MAE)


def test_all_zero_tables_are_rebuilt_and_said(tmp_path, mae):
    weights = of_layout(mae, "transformers")
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        weights[name] = torch.zeros_like(weights[name])
    model, notes = told(MAE, saved(weights, tmp_path / "x.safetensors"), **SMALL_MAE)
    assert same(model, {"pos_embed": sincos_2d(128, (4, 4)), "decoder_pos_embed": sincos_2d(96, (4, 4))})
    assert len(notes) == 2
    assert all("all zero" in note for note in notes)


def test_everything_that_does_not_fit_is_listed(tmp_path, mae):
    path = saved(mae.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError) as caught:
        told(MAE, path, **SMALL_MAE | {"depth": 2, "decoder_depth": 0, "decoder_embed_dim": 48})
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        "lacks blocks.1.norm1.weight", "lacks blocks.1.mlp.fc2.bias", "has decoder_blocks.0.attn.qkv.weight besides",
        "has mask_token of [1, 1, 96] for [1, 1, 48]", "has decoder_pos_embed of [1, 17, 96] for [1, 17, 48]",
    ):  # fmt: skip
        assert part in said
    weights = mae.state_dict() | {"blocks.0.ls1.gamma": torch.ones(128)}
    with pytest.raises(UserError, match=r"blocks\.0\.ls1\.gamma"):
        told(MAE, saved(weights, tmp_path / "y.safetensors"), **SMALL_MAE)


def test_names_and_sizes():
    with pytest.raises(ValueError, match="unknown model 'resnet50'"):
        mae_fast.create_model("resnet50")
    assert isinstance(mae_fast.create_model(VIT, **SMALL), VisionTransformer)
    assert isinstance(mae_fast.create_model(MAE, **SMALL_MAE), MaskedAutoencoderViT)


def run_of(folder, model, about, average=None):
    saved = checkpoint.snapshot(7, model, adamw(model, 0.1, 0.05), {"model": about, "mask_ratio": 0.5}, average)
    checkpoint.write(folder / "checkpoints", saved)
    return folder


def test_runs_of_ours(tmp_path, mae):
    run = run_of(tmp_path / "run", mae, {"name": MAE, **SMALL_MAE})
    for path in (run, run / "checkpoints" / "step-00000007"):
        model, notes = told(MAE, path, **SMALL_MAE)
        assert (same(model, mae.state_dict()), notes) == (True, [])
    model, found = of_run(run)
    assert (same(model, mae.state_dict()), model.training, found.step) == (True, False, 7)

    probe = probed(global_pool=True)
    run = run_of(tmp_path / "probe", probe, {"name": VIT, **SMALL, "num_classes": 7, "global_pool": True})
    images = pictures(probe)
    assert torch.equal(of_run(run)[0](images), probe(images))
    assert torch.equal(told(VIT, run, **SMALL)[0].eval()(images), probe(images))

    run = run_of(tmp_path / "timm", probe, {"name": "timm/vit_tiny", "num_classes": 7})
    with pytest.raises(UserError, match="not one of this package's: unknown model 'timm/vit_tiny'"):
        of_run(run)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no usable checkpoint"):
        told(MAE, tmp_path / "empty")


def test_a_damaged_checkpoint_is_passed_over(tmp_path, mae, capsys):
    run = run_of(tmp_path / "run", mae, {"name": MAE, **SMALL_MAE})
    older, newer = run / "checkpoints" / "step-00000007", run / "checkpoints" / "step-00000009"
    newer.mkdir()
    for file in older.iterdir():
        (newer / file.name).write_bytes(file.read_bytes()[:-1])
    model, _ = told(MAE, run, **SMALL_MAE)
    assert same(model, mae.state_dict())
    assert "step-00000009" in capsys.readouterr().err


def test_folders(tmp_path, mae):
    weights = of_layout(mae, "transformers")
    folder = tmp_path / "whole"
    folder.mkdir()
    saved(weights, folder / "model.safetensors")
    assert same(told(MAE, folder, **SMALL_MAE)[0], mae.state_dict())
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of_it in parts.items():
        saved({name: weights[name] for name in of_it}, folder / file)
    places = {name: file for file, of_it in parts.items() for name in of_it}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(told(MAE, folder, **SMALL_MAE)[0], mae.state_dict())
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"no weights in the folder"):
        told(MAE, tmp_path / "bare")
    with pytest.raises(UserError, match="there is no such file or folder"):
        told(MAE, tmp_path / "nowhere.pth")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_hubs_cache_is_enough(cache, mae, file):
    """As another machine's 'hf download' leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--organisation--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    weights = of_layout(mae, "transformers")
    save_file(weights, snapshot / file) if "safe" in file else torch.save(weights, snapshot / file)
    model, notes = told(MAE, "organisation/name", **SMALL_MAE)
    assert (same(model, mae.state_dict()), notes) == (True, [])


def test_what_is_fetched(tmp_path, monkeypatch, mae):
    """Pickled weights only where there are no others."""
    asked = []

    def fetch(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if "pytorch_model.bin" in allow_patterns:
            torch.save(of_layout(mae, "transformers"), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert same(told(MAE, "organisation/name", **SMALL_MAE)[0], mae.state_dict())
    assert asked == [
        ("organisation/name", [f"{stem}.{end}", f"{stem}.{end}.index.json", f"{stem}-*.{end}"])
        for stem, end in (("model", "safetensors"), ("pytorch_model", "bin"))
    ]


def test_without_a_network(cache):
    with pytest.raises(UserError) as caught:
        told(MAE, "organisation/name")
    said = str(caught.value)
    assert "\n" not in said
    for way in ("local file or folder", "HF_HOME", "HF_HUB_OFFLINE=1", "pretrained=None"):
        assert way in said


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (partial(tiny, img_size=(16, 24), norm_pix_loss=True, in_chans=2), lambda m, i, n: m(i, 0.75, n)[:2]),
        (partial(tiny_vit, global_pool=True, qkv_bias=False, drop_path_rate=0.1), lambda m, i, n: [m(i)]),
        (partial(tiny, norm_layer=nn.LayerNorm), lambda m, i, n: m(i, 0.75, n)[:2]),
    ],
    ids=["mae", "vit", "default norm"],
)
def test_mixin_round_trip(tmp_path, capsys, make, call):
    model = make().eval()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    again = type(model).from_pretrained(tmp_path)
    eps = [[m.eps for m in x.modules() if isinstance(m, nn.LayerNorm)] for x in (model, again)]
    assert eps[0] == eps[1]
    assert again.patch_embed.img_size == model.patch_embed.img_size
    images, noise = inputs(model)
    found, expected = call(again, images, noise), call(model, images, noise)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_mixin_of_factories_copies_and_subclasses(tmp_path):
    class Mine(MaskedAutoencoderViT):
        pass

    options = {"embed_dim": 32, "num_heads": 2, "norm_layer": partial(nn.LayerNorm, eps=1e-3)}
    made = build(MAE, **SMALL_MAE)
    for i, model in enumerate((made, copy.deepcopy(made), Mine(**SMALL, **options))):
        model.save_pretrained(tmp_path / str(i))
        again = type(model).from_pretrained(tmp_path / str(i))
        assert again.norm.eps == model.norm.eps
        assert same(again, model.state_dict())
    assert Mine.from_pretrained(tmp_path / "2", depth=1, norm_layer=nn.LayerNorm).norm.eps == 1e-5


def test_mixin_refuses_what_does_not_fit(tmp_path):
    build(MAE, **SMALL_MAE).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"blocks\.1"):
        MaskedAutoencoderViT.from_pretrained(tmp_path, depth=2)


def test_a_mixin_folder_is_a_folder_of_weights(tmp_path, mae):
    mae.save_pretrained(tmp_path)
    model, notes = told(MAE, tmp_path, **SMALL_MAE)
    assert (same(model, mae.state_dict()), notes) == (True, [])
