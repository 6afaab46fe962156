"""Datasets of images and masks: layouts, bad pairs, and augmentations that move image and mask alike."""

import io
import shutil

import numpy as np
import pytest
import tifffile
import torch
import zoo
from batches import evaluation_segmentation, training_segmentation
from PIL import Image

from mae_fast.cli import images as cli_images
from mae_fast.data import segmentation as pairs
from mae_fast.data.check import check, known_bad
from mae_fast.data.decode import BadImage
from mae_fast.data.loader import LoaderConfig, Skipped
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.raw import resized_raw
from mae_fast.data.rng import CROP, generator
from mae_fast.data.segmentation import Crops, colours, has_jitter, mask_values, open_pairs, open_segmentation
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError

MEAN = torch.tensor([124, 116, 104], dtype=torch.uint8)


def ramp(height, width):
    """Image uint8 [H, W, 3] in which red shows the column and green the row, to 1/16 pixel. Sides up to 60."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([4 * columns + 8, 4 * rows + 8, 0 * rows + 128], -1).astype(np.uint8)


def blocks(height, width, side=8):
    """Classes 0 to 63 in squares of ``side`` pixels."""
    rows, columns = np.mgrid[:height, :width]
    return (rows // side * 8 + columns // side).astype(np.uint8)


def folder(root, counts=(6, 3), sizes=((44, 56), (60, 40)), classes=64):
    """A dataset in our layout, of ramps and blocks with alternating sizes. Images are PNG, to keep exact values."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            size = sizes[i % len(sizes)]
            Image.fromarray(ramp(*size)).save(root / split / "images" / f"{i:02}.png")
            Image.fromarray(blocks(*size)).save(root / split / "masks" / f"{i:02}.png")
    if classes:
        (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(classes)) + "\n")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


@pytest.fixture
def no_jitter(monkeypatch):
    monkeypatch.setattr(pairs.ColorJitter, "__call__", lambda *_: None)


def png(pixels, mode=None, **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_images_and_masks_are_paired(copy, caplog):
    (copy / "train" / "images" / "02.png").rename(copy / "train" / "images" / "02.JPG")
    (copy / "train" / "masks" / "03.png").unlink()
    (copy / "train" / "masks" / "alone.png").write_bytes(b"")
    (copy / "train" / "masks" / "notes.txt").write_text("no mask")
    (copy / "train" / "images" / "notes.txt").write_text("no image")
    (copy / "annotations").mkdir()  # as for detection
    train, val = open_segmentation(copy)
    assert train.names == ("00.png", "01.png", "02.JPG", "04.png", "05.png")
    assert train.masks.names == ("00.png", "01.png", "02.png", "04.png", "05.png")
    assert train.classes == val.classes == tuple(f"class {i}" for i in range(64))
    assert len(val) == 3
    assert caplog.messages == [
        f"{copy / 'train' / 'images'}: left out 1 images without a mask, 1 masks without an image, "
        "1 files that are not masks, 1 other file (.txt: 1)"
    ]
    image, labels = train.pair(1)
    assert np.array_equal(np.asarray(image), ramp(60, 40))
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, blocks(60, 40))


def test_without_classes_txt_classes_are_counted_in_masks(copy, caplog):
    (copy / "classes.txt").unlink()
    (copy / "train" / "masks" / "00.png").write_bytes(b"no mask")
    assert open_segmentation(copy)[0].classes == tuple(map(str, range(8 * 7 + 5)))  # the last block of 60 x 40
    assert caplog.messages == [f"{copy}: no classes.txt, found 61 classes in masks"]
    pixels = blocks(44, 56)
    pixels[0, 0], pixels[0, 1] = 255, 70
    Image.fromarray(pixels).save(copy / "val" / "masks" / "00.png")
    assert len(open_segmentation(copy)[0].classes) == 71


