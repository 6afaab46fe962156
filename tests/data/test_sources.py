"""Sources of images: folders, tar shards, saved datasets, and their errors."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import zoo
from PIL import Image

from mae_fast.data.decode import BadImage
from mae_fast.data.sources import HuggingFace, labelled, open_source
from mae_fast.errors import UserError


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def test_class_folders_give_labels(tmp_path: Path) -> None:
    make(tmp_path, "b/1.png", "a/2.jpg", "a/deep/er/1.PNG", "b/10.webp")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    source = open_source(tmp_path)
    assert source.classes == ("a", "b")
    assert list(source.names) == [
        "a/2.jpg", "a/deep/er/1.PNG", "b/1.png", "b/10.webp",
    ]  # fmt: skip
    assert source.labels == (0, 0, 1, 1)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    make(tmp_path, "x.png", "a.png")
    source = open_source(tmp_path)
    assert list(source.names) == ["a.png", "x.png"]
    assert source.labels is None


def test_a_split_is_read_if_it_exists(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "val/a/2.png")
    found = open_source(tmp_path, "train")
    assert (found.root, found.names) == (tmp_path / "train", ("a/1.png",))
    make(tmp_path / "other", "a/1.png")
    assert len(open_source(tmp_path / "other", "train")) == 1


def test_missing_and_empty_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images"):
        open_source(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        open_source(tmp_path / "file")


def tar(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_tar_shards_are_read(tmp_path: Path) -> None:
    images = [zoo.jpeg(seed) for seed in range(3)]
    tar(
        tmp_path / "0.tar",
        **{"x/a.jpg": images[0], "x/a.cls": b"2", "x/a.json": b"{}", "b.jpg": images[1], "b.cls": b"0"},
    )
    tar(tmp_path / "1.tar", **{"a.cls": b"1\n", "a.jpg": images[2]})
    source = open_source(tmp_path)
    assert source.names == ("0.tar/x/a.jpg", "0.tar/b.jpg", "1.tar/a.jpg")
    assert source.labels == (2, 0, 1)
    assert source.classes == ("0", "1", "2")
    assert [source.read(i) for i in (2, 0, 1)] == [images[2], images[0], images[1]]
    assert len(open_source(tmp_path / "1.tar")) == 1


def test_keys_of_a_tar_include_the_folder(tmp_path: Path) -> None:
    members = {"x/a.cls": b"2", "y/a.cls": b"1", "x/a.jpg": zoo.jpeg(), "y/a.jpg": zoo.jpeg()}
    assert open_source(tar(tmp_path / "0.tar", **members)).labels == (2, 1)


def test_invalid_tar_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar"):
        open_source(tmp_path / "text.tar")
    tar(tmp_path / "empty.tar", **{"a.txt": b"x"})
    with pytest.raises(UserError, match="no images"):
        open_source(tmp_path / "empty.tar")
    tar(tmp_path / "half.tar", **{"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x"})
    with pytest.raises(UserError, match="1 of 2 images have a label"):
        open_source(tmp_path / "half.tar")


def test_a_shard_truncated_after_indexing_gives_bad_images(tmp_path: Path) -> None:
    source = open_source(tar(tmp_path / "0.tar", **{"a.jpg": zoo.jpeg(0), "b.jpg": zoo.jpeg(1)}))
    with (tmp_path / "0.tar").open("r+b") as file:
        file.truncate(source.places[1, 1] + 100)
    assert source.read(0) == zoo.jpeg(0)
    with pytest.raises(BadImage, match=r"unreadable: 0\.tar ends inside it"):
        source.read(1)


def test_hugging_face_datasets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [zoo.jpeg(seed) for seed in range(4)]
    (tmp_path / "on_disk.jpg").write_bytes(images[3])
    rows = [{"bytes": data, "path": None} for data in images[:3]]
    rows += [{"bytes": None, "path": str(tmp_path / "on_disk.jpg")}, None]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    dataset = datasets.Dataset.from_dict({"picture": rows, "label": [0, 1, 1, 0, 0]}, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    for source in (HuggingFace(dataset), open_source(tmp_path / "saved")):
        assert [source.read(i) for i in range(4)] == images
        assert source.labels == (0, 1, 1, 0, 0)
        assert source.classes == ("cat", "dog")
        with pytest.raises(BadImage, match="empty"):
            source.read(4)
    with pytest.raises(UserError, match="one column of images"):
        HuggingFace(dataset.remove_columns("picture"))


def test_hidden_members_of_a_tar_are_left_out(tmp_path: Path) -> None:
    members = {"./a.jpg": zoo.jpeg(), "./a.cls": b"1", "./._a.jpg": b"macOS", ".x/b.jpg": zoo.jpeg(), ".x/b.cls": b"0"}
    assert open_source(tar(tmp_path / "0.tar", **members)).names == ("0.tar/./a.jpg",)


def saved(path: Path, columns: dict[str, list[object]], **features: object) -> None:
    """Save a Hugging Face dataset with one image for each row of the columns."""
    import datasets

    count = len(next(iter(columns.values())))
    rows = {"image": [{"bytes": zoo.jpeg(i), "path": None} for i in range(count)], **columns}
    datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), **features)).save_to_disk(path)


@pytest.mark.parametrize(
    ("dtype", "train", "val", "names"),
    [
        ("int64", [7, 11, 3], [11, 3], ("3", "7", "11")),
        ("uint8", [0, 2, 1], [2, 0], ("0", "1", "2")),
        ("string", ["cat", "dog", "ant"], ["dog", "ant"], ("ant", "cat", "dog")),
        ("bool", [True, False], [True], ("False", "True")),
    ],
)
def test_names_of_classes_are_the_values_of_the_label_column(
    tmp_path: Path, dtype: str, train: list[object], val: list[object], names: tuple[str, ...]
) -> None:
    datasets = pytest.importorskip("datasets")
    saved(tmp_path / "train", {"label": train}, label=datasets.Value(dtype))
    saved(tmp_path / "validation", {"label": val}, label=datasets.Value(dtype))
    for source, values in zip(labelled(tmp_path), (train, val), strict=True):
        assert source.classes == names
        assert source.labels is not None
        assert [names[label] for label in source.labels] == [str(value) for value in values]


def test_datasets_without_a_clear_label_column_have_no_labels(tmp_path: Path) -> None:
    """This is an error only for commands that need labels."""
    datasets = pytest.importorskip("datasets")
    of, text, number = datasets.ClassLabel(names=["x", "y"]), datasets.Value("string"), datasets.Value("int64")
    cases = {
        "two": ({"fine": [0, 1], "coarse": [1, 0]}, {"fine": of, "coarse": of}, "['coarse', 'fine']"),
        "text": ({"caption": ["p", "q"]}, {"caption": text}, "none of feature ClassLabel or named label, "),
        "unknown": ({"label": [0, -1]}, {"label": of}, "1 of 2 rows have no label"),
        "negative": ({"label": [5, -1]}, {"label": number}, "1 of 2 rows have no label"),
    }
    for name, (columns, features, why) in cases.items():
        saved(tmp_path / name, columns, **features)
        source = open_source(tmp_path / name)
        assert source.labels is None
        assert why in source.unlabelled
    saved(tmp_path / "named", {"label": [0, 1], "coarse": [1, 0]}, label=of, coarse=of)
    assert open_source(tmp_path / "named").labels == (0, 1)


def test_a_saved_datasetdict_is_refused_and_its_splits_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for split in ("train", "validation"):
        saved(tmp_path / split, {"label": ["a", "b"]}, label=datasets.Value("string"))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert [source.root.name for source in labelled(tmp_path)] == ["train", "validation"]
    with pytest.raises(UserError, match="saved DatasetDict with train, validation"):
        open_source(tmp_path)


def test_cyclic_links_are_ignored(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "a/deep/2.png")
    (tmp_path / "a/deep/up").symlink_to(tmp_path / "a")
    assert len(open_source(tmp_path)) == 2


def test_the_fingerprint_depends_on_names_and_labels(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    before = open_source(tmp_path).fingerprint
    assert open_source(tmp_path).fingerprint == before
    make(tmp_path, "b/3.png")
    assert open_source(tmp_path).fingerprint != before


def test_folders_named_like_tar_files_are_ignored(tmp_path: Path) -> None:
    make(tmp_path, "n01.tar/1.png", "n02.tar/2.png")
    os.mkfifo(tmp_path / "pipe.tar")
    assert open_source(tmp_path).classes == ("n01.tar", "n02.tar")


@pytest.mark.parametrize("label", [b"-1", b"99999999999999", b"cat"])
def test_invalid_labels_in_a_tar_are_refused(tmp_path: Path, label: bytes) -> None:
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar of images"):
        open_source(tar(tmp_path / "0.tar", **{"a.jpg": b"x", "a.cls": label}))


def test_incomplete_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = [{"bytes": zoo.jpeg(), "path": None}, None]
    dataset = datasets.Dataset.from_dict({"image": rows, "label": [0, 1]}, features=features)
    for form in (dataset.with_format(columns=["label"]), dataset.with_format("numpy"), dataset):
        source = HuggingFace(form)
        assert source.read(0) == zoo.jpeg()
        with pytest.raises(BadImage, match="empty"):
            source.read(1)
    without = datasets.Dataset.from_dict({"image": rows, "label": [0, None]}, features=features)
    source = HuggingFace(without)
    assert (source.labels, source.unlabelled) == (None, "1 of 2 rows have no label")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a saved dataset"):
        open_source(tmp_path / "saved")


def test_folders_without_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def forbidden(path: str) -> object:  # as for a user who is not root
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match=r"/a cannot be read \(Permission denied\)"):
        open_source(tmp_path)


def test_train_and_val_have_the_same_class_numbers(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "train/b/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    train, val = labelled(tmp_path)
    assert (train.names, train.labels) == (("a/1.png", "b/1.png", "b/2.png"), (0, 1, 1))
    assert (val.names, val.labels, val.classes) == (("a/3.png", "b/4.png"), (0, 1), train.classes)


def test_other_classes_in_val_are_refused(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/{name}/1.png" for name in "abcdefg"), "val/a/1.png", "val/x/1.png")
    with pytest.raises(
        UserError, match=r"val has classes that .*train does not have: x; .* 7 classes: a, b, c, d, e, "
    ):
        labelled(tmp_path)


def test_val_may_lack_classes_of_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/a/2.png")
    train, val = labelled(tmp_path)
    assert val.classes == train.classes == ("a", "b", "c")
    assert val.labels == (0, 2)
    assert caplog.messages == [f"{val.root} has 2 of the 3 classes of {train.root}; it does not have b"]
    assert val.fingerprint == open_source(tmp_path / "val").fingerprint  # so old lists still match


@pytest.mark.parametrize("names", [("train/1.png", "val/a/1.png"), ("train/a/1.png", "train/b/1.png", "val/1.png")])
def test_both_splits_need_labels(tmp_path: Path, names: tuple[str, str]) -> None:
    make(tmp_path, *names)
    with pytest.raises(
        UserError,
        match=r"must hold train/ and val/ .* has no classes: it has images",
    ):
        labelled(tmp_path)


def test_a_missing_val_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png")
    with pytest.raises(UserError, match="val does not exist"):
        labelled(tmp_path)


def test_classes_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for split, names in (("train", ["cat", "dog"]), ("validation", ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": zoo.jpeg(), "path": None}], "label": [0]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / split)
    train, val = labelled(tmp_path)
    assert (train.labels, val.labels) == ((0,), (1,))
    assert train.classes == val.classes == ("cat", "dog")


def test_shards_of_val_may_lack_the_last_classes(tmp_path: Path) -> None:
    for split, labels in (("train", b"02"), ("val", b"01")):
        (tmp_path / split).mkdir()
        members = {f"{i}.cls": bytes([c]) for i, c in enumerate(labels)} | {f"{i}.jpg": b"x" for i in range(2)}
        tar(tmp_path / split / "0.tar", **members)
    train, val = labelled(tmp_path)
    assert train.classes == val.classes == ("0", "1", "2")
    (tmp_path / "train").rename(tmp_path / "x")
    (tmp_path / "val").rename(tmp_path / "train")
    (tmp_path / "x").rename(tmp_path / "val")
    with pytest.raises(UserError, match="train does not have: 2"):
        labelled(tmp_path)
