"""The logistic regression on features: each row of its scores belongs to its own encoder."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import command

from mae_fast.errors import UserError
from mae_fast.evaluation.logreg_probe import Score, logreg_probe
from mae_fast.models.mae import build
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw

MODEL = "mae_vit_tiny_patch4"
UNTRAINED = "untrained encoder"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Dark and light images; three times as many dark ones."""
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
    """A run whose encoder sees no pixels; its averaged weights are those of an encoder that does."""
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
    """An encoder that sees nothing takes all images for the commoner class."""
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
    with pytest.raises(UserError, match="same class folders"):
        logreg_probe(blind, tmp_path)
