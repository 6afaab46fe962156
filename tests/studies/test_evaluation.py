"""The demo's evaluation on a handful of pictures."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_fast import api
from mae_fast.errors import UserError
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


def test_evaluate_demo(pictures, caplog):
    caplog.set_level(logging.INFO, "mae_fast")
    configs = []

    def run(config):
        configs.append(config)
        small = {"device": "cpu", "dtype": "fp32", "num_workers": 0, "image_decoder": "pil", "warmup_epochs": 0}
        api.run(config.changed(**small, batch_size=min(config.batch_size, 12)))

    budget = Budget(labels=(4, 8), seeds=(0, 1), pretrain_epochs=2, finetune_steps=2, probe_steps=2)
    results = evaluate_demo(pictures, budget, run)
    assert sorted(results) == [f"{kind}, {start} weights" for kind in ("fine-tuned", "linear probe")
                               for start in ("MAE", "random")]  # fmt: skip
    for name, each in results.items():
        verb, start = "finetune" if "fine" in name else "linprobe", "MAE" if "MAE" in name else "random"
        for labels, result in each.items():
            runs = [pictures / f"{verb}-{start}-{labels}-{seed}" for seed in (0, 1)]
            assert result.accuracies == [final_figure(run) for run in runs]
    table = (pictures / "evaluation.md").read_text()
    assert table in caplog.text
    caplog.clear()
    for each in results.values():
        assert str(each[4]) in table
    assert Image.open(pictures / "evaluation.png").width > 500
    trained = len(configs)
    assert trained == 2 * (1 + 2 * 4)
    assert evaluate_demo(pictures, budget, run) == results  # every run says that it is finished
    assert caplog.text.count("is finished") == trained


def test_results_have_a_spread():
    assert str(Result([70.0, 72.0, 74.0])) == "72.0 +- 2.0"
    assert Result([70.0]).deviation == 0


def test_few_labels_are_evenly_spaced(pictures, tmp_path):
    assert few_labels(pictures / "data", tmp_path, 4) == tmp_path
    assert len(list((tmp_path / "train").rglob("*.jpg"))) == 12
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
