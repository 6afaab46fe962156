"""The logistic regression probe: fits against scikit-learn, and scores of the right encoder in each row."""

import json
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from support import command

from mae_fast.data.sources import open_source
from mae_fast.errors import UserError
from mae_fast.evaluation import knn as knn_module
from mae_fast.evaluation import logreg_probe as probe_module
from mae_fast.evaluation.encoding import LoadOptions
from mae_fast.evaluation.logistic import fit_logistic
from mae_fast.evaluation.logreg_probe import Score, logreg_probe
from mae_fast.models.mae import build
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw
from mae_fast.weights.create import load_encoder

MODEL = "mae_vit_tiny_patch4"
UNTRAINED = "untrained encoder"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Dark and light images. There are three times as many dark ones."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, level, count in (("dark", 40, 12), ("light", 200, 4)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(level, 20, (40, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """A run whose encoder ignores pixels. Its averaged weights are from an encoder that does not."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    model = build(MODEL, depth=1, decoder_depth=1)
    averages = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.nn.init.zeros_(model.patch_embed.proj.weight)
    state = {"model": {"name": MODEL, "depth": 1, "decoder_depth": 1}, "mask_ratio": 0.75}
    saved = checkpoint.snapshot(7, model, adamw(model, 0.1, 0.05), state, averages)
    checkpoint.write(folder / "checkpoints", saved)
    return folder


def test_scores_are_those_of_the_encoder_in_the_row(blind, pictures):
    """With an encoder that ignores pixels, the more frequent class is predicted for all images."""
    scores = logreg_probe(blind, pictures)
    pixels = "raw pixels (15 principal components)"
    assert scores == {"pre-trained encoder": Score(0.75, 0.5), UNTRAINED: Score(1, 1), pixels: Score(1, 1)}
    assert str(scores["pre-trained encoder"]) == "0.750 (balanced 0.500)"
    averaged = logreg_probe(blind, pictures, ema=True)
    assert averaged == {**scores, "pre-trained encoder": Score(1, 1)}


def test_the_verb_prints_a_line_for_each(blind, pictures, monkeypatch, capsys):
    done = command(monkeypatch, capsys, "logreg-probe", blind, "--data-path", pictures)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "probe on pre-trained encoder: held-out accuracy 0.750 (balanced 0.500)",
        "probe on untrained encoder: held-out accuracy 1.000 (balanced 1.000)",
        "probe on raw pixels (15 principal components): held-out accuracy 1.000 (balanced 1.000)",
    ]


def test_both_splits_must_have_the_same_classes(blind, pictures, tmp_path):
    for split, classes in (("train", ("a", "b")), ("val", ("a", "c"))):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.jpg").write_bytes((pictures / "val" / "dark" / "0.jpg").read_bytes())
    with pytest.raises(UserError, match="does not have: c"):
        logreg_probe(blind, tmp_path)


