"""The transfer dataset, from small random maps."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_fast.errors import UserError
from mae_fast.studies import scenes
from mae_fast.studies.demo_data import Recipe, build_from, on_mosaic
from mae_fast.studies.scenes import CLASSES, MERGED, OBJECT_PIXELS, OBJECTS, SIDE, UNLABELLED, build_scenes, objects

HIGH, WIDE = 448, 1344  # 2 x 6 blocks
RECIPE = Recipe(val_share=0.4, least=(0, 0), contrast=0.0, purity=0.0)


def maps() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mosaic = rng.integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8)
    labels = np.kron(rng.integers(0, 17, (15, 45)), np.ones((40, 40)))[: HIGH * 4 // 3, : WIDE * 4 // 3]
    return mosaic, labels.astype(np.uint8)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "set"
    counts = build_scenes(root, RECIPE, lambda _: maps())
    assert all(counts[split]["images"] and counts[split]["objects"] for split in ("train", "val"))
    return root


def corner(path: Path) -> tuple[int, int]:
    row, col = (int(part[1:]) for part in path.stem.split("_"))
    return row, col


def test_images_and_masks_are_cut_from_the_maps(built):
    mosaic, labels = maps()
    classes = MERGED[on_mosaic(labels, mosaic.shape[:2])]
    for path in built.glob("*/*/*.png"):
        row, col = corner(path)
        here = (slice(row, row + SIDE), slice(col, col + SIDE))
        expected = mosaic[here] if path.parent.name == "images" else classes[here]
        assert np.array_equal(np.asarray(Image.open(path)), expected)
    assert (built / "classes.txt").read_text().split() == list(CLASSES)


def test_every_land_cover_value_has_a_class():
    igbp = (
        ("water", "water"), ("evergreen needleleaf", "forest"), ("evergreen broadleaf", "forest"),
        ("deciduous needleleaf", "forest"), ("deciduous broadleaf", "forest"), ("mixed forest", "forest"),
        ("closed shrubland", "shrubs_and_savannas"), ("open shrubland", "shrubs_and_savannas"),
        ("woody savanna", "shrubs_and_savannas"), ("savanna", "shrubs_and_savannas"), ("grassland", "grasslands"),
        ("permanent wetland", None), ("cropland", "croplands"), ("urban", None), ("cropland mosaic", "croplands"),
        ("snow and ice", "snow_and_ice"), ("barren", "barren"),
    )  # fmt: skip
    assert MERGED.tolist() == [UNLABELLED if name is None else CLASSES.index(name) for _, name in igbp]


def test_images_are_in_the_split_of_the_surrounding_tiles(built, tmp_path):
    build_from(tmp_path / "demo", RECIPE, lambda _: maps())
    tiles = {
        split: {corner(path) for path in (tmp_path / "demo").glob(f"{split}/*/*.png")} for split in ("train", "val")
    }
    seen = 0
    for split, other in (("train", "val"), ("val", "train")):
        for row, col in map(corner, (built / split / "images").glob("*.png")):
            inside = {(r, c) for r, c in tiles[split] if row <= r <= row + SIDE - 32 and col <= c <= col + SIDE - 32}
            seen += len(inside)
            for r, c in tiles[other]:
                assert max(abs(r + 16 - row - SIDE // 2), abs(c + 16 - col - SIDE // 2)) >= (32 + SIDE) // 2
    assert seen > 20


def test_images_do_not_overlap(built):
    places = [corner(path) for path in built.glob("*/images/*.png")]
    for i, (row, col) in enumerate(places):
        assert all(max(abs(row - r), abs(col - c)) >= SIDE for r, c in places[:i])


def test_images_of_one_class_are_left_out(tmp_path):
    mosaic, labels = maps()
    labels[:, : WIDE * 2 // 3] = 0
    build_scenes(tmp_path / "set", RECIPE, lambda _: (mosaic, labels))
    assert min(corner(path)[1] for path in (tmp_path / "set").glob("*/images/*.png")) >= WIDE // 2 - SIDE


def test_objects_are_regions_of_water_and_ice():
    import pycocotools.mask

    classes = np.full((SIDE, SIDE), UNLABELLED, np.uint8)
    classes[2:12, 3:13] = 0
    classes[12:22, 13:23] = 0  # touches the first at a corner only
    classes[26:27, 40:50] = 5  # too small
    classes[2:12, 40:50] = 3  # grass
    classes[30:, :] = 5  # more than half of the square
    found = {(each["category_id"], tuple(each["bbox"])): each for each in objects(classes)}
    assert {*found} == {(1, (3, 2, 10, 10)), (1, (13, 12, 10, 10)), (6, (0, 30, 64, 34))}
    for each in found.values():
        x, y, wide, high = map(int, each["bbox"])
        mask = pycocotools.mask.decode(each["segmentation"])
        assert mask[y : y + high, x : x + wide].all()
        assert mask.sum() == each["area"] == wide * high


def test_smallest_object():
    classes = np.ones((SIDE, SIDE), np.uint8)
    classes[:8, :8] = classes[20:27, :9] = 0  # 64 pixels, and one less
    assert [each["area"] for each in objects(classes)] == [64] == [OBJECT_PIXELS]


def test_pycocotools_reads_the_annotations(built, capsys):
    from pycocotools.coco import COCO

    for split in ("train", "val"):
        coco = COCO(built / "annotations" / f"instances_{split}.json")
        assert {each["id"]: each["name"] for each in coco.loadCats(coco.getCatIds())} == OBJECTS
        assert {each["file_name"] for each in coco.imgs.values()} == {
            path.name for path in (built / split / "images").iterdir()
        }
        for each in coco.anns.values():
            name = coco.imgs[each["image_id"]]["file_name"]
            mask = np.asarray(Image.open(built / split / "masks" / name))
            assert {CLASSES[i] for i in mask[coco.annToMask(each) == 1]} == {OBJECTS[each["category_id"]]}


def test_existing_dataset_is_kept_and_other_content_refused(built, tmp_path):
    def refuse(_: Path) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("the maps must not be fetched")

    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    counts = build_scenes(built, RECIPE, refuse)
    assert counts["train"]["images"] == len([*(built / "train" / "masks").iterdir()])
    assert before == {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    with pytest.raises(UserError, match="other settings"):
        build_scenes(built, Recipe(), refuse)
    made = tmp_path / "set"
    build_scenes(made, RECIPE, lambda _: maps())
    next((made / "val" / "masks").iterdir()).unlink()
    with pytest.raises(UserError, match="missing or extra images"):
        build_scenes(made, RECIPE, refuse)


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(_: dict) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes.json, "dumps", full)
    with pytest.raises(UserError, match="No space left"):
        build_scenes(tmp_path / "set", RECIPE, lambda _: maps())
    assert list(tmp_path.iterdir()) == []


def test_second_class_covers_a_tenth_of_each_image():
    classes = np.zeros((224, 224), np.uint8)  # one block of nine squares
    classes[16:22, 16:80] = 1  # 6 of 64 rows
    classes[16:23, 80:144] = 1  # 7 of 64 rows
    found = [place for _, *place in scenes.squares(np.zeros((224, 224, 3), np.uint8), classes, RECIPE)]
    assert found == [[16, 80]]
