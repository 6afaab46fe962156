"""Folders of images: unambiguous ones are read, others are refused, and ignored files are logged."""

from pathlib import Path

import pytest
import zoo
from PIL import Image

from mae_fast.data.folders import choose_folder, data_root, split_folder
from mae_fast.data.segmentation import open_segmentation
from mae_fast.data.sources import held_out_source, labelled, open_source
from mae_fast.errors import UserError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zoo.jpeg())
    return root


def test_images_beside_class_folders_are_refused_or_read_without_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "x.jpg", "y.png", "cat/1.jpg", "dog/1.jpg")
    message = r"2 pictures \(x.jpg, y.png\) beside 2 class folders \(cat, dog\).*pre-training reads both"
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)
    make(tmp_path, "notes.pdf", "cat/deep/2.jpg")
    mixed = open_source(tmp_path, "train", mixed=True)
    assert mixed.names == ("cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg", "x.jpg", "y.png")
    assert mixed.labels is None
    assert mixed.left_out == "1 other file (.pdf: 1)"
    assert "beside 2 class folders (cat, dog): all images are read, without labels" in caplog.text
    (tmp_path / "x.jpg").unlink()
    (tmp_path / "y.png").rename(tmp_path / ".y.png")
    assert open_source(tmp_path).classes == ("cat", "dog")


def test_images_beside_folders_without_images_are_read(tmp_path: Path) -> None:
    make(tmp_path, "x.jpg", ".thumbnails/x.jpg", "notes/read.txt")
    assert open_source(tmp_path).names == ("x.jpg",)


@pytest.mark.parametrize("name", ["n01.tar", "0.tar"])
def test_shards_beside_class_folders_are_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path, name, "n01/1.jpg", "n02/1.jpg")
    with pytest.raises(UserError, match=rf"1 tar shard \({name}\) beside 2 class folders \(n01, n02\)"):
        open_source(tmp_path)


@pytest.mark.parametrize("names", [("train.tar", "val.tar"), ("imagenet-train-000.tar", "imagenet_validation_00.tar")])
def test_shards_of_several_splits_in_one_folder_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    make(tmp_path, *names)
    with pytest.raises(UserError, match=rf"several splits: {names[0]}, {names[1]}"):
        open_source(tmp_path, "train")


def test_ignored_archives_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "train.zip", "old.tar.gz", "cat/1.jpg", "cat/2.txt", "cat/Thumbs.db", "dog/1.jpg", "bad.jsonl")
    assert len(open_source(tmp_path)) == 2
    assert caplog.messages == [f"{tmp_path}: left out 3 other files (.gz: 1, .zip: 1, .txt: 1)"]
    caplog.clear()
    make(tmp_path / "alone", "train.zip")
    with pytest.raises(UserError, match=r"no images in .*: found 1 other file \(.zip: 1\); unpack the archives"):
        open_source(tmp_path / "alone")
    with pytest.raises(UserError, match="is not a folder; unpack it"):
        open_source(tmp_path / "train.zip")


def test_hidden_files_and_folders_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = ".ipynb_checkpoints/1.jpg", "@eaDir/1.jpg", "cat/._1.jpg", "cat/.cache/1.jpg", "__MACOSX/1.jpg"
    make(tmp_path, "cat/1.jpg", "dog/1.jpg", "cat/.DS_Store", *hidden)
    source = open_source(tmp_path)
    assert source.names == ("cat/1.jpg", "dog/1.jpg")
    assert source.classes == ("cat", "dog")
    assert len(caplog.messages) == 1
    assert all(name in caplog.text for name in (".ipynb_checkpoints", "@eaDir", "._1.jpg", ".cache", "__MACOSX"))


def test_a_hidden_folder_is_read_if_it_is_given(tmp_path: Path) -> None:
    make(tmp_path, ".data/.set/cat/1.jpg", ".data/.set/dog/1.jpg")
    assert len(open_source(tmp_path / ".data" / ".set")) == 2


