"""Fashion-MNIST from random IDX files, and from the published files if apt has them."""

import gzip
import shutil

import numpy as np
import pytest
from idx_files import make_idx_files
from PIL import Image

from mae_fast.errors import UserError
from mae_fast.studies import fashion_mnist
from mae_fast.studies.fashion_mnist import CLASSES, DownloadError, build_fashion_mnist


@pytest.fixture
def files(tmp_path, monkeypatch):
    """IDX files of 20 and 10 random images, and their content."""
    return tmp_path / "idx", make_idx_files(tmp_path / "idx", monkeypatch)


def test_images_are_in_the_folder_of_their_class(files, tmp_path):
    folder, content = files
    counts = build_fashion_mnist(tmp_path / "set", folder)
    assert counts == {"train": dict.fromkeys(CLASSES, 2), "val": dict.fromkeys(CLASSES, 1)}
    for split, theirs in (("train", "train"), ("val", "t10k")):
        for i, (image, label) in enumerate(zip(*content[theirs], strict=True)):
            with Image.open(tmp_path / "set" / split / CLASSES[label] / f"{i:05}.png") as made:
                assert made.mode == "L"
                assert np.array_equal(np.asarray(made), image)
    assert build_fashion_mnist(tmp_path / "set", tmp_path / "nowhere") == counts, "a finished set is left as it is"


def test_other_files_are_refused_and_leave_nothing(files, tmp_path, monkeypatch):
    folder, _ = files
    path = folder / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-9], "is damaged"),
        (gzip.compress(gzip.decompress(whole)[:-1] + b"x"), "differs from the published"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            build_fashion_mnist(tmp_path / "set", folder)
    path.unlink()
    with pytest.raises(UserError, match="train-labels-idx1-ubyte"):
        build_fashion_mnist(tmp_path / "set", folder)

    def fail(folder):
        raise OSError("no network\nat all")

    monkeypatch.setattr(fashion_mnist, "_from_torchvision", fail)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"apt-get or dpkg-deb is not installed; torchvision: .*no network") as raised:
        build_fashion_mnist(tmp_path / "set")
    assert "--source" in raised.value.hint
    path.write_bytes(whole[:-9])
    monkeypatch.setattr(fashion_mnist, "_from_torchvision", lambda scratch: folder)
    with pytest.raises(DownloadError, match=r"torchvision: .* is damaged"):
        build_fashion_mnist(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


@pytest.mark.exhaustive
def test_published_dataset(tmp_path):
    counts = build_fashion_mnist(tmp_path / "set")
    assert counts == {"train": dict.fromkeys(CLASSES, 6000), "val": dict.fromkeys(CLASSES, 1000)}
