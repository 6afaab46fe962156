"""Datasets in COCO's format: reading, invalid entries, large-scale jitter, evaluation on whole images."""

import copy
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from batches import evaluation_detections, training_detections
from coco_files import CATEGORIES, COLOURS, annotated, drawn, scenes, write_scenes, write_split
from pycocotools import mask

from mae_fast.data import coco as coco_module
from mae_fast.data.cache import Cached
from mae_fast.data.check import check, known_bad
from mae_fast.data.coco import FILL, Coco, fitted, jittered, rle
from mae_fast.data.decode import BadImage
from mae_fast.data.rng import CROP, generator
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError

H, W = 20, 30


def image(number, **changes):
    found = {"id": number, "file_name": f"{number}.jpg", "height": H, "width": W, "pixels": drawn(H, W, [])}
    return {**found, **changes}


def one(tmp_path, *changes, images=None, split="train", **options):
    """A dataset with one valid annotation, id 1 of image 1, and one more for each of ``changes``, with ids from 2."""
    listed = [annotated(1, 1, 3, 2, 3, 8)]
    for i, change in enumerate(changes):
        listed.append({**annotated(2 + i, 1, 7, 2, 3, 8), **change} if isinstance(change, dict) else change)
    write_split(tmp_path, split, images or [image(1), image(2)], listed)
    return Coco(tmp_path, split, **options)


def test_objects_and_targets_are_read(tmp_path):
    write_scenes(tmp_path, train=5, val=3)
    for split, count, seed in (("train", 5, 0), ("val", 3, 1)):
        coco = Coco(tmp_path, split)
        _, annotations = scenes(count, seed)
        assert coco.root == tmp_path / f"{split}2017"
        assert coco.names == tuple(f"{i:03}.jpg" for i in range(count))
        assert coco.image_ids == tuple(range(100, 100 + count))
        assert coco.sizes == ((28, 32),) * count
        assert coco.classes == ("disc", "square")
        assert coco.categories == (3, 7)
        assert coco.labels is None
        assert coco.left_out == ""
        for i in range(count):
            assert coco.objects(i) == [x for x in annotations if x["image_id"] == 100 + i]
            boxes, labels, masks = coco.targets(i)
            assert boxes.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert masks.dtype == torch.uint8
            for box, label, one, x in zip(boxes, labels, masks, coco.objects(i), strict=True):
                left, top, width, height = x["bbox"]
                assert box.tolist() == [left, top, left + width, top + height]
                assert coco.classes[label - 1] == {3: "disc", 7: "square"}[x["category_id"]]
                if x["category_id"] == 7:
                    expected = torch.zeros(28, 32, dtype=torch.uint8)
                    expected[top : top + height, left : left + width] = 1
                    assert torch.equal(one, expected)


@pytest.mark.parametrize(("year", "folder"), [("2017", "val2017"), ("", "val/images"), ("", "val"), ("2017", "val")])
def test_all_layouts_are_read(tmp_path, year, folder):
    write_split(tmp_path, "val", *scenes(2), year=year, folder=folder)
    coco = Coco(tmp_path, "val")
    assert coco.root == tmp_path / folder
    assert len(coco.read(1)) > 0


@pytest.mark.parametrize("gone", ["annotations", "val2017"])
def test_a_missing_split_is_named(tmp_path, gone):
    write_scenes(tmp_path, train=1, val=1)
    shutil.rmtree(tmp_path / gone)
    with pytest.raises(UserError, match=rf"{tmp_path} has none of .*{gone}"):
        Coco(tmp_path, "val")


def test_missing_pycocotools_is_named(coco, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"need pycocotools; pip install 'mae_fast\[transfer\]'"):
        Coco(coco.root.parent, "train")