def test_255_means_no_label(copy):
    pixels = blocks(44, 56)
    pixels[3:5, 7] = 255
    Image.fromarray(pixels).save(copy / "val" / "masks" / "00.png")
    assert np.array_equal(open_segmentation(copy)[1].pair(0)[1], pixels)


def test_a_class_may_have_no_name(copy):
    """A blank line is a class without a name. Later classes keep their values."""
    listed(b"\n".join([b"name"] * 3 + [b""] + [b"last"] * 60) + b"\n\n")(copy)
    assert open_segmentation(copy)[0].classes[2:5] == ("name", "", "last")


def ade20k(root, names=True):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        mask = np.array([[0, 1, 2], [150, 149, 255]], np.uint8)
        Image.fromarray(ramp(2, 3)).save(root / "images" / split / f"ADE_{split}_1.jpg")
        Image.fromarray(mask).save(root / "annotations" / split / f"ADE_{split}_1.png")
    if names:
        rows = [f"{i}\t0.1\t2\t3\t{i % 2}\tname {i}, other name \n" for i in range(1, 151)]
        (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(rows))
    return root


def test_ade20k_is_read(tmp_path):
    train, val = open_segmentation(ade20k(tmp_path))
    assert train.names == ("ADE_training_1.jpg",)
    assert val.masks.names == ("ADE_validation_1.png",)
    assert len(train.classes) == 150
    assert (train.classes[0], train.classes[149]) == ("name 1, other name", "name 150, other name")
    assert train.pair(0)[1].tolist() == [[255, 0, 1], [149, 148, 255]]
    assert train.first == 1
    (tmp_path / "objectInfo150.txt").unlink()
    assert open_segmentation(tmp_path)[1].classes == tuple(map(str, range(1, 151)))


def test_ade20k_has_no_class_beyond_150(tmp_path):
    source, _ = open_segmentation(ade20k(tmp_path, names=False))
    path = tmp_path / "annotations" / "training" / "ADE_training_1.png"
    Image.fromarray(np.full((2, 3), 151, np.uint8)).save(path)
    with pytest.raises(BadImage, match="no class has value 151, there are 150"):
        source.pair(0)


def without(*parts):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def empty(root):
    for path in (root / "val" / "masks").iterdir():
        path.unlink()


def listed(text):
    return lambda root: (root / "classes.txt").write_bytes(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("val"), r"val/images cannot be read \(No such file or directory\)"),
        (without("train", "masks"), "train/masks cannot be read"),
        (empty, "no image in .*val/images .* has a mask in .*val/masks"),
        (listed(b"\n\n"), "has 0 classes; list 2 to 255 in .*classes.txt"),
        (listed(b"one\n"), "has 1 classes"),
        (listed(b"name\n" * 256), "has 256 classes"),
        (listed(b"\xff\xfe\n"), "classes.txt is not UTF-8 text"),
    ],
    ids=["split", "masks", "pairs", "empty list", "one class", "too many classes", "no text"],
)
def test_wrong_folders_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        open_segmentation(copy)


def test_a_damaged_list_of_ade20k_classes_is_refused(tmp_path):
    path = ade20k(tmp_path) / "objectInfo150.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"objectInfo150\.txt must have a header and rows 1 to 150"):
        open_segmentation(tmp_path)


def test_up_to_255_classes_are_supported(copy):
    listed(b"name\n" * 255)(copy)
    source, _ = open_segmentation(copy)
    Image.fromarray(np.full((44, 56), 254, np.uint8)).save(copy / "train" / "masks" / "00.png")
    assert (source.pair(0)[1] == 254).all()


