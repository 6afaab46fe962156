"""Fine-tuning on images whose classes are in a CSV file."""

import csv
import json

import pytest
import torch
from support import one_thread  # noqa: F401

from mae_fast.data.label_table import class_labelled, multi_labelled
from mae_fast.errors import UserError
from mae_fast.training.config import FINETUNE_PRESETS, FinetuneConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.tasks.classifier import evaluate
from mae_fast.training.tasks.classify import Finetuning, finetune

SMALL = {"num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "log_every": 1, "epochs": 6,
         "warmup_epochs": 1, "batch_size": 24, "lr": 2e-3, "layer_decay": 1.0}  # fmt: skip


def config(data, **changes):
    preset = FINETUNE_PRESETS["tiny"]
    return FinetuneConfig(**{**preset, **SMALL, "data_path": data, "output_dir": data / "run", **changes})


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def flat(labelled_images, tmp_path):
    """The labelled images without class folders, and a table of their classes."""
    rows = [("file", "class")]
    for image in sorted(labelled_images.rglob("*.jpg")):
        split, name = image.parts[-3], f"{image.parts[-2]}-{image.name}"
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / split / name).symlink_to(image)
        rows.append((f"{split}/{name}", {"r": "Rot, dunkel", "g": "green", "b": "blue"}[image.parts[-2]]))
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([*rows, ("gone.jpg", "unseen")])
    return tmp_path


CLASSES = ("Rot, dunkel", "blue", "green")


def test_images_get_the_classes_of_the_table(flat, caplog):
    with caplog.at_level("INFO"):
        train, val = class_labelled(flat, flat / "labels.csv")
    assert train.classes == val.classes == CLASSES
    order = {"r": 0, "b": 1, "g": 2}
    for source, count in ((train, 72), (val, 24)):
        assert source.labels == tuple(order[name[0]] for name in source.names)
        assert len(source) == count
    assert "labels.csv: 1 rows match no image" in caplog.text


def test_a_run_with_labels_resumes_and_is_evaluated(flat, one_thread, caplog):  # noqa: F811
    made = config(flat, labels=flat / "labels.csv")
    found = finetune(made).metrics
    assert found["val_acc1"] > 80
    again = {"eval_only": True, "labels": None}
    assert evaluate(made.model_copy(update=again))["val_acc1"] == pytest.approx(found["val_acc1"])
    state = json.loads(next((flat / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["classes"] == [*CLASSES]
    (flat / "other").mkdir()
    (flat / "other" / "r-00.jpg").symlink_to((flat / "val" / "r-00.jpg").resolve())
    other = write(flat / "other.csv", "file,class\nr-00.jpg,blue\n")
    update = {"eval_only": True, "data_path": flat / "other", "labels": other}
    assert evaluate(made.model_copy(update=update))["val_acc1"] == 0
    write(other, "file,class\nr-00.jpg,yellow\n")
    with pytest.raises(UserError, match=r"classes that .*run does not have: yellow"):
        evaluate(made.model_copy(update=update))
    with pytest.raises(UserError, match="have a single class each; leave --multi-label out"):
        evaluate(made.model_copy(update={**update, "labels": None, "multi_label": other}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("train/r-03.jpg", "train/x.jpg"), "1 of 72 images in .* have no row.*: r-03.jpg"),
        (lambda text: text.replace("train/g-03.jpg,green", "train/g-03.jpg,"), "g-03.jpg has no class"),
        (lambda text: text.replace("class", "a,b").replace("blue", "1,1").replace("green", "1,0"), "columns"),
        (lambda text: text.replace("blue", "green").replace('"Rot, dunkel"', "green"), "all .* have the class green"),
        (lambda text: text.replace("val/b-03.jpg,blue", "val/b-03.jpg,pink"), "val has classes .*: pink"),
    ],
    ids=["no row", "no class", "columns", "one class", "other classes"],
)
def test_a_wrong_table_is_an_error(flat, change, message):
    table = flat / "labels.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(UserError, match=message):
        class_labelled(flat, table)


def test_the_table_needs_two_columns(flat):
    table = write(flat / "wide.csv", "file,cat,dog\n1.jpg,1,0\n")
    with pytest.raises(UserError, match=r"the columns file, cat, dog, but --labels needs two.*--multi-label"):
        class_labelled(flat, table)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_columns_may_be_separated_by_other_characters(flat, mark):
    with (flat / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    with (flat / "excel.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=mark).writerows(rows)
    expected = [source.labels for source in class_labelled(flat, flat / "labels.csv")]
    assert [source.labels for source in class_labelled(flat, flat / "excel.csv")] == expected


def test_a_table_must_be_utf8(flat):
    (flat / "latin.csv").write_bytes("file,class\nbär.jpg,cat\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 text .*save it as UTF-8"):
        class_labelled(flat, flat / "latin.csv")


def test_labels_and_multi_label_exclude_each_other(flat):
    table = flat / "labels.csv"
    with pytest.raises(UserError, match="--labels and --multi-label exclude each other"):
        Finetuning(config(flat, labels=table, multi_label=table), DistContext(torch.device("cpu")))


def test_single_labels_in_a_multi_label_table_are_a_warning(flat, caplog):
    table = flat / "labels.csv"
    table.write_text(table.read_text().replace('"Rot, dunkel"', "red"))
    multi_labelled(flat, table)
    assert "each image has one label; for classes that exclude each other, use --labels" in caplog.text