SQUARE = [[2, 3, 10, 3, 10, 11, 2, 11]]
GOOD_RUNS = mask.encode(np.asfortranarray(np.eye(H, W, dtype=np.uint8)))["counts"].decode()
BAD = {
    "malformed": [
        "text", None, {"id": None}, {"id": "2"}, {"id": True}, {"image_id": "1"}, {"image_id": [1]},
        {"category_id": None}, {"category_id": {}},
    ],
    "duplicate id": [{"id": 1}],
    "unknown image": [{"image_id": 77}],
    "unknown category": [{"category_id": 4}],
    "no box inside the image": [
        {"bbox": None}, {"bbox": [1, 2, 3]}, {"bbox": [2, 3, 0, 8]}, {"bbox": [2, 3, 8, -1]},
        {"bbox": [float("nan"), 3, 8, 8]}, {"bbox": [2, 3, float("inf"), 8]}, {"bbox": [2, 3, "8", 8]},
        {"bbox": [W, 3, 8, 8]}, {"bbox": [2, H + 5, 8, 8]}, {"bbox": [-9, 3, 9, 8]}, {"bbox": [2, -9, 8, 8]},
        {"bbox": [2, 3, 8, 10**400]},
    ],
    "no mask that fits the image": [
        {"segmentation": None}, {"segmentation": []}, {"segmentation": [[]]}, {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, {"segmentation": [SQUARE[0], [1, 2, 3, 4, 5, None]]},
        {"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, {"segmentation": [[1, 2, 3, 4, 5, 3 * W + 1]]},
        {"segmentation": [1, 2, 3, 4, 5, 6]}, {"segmentation": "runs"}, {"segmentation": {"counts": GOOD_RUNS}},
        {"segmentation": {"size": [W, H], "counts": GOOD_RUNS}}, {"segmentation": {"size": [H, W]}},
        {"segmentation": {"size": [H, W + 1], "counts": [H * W]}}, {"segmentation": {"size": [H, W], "counts": [5]}},
        {"segmentation": {"size": [H, W], "counts": [-1, H * W + 1]}},
        {"segmentation": {"size": [H, W], "counts": [float(H * W)]}},
        {"segmentation": {"size": [H, W], "counts": "zzzz~~"}}, {"segmentation": {"size": [H, W], "counts": "1"}},
        {"segmentation": {"size": [H, W], "counts": ""}}, {"segmentation": {"size": [H, W], "counts": "\u1234"}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
def test_bad_annotations_are_counted(tmp_path, why):
    coco = one(tmp_path, *BAD[why], split="val")
    path = tmp_path / "annotations" / "instances_val2017.json"
    n = len(BAD[why])
    assert coco.left_out == f"{path}: left out {n} of {n + 1} annotations ({why}: {n})"
    assert [x["id"] for x in coco.objects(0)] == [1]


def test_one_line_counts_all_invalid_entries(tmp_path):
    changes = [{"category_id": 4}, {"bbox": None}, {"bbox": [2, 3, 0, 0]}]
    images = [image(1), image(1), image(2), {"id": 3}]
    coco = one(tmp_path, *changes, images=images)
    assert coco.left_out.endswith(
        ": left out 3 of 4 annotations (no box inside the image: 2, unknown category: 1) and "
        "3 of 4 images (duplicate id: 1, malformed: 1, without objects: 1)"
    )
    assert coco.image_ids == (1,)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "1"}, {"file_name": 5}, {"file_name": ""}, {"file_name": "a\0b"}, {"file_name": "\ud800"},
        {"height": None}, {"width": 0}, {"width": float("nan")}, {"height": 10**6, "width": 10**6}, {"height": True},
    ],
    ids=repr,
)  # fmt: skip
def test_bad_images_are_counted(tmp_path, changes):
    coco = one(tmp_path, images=[image(1), {**image(2), **changes, "pixels": None}], split="val")
    if changes == {"file_name": ""}:  # found when the file is read
        with pytest.raises(BadImage):
            coco.read(1)
        return
    assert coco.left_out.endswith("left out 1 of 2 images (malformed: 1)")
    assert coco.image_ids == (1,)


def test_boxes_are_clipped_to_their_image(tmp_path):
    coco = one(tmp_path, {"bbox": [-2, 15, 9, 9], "area": None}, {"bbox": [25.5, -1, 9, 3.5], "area": 7})
    assert [(x["bbox"], x["area"]) for x in coco.objects(0)[1:]] == [
        ([0, 15, 7, 5], 35),
        ([25.5, 0, 4.5, 2.5], 7),
    ]
    assert coco.targets(0)[0][1:].tolist() == [[0, 15, 7, 20], [25.5, 0, 30, 2.5]]


@pytest.mark.parametrize("form", ["polygons", "runs", "encoded"])
def test_all_formats_of_masks_are_read(tmp_path, form):
    expected = np.zeros((H, W), np.uint8)
    expected[3:11, 2:10] = expected[12:15, 20:25] = 1
    encoded = mask.encode(np.asfortranarray(expected))
    flat = expected.flatten(order="F")
    ends = [0, *(1 + np.flatnonzero(np.diff(flat))), flat.size]
    segmentation = {
        "polygons": [*SQUARE, [20, 12, 25, 12, 25, 15, 20, 15]],
        "runs": {"size": [H, W], "counts": np.diff(ends).tolist()},
        "encoded": {"size": [H, W], "counts": encoded["counts"].decode()},
    }[form]
    coco = one(tmp_path, {"segmentation": segmentation})
    assert coco.left_out.endswith("left out 1 of 2 images (without objects: 1)")
    assert np.array_equal(coco.targets(0)[2][1].numpy(), expected)
    assert np.array_equal(mask.decode(rle(segmentation, H, W)), expected)


def test_crowds_are_used_only_in_evaluation(tmp_path):
    crowd = {"iscrowd": 1, "segmentation": {"size": [H, W], "counts": [0, H * W]}}
    images = [image(1), image(2)]
    write_split(tmp_path, "train", images, [annotated(1, 1, 3, 2, 3, 8), {**annotated(2, 1, 7, 1, 1, 5), **crowd},
                                            {**annotated(3, 2, 7, 1, 1, 5), **crowd}])  # fmt: skip
    shutil.copytree(tmp_path / "train2017", tmp_path / "val2017")
    path = tmp_path / "annotations"
    shutil.copy(path / "instances_train2017.json", path / "instances_val2017.json")
    train, val = Coco(tmp_path, "train"), Coco(tmp_path, "val")
    assert train.image_ids == (1,)  # the other image has only crowds
    assert val.image_ids == (1, 2)
    assert [x["iscrowd"] for x in val.objects(0)] == [0, 1]
    boxes, labels, masks = train.targets(0)
    assert (len(boxes), labels.tolist(), len(masks)) == (1, [1], 1)
    assert [len(x) for x in val.targets(1)[:2]] == [0, 0]


def test_masks_may_be_missing_without_masks(tmp_path):
    coco = one(tmp_path, {"segmentation": None}, masks=False)
    assert len(coco.objects(0)) == 2
    assert "segmentation" not in coco.objects(0)[0]
    assert coco.targets(0)[2] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no list of images or annotations or categories"),
        ('{"images": [], "annotations": {}, "categories": []}', "has no list of annotations"),
        ('{"images": [], "annotations": [], "categories": []}', "must list categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "is empty"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "unique id",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2}]}', "must list categ"),
    ],
    ids=lambda text: text[:40],
)
def test_files_without_annotations_are_refused(tmp_path, text, message):
    write_scenes(tmp_path, train=1, val=1)
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path} .*{message}"):
        Coco(tmp_path, "val")


