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


def test_few_labels_with_a_seed_are_random_and_nested(data, tmp_path):
    def drawn(count, seed):
        few = few_labels(data, tmp_path / f"{count}-{seed}", count, seed)
        return [(name, file) for name in "rgb" for file in names(few / "train" / name)]

    assert len(drawn(4, 0)) == 12
    assert set(drawn(4, 0)) < set(drawn(8, 0))
    assert drawn(4, 0) != drawn(4, 1)
    of_classes = [[file for name, file in drawn(4, 0) if name == letter] for letter in "rgb"]
    assert of_classes[0] != of_classes[1]  # each class has its own draw
