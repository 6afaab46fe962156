"""Classes of unequal size: class weights, the balanced sampler, and metrics per class."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support
from support import one_thread  # noqa: F401
from torch.nn import functional as F

from mae_fast.data.loader import REPEAT, KeyedBatches, LoaderConfig
from mae_fast.errors import UserError
from mae_fast.training.config import FINETUNE_PRESETS, LINPROBE_PRESETS, FinetuneConfig, LinprobeConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.tasks.class_metrics import accuracies, format_per_class
from mae_fast.training.tasks.classify import Finetuning, LinearProbing, finetune

ALONE = DistContext(torch.device("cpu"))
LABELS = [0] * 90 + [1] * 9 + [3] * 2  # no image of class 2


SMALL = {"num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "log_every": 1, "epochs": 2,
         "warmup_epochs": 1, "batch_size": 24}  # fmt: skip


def config(kind, images, run, **changes):
    preset = (LINPROBE_PRESETS if kind is LinprobeConfig else FINETUNE_PRESETS)["tiny"]
    return kind(**{**preset, **SMALL, "data_path": images, "output_dir": run, **changes})


def newest(run):
    return sorted((run / "checkpoints").iterdir())[-1]


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def unequal(labelled_images, tmp_path):
    """24, 6 and 2 training images of three classes, and no held-out image of the first class."""
    root = tmp_path / "data"
    shutil.copytree(labelled_images, root)
    for name, count in (("g", 6), ("r", 2)):
        for path in sorted((root / "train" / name).iterdir())[count:]:
            path.unlink()
    shutil.rmtree(root / "val" / "b")
    return root


def test_class_metrics_equal_scikit_learn():
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3, 3, 5])  # classes 2, 4 and 6 have no image
    logits = torch.randn(10, 7)
    logits[:, 6] = -9  # never predicted
    logits[7, 3] = 9
    names = list("abcdefg")
    found = accuracies(iter([(logits[:1], labels[:1]), (logits[1:], labels[1:])]), names, ALONE)
    guesses = logits.argmax(1)
    precision, recall, _, count = precision_recall_fscore_support(
        labels, guesses, labels=range(7), zero_division=np.nan
    )
    for i, name in enumerate(names):
        ours = found["per_class"][name]
        assert ours["count"] == count[i]
        for key, value in (("precision", precision[i]), ("recall", recall[i])):
            assert ours[key] == (None if np.isnan(value) else pytest.approx(100 * value, abs=0.005)), (name, key)
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        assert found["val_balanced_acc"] == pytest.approx(100 * balanced_accuracy_score(labels, guesses))
    assert found["val_acc1"] == pytest.approx(100 * (guesses == labels).float().mean().item())
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert found["val_acc5"] == pytest.approx(100 * top5)
    assert found["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert "val_acc5" not in accuracies(iter([(logits[:4, :5], labels[:4])]), names[:5], ALONE)


def test_a_long_table_shows_the_classes_of_the_lowest_recall():
    figures = {f"class{i}": {"count": 1, "recall": 100.0 - i, "precision": None} for i in range(30)}
    figures["empty"] = {"count": 0, "recall": None, "precision": None}
    text = format_per_class(figures)
    assert "20 of 31 classes" in text
    assert "class29" in text
    assert "class9 " not in text
    assert "empty" not in text


@pytest.mark.parametrize("mixup", [0.8, 0.0], ids=["mixed", "labels"])
def test_balanced_weights_scale_the_terms_of_each_class(unequal, tmp_path, mixup):
    """The loss is the mean over images of -sum_c w_c t_c log p_c, w_c = n / (k count_c), for labels and for mixed and
    smoothed targets."""
    kind, task_type = (FinetuneConfig, Finetuning) if mixup else (LinprobeConfig, LinearProbing)
    changes = {"mixup": mixup, "smoothing": 0.1} if mixup else {}
    task = task_type(config(kind, unequal, tmp_path / "run", class_weights="balanced", **changes), ALONE)
    weights = torch.tensor([32 / (3 * 24), 32 / (3 * 6), 32 / (3 * 2)])
    labels = torch.tensor([0, 1, 2, 0])
    targets = F.one_hot(labels, 3).float()
    if mixup:
        _, targets = task.mixing(torch.randn(4, 3, 32, 32), labels, 0)
        assert (targets > 0).all()
    logits = torch.randn(4, 3)
    loss = task.loss(lambda _: logits, None, targets if mixup else labels)
    expected = -(weights * targets * logits.log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_the_balanced_sampler_draws_as_many_images_of_each_class(world):
    options = {"size": (8, 8), "batch_size": 10 // world, "epochs": 3, "seed": 5, "world": world, "balanced": True}

    def keys(first=0):
        ranks = [
            list(KeyedBatches(101, LoaderConfig(**options, rank=rank, first=first), LABELS)) for rank in range(world)
        ]
        return [[key for part in step for key in part] for step in zip(*ranks, strict=True)]

    steps = keys()
    assert len(steps) == 30
    assert keys(first=17) == steps[17:]
    for epoch in range(3):
        drawn = [key for step in steps[10 * epoch : 10 * epoch + 10] for key in step]
        assert len({*drawn}) == 100  # an image that comes again has another key, so another crop
        assert {key % REPEAT for key, _ in drawn} == {epoch}
        counts = Counter(LABELS[sample] for _, sample in drawn)
        assert set(counts) == {0, 1, 3}
        assert max(counts.values()) - min(counts.values()) <= 2  # one image of 101 is left out
        of_rare = Counter(sample for _, sample in drawn if LABELS[sample] == 1)
        assert max(of_rare.values()) - min(of_rare.values()) <= 1
    seen = {sample for step in steps for _, sample in step if LABELS[sample] == 0}
    assert len(seen) > 60  # others in each epoch


def test_a_balanced_run_resumes_exactly_and_logs_each_class(unequal, tmp_path, caplog, one_thread):  # noqa: F811
    """One class has no held-out images."""
    options = {"sampler": "balanced", "batch_size": 8, "save_every": 3, "reprob": 0.25}
    made = config(FinetuneConfig, unequal, tmp_path / "run", **options)
    finetune(made)
    whole, last = load_file(newest(tmp_path / "run") / "model.safetensors"), log(tmp_path / "run")[-1]
    assert {name: row["count"] for name, row in last["per_class"].items()} == {"b": 0, "g": 8, "r": 7}
    assert last["per_class"]["b"]["recall"] is None
    assert "val_acc5" not in last
    assert "recall" in caplog.text
    shutil.rmtree(newest(tmp_path / "run"))
    finetune(made)
    again = load_file(newest(tmp_path / "run") / "model.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    (unequal / "val" / "z").mkdir()
    shutil.copy(unequal / "val" / "g" / "00.jpg", unequal / "val" / "z")
    with pytest.raises(UserError, match=r"val has classes that .*train does not have: z"):
        finetune(made)


def test_cached_features_are_drawn_by_class_too(unequal, tmp_path):
    (unequal / "train" / "b" / "00.jpg").write_bytes(b"no image")
    made = config(LinprobeConfig, unequal, tmp_path / "run", cache_features=True, sampler="balanced",
                  max_bad_fraction=0.5)  # fmt: skip
    task = LinearProbing(made, ALONE)
    (batch,) = task.batches(task.source, LoaderConfig(size=task.size, batch_size=30, batches_per_epoch=1))
    assert batch.labels.tolist() == [task.source.labels[i] for i in batch.ids.tolist()]
    assert max(batch.labels.bincount()) - min(batch.labels.bincount()) <= 3