def test_a_file_without_usable_entries_is_refused(tmp_path):
    images, annotations = scenes(1)
    write_split(tmp_path, "train", images, [{**x, "segmentation": []} for x in annotations])
    message = "left out 2 of 2 annotations .*: 2.* and 1 of 1 images .*--no-masks"
    with pytest.raises(UserError, match=message):
        Coco(tmp_path, "train")
    assert len(Coco(tmp_path, "train", masks=False)) == 1


def test_the_fingerprint_depends_on_all_annotations(tmp_path):
    found = set()
    for i, change in enumerate([{}, {"bbox": [2, 3, 8, 7.5]}, {"category_id": 3}, {"segmentation": [SQUARE[0][::-1]]}]):
        found.add(one(tmp_path / str(i), change).fingerprint)
    write_split(tmp_path / "0", "train", [image(1, file_name="other.jpg")], [annotated(1, 1, 3, 2, 3, 8)])
    found.add(Coco(tmp_path / "0", "train").fingerprint)
    categories = [{**x, "name": x["name"].upper()} for x in CATEGORIES]
    write_split(tmp_path / "0", "train", [image(1, file_name="other.jpg")], [annotated(1, 1, 3, 2, 3, 8)], categories)
    found.add(Coco(tmp_path / "0", "train").fingerprint)
    assert len(found) == 6
    assert one(tmp_path / "1", {}).fingerprint == one(tmp_path / "2", {}).fingerprint


