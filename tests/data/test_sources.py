"""Folders of images, and what is said where there are none."""

from pathlib import Path

import pytest
from PIL import Image

from mae_fast.data.sources import image_folder
from mae_fast.errors import UserError


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def test_class_folders(tmp_path: Path) -> None:
    make(tmp_path, "b/1.png", "a/2.jpg", "a/deep/er/1.PNG", "b/10.webp")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    source = image_folder(tmp_path)
    assert source.classes == ("a", "b")
    assert [Path(p).relative_to(tmp_path).as_posix() for p in source.paths] == [
        "a/2.jpg", "a/deep/er/1.PNG", "b/1.png", "b/10.webp",
    ]  # fmt: skip
    assert source.labels == (0, 0, 1, 1)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    make(tmp_path, "x.png", "a.png")
    source = image_folder(tmp_path)
    assert [Path(p).name for p in source.paths] == ["a.png", "x.png"]
    assert source.labels is None


def test_split_is_taken_where_there_is_one(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "val/a/2.png")
    assert image_folder(tmp_path, "train").paths == (str(tmp_path / "train/a/1.png"),)
    make(tmp_path / "other", "a/1.png")
    assert len(image_folder(tmp_path / "other", "train")) == 1


def test_missing_empty_and_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images"):
        image_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        image_folder(tmp_path / "file")