def test_annotations_depend_on_masks_and_classes(copy):
    """They change with a name, size or class. The fingerprint depends only on the images."""
    found = {open_segmentation(copy)[0].annotations}
    images = open_segmentation(copy)[0].fingerprint
    mask = copy / "train" / "masks" / "05.png"
    mask.write_bytes(mask.read_bytes() + b"\0")
    found.add(open_segmentation(copy)[0].annotations)
    (copy / "classes.txt").write_text((copy / "classes.txt").read_text().replace("class 3\n", "class three\n"))
    found.add(open_segmentation(copy)[0].annotations)
    assert images == open_segmentation(copy)[0].fingerprint == open_source(copy / "train" / "images").fingerprint
    for kind in ("images", "masks"):
        (copy / "train" / kind / "05.png").rename(copy / "train" / kind / "06.png")
    found.add(open_segmentation(copy)[0].annotations)
    assert len(found) == 4
    assert images != open_segmentation(copy)[0].fingerprint


def test_images_listed_by_a_check_are_skipped(copy):
    (copy / "train" / "images" / "02.png").write_bytes(b"no image")
    check(open_source(copy / "train" / "images"))
    assert list(known_bad(open_segmentation(copy)[0])) == [2]
    (copy / "train" / "masks" / "00.png").unlink()  # its image is then left out
    assert list(known_bad(open_segmentation(copy)[0])) == [1]


GREY = np.array([[0, 1], [2, 255]], np.uint8)
PALETTE = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), "P")
PALETTE.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(GREY), GREY),
        (png(PALETTE), [[0, 1], [2, 3]]),  # of 2 bits
        (png(PALETTE, transparency=0), [[0, 1], [2, 3]]),
        (png(PALETTE, bits=8), [[0, 1], [2, 3]]),
        (png(Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)), [[0, 0], [0, 1]]),
    ],
    ids=["grey", "palette", "transparent palette", "palette of 8 bits", "1 bit"],
)
def test_all_formats_of_masks_are_read(data, expected):
    values = mask_values(data)
    assert values.dtype == np.uint8
    assert np.array_equal(values, expected)


def jpeg():
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(GREY.astype(np.uint16)), "unsupported: mode I;16 of 16 bits"),
        (png(np.zeros((2, 2, 3), np.uint8)), "unsupported: mode RGB of 8 bits"),
        (png(Image.new("LA", (2, 2))), "unsupported: mode LA of 8 bits"),
        (png(np.zeros((2, 2, 4), np.uint8)), "unsupported: mode RGBA"),
        (zoo.png_of_rows(2, 4, 0, b"\0\x01\0\x23"), "unsupported: mode L of 4 bits"),
        (jpeg(), "unsupported: JPEG: masks must be .png, .tif, .tiff, .npy"),
        (b"", "empty"),
        (b"no image", "not an image"),
        (png(blocks(60, 40))[:-40], "broken"),
    ],
    ids=["16 bits", "RGB", "LA", "RGBA", "4 bits", "JPEG", "empty", "text", "cut short"],
)
def test_other_formats_of_masks_are_refused(data, message):
    with pytest.raises(BadImage, match=message):
        mask_values(data)


def damage(root, split):
    """Damage a pair in each way. Returns the expected messages."""
    masks = root / split / "masks"
    beyond = blocks(44, 56)
    beyond[:2, :7] = np.arange(100, 107)
    damaged = {
        "00.png": (png(beyond), "no class has value 100, 101, 102, 103, 104, ..., there are 64 classes"),
        "01.png": (png(blocks(40, 60)), "40 x 60 pixels, but the image has 60 x 40"),
        "02.png": (png(np.zeros((44, 56, 3), np.uint8)), "mode RGB of 8 bits, neither 8 bits of grey nor a palette"),
        "03.png": (b"no image", "no known image format"),
        "04.png": (None, "No such file or directory"),
    }
    for name, (data, _) in damaged.items():
        if data is None:
            (masks / name).unlink()
            (masks / name).symlink_to("nowhere.png")
        else:
            (masks / name).write_bytes(data)
    return {int(name[:2]): f"mask {name}: {message}" for name, (_, message) in damaged.items()}