class Draws:
    """A generator that returns given values."""

    def __init__(self, scale, places, flip):
        self.scale, self.places, self.flip, self.highs = scale, list(places), flip, []

    def uniform(self, low, high):
        assert (low, high) == (0.1, 2.0)
        return self.scale

    def integers(self, high):
        self.highs.append(high)
        return self.places.pop(0)

    def random(self):
        return 0.0 if self.flip else 0.5


def squares(height, width, *places):
    """Pixels [3, H, W] with squares (left, top, side) of different colours, their boxes, labels and masks."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    masks = torch.zeros(len(places), height, width, dtype=torch.uint8)
    for i, (left, top, side) in enumerate(places):
        masks[i, top : top + side, left : left + side] = 1
        pixels[:, masks[i] == 1] = torch.tensor([[50 + 40 * i], [255], [10]], dtype=torch.uint8)
    boxes = torch.tensor([[left, top, left + side, top + side] for left, top, side in places], dtype=torch.float32)
    return pixels, boxes, torch.arange(1, 1 + len(places)), masks


def test_a_crop_of_an_enlarged_image():
    """The image is doubled: each pixel becomes four, exactly if all its neighbours are equal."""
    pixels, boxes, labels, masks = squares(12, 16, (2, 3, 4), (9, 1, 7))
    rng = Draws(2.0, [5, 7], False)
    image, target = jittered(rng, pixels, boxes, labels, masks, 16)
    assert rng.highs == [24 - 16 + 1, 32 - 16 + 1]
    assert image.shape == (16, 16, 3)
    assert image.dtype == torch.uint8
    expected = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, 5:21, 7:23]
    assert torch.equal(target["masks"], expected)
    # The first square is cut on the left only, the second at the right.
    assert target["boxes"].tolist() == [[0, 1, 5, 9], [11, 0, 16, 11]]
    assert target["labels"].tolist() == [1, 2]
    inner = image[3:7, 1:3].reshape(-1, 3)
    assert (inner == torch.tensor([50, 255, 10])).all()


def test_a_small_image_is_flipped_and_padded_below_and_right():
    pixels, boxes, labels, masks = squares(12, 16, (2, 3, 4))
    image, target = jittered(Draws(0.5, [0, 0], True), pixels, boxes, labels, masks, 32)
    assert image.shape == (32, 32, 3)  # 12 x 16 pixels are the image
    assert torch.equal(image[:12, :16], pixels.flip(2).permute(1, 2, 0))
    fill = torch.tensor(FILL, dtype=torch.uint8)
    assert (image[12:] == fill).all()
    assert (image[:, 16:] == fill).all()
    assert target["boxes"].tolist() == [[10, 3, 14, 7]]
    assert torch.equal(target["masks"][0, :12, :16], masks[0].flip(1))
    assert target["masks"][0, 12:].sum() == target["masks"][0, :, 16:].sum() == 0


def test_objects_are_cut_with_the_crop():
    pixels, boxes, labels, masks = squares(16, 16, (0, 0, 4), (12, 12, 4), (6, 6, 4))
    masks[2, 6:9] = 0  # only the lower part has a mask, and it is outside of the crop
    _, target = jittered(Draws(2.0, [0, 0], False), pixels, boxes, labels, masks, 16)
    assert target["labels"].tolist() == [1]
    assert {name: len(x) for name, x in target.items()} == {"boxes": 1, "labels": 1, "masks": 1}
    # Without masks, boxes are clipped to the crop.
    _, target = jittered(Draws(2.0, [0, 0], False), pixels, boxes, labels, None, 16)
    assert target["labels"].tolist() == [1, 3]
    assert target["boxes"].tolist() == [[0, 0, 8, 8], [12, 12, 16, 16]]
    assert target.keys() == {"boxes", "labels"}
    # Less than one pixel wide.
    _, target = jittered(Draws(0.1, [0, 0], False), pixels, boxes, labels, None, 20)
    assert len(target["boxes"]) == 0
    # The box of a cut object is that of the rest of its mask.
    pixels, boxes, labels, masks = squares(16, 16, (4, 4, 8))
    masks[0, :, :6] = 0
    _, target = jittered(Draws(2.0, [12, 0], False), pixels, boxes, labels, masks, 16)
    assert target["boxes"].tolist() == [[12, 0, 16, 12]]
    _, target = jittered(Draws(1.0, [0, 0], False), pixels, boxes, labels, masks, 16)
    assert target["boxes"].tolist() == [[4, 4, 12, 12]]  # not cut, so the annotated box


@pytest.mark.parametrize("seed", range(12))
def test_masks_and_boxes_move_with_the_pixels(seed):
    """Objects of different colours, with random jitter."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 140, 2).tolist()
    put = [(3, 8, 10, 24), (7, width - 30, height - 34, 22)]
    pixels = torch.from_numpy(np.array(drawn(height, width, put))).permute(2, 0, 1)
    listed = [annotated(i, 1, *x) for i, x in enumerate(put)]
    masks = torch.from_numpy(
        mask.decode([rle(x["segmentation"], height, width) for x in listed]).transpose(2, 0, 1).copy()
    )
    boxes = torch.tensor([[x, y, x + s, y + s] for _, x, y, s in put], dtype=torch.float32)
    image, target = jittered(rng, pixels, boxes, torch.tensor([1, 2]), masks, 96)
    for label, found, box in zip(target["labels"].tolist(), target["masks"], target["boxes"], strict=True):
        colour = torch.tensor(COLOURS[{1: 3, 2: 7}[label]], dtype=torch.int64)
        where = (image.long() - colour).abs().sum(2) < 145  # closer to this colour than to grey
        both, either = (where & (found == 1)).sum(), (where | (found == 1)).sum()
        if either < 100:
            continue
        assert both / either > 0.85
        rows, columns = where.nonzero().unbind(1)
        bounding_box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (box - bounding_box).abs().max() <= 2.5


