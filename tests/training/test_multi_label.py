"""Fine-tuning on images with several labels."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from support import one_thread  # noqa: F401
from torch.nn import functional as F

from mae_fast.data.label_table import multi_labelled, read_label_table
from mae_fast.data.loader import LoaderConfig
from mae_fast.errors import UserError
from mae_fast.ops.patches import without_missing
from mae_fast.training.config import FINETUNE_PRESETS, LINPROBE_PRESETS, FinetuneConfig, LinprobeConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.tasks.class_metrics import multi_label_metrics
from mae_fast.training.tasks.classifier import evaluate
from mae_fast.training.tasks.classify import Finetuning, LinearProbing, finetune

ALONE = DistContext(torch.device("cpu"))
SMALL = {"num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "log_every": 1, "epochs": 2,
         "warmup_epochs": 1, "batch_size": 24}  # fmt: skip


def config(kind, images, run, **changes):
    preset = (LINPROBE_PRESETS if kind is LinprobeConfig else FINETUNE_PRESETS)["tiny"]
    return kind(**{**preset, **SMALL, "data_path": images, "output_dir": run, **changes})


@pytest.fixture
def table(labelled_images, tmp_path):
    """A table of the labels "warm", "even", and "none", which no image has."""
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "warm", "even", "none"])
        for image in sorted(labelled_images.rglob("*.jpg")):
            name = image.relative_to(labelled_images)
            rows.writerow([name, int(name.parts[1] == "r"), 1 - int(name.stem) % 2, ""])
    return path


def write(path, text):
    path.write_text(text)
    return path


def test_labels_are_columns_or_a_list(tmp_path):
    columns = read_label_table(write(tmp_path / "a.csv", "file,cat,dog,sun\na/1.jpg,1,0,1\n2.jpg,,1.0,0\n"))
    assert columns.classes == ("cat", "dog", "sun")
    lists = read_label_table(write(tmp_path / "b.csv", "file,labels\na/1.jpg,sun|cat\n2.jpg,dog\n"))
    assert lists.classes == columns.classes
    assert lists.rows == columns.rows == {"a/1.jpg": (1, 0, 1), "2.jpg": (0, 1, 0)}
    commas = read_label_table(write(tmp_path / "c.csv", 'file,labels\na/1.jpg,"sun, cat"\n2.jpg,dog\n3.jpg,\n'))
    assert commas.rows == {**columns.rows, "3.jpg": (0, 0, 0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,cat,dog\n1.jpg,1,-1\n", "1.jpg has the value '-1'; give 1, 0 or"),
        ("file,cat,dog\n1.jpg,1\n", "line 2: 2 columns, the header has 3"),
        ("file,cat,dog\n1.jpg,1,0\n1.jpg,1,0\n", "line 3: second row of 1.jpg"),
        ("file,labels\n1.jpg,cat\n", "has one label, cat; two or more are needed; .* two class folders"),
        ("file,cat\n1.jpg,1\n2.jpg,0\n3.jpg,\n", "has one label, cat; "),
        ("file,labels\n1.jpg,\n", "has no labels"),
        ("file,labels\n1.jpg,nan\n2.jpg,cat|dog\n", "1.jpg has the label 'nan'; leave the field .* empty"),
        ("file,cat,dog\n1.jpg,1,nan\n", "1.jpg has the value 'nan'; give 1, 0 or"),
        ("1.jpg,cat|dog\n2.jpg,sun\n", "has no header: its first line is a row of the image 1.jpg"),
        (",file,cat,dog\n0,1.jpg,1,0\n", "column 1 has no name in the header; .*index=False"),
        ("file,cat,,dog\n1.jpg,1,0,0\n", "column 3 has no name"),
        ("file,cat,dog, cat\n1.jpg,1,0,0\n", "several columns with the name cat"),
        ("file,cat,dog\n", "has no rows of images"),
        ("\n", "is empty, or its first line is"),
        ("", "is empty"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_label_table(write(tmp_path / "a.csv", text))


def test_a_table_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"missing.csv, the file of labels, does not exist"):
        read_label_table(tmp_path / "missing.csv")


def test_an_image_without_a_row_is_an_error(labelled_images, table, tmp_path):
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if "train/r/03" not in line))
    with pytest.raises(UserError, match=r"1 of 72 images in .*train have no row in .*labels.csv: r/03.jpg"):
        Finetuning(config(FinetuneConfig, labelled_images, tmp_path / "run", multi_label=table), ALONE)


def test_images_beside_folders_and_names_in_both_splits_are_read(labelled_images, tmp_path, caplog):
    image = next((labelled_images / "train").rglob("*.jpg"))
    names = {"train": ["a/1.jpg", "a/b/3.jpg", "2.jpg"], "val": ["2.jpg", "c/4.jpg"]}
    for split, paths in names.items():
        for path in paths:
            (tmp_path / split / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, tmp_path / split / path)
    rows = "a/1.jpg,cat|dog\na/b/3.jpg,dog\n2.jpg,\nval/c/4.jpg,\n5.jpg,cat\n"
    path = write(tmp_path / "labels.csv", f"file,labels\n{rows}")
    with caplog.at_level("INFO"):
        train, val = multi_labelled(tmp_path, path)
    assert train.names == ("2.jpg", "a/1.jpg", "a/b/3.jpg")
    assert train.labels == ((0, 0), (1, 1), (0, 1))
    assert val.names == ("2.jpg", "c/4.jpg")
    assert "1 rows match images in both train/ and val/ (2.jpg). Write train/2.jpg and val/2.jpg" in caplog.text
    assert "1 rows match no image" in caplog.text
    assert f"no image in {tmp_path / 'val'} has a label" in caplog.text
    assert f"no image in {tmp_path / 'train'} has a label" not in caplog.text


def test_label_metrics_equal_scikit_learn():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 4), torch.randint(2, (40, 4))
    labels[:, 2] = 0
    found = multi_label_metrics(iter([(logits[:7], labels[:7]), (logits[7:], labels[7:])]), list("abcd"), ALONE)
    expected = [100 * average_precision_score(labels[:, i], logits[:, i]) for i in (0, 1, 3)]
    assert [found["per_class"][name]["ap"] for name in "abd"] == pytest.approx(expected, abs=0.006)
    assert found["per_class"]["c"] == {"count": 0, "ap": None, "recall": None, "precision": 0.0}
    assert found["val_map"] == pytest.approx(sum(expected) / 3)
    assert found["val_loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels.float()).item())


@pytest.mark.parametrize("kind", [FinetuneConfig, LinprobeConfig])
def test_the_loss_is_binary_cross_entropy_of_the_labels(labelled_images, table, tmp_path, kind):
    made = config(kind, labelled_images, tmp_path / "run", multi_label=table,
                  **({"mixup": 0.8, "reprob": 0.0} if kind is FinetuneConfig else {}))  # fmt: skip
    task = (Finetuning if kind is FinetuneConfig else LinearProbing)(made, ALONE)
    loader = LoaderConfig(size=task.size, batch_size=24, batches_per_epoch=3, repeats=2)
    batch = next(iter(task.batches(task.source, loader)))
    names = [task.source.names[i] for i in batch.ids.tolist()]
    expected = torch.tensor([[name[0] == "r", 1 - int(name[2:4]) % 2, 0] for name in names]).float()
    images, targets = task.inputs(batch, 0)
    if kind is FinetuneConfig:  # nothing is mixed
        assert torch.equal(images, without_missing(batch.images, task.mean, task.std, None))
    assert torch.equal(targets.float(), expected)
    logits = torch.randn(len(names), 3)
    loss = task.loss(lambda _: logits, None, targets)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(logits, expected).item(), rel=1e-6)


def test_a_multi_label_run_resumes_and_is_evaluated(labelled_images, table, tmp_path, one_thread):  # noqa: F811
    run = tmp_path / "run"
    made = config(FinetuneConfig, labelled_images, run, multi_label=table, epochs=6, lr=2e-3, layer_decay=1.0,
                  reprob=0.0, eval_every=6)  # fmt: skip
    finetune(made)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["per_class"]["warm"]["ap"] > 90
    newest = sorted((run / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    assert (state["classes"], state["multi_label"]) == (["warm", "even", "none"], True)
    predictions = tmp_path / "predictions.csv"
    update = {"eval_only": True, "predictions": predictions, "multi_label": None}
    figures = evaluate(made.model_copy(update=update))  # the run's own table
    assert figures["val_map"] == pytest.approx(lines[-1]["val_map"], rel=1e-5)
    rows = list(csv.DictReader(predictions.open()))
    assert list(rows[0]) == ["image", "warm", "even", "none"]
    assert any(float(row["warm"]) + float(row["even"]) > 1.1 for row in rows)  # of each label, not of one of them
    assert all((float(row["warm"]) > 0.5) == (row["image"][0] == "r") for row in rows)
    weights = load_file(newest / "model.safetensors")
    shutil.rmtree(newest)
    finetune(made)
    assert all(torch.equal(x, weights[name]) for name, x in load_file(newest / "model.safetensors").items())


@pytest.mark.parametrize(
    "flag", [{"mixup": 0.5}, {"smoothing": 0.1}, {"sampler": "balanced"}, {"class_weights": "balanced"}]
)
def test_flags_that_mix_or_weight_classes_are_refused(flag):
    with pytest.raises(UserError, match="has no effect with --multi-label"):
        FinetuneConfig.with_preset("tiny", data_path="data", output_dir="run", multi_label="labels.csv", **flag)