def test_bad_pairs_are_logged_and_replaced(tmp_path, caplog):
    root = folder(tmp_path, (10, 3))
    expected = damage(root, "train")
    (root / "train" / "images" / "05.png").write_bytes(b"no image")
    source, _ = open_segmentation(root)
    assert source.annotations
    skipped = Skipped(source, 0.6)
    batches = list(training_segmentation(source, size=(16, 16), batch_size=5, epochs=2, seed=0))
    for batch in batches:
        skipped.add(batch)
        assert batch.images.shape == (5, 16, 16, 3)
        assert set(batch.ids.tolist()) <= {6, 7, 8, 9}
    assert len(batches) == 4
    assert {i: bad.detail for i, bad in skipped.bad.items()} == {**expected, 5: "no known image format"}
    assert len(caplog.messages) == 6
    first = next(batch for batch in batches if batch.skipped)
    with pytest.raises(UserError, match="of 10 images cannot be used"):
        Skipped(source, 0.0).add(first)


def test_bad_pairs_are_left_out_of_evaluation(tmp_path):
    root = folder(tmp_path, (2, 7))
    expected = damage(root, "val")
    _, source = open_segmentation(root)
    batches = list(evaluation_segmentation(source, size=20))
    assert [batch.ids.tolist() for batch in batches] == [[], [], [], [], [], [5], [6]]
    assert {i: bad.detail for batch in batches for i, bad in batch.skipped} == expected
    assert all(batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64 for batch in batches)


def test_training_ends_if_all_pairs_are_bad(copy):
    for path in (copy / "train" / "masks").iterdir():
        path.write_bytes(b"no mask")
    source, _ = open_segmentation(copy)
    with pytest.raises(UserError, match=r"100 images in a row .*mask 0\d.png: no known image format"):
        next(training_segmentation(source, size=(16, 16), batch_size=2, epochs=1, seed=0))


def test_known_bad_pairs_are_not_read(data):
    source, _ = open_segmentation(data)
    bad = {i: BadImage("broken", "known") for i in (0, 1, 2)}
    for batch in training_segmentation(source, size=(16, 16), batch_size=3, epochs=3, seed=0, bad=bad):
        assert set(batch.ids.tolist()) <= {3, 4, 5}
        assert {bad.detail for _, bad in batch.skipped} <= {"known"}