def test_the_jitter_has_the_documented_distribution():
    """Scale uniform in 0.1..2, flips with probability 0.5, crops at any position."""
    pixels, boxes, labels, masks = squares(20, 40, (0, 0, 20))
    scales, flips = [], 0
    for i in range(400):
        image, target = jittered(np.random.default_rng(i), pixels, boxes, labels, masks, 40)
        fill = (image == torch.tensor(FILL, dtype=torch.uint8)).all(2)
        width = int((~fill).any(0).sum())
        if 10 < width < 40:
            scales.append(width / 40)
            flips += bool(target["boxes"][0, 0] > 0)
    assert 0.32 < len(scales) / 400 < 0.44  # (1 - 11 / 40) / 1.9 = 0.38
    assert np.mean(scales) == pytest.approx(0.63, abs=0.04)
    assert 0.4 < flips / len(scales) < 0.6


OPTIONS = {"size": 32, "batch_size": 4, "epochs": 2, "seed": 3}


def batches(coco, source=None, **options):
    return list(training_detections(source or coco, coco, **{**OPTIONS, **options}))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ids, b.ids)
        for x, y in zip(a.targets, b.targets, strict=True):
            assert x.keys() == y.keys()
            assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return Coco(write_scenes(tmp_path_factory.mktemp("coco"), train=9, val=7), "train")