def test_folders_without_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "cat/1.jpg")
    (tmp_path / "dog").mkdir()
    assert open_source(tmp_path).classes == ("cat",)
    assert caplog.messages == [f"{tmp_path}: left out 1 folder without images (dog)"]


def test_class_folders_that_differ_in_case_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "Cat/1.jpg", "cat/1.jpg", "dog/1.jpg")
    assert open_source(tmp_path).classes == ("Cat", "cat", "dog")
    assert "Cat and cat differ only in case" in caplog.text


@pytest.mark.parametrize("name", ["1.jfif", "1.JPG", "1.jpe", "1.Jpeg", "1.TIF"])
def test_all_extensions_of_images_are_read(tmp_path: Path, name: str) -> None:
    assert open_source(make(tmp_path, f"cat/{name}")).names == (f"cat/{name}",)


def test_images_without_an_extension_are_read_if_there_are_no_others(tmp_path: Path) -> None:
    make(tmp_path, *(f"cat/{i:02}" for i in range(40)), "cat/list.txt")
    assert len(open_source(tmp_path)) == 40
    make(tmp_path / "flat", "a", "b")
    assert open_source(tmp_path / "flat").names == ("a", "b")


def test_files_without_an_extension_are_counted_beside_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "cat/1.jpg", "cat/2")
    assert len(open_source(tmp_path)) == 1
    assert caplog.messages == [f"{tmp_path}: left out 1 other file (no extension: 1)"]


def test_other_files_are_named_if_there_are_no_images(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.heic", "cat/2.HEIC", "dog/x.avif")
    with pytest.raises(UserError, match=r"found 3 other files \(.heic: 2, .avif: 1\).*; convert them to one of .bmp"):
        open_source(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "README").write_text("no image")
    with pytest.raises(UserError, match=r"found 1 other file .no extension: 1"):
        open_source(tmp_path / "text")


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("val", ["val", "Val", "valid", "validation", "VALIDATION", "test", "Test"])
def test_all_spellings_of_splits_are_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train: str, val: str
) -> None:
    make(tmp_path, f"{train}/a/1.jpg", f"{train}/b/1.jpg", f"{val}/a/1.jpg", f"{val}/b/1.jpg")
    assert [source.root.name for source in labelled(tmp_path)] == [train, val]
    assert open_source(tmp_path, "train").root.name == train
    assert open_source(tmp_path, "val").root.name == val
    assert ("has no val/" in caplog.text) == (val.lower() == "test")


def test_several_spellings_of_a_split_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "validation/a/1.jpg", "test/a/1.jpg")
    with pytest.raises(UserError, match="has val/ and validation/"):
        labelled(tmp_path)
    (tmp_path / "validation").rename(tmp_path / ".validation")
    assert labelled(tmp_path)[1].root == tmp_path / "val"
    make(tmp_path, "Train/a/1.jpg")
    with pytest.raises(UserError, match="has Train/ and train/"):
        open_source(tmp_path, "train")


def test_train_is_read_if_there_is_no_val(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    assert open_source(tmp_path, "val").root == tmp_path / "train"
    assert open_source(tmp_path / "train", "val").root == tmp_path / "train"


def test_a_folder_train_beside_class_folders_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "bus/1.jpg", "car/1.jpg", "train/1.jpg")
    with pytest.raises(UserError, match=r"train/ beside other image folders \(bus, car\)"):
        open_source(tmp_path, "train")
    assert open_source(tmp_path).classes == ("bus", "car", "train")
    make(tmp_path / "split", "extra/1.jpg", "train/a/1.jpg")
    assert choose_folder(tmp_path / "split", "train").name == "train"


@pytest.mark.parametrize("name", ["val", "Validation", "test"])
def test_training_refuses_val_or_test_without_train(tmp_path: Path, name: str) -> None:
    make(tmp_path, f"{name}/a/1.jpg", f"{name}/b/1.jpg", "train2/a/1.jpg")
    with pytest.raises(UserError, match=f"has {name}/ but no train/"):
        open_source(tmp_path, "train")
    assert len(open_source(tmp_path / name, "train")) == 2
    assert len(open_source(tmp_path)) == 3