@pytest.mark.usefixtures("no_jitter")
def test_the_mask_moves_with_the_image(data):
    """The colour of each pixel shows its position in the original image, and so its class."""
    source, _ = open_segmentation(data)
    seen, flips = 0, set()
    for batch in training_segmentation(source, size=(24, 24), batch_size=6, epochs=8, seed=3):
        for image, labels in zip(batch.images.double(), batch.labels, strict=True):
            within = (labels != 255) & (image[..., 2] == 128)
            column, row = ((image[..., i] - 8) / 4 + 0.5 for i in (0, 1))  # pixel centres, from the corner
            flips.add(bool(column[0, 0] > column[0, 1]))
            # Pixels at the border of the image are interpolated, and those between blocks depend on rounding.
            for place in (column, row):
                within &= ((place / 8) % 1 * 8 > 0.6) & ((place / 8) % 1 * 8 < 7.4)
                within &= place > 1.5
            within &= (column < 54.5) & (row < 58.5)
            expected = (row // 8 * 8 + column // 8).long()
            assert torch.equal(labels[within], expected[within])
            seen += int(within.sum())
    assert seen > 10_000
    assert flips == {True, False}


@pytest.mark.usefixtures("no_jitter")
def test_crops_equal_crops_of_the_scaled_image(data):
    """Cropping before scaling gives the same result. Scales have the documented distribution."""
    source, _ = open_segmentation(data)
    crops = Crops(source, LoaderConfig(size=(24, 24), batch_size=1, seed=5))
    scales = []
    for epoch in range(40):
        key = (epoch, 1)
        batch = crops.__getitems__([key])
        rng = generator(5, CROP, *key)
        scale = rng.uniform(0.5, 2.0)
        scales.append(scale)
        height, width = round(60 * 24 * scale / 40), round(40 * 24 * scale / 40)
        h, w = min(24, height), min(24, width)
        image, labels = source.pair(1)
        whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        nearest = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
        while True:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            cut = nearest[top : top + h, left : left + w]
            if np.unique(cut, return_counts=True)[1].max() <= 0.75 * cut.size:
                break
        pixels = whole[top : top + h, left : left + w]
        if rng.random() < 0.5:
            pixels, cut = pixels[:, ::-1], cut[:, ::-1]
        assert np.abs(batch.images[0, :h, :w].numpy() - pixels).max() <= 2
        assert (batch.labels[0, :h, :w].numpy() != cut).mean() < 0.01
        assert (batch.images[0, h:] == MEAN).all()
        assert (batch.images[0, :, w:] == MEAN).all()
        assert (batch.labels[0, h:] == 255).all()
        assert (batch.labels[0, :, w:] == 255).all()
    assert min(scales) < 0.6
    assert max(scales) > 1.9


def largest_share(labels):
    counts = np.bincount(labels[labels != 255])
    return counts.max() / counts.sum() if len(counts) else 1.0


@pytest.mark.parametrize("rest", [255, 7], ids=["no label", "one class"])
def test_crops_of_one_class_are_drawn_again(tmp_path, rest):
    """If a small part of an image has two classes, nearly all crops contain it."""
    folder(tmp_path, (1, 1), ((60, 60),))
    mask = np.full((60, 60), rest, np.uint8)
    mask[36:, 36:48], mask[36:, 48:] = 1, 2
    path = tmp_path / "train" / "masks" / "00.png"
    Image.fromarray(mask).save(path)
    source, _ = open_segmentation(tmp_path)

    def share_of_good(redraws):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairs, "REDRAWS", redraws)
            crops = Crops(source, LoaderConfig(size=(24, 24), batch_size=1))
            labels = [crops.__getitems__([(epoch, 0)]).labels.numpy() for epoch in range(60)]
        return np.mean([largest_share(x) <= 0.75 for x in labels])

    at_once = share_of_good(0)
    assert share_of_good(10) > at_once + 0.15
    Image.fromarray(np.full((60, 60), rest, np.uint8)).save(path)
    assert share_of_good(10) == 0


def test_colour_jitter_does_not_change_the_padding(data):
    source, _ = open_segmentation(data)
    batches = list(training_segmentation(source, size=(24, 24), batch_size=6, epochs=4, seed=1))
    blues = {int(x) for batch in batches for x in batch.images[batch.labels != 255][:, 2]}
    assert len(blues) > 20
    beyond = torch.cat([batch.images[batch.labels == 255] for batch in batches])
    assert len(beyond) > 0
    assert (beyond == MEAN).all()


def test_batches_depend_only_on_number_and_seed(data):
    """Not on workers, ranks or where a run was resumed."""
    source, _ = open_segmentation(data)
    options = {"size": (16, 16), "epochs": 3, "seed": 4}
    whole = list(training_segmentation(source, batch_size=2, **options))
    assert len(whole) == 9

    def same(ours, theirs):
        return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("images", "labels", "ids"))

    for first, workers in ((4, 0), (0, 1)):
        found = list(training_segmentation(source, batch_size=2, first=first, num_workers=workers, **options))
        assert len(found) == 9 - first
        assert all(map(same, found, whole[first:]))
    parts = [list(training_segmentation(source, batch_size=1, rank=rank, world=2, **options)) for rank in (0, 1)]
    for i, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[i].images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part[i].labels for part in parts]), batch.labels)
    assert len({tuple(batch.ids.tolist()) for batch in whole}) > 3
    assert len(list(training_segmentation(source, batch_size=2, batches_per_epoch=2, **options))) == 6
    again = list(training_segmentation(source, batch_size=2, **(options | {"seed": 5})))
    assert not any(map(same, again, whole))
    by_id = {}
    for batch in whole:
        for i, image in zip(batch.ids.tolist(), batch.images, strict=True):
            by_id.setdefault(i, []).append(image)
    assert all(not torch.equal(images[0], images[1]) for images in by_id.values())


