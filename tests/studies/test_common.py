"""Results over seeds, and subsets with few labels."""

import pytest

from mae_fast.errors import UserError
from mae_fast.studies.common import Result, few_labels


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 12), ("val", 4)):
        for name in "rgb":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "data" / split / name / f"{i:02}.jpg").touch()
    return tmp_path / "data"


def names(folder):
    return [path.name for path in sorted(folder.iterdir())]


def test_results_of_several_seeds_have_a_deviation():
    assert str(Result([70.0, 72.0, 74.0])) == "72.0 +- 2.0"
    assert str(Result([70.0])) == "70.0"
    assert Result([70.0]).deviation == 0


def test_few_labels_are_evenly_spaced_without_a_seed(data, tmp_path):
    few = few_labels(data, tmp_path / "few", 4)
    assert len(list((few / "train").rglob("*.jpg"))) == 12
    assert names(few / "train" / "g") == ["00.jpg", "03.jpg", "06.jpg", "09.jpg"]
    assert len(list((few / "val").rglob("*.jpg"))) == 12
    few_labels(data, tmp_path / "few", 4)  # again
    with pytest.raises(UserError, match=r"12 images.* 13 "):
        few_labels(data, tmp_path / "more", 13)


def test_other_files_and_nested_images_are_read_as_in_training(data, tmp_path):
    (data / "train" / "bad.jsonl").touch()
    (data / "train" / "r" / "notes.txt").touch()
    (data / "train" / "r" / "deep").mkdir()
    (data / "train" / "r" / "deep" / "00.jpg").touch()
    (data / "train").rename(data / "Train")
    few = few_labels(data, tmp_path / "few", 12)
    assert names(few / "train") == ["b", "g", "r"]
    assert names(few / "train" / "r") == [f"{i:02}.jpg" for i in range(12)]
    (data / "Train" / "r" / "00.jpg").unlink()
    assert (few_labels(data, tmp_path / "other", 12) / "train" / "r" / "deep" / "00.jpg").is_symlink()


def test_few_labels_with_a_seed_are_random_and_nested(data, tmp_path):
    def drawn(count, seed):
        few = few_labels(data, tmp_path / f"{count}-{seed}", count, seed)
        return [(name, file) for name in "rgb" for file in names(few / "train" / name)]

    assert len(drawn(4, 0)) == 12
    assert set(drawn(4, 0)) < set(drawn(8, 0))
    assert drawn(4, 0) != drawn(4, 1)
    of_classes = [[file for name, file in drawn(4, 0) if name == letter] for letter in "rgb"]
    assert of_classes[0] != of_classes[1]  # each class has its own draw
