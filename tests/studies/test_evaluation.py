"""The demo's evaluation on a handful of pictures; nearest neighbours against scikit-learn's."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from mae_fast.cli import main
from mae_fast.errors import UserError
from mae_fast.evaluation.knn import knn, knn_votes
from mae_fast.studies.evaluation import Budget, Result, evaluate_demo, few_labels, final_figure


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for colour in range(3):
            folder = root / "data" / split / "rgb"[colour]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[..., colour] += 60
                Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
    return root


def test_evaluate_demo(pictures, monkeypatch, capsys):
    verbs = []

    def run(verb, words):
        verbs.append(verb)
        small = [
            "--device",
            "cpu",
            "--dtype",
            "fp32",
            "--num-workers",
            "0",
            "--image-decoder",
            "pil",
            "--warmup-epochs",
            "0",
        ]
        batch = [] if verb != "pretrain" else ["--batch-size", "12"]
        monkeypatch.setattr(sys, "argv", ["mae-fast", verb, *words, *small, *batch])
        main()

    budget = Budget(labels=(4, 8), seeds=(0, 1), pretrain_epochs=1, finetune_steps=2, probe_steps=2)
    results = evaluate_demo(pictures, run, budget)
    assert sorted(results) == [f"{kind}, {start} weights" for kind in ("fine-tuned", "linear probe")
                               for start in ("MAE", "random")]  # fmt: skip
    for name, each in results.items():
        verb, start = "finetune" if "fine" in name else "linprobe", "MAE" if "MAE" in name else "random"
        for labels, result in each.items():
            runs = [pictures / f"{verb}-{start}-{labels}-{seed}" for seed in (0, 1)]
            assert result.accuracies == [final_figure(run) for run in runs]
    table = (pictures / "evaluation.md").read_text()
    assert table in capsys.readouterr().out
    for each in results.values():
        assert str(each[4]) in table
    assert Image.open(pictures / "evaluation.png").width > 500
    trained = len(verbs)
    assert trained == 2 * (1 + 2 * 4)
    assert evaluate_demo(pictures, run, budget) == results  # every run says that it is finished
    assert capsys.readouterr().out.count("is finished") == trained


def test_results_have_a_spread():
    assert str(Result([70.0, 72.0, 74.0])) == "72.0 +- 2.0"
    assert Result([70.0]).deviation == 0


def test_few_labels_are_evenly_spaced(pictures, tmp_path):
    assert few_labels(pictures / "data", tmp_path, 4) == 12
    assert [path.name for path in sorted((tmp_path / "train" / "g").iterdir())] == [
        "00.jpg",
        "03.jpg",
        "06.jpg",
        "09.jpg",
    ]
    assert len(list((tmp_path / "val").rglob("*.jpg"))) == 12
    few_labels(pictures / "data", tmp_path, 4)  # again
    with pytest.raises(UserError, match="holds 12 images, 13 are wanted"):
        few_labels(pictures / "data", tmp_path, 13)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_as_scikit_learn(k):
    generator = torch.Generator().manual_seed(0)
    known, asked = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (60, 25))
    labels = torch.randint(4, (60,), generator=generator)
    votes = knn_votes(asked, known, labels, 4, k, temperature=0.2)
    theirs = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / 0.2), metric="cosine", algorithm="brute").fit(
        known.numpy(), labels.numpy()
    )
    expected = theirs.predict_proba(asked.numpy())
    np.testing.assert_allclose((votes / votes.sum(1, keepdim=True)).numpy(), expected, atol=1e-9)


def test_knn_of_a_run_and_of_a_file(pictures, tmp_path, capsys):
    from safetensors.torch import save_file

    from mae_fast.models.mae import build

    torch.manual_seed(0)
    model = build("mae_vit_tiny_patch4")
    save_file(model.state_dict(), tmp_path / "mae.safetensors")
    top1, top5 = knn(str(tmp_path / "mae.safetensors"), pictures / "data", "mae_vit_tiny_patch4", k=5)
    assert top5 == 1  # of three classes
    assert top1 > 0.5
    assert f"top-1 {top1:.2%}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--k must be 1 or more"):
        knn(str(tmp_path / "mae.safetensors"), pictures / "data", "mae_vit_tiny_patch4", k=0)


def test_votes_do_not_overflow():
    known, labels = torch.tensor([[1.0, 0.0], [1.0, 0.02], [0.0, 1.0]]), torch.tensor([1, 0, 0])
    votes = knn_votes(torch.tensor([[1.0, 0.0]]), known, labels, 2, 3, temperature=1e-5)
    assert votes.isfinite().all()
    assert votes.argmax() == 1