def test_evaluation_has_each_whole_image_once(data):
    """The shorter side is scaled, labels keep their size, and all ranks have the same number of batches."""
    _, source = open_segmentation(data)
    batches = list(evaluation_segmentation(source, size=28))
    assert [tuple(batch.images.shape) for batch in batches] == [(1, 28, 36, 3), (1, 42, 28, 3), (1, 28, 36, 3)]
    for batch in batches:
        image, labels = source.pair(int(batch.ids))
        assert np.array_equal(batch.labels[0], labels)
        size = batch.images.shape[2], batch.images.shape[1]
        assert np.array_equal(batch.images[0], np.asarray(image.resize(size, Image.Resampling.BICUBIC)))
    parts = [[b.ids.tolist() for b in evaluation_segmentation(source, size=28, rank=rank, world=2)] for rank in (0, 1)]
    assert parts == [[[0], [1]], [[2], []]]


def test_narrow_images_that_would_be_too_large_are_bad(tmp_path):
    folder(tmp_path, (1, 1), ((2, 56),))
    _, source = open_segmentation(tmp_path)
    [batch] = evaluation_segmentation(source, size=2000)
    assert "scaled to 2000 x 56000" in batch.skipped[0][1].detail
    folder(tmp_path / "narrow", (1, 1), ((1, 65),))
    _, source = open_segmentation(tmp_path / "narrow")
    [batch] = evaluation_segmentation(source, size=32)
    assert "more than 64 times the other" in batch.skipped[0][1].detail


def test_exif_orientation_is_applied_to_the_image_only(tmp_path):
    folder(tmp_path, (1, 1), ((44, 56),))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(ramp(56, 44))
    for split in ("train", "val"):
        path = tmp_path / split / "images" / "00.png"
        turned.save(path.with_suffix(".jpg"), exif=exif)
        path.unlink()
    train, val = open_segmentation(tmp_path)
    with pytest.raises(BadImage, match="44 x 56 pixels, but the image has 56 x 44"):
        train.pair(0)
    assert train.pair(0, PixelFormat(exif=True))[0].size == (56, 44)
    options = {"size": (16, 16), "batch_size": 1, "epochs": 1, "seed": 0, "exif": True}
    assert not next(training_segmentation(train, **options)).skipped
    assert not next(evaluation_segmentation(val, size=16, exif=True)).skipped


def test_classes_have_distinct_colours():
    palette = colours(torch.arange(256).reshape(16, 16)).reshape(256, 3)
    assert palette.dtype == torch.uint8
    assert palette[255].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in palette.tolist()}) == 256
    assert (palette[:255].int().amax(1) >= 120).all()


def array(values, suffix, folder):
    """Encode values as TIFF or .npy."""
    path = folder / f"array{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    else:
        tifffile.imwrite(path, values)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64", "bool"])
def test_arrays_of_integers_are_masks(tmp_path, dtype, suffix):
    values = np.array([[0, 1, 1], [1, 0, 1]] if dtype == "bool" else [[0, 1, 200], [255, 3, 4]]).astype(dtype)
    for stored in (values, values[:, :, None]) if suffix == ".npy" else (values,):
        found = mask_values(array(stored, suffix, tmp_path))
        assert found.dtype == np.uint8
        assert np.array_equal(found, values)


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 256]], np.uint16), "values 0 to 256, expected 0 to 255"),
        (np.array([[-1, 2]], np.int16), "values -1 to 2, expected 0 to 255"),
        (np.zeros((2, 2), np.float32), "float32"),
        (np.zeros((4, 4, 3), np.uint8), r"uint8 \[4, 4, 3\], expected integers \[H, W\]"),
    ],
    ids=["large", "negative", "float", "colour"],
)
def test_other_arrays_are_refused_as_masks(tmp_path, values, message, suffix):
    with pytest.raises(BadImage, match=f"unsupported: .*{message}"):
        mask_values(array(values, suffix, tmp_path))