def test_links_to_parent_folders_are_left_out(tmp_path: Path) -> None:
    root = make(tmp_path / "data/set", "cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg")
    make(tmp_path / "store", "up/1.jpg", "more/3.jpg")
    for link, target in {
        "cat/loop": "..", "cat/deep/far": "../../..", "all": ".", "dog/self": ".", "dog/more": tmp_path / "store/more",
        "store": tmp_path / "store/up",
    }.items():  # fmt: skip
        (root / link).symlink_to(target)
    (tmp_path / "store/up/back").symlink_to(root)
    (tmp_path / "store/more/whole").symlink_to(tmp_path / "store")
    source = open_source(root)
    assert source.names == ("cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg", "dog/more/3.jpg", "store/1.jpg")
    assert "6 links to a parent folder (set/all, cat/loop, deep/far, dog/self, more/whole, ...)" in source.left_out


def test_a_single_folder_around_the_splits_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "set/set/train/a/1.jpg", "set/set/train/b/1.jpg", "set/set/val/a/1.jpg", "set/__MACOSX/x.jpg")
    assert [source.root for source in labelled(tmp_path)] == [tmp_path / "set/set/train", tmp_path / "set/set/val"]
    assert open_source(tmp_path, "train").root == tmp_path / "set/set/train"
    assert "set/set/" in caplog.text
    make(tmp_path, "other/1.jpg")
    assert data_root(tmp_path) == tmp_path  # no longer the only folder
    with pytest.raises(UserError, match=r"train does not exist; .* has other, set"):
        labelled(tmp_path)


def test_a_single_class_is_refused_and_its_folders_are_named(tmp_path: Path) -> None:
    make(tmp_path, "train/set/cat/1.jpg", "train/set/dog/1.jpg", "val/set/cat/1.jpg")
    with pytest.raises(UserError, match=r"2 images of one class, set .its folder contains cat, dog"):
        labelled(tmp_path)


def test_classes_of_val_are_matched_by_name(tmp_path: Path) -> None:
    make(tmp_path, "val/zebra/1.jpg", "val/cat/1.jpg")
    source = held_out_source(tmp_path, ["zebra", "dog", "cat"], "run")
    assert (source.labels, source.classes) == ((2, 0), ("zebra", "dog", "cat"))
    assert held_out_source(tmp_path / "val", ["cat", "zebra"], "run").labels == (0, 1)
    with pytest.raises(UserError, match="val has classes that run does not have: zebra; run has 2 classes: cat, dog"):
        held_out_source(tmp_path, ["cat", "dog"], "run")
    make(tmp_path / "alone", "train/cat/1.jpg")
    with pytest.raises(UserError, match="val does not exist"):
        held_out_source(tmp_path / "alone", ["cat", "dog"], "run")


def test_split_folder_of_a_file_is_none(tmp_path: Path) -> None:
    make(tmp_path, "train")
    assert split_folder(tmp_path, "train") is None
    assert split_folder(tmp_path / "train", "train") is None


def test_segmentation_folders_follow_the_same_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("Train", "validation"):
        make(tmp_path, f"set/{split}/images/1.jpg", f"set/{split}/images/._1.jpg", f"set/{split}/images/2.heic")
        (tmp_path / "set" / split / "masks").mkdir()
        for name in ("1.png", "._1.png"):
            Image.new("L", (40, 40), 1).save(tmp_path / "set" / split / "masks" / name)
    train, val = open_segmentation(tmp_path)
    assert (train.names, val.names, val.masks.names) == (("1.jpg",), ("1.jpg",), ("1.png",))
    assert sum("left out" in message for message in caplog.messages) == 2
    assert "1 other file (.heic: 1)" in caplog.text