@pytest.fixture(scope="module")
def val(coco):
    return Coco(coco.root.parent, "val")


def test_training_batches_have_images_and_targets(coco):
    found = batches(coco)
    assert len(found) == 4
    for batch in found:
        assert batch.images.shape == (4, 32, 32, 3)
        assert batch.noise.shape == (4, 0)
        assert batch.labels is None
        assert batch.skipped == ()
        assert len(batch.targets) == 4
        for target in batch.targets:
            assert target["masks"].shape == (len(target["boxes"]), 32, 32)
            assert [x.dtype for x in target.values()] == [torch.float32, torch.int64, torch.uint8]
    for epoch in (found[:2], found[2:]):
        ids = torch.cat([batch.ids for batch in epoch]).tolist()
        assert len(set(ids)) == 8
    assert not torch.equal(found[0].images, found[2].images)


def test_batches_depend_only_on_number_and_seed(coco):
    found = batches(coco)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert_same(batches(coco), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(batches(coco, num_workers=1), found)
    assert_same(batches(coco, first=3), found[3:])
    halves = [batches(coco, batch_size=2, world=2, rank=rank) for rank in (0, 1)]
    for a, b, whole in zip(*halves, found, strict=True):
        assert torch.equal(torch.cat([a.images, b.images]), whole.images)
    assert_same(batches(coco, source=Cached(coco)), found)
    assert not torch.equal(batches(coco, seed=4)[0].images, found[0].images)
    assert len(batches(coco, batches_per_epoch=1)) == 2


def test_targets_are_copied_with_the_batch(coco):
    batch = batches(coco)[0]
    moved = batch.to(torch.device("meta"))
    assert type(moved) is type(batch)
    assert {x.device.type for x in (moved.images, moved.ids, moved.targets[3]["masks"])} == {"meta"}
    assert moved.targets[3]["boxes"].shape == batch.targets[3]["boxes"].shape


def test_another_image_replaces_a_bad_one(coco, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(coco.root.parent, root)
    (root / "train2017" / "002.jpg").unlink()
    drawn(30, 30, []).save(root / "train2017" / "004.jpg")
    broken = Coco(root, "train")
    assert broken.fingerprint == coco.fingerprint
    known = {6: BadImage("broken", "known")}
    found, good = batches(broken, bad=known), batches(coco)
    skipped = {i: str(bad) for batch in found for i, bad in batch.skipped}
    assert skipped == {
        2: "unreadable: No such file or directory",
        4: "unsupported: 30 x 30 pixels, but the annotations have 28 x 32",
        6: "broken: known",
    }
    for number, (ours, theirs) in enumerate(zip(found, good, strict=True)):
        for i in range(4):
            was, now = int(theirs.ids[i]), int(ours.ids[i])
            assert now not in skipped
            assert (now == was) == (was not in skipped)
            assert torch.equal(ours.images[i], theirs.images[i]) == (was == now)
            # It gets the crop of the replaced image.
            rng = generator(OPTIONS["seed"], CROP, number // 2, was)
            expected, _ = jittered(rng, coco.pixels(coco, now, False), *coco.targets(now), 32)
            assert torch.equal(ours.images[i], expected)
    with pytest.raises(UserError, match=r"100 images in a row cannot be used, the last .* \(broken: all\)"):
        batches(coco, bad={i: BadImage("broken", "all") for i in range(9)})
    left = [i for batch in evaluation_detections(broken, size=32, batch_size=4) for i in batch.ids.tolist()]
    assert left == [0, 1, 3, 5, 6, 7, 8]


@pytest.mark.parametrize(("height", "width"), [(28, 32), (32, 28), (64, 20), (5, 200), (1, 999)])
def test_fitted_scales_the_longer_side(height, width):
    h, w = fitted(height, width, 64)
    assert max(h, w) == 64
    assert min(h, w) >= 1
    assert abs(h / w - height / width) <= 0.5 / min(h, w) * max(1, h / w) or min(h, w) == 1


def test_evaluation_has_each_whole_image_once(val):
    found = list(evaluation_detections(val, size=48, batch_size=3))
    assert [batch.ids.tolist() for batch in found] == [[0, 1, 2], [3, 4], [5, 6]]
    for batch in found:
        assert batch.images.shape == (len(batch.ids), 48, 48, 3)
        assert (batch.images[:, 42:] == torch.tensor(FILL, dtype=torch.uint8)).all()
        for i, image in zip(batch.ids.tolist(), batch.images, strict=True):
            pixels = val.pixels(val, i, False)
            shrunk = torch.nn.functional.interpolate(image[:42].permute(2, 0, 1)[None].float(), (28, 32), mode="area")
            assert (shrunk[0] - pixels).abs().mean() < 12
    ranks = [list(evaluation_detections(val, size=48, batch_size=2, rank=rank, world=3)) for rank in range(3)]
    assert len({len(x) for x in ranks}) == 1
    assert [i for x in ranks for batch in x for i in batch.ids.tolist()] == list(range(7))
    sizes = [len(batch.ids) for batch in evaluation_detections(val, size=48, batch_size=2, rank=8, world=9)]
    assert sizes == [0]


def test_exif_orientation_is_applied_on_request(tmp_path):
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    write_split(tmp_path, "val", [image(1, file_name="1.jpg")], [annotated(1, 1, 3, 2, 3, 8)])
    drawn(W, H, []).save(tmp_path / "val2017" / "1.jpg", exif=turned)
    coco = Coco(tmp_path, "val")
    assert coco.pixels(coco, 0, True).shape == (3, H, W)
    with pytest.raises(BadImage, match=f"{W} x {H} pixels, but the annotations have {H} x {W}"):
        coco.pixels(coco, 0, False)


def test_objects_are_copied(coco):
    changed = copy.deepcopy(coco.objects(0))
    coco.objects(0)[0]["bbox"] = None
    assert coco.objects(0) == changed
    assert json.loads(json.dumps(changed)) == changed
    assert coco_module.SCALE == (0.1, 2.0)


def test_the_scales_of_the_jitter_can_be_set(coco):
    for batch in batches(coco, scale=(1.0, 1.0)):
        for i, image in zip(batch.ids.tolist(), batch.images, strict=True):
            pixels = coco.pixels(coco, i, False).permute(1, 2, 0)
            assert any(torch.equal(image[:28], x) for x in (pixels, pixels.flip(1)))


def test_images_listed_by_a_check_are_skipped(coco, tmp_path):
    """They are matched by name, because the file has another order and images without objects are left out."""
    root = tmp_path / "copy"
    shutil.copytree(coco.root.parent, root)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"].reverse()
    file.write_text(json.dumps(content))
    (root / "train2017" / "002.jpg").write_bytes(b"no image")
    drawn(9, 9, []).save(root / "train2017" / "aaa.jpg")  # only in the folder
    (root / "train2017" / "bbb.jpg").write_bytes(b"no image, nor listed")
    check(open_source(root / "train2017"))
    copied = Coco(root, "train")
    assert list(known_bad(copied)) == [copied.names.index("002.jpg")]