def test_png_is_read_first_if_there_are_several_masks(copy, caplog):
    masks = copy / "train" / "masks"
    for name, suffix in (("00", ".tif"), ("01", ".npy")):
        (masks / f"{name}{suffix}").write_bytes(array(blocks(44, 56), suffix, copy))
    (masks / "01.png").unlink()
    train, _ = open_segmentation(copy)
    assert train.masks.names[:3] == ("00.png", "01.npy", "02.png")
    assert "left out 1 files that are not masks" in caplog.text


def raw_folder(root, dtype, sizes=((44, 56), (60, 40))):
    """Images with five bands: 0 is the column, 3 the row, 4 constant, others noise. Some pixels are missing."""
    rng, missing = np.random.default_rng(0), MISSING[dtype]
    for split, count in (("train", 6), ("val", 3)):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            rows, columns = np.mgrid[:height, :width]
            noise = rng.integers(0, 200, (2, height, width))
            image = np.stack([UNIT * columns, *noise, UNIT * rows, 0 * rows + CONSTANT], -1).astype(dtype)
            image[8:16, 8:16] = missing
            np.save(root / split / "images" / f"{i:02}.npy", image)
            np.save(root / split / "masks" / f"{i:02}.npy", blocks(height, width))
    (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(64)) + "\n")
    return root


UNIT, CONSTANT = 100, 3000
MISSING = {"uint8": 255, "uint16": 60000, "int16": -999, "float32": np.nan, "float16": np.nan}


def raw_options(dtype, **others):
    nodata = {} if dtype.startswith("float") else {"nodata": MISSING[dtype]}
    return {"channels": 3, "bands": (4, 1, 5), "dtype": dtype, "fill": (11, 22, 33), **nodata, **others}


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float16", "float32"])
def test_raw_images_and_masks_are_cropped_alike(tmp_path, dtype):
    """Values show the original position. Missing pixels stay missing, and the padding has the fill values."""
    source, _ = open_segmentation(raw_folder(tmp_path, dtype))
    seen, lost, flips = 0, 0, set()
    options = raw_options(dtype, size=(24, 24), batch_size=6, epochs=6, seed=3)
    for batch in training_segmentation(source, **options):
        assert (batch.images.dtype, batch.images.shape) == (getattr(torch, dtype), (6, 24, 24, 3))
        for image, labels in zip(batch.images.double(), batch.labels, strict=True):
            missing = image.isnan() if dtype.startswith("float") else image == MISSING[dtype]
            assert torch.equal(missing.any(-1), missing.all(-1))
            missing, beyond = missing[..., 0], (image == torch.tensor([11.0, 22, 33])).all(-1)
            assert (labels[beyond] == 255).all()
            assert ((labels == 255) == beyond).all()
            there = ~missing & ~beyond
            assert ((image[there][:, 2] - CONSTANT).abs() < 0.01).all()  # no jitter, and no influence of missing values
            flips.add(bool(image[0, 0, 1] > image[0, 5, 1]))
            row, column = (image[..., i] / UNIT + 0.5 for i in (0, 1))
            inside = there.clone()
            for place in (column, row):
                inside &= ((place / 8) % 1 * 8 > 1) & ((place / 8) % 1 * 8 < 7) & (place > 2)
            inside &= (column < 54) & (row < 58)
            expected = (row // 8 * 8 + column // 8).long()
            assert torch.equal(labels[inside], expected[inside])
            seen, lost = seen + int(inside.sum()), lost + int(missing.sum())
            assert (labels[missing] == 9).float().mean() > 0.8 or not missing.any()  # the block in row 1, column 1
    assert seen > 5000
    assert lost > 300
    assert flips == {True, False}


def test_8_bit_images_with_many_bands_get_no_jitter(tmp_path):
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in ("images", "masks"):
            (tmp_path / split / name).mkdir(parents=True)
        np.save(tmp_path / split / "images" / "0.npy", rng.integers(0, 256, (30, 40, 6), dtype=np.uint8))
        np.save(tmp_path / split / "masks" / "0.npy", blocks(30, 40) % 5)
    train, val = open_segmentation(tmp_path)
    batch = next(training_segmentation(train, size=(16, 16), channels=6, fill=range(6)))
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (1, 16, 16, 6))
    [whole] = evaluation_segmentation(val, size=30, channels=6)
    assert np.array_equal(whole.images[0], np.load(tmp_path / "val" / "images" / "0.npy"))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_evaluation_scales_raw_images_in_their_dtype(tmp_path, dtype):
    _, source = open_segmentation(raw_folder(tmp_path, dtype))
    options = raw_options(dtype, size=22)
    fill, pixels = options.pop("fill"), PixelFormat(**{name: x for name, x in options.items() if name != "size"})
    del fill
    batches = list(evaluation_segmentation(source, **options))
    assert [tuple(batch.images.shape) for batch in batches] == [(1, 22, 28, 3), (1, 33, 22, 3), (1, 22, 28, 3)]
    for batch in batches:
        image, labels = source.pair(int(batch.ids), pixels)
        expected = resized_raw(image, tuple(batch.images.shape[1:3]), pixels.nodata).permute(1, 2, 0)
        assert torch.equal(batch.images[0].nan_to_num(-1) if dtype == "float32" else batch.images[0],
                           expected.nan_to_num(-1) if dtype == "float32" else expected)  # fmt: skip
        assert np.array_equal(batch.labels[0], labels)
    (root := tmp_path / "val" / "images" / "00.npy").write_bytes(b"no image")
    left_out = next(evaluation_segmentation(source, **options)).images
    assert (left_out.dtype, left_out.shape[3], root.exists()) == (getattr(torch, dtype), 3, True)


