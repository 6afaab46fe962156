"""The transfer demo on small random maps: its runs, its table, its pictures."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_fast import api
from mae_fast.studies.common import final_figure
from mae_fast.studies.demo_data import Recipe, build_from
from mae_fast.studies.scenes import CLASSES, SIDE, UNLABELLED, build_scenes
from mae_fast.studies.transfer import (
    COLOURS,
    MAE,
    SCRATCH,
    STARTS,
    Budget,
    _with_most_classes,
    coloured,
    few_scenes,
    transfer_demo,
)
from mae_fast.training.config import DetectConfig, SegmentConfig

RECIPE = Recipe(val_share=0.6, least=(0, 0), contrast=0.0, purity=0.0)


def maps(_: Path) -> tuple[np.ndarray, np.ndarray]:
    """2 x 3 blocks of the demo; each class of land cover has its own grey."""
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 17, (15, 23)), np.ones((40, 40)))[: 448 * 4 // 3, : 672 * 4 // 3].astype(np.uint8)
    at = [((2 * np.arange(n) + 1) * m // (2 * n)) for n, m in zip((448, 672), labels.shape, strict=True)]
    grey = labels[at[0]][:, at[1]] * 12
    noise = rng.integers(0, 12, (448, 672, 3), dtype=np.uint8)
    return grey[..., None] + noise, labels


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Both datasets, as made by ``data demo`` and ``data scenes``."""
    root = tmp_path_factory.mktemp("transfer")
    build_from(root / "demo", RECIPE, maps)
    build_scenes(root / "scenes", RECIPE, maps)
    return root


def few_of(root: Path) -> Path:
    return few_scenes(root / "scenes", root / "few", 5)


def test_few_scenes_are_links_to_evenly_spaced_pairs(sets):
    few = few_of(sets)
    names = sorted(path.name for path in (sets / "scenes" / "train" / "images").iterdir())
    chosen = [names[i * len(names) // 5] for i in range(5)]
    for kind in ("images", "masks"):
        assert sorted(path.name for path in (few / "train" / kind).iterdir()) == chosen
        for split in ("train", "val"):
            for path in (few / split / kind).iterdir():
                assert path.resolve() == (sets / "scenes" / split / kind / path.name).resolve()
        assert len([*(few / "val" / kind).iterdir()]) == len([*(sets / "scenes" / "val" / kind).iterdir()])
    assert (few / "classes.txt").read_text().split() == list(CLASSES)
    assert few_of(sets) == few  # a second call changes nothing


def test_colours():
    drawn = coloured(np.array([[*range(len(CLASSES)), UNLABELLED]]))
    assert len({tuple(colour) for colour in drawn[0].tolist()}) == len(CLASSES) + 1
    assert "#{:02x}{:02x}{:02x}".format(*drawn[0, 3]) == COLOURS[3]


def test_drawn_masks_have_most_classes(sets):
    masks = sets / "scenes" / "val" / "masks"
    counts = {path.name: len(np.unique(np.asarray(Image.open(path)))) for path in masks.iterdir()}
    chosen = _with_most_classes(masks, 3)
    assert len({*chosen}) == 3
    most = sorted(counts.values())[-max(3, len(counts) // 4)]
    assert all(counts[name] >= most for name in chosen)


@pytest.mark.slow
def test_transfer_demo(sets, caplog):
    caplog.set_level(logging.INFO, "mae_fast")
    configs = []

    def run(config):
        configs.append(config)
        small = {"device": "cpu", "dtype": "fp32", "num_workers": 0, "image_decoder": "pil"}
        if not getattr(config, "eval_only", False):
            small |= {"warmup_epochs": 0, "batch_size": min(config.batch_size, 8)}
        api.run(config.changed(**small))

    budget = Budget(images=(4,), seeds=(3, 4), pretrain_epochs=2, segment_steps=1, detect_steps=1, batch_size=4)
    results = transfer_demo(sets, budget, run)
    assert {*results} == {("segmentation", start) for start in STARTS} | {("detection", s) for s in (MAE, SCRATCH)}
    assert results["segmentation", "MAE, frozen"]["mIoU, 4 images"].accuracies == [
        final_figure(sets / f"segment-4-MAE-frozen-{seed}", "val_miou") for seed in budget.seeds
    ]
    scratch = final_figure(sets / "detect-from-scratch-3", "val_box_ap50")
    assert results["detection", SCRATCH]["box AP50"].accuracies == [scratch]
    table = (sets / "transfer.md").read_text()
    assert table in caplog.text
    caplog.clear()
    for row in results.values():
        assert all(str(result) in table for result in row.values())
    for name in ("masks.png", "objects.png"):
        assert Image.open(sets / name).width > 500
    predicted = [*(sets / "segment-4-MAE-fine-tuned-3" / "predictions").glob("*.png")]
    assert len(predicted) == len([*(sets / "scenes" / "val" / "images").iterdir()])
    assert Image.open(predicted[0]).size == (SIDE, SIDE)
    assert isinstance(json.loads((sets / "detect-MAE-fine-tuned-3" / "predictions.json").read_text()), list)
    trained = [
        config for config in configs if isinstance(config, SegmentConfig | DetectConfig) and not config.eval_only
    ]
    assert len(trained) == 2 * len(STARTS) + 2
    for config in trained:
        name = config.output_dir.name
        assert (config.weights is not None) == ("MAE" in name)
        assert config.freeze_encoder == ("frozen" in name)
        assert (config.layer_decay == 1) == ("scratch" in name)
    assert transfer_demo(sets, budget, run) == results  # all runs are finished
    assert caplog.text.count("is finished") == len(trained) + 2