@pytest.mark.parametrize("penalty", [1, 25.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_fit_equals_scikit_learn(classes, penalty):
    """On correlated features of different scales, one of them constant."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 300)
    features = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 12)) + rng.normal(size=(classes, 12))[labels]
    features = (features * np.logspace(-2, 2, 12)).astype(np.float32)
    features[:, 3] = 7
    ours = fit_logistic(torch.from_numpy(features), torch.from_numpy(labels), classes, penalty)
    scaler = StandardScaler().fit(features)
    # For two classes, scikit-learn has one vector, the difference of our two. Its squared norm is twice as large.
    theirs = LogisticRegression(C=(2 if classes == 2 else 1) / penalty, tol=1e-8, max_iter=100_000)
    theirs.fit(scaler.transform(features).astype(float), labels)
    weight = ours.weight.numpy().T
    if classes == 2:
        weight = weight[1:] - weight[:1]
    np.testing.assert_allclose(weight, theirs.coef_, atol=2e-3)
    agree = ours.predict(torch.from_numpy(features)).numpy() == theirs.predict(scaler.transform(features))
    assert agree.all()


@pytest.mark.parametrize("verb", ["knn", "logreg-probe"])
def test_a_bad_image_is_left_out(verb, blind, pictures, tmp_path, monkeypatch, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "train" / "dark" / "3.jpg").write_bytes(b"no image")
    line = [verb, blind, "--data-path", tmp_path / "data"]
    refused = command(monkeypatch, capsys, *line)
    assert refused.returncode == 2
    assert "1 of 16 images cannot be used, more than the allowed 1.0%" in refused.stderr
    assert "--max-bad-fraction" in refused.stderr
    done = command(monkeypatch, capsys, *line, "--max-bad-fraction", 0.1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "skipped 'dark/3.jpg' (not an image" in done.stderr


@pytest.mark.parametrize("verb", ["knn", "logreg-probe"])
def test_images_that_a_check_found_are_not_read_again(verb, blind, pictures, tmp_path, monkeypatch, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "train" / "dark" / "3.jpg").write_bytes(b"no image")
    check = ["data", "check", tmp_path / "data" / "train", "--max-bad-fraction", 0.1]
    assert command(monkeypatch, capsys, *check).returncode == 0
    pixels = (pictures / "train" / "dark" / "3.jpg").read_bytes()
    (tmp_path / "data" / "train" / "dark" / "3.jpg").write_bytes(pixels)  # good now, but listed
    read = defaultdict(list)

    def remember(loaded, source, *options, **more):
        for batch in made(loaded, source, *options, **more):
            read[source.root.name] += [source.names[i] for i in batch.ids]
            yield batch

    made = probe_module.usable_images
    for module in (probe_module, knn_module):
        monkeypatch.setattr(module, "usable_images", remember)
    done = command(monkeypatch, capsys, verb, blind, "--data-path", tmp_path / "data", "--max-bad-fraction", 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert {*open_source(tmp_path / "data" / "train").names} - {*read["train"]} == {"dark/3.jpg"}
    assert len({*read["val"]}) == 16


def test_images_are_rotated_if_the_run_rotated_them(blind, pictures, tmp_path, monkeypatch):
    """The upper half of each picture is dark. An EXIF tag rotates it."""
    seen = {}

    def remember(loaded, source, options, crop_pct=None):
        for batch in made(loaded, source, options, crop_pct):
            seen[source.root.name] = batch.images
            yield batch

    made = probe_module.usable_images
    monkeypatch.setattr(probe_module, "usable_images", remember)
    pixels = np.full((32, 32, 3), 250, np.uint8)
    pixels[:16] = 5
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.jpg", exif=exif)
    shutil.copytree(blind, tmp_path / "run")
    for turned in (False, True):
        (tmp_path / "run" / "config.json").write_text(json.dumps({"exif": turned}))
        logreg_probe(tmp_path / "run", tmp_path)
        above, below = seen["val"][0, :16].float().mean(), seen["val"][0, 16:].float().mean()
        assert (above > below) == turned


def test_cached_pixels_are_scaled_down(blind, tmp_path):
    """Larger images are averaged to 32 x 32 for the baseline of raw pixels."""
    torch.manual_seed(0)
    model = build(MODEL, img_size=64, depth=1, decoder_depth=1)
    save_file(model.state_dict(), tmp_path / "large.safetensors")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (70, 64)).save(tmp_path / split / name / "0.png")
    loaded = load_encoder(tmp_path / "large.safetensors")
    encoded = probe_module._encode(loaded, loaded.model, open_source(tmp_path / "train"), LoadOptions())
    assert (encoded.pixels.shape, encoded.pixels.dtype) == ((2, 3 * 32 * 32), torch.uint8)


def test_the_untrained_encoder_is_a_new_model():
    torch.manual_seed(3)
    trained = build(MODEL, depth=1, decoder_depth=1)
    torch.manual_seed(0)
    expected = build(MODEL, depth=1, decoder_depth=1).state_dict()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = probe_module._untrained(trained).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, found[name]) for name, x in expected.items())


def test_principal_components_do_not_depend_on_the_seed():
    pixels = torch.randint(0, 256, (40, 30), dtype=torch.uint8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    centre, axes = probe_module._principal_components(pixels, 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(
        torch.equal(x, y) for x, y in zip((centre, axes), probe_module._principal_components(pixels, 8), strict=True)
    )