def test_boxes_are_rounded_to_pixels_inside_the_image():
    assert pairs._whole_pixels((1.4, 2.6, 9.5, 8.4), (20, 10)) == (1, 3, 10, 8)
    assert pairs._whole_pixels((1.6, 0.2, 2.0, 0.4), (2, 1)) == (1, 0, 2, 1)


def test_only_8_bit_images_get_colour_jitter():
    assert has_jitter(PixelFormat())
    assert has_jitter(PixelFormat(channels=1))
    for other in ({"dtype": "uint16"}, {"bands": (3, 2, 1)}, {"nodata": 0.0}, {"channels": 4}):
        assert not has_jitter(PixelFormat(**other))


def test_the_check_finds_the_pairs_that_training_refuses(tmp_path, monkeypatch):
    """With the same bands and dtype, and with masks. Training skips the listed pairs."""
    root = raw_folder(tmp_path / "data", "uint16")
    np.save(root / "train" / "images" / "02.npy", np.zeros((44, 56, 3), np.uint16))
    np.save(root / "train" / "masks" / "03.npy", blocks(40, 60))
    for of in ({}, {"bands": (4, 1, 5)}):
        monkeypatch.setattr("sys.argv", ["mae-fast"])
        flags = cli_images.PixelFlags(bands="4,1,5") if of else cli_images.PixelFlags(in_chans=5)
        cli_images._check(root / "train", max_bad_fraction=1, pixel_flags=flags)
        train, _ = open_segmentation(root)
        bad = known_bad(train, PixelFormat(channels=3 if of else 5, dtype="uint16", **of))
        assert list(bad) == [2, 3]
        assert "bands" in bad[2].detail
        assert "mask 03.npy: 40 x 60 pixels" in bad[3].detail
    assert open_pairs(root) is None
    assert open_pairs(root / "train" / "images") is None
