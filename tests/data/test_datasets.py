"""Map-style datasets and sequences as sources of images."""

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
    """Items are dicts, as in torchgeo. The third one cannot be read."""

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


def test_items_are_tensors_arrays_or_pil_images() -> None:
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


def test_pil_images_of_16_and_32_bits_keep_their_values() -> None:
    grey = np.arange(480, dtype=np.int32).reshape(20, 24) * 130
    sixteen = Image.fromarray(grey.astype(np.uint16))
    swapped = Image.frombytes("I;16B", (24, 20), grey.astype(">u2").tobytes())
    source = MapDataset([Image.fromarray(grey), sixteen, swapped, Image.fromarray(-grey)], "pictures")
    for i in range(3):
        assert stored(source, i).dtype == np.uint16
        assert np.array_equal(stored(source, i), grey)
    assert np.array_equal(stored(source, 3), (-grey).astype(np.float32))
    with pytest.raises(BadImage, match="32-bit integers that float32 cannot hold"):
        MapDataset([Image.fromarray(grey + 2**25)], "pictures").read(0)


def test_exif_orientation_of_pil_images_is_applied_on_request() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[0][:, :, :3].astype(np.uint8)).save(file, "PNG", exif=exif)
    picture = Image.open(file)
    assert stored(MapDataset([picture], "x"), 0).shape == (20, 24, 3)
    assert stored(MapDataset([picture], "x", exif=True), 0).shape == (24, 20, 3)


def test_masked_pixels_are_missing_or_refused() -> None:
    floats = np.ma.masked_equal(PIXELS[0].astype(np.float32), PIXELS[0, 0, 0, 0])
    found = stored(MapDataset([floats], "masked"), 0)
    assert np.array_equal(np.isnan(found), floats.mask)
    with pytest.raises(BadImage, match=r"masked uint16 pixels: .*nodata=VALUE"):
        MapDataset([np.ma.masked_equal(PIXELS[0], PIXELS[0, 0, 0, 0])], "masked").read(0)
    assert np.array_equal(stored(MapDataset([np.ma.array(PIXELS[0])], "masked"), 0), PIXELS[0])


def test_items_that_are_not_images_are_bad_images() -> None:
    tensors = MapDataset([torch.ones(3, 4, 5, dtype=torch.bfloat16), (), torch.ones(3, 4, 5).to_sparse()], "x")
    assert np.array_equal(stored(tensors, 0), np.ones((4, 5, 3), np.float32))
    for i, message in ((1, "empty: an empty tuple"), (2, "unsupported: TypeError")):
        with pytest.raises(BadImage, match=message):
            tensors.read(i)


def test_errors_of_the_dataset_are_bad_images() -> None:
    with pytest.raises(BadImage, match="OSError: disk on fire"):
        MapDataset(Scenes(), "scenes", key="image").read(2)
    with pytest.raises(BadImage, match="a str: expected"):
        MapDataset(["text"], "words").read(0)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Stream(), {}, "Stream has no __len__"),
        (iter([1]), {}, "no __len__"),
        ([], {}, "'mine' is empty"),
        ([PIXELS[0]], {"labelled": True}, "its items have no labels"),
        ([(PIXELS[0], torch.ones(3))], {"labelled": True}, "its items have no labels"),
        ([(PIXELS[0], 3), (PIXELS[1], "oak")], {"labelled": True}, "both integers and strings, such as 3, 'oak'"),
        (Scenes(), {"labelled": True, "key": "image"}, "the label of item 2 cannot be read .OSError: disk on fire"),
        ([(PIXELS[0], 3), ()], {"labelled": True}, "the label of item 1 cannot be read .*an empty tuple"),
    ],
)
def test_other_datasets_are_refused(dataset: object, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MapDataset(dataset, "mine", **options)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="items are dicts of image, label"):
        MapDataset(Scenes(), "scenes").read(0)
    with pytest.raises(UserError, match="no key 'pixels'"):
        MapDataset(Scenes(), "scenes", key="pixels").read(0)


def test_labels_are_read_from_targets_or_from_items(caplog: pytest.LogCaptureFixture) -> None:
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


def test_the_fingerprint_depends_on_name_and_length() -> None:
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
        """A local class, which other processes cannot unpickle."""

    local = MapDataset(Local(), "scenes", key="image")
    assert not for_processes(local)
    for a, b in zip(alone, training_batches(local, num_workers=2, **options, **pixels), strict=True):
        assert torch.equal(a.images, b.images)


def test_batches_have_the_values_of_the_items() -> None:
    source = MapDataset(list(PIXELS), "arrays")
    (batch,) = evaluation_batches(source, size=(20, 24), batch_size=6, channels=5, dtype="uint16", crop_pct=1.0)
    assert np.array_equal(batch.images.numpy(), PIXELS)
