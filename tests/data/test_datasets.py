"""Datasets of the program as sources of images."""

import io
import logging

import numpy as np
import pytest
import torch
from batches import evaluation_batches, training_batches
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from mae_fast.data.datasets import MapDataset, for_processes
from mae_fast.data.decode import BadImage, decode
from mae_fast.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 4000, (6, 20, 24, 5), dtype=np.uint16)


class Scenes(Dataset):
    """Dicts, as torchgeo has them; the third cannot be read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, object]:
        if i == 2:
            raise OSError("disk on fire")
        return {"image": torch.from_numpy(PIXELS[i]).permute(2, 0, 1), "label": f"class {i % 2}"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1])


def stored(source: MapDataset, i: int) -> np.ndarray:
    return np.load(io.BytesIO(source.read(i)))


def test_items_are_tensors_arrays_or_pictures() -> None:
    source = MapDataset(Scenes(), "scenes", key="image")
    assert np.array_equal(stored(source, 0), PIXELS[0])
    arrays = MapDataset([PIXELS[0], (PIXELS[1], 3), PIXELS[2][:, :, 0]], "arrays")
    assert all(np.array_equal(stored(arrays, i), x) for i, x in enumerate((PIXELS[0], PIXELS[1], PIXELS[2][:, :, 0])))
    picture = Image.fromarray(PIXELS[0][:, :, :3].astype(np.uint8))
    pictures = MapDataset([picture, picture.convert("RGBA"), picture.convert("L")], "pictures")
    shown = [np.asarray(picture), np.asarray(picture), np.asarray(picture.convert("L"))]
    assert all(np.array_equal(stored(pictures, i), x) for i, x in enumerate(shown))
    assert np.array_equal(np.asarray(decode(pictures.read(0))), np.asarray(picture))
    tensors = MapDataset(TensorDataset(torch.zeros(2, 3, 4, 5)), "tensors")
    assert stored(tensors, 1).shape == (4, 5, 3)


def test_what_the_dataset_raises_is_a_bad_image() -> None:
    with pytest.raises(BadImage, match="OSError: disk on fire"):
        MapDataset(Scenes(), "scenes", key="image").read(2)
    with pytest.raises(BadImage, match="a str: items are"):
        MapDataset(["text"], "words").read(0)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Stream(), {}, "Stream gives its items one after the other"),
        (iter([1]), {}, "one after the other"),
        ([], {}, "'mine' is empty"),
        ([PIXELS[0]], {"labelled": True}, "its items have no labels"),
    ],
)
def test_other_datasets_are_refused(dataset: object, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MapDataset(dataset, "mine", **options)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="items are dicts of image, label"):
        MapDataset(Scenes(), "scenes").read(0)
    with pytest.raises(UserError, match="items have no 'pixels'"):
        MapDataset(Scenes(), "scenes", key="pixels").read(0)


def test_labels_are_those_of_targets_or_of_the_items(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    items = [(PIXELS[i], label) for i, label in enumerate(("oak", "ash", "oak"))]
    source = MapDataset(items, "trees", labelled=True)
    assert (source.labels, source.classes) == ((1, 0, 1), ("ash", "oak"))
    assert "reading all 3 items once" in caplog.text
    caplog.clear()
    known = TensorDataset(torch.zeros(3, 1, 4, 4))
    known.targets, known.classes = torch.tensor([2, 0, 2]), ["a", "b", "c"]
    source = MapDataset(known, "known", labelled=True)
    assert (source.labels, source.classes) == ((2, 0, 2), ("a", "b", "c"))
    assert not caplog.text


def test_the_fingerprint_is_of_name_and_length() -> None:
    prints = [MapDataset(x, name).fingerprint for x, name in (([0, 1], "a"), ([5, 6], "a"), ([0, 1], "b"), ([0], "a"))]
    assert prints[0] == prints[1]
    assert len({*prints}) == 3


def test_batches_do_not_depend_on_the_workers() -> None:
    options = {"size": (8, 8), "batch_size": 3, "epochs": 2, "seed": 4, "num_patches": 4}
    pixels = {"channels": 5, "dtype": "uint16"}
    source = MapDataset(Scenes(), "scenes", key="image")
    assert for_processes(source)
    alone, by_processes = (
        list(training_batches(source, num_workers=workers, **options, **pixels)) for workers in (0, 2)
    )
    for a, b in zip(alone, by_processes, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ids, b.ids)
        assert 2 not in a.ids

    class Local(Scenes):
        """No other process can make one."""

    local = MapDataset(Local(), "scenes", key="image")
    assert not for_processes(local)
    for a, b in zip(alone, training_batches(local, num_workers=2, **options, **pixels), strict=True):
        assert torch.equal(a.images, b.images)


def test_values_reach_the_batch() -> None:
    source = MapDataset(list(PIXELS), "arrays")
    (batch,) = evaluation_batches(source, size=(20, 24), batch_size=6, channels=5, dtype="uint16", crop_pct=1.0)
    assert np.array_equal(batch.images.numpy(), PIXELS)
