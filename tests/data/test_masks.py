"""Masks as noise: exact counts, the block distribution of BEiT, grids, and valid and invalid files."""

import itertools
import math
import pickle
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from mae_fast.data import masks
from mae_fast.data.masks import check_mask_ratio, from_file, sampler
from mae_fast.data.rng import MASK, generator, mask_noise
from mae_fast.errors import UserError
from mae_fast.ops.random_masking import random_masking

grids = st.tuples(st.integers(1, 20), st.integers(1, 20))


def removed(noise: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The mask of a noise."""
    assert noise.shape == (grid[0] * grid[1],)
    assert noise.dtype == np.float32
    assert ((noise >= 0) & (noise <= 2)).all()
    return (noise >= 1).reshape(grid)


# --- random masks


@pytest.mark.parametrize("num_patches", [1, 7, 49, 196])
@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_random_noise_equals_the_default_bit_by_bit(num_patches: int, repeats: int) -> None:
    """Also for odd lengths, where half of a random word is left for the next crop."""
    draw, rng = sampler("random", (1, num_patches), 0.75), generator(5, MASK, 2, 7)
    drawn = np.stack([draw(rng) for _ in range(repeats)])
    assert drawn.dtype == np.float32
    assert np.array_equal(drawn, mask_noise(5, 2, 7, (repeats, num_patches)))


# --- all kinds


@given(st.sampled_from(["random", "block"]), grids, st.floats(0, 1), st.integers(0, 2**32))
def test_the_number_of_removed_patches_is_the_published_one(
    kind: Any, grid: tuple[int, int], ratio: float, seed: int
) -> None:
    num_patches = grid[0] * grid[1]
    num_keep = int(num_patches * (1 - ratio))
    noise = sampler(kind, grid, ratio)(np.random.default_rng(seed))
    mask = removed(noise, grid)
    if kind == "random":
        assert not mask.any()  # uniform noise: sorting decides
    else:
        assert mask.sum() == num_patches - num_keep
    ids_keep, _, _, models = random_masking(torch.from_numpy(noise)[None], num_keep)
    assert ids_keep.shape == (1, num_keep)
    if kind == "block":
        assert np.array_equal(models[0].bool().numpy(), mask.ravel())


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_kept_patches_are_in_random_order(kind: Any) -> None:
    rng, draw = np.random.default_rng(0), sampler(kind, (4, 4), 0.75)
    noise = torch.from_numpy(np.stack([draw(rng) for _ in range(4000)]))
    ids_keep, *_ = random_masking(noise, 4)
    share = (ids_keep[:, :1] < ids_keep[:, 1:]).double().mean(0)  # how often the first patch precedes each other one
    assert (share - 0.5).abs().max() < 0.05


class Extreme(np.random.Generator):
    """A generator that returns 0, or the largest number below 1."""

    value = 0.0

    def random(self, size: Any = None, dtype: Any = None, out: Any = None) -> Any:
        return np.full(size, self.value, dtype)


@pytest.mark.parametrize("value", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("kind", ["block", "grid"])
def test_rounding_changes_no_mask(kind: Any, value: float) -> None:
    rng = Extreme(np.random.Philox(0))
    rng.value = value
    noise = sampler(kind, (14, 14), 0.75)(rng)
    assert np.sort(noise)[48] == np.float32(value) < 1
    assert np.sort(noise)[49] >= 1


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
@pytest.mark.parametrize("ratio", [-0.01, 1.01, 75, math.nan])
def test_ratios_outside_of_0_to_1_are_refused(kind: Any, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"mask_ratio must be in 0\.\.1, got {ratio}"):
        sampler(kind, (14, 14), ratio)


def test_a_grid_mask_of_one_patch_is_refused() -> None:
    for kind in ("random", "block"):
        for ratio in (0.0, 0.75, 1.0):
            mask = removed(sampler(kind, (1, 1), ratio)(np.random.default_rng(0)), (1, 1))
            assert mask.item() == (kind == "block" and ratio > 0)
    with pytest.raises(ValueError, match="keeps 0 of 1; feasible ratios: none"):
        sampler("grid", (1, 1), 0.75)


def test_samplers_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.random.default_rng(0).permuted(np.tile(np.arange(16) < 12, (9, 1)), axis=1))
    kinds: list[Any] = ["random", "block", "grid"]
    for draw in [*(sampler(kind, (4, 4), 0.75) for kind in kinds), from_file(tmp_path / "m.npy", (4, 4))[0]]:
        sent = pickle.loads(pickle.dumps(draw))
        rngs = np.random.default_rng(1), np.random.default_rng(1)
        for _ in range(3):
            assert np.array_equal(draw(rngs[0]), sent(rngs[1]))


# --- blocks


def beits(rng: random.Random, h: int, w: int, count: int, least: float) -> np.ndarray:
    """A mask by the algorithm of BEiT's paper, over sets of patches. It may have fewer patches than ``count``."""
    covered: set[tuple[int, int]] = set()
    tries = 0
    while len(covered) < count and tries < 10:
        tries += 1
        area = rng.uniform(least, count - len(covered))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        a, b = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if a >= h or b >= w:
            continue
        y, x = rng.randint(0, h - a), rng.randint(0, w - b)
        new = {(i, j) for i in range(y, y + a) for j in range(x, x + b)} - covered
        if 0 < len(new) <= count - len(covered):
            covered |= new
            tries = 0
    mask = np.zeros((h, w), bool)
    for patch in covered:
        mask[patch] = True
    return mask


def features(mask: np.ndarray) -> dict[str, float]:
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    edges = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
    return {
        "removed": mask.sum(),
        "edges": edges,
        "height": np.ptp(rows),
        "width": np.ptp(cols),
        "full rows": mask.all(1).sum(),
        "full columns": mask.all(0).sum(),
        "top": mask[: len(mask) // 2].sum(),
        "left": mask[:, : mask.shape[1] // 2].sum(),
        "corners": mask[0, 0] + mask[0, -1] + mask[-1, 0] + mask[-1, -1],
        "middle": mask[tuple(side // 2 for side in mask.shape)],
    }


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.4), ((14, 14), 0.75), ((10, 20), 0.5)], ids=str)
def test_blocks_have_the_distribution_of_beit(
    grid: tuple[int, int], ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the end of BEiT's algorithm, which may stop early if no block fits."""
    (h, w), n = grid, 2500
    count = h * w - int(h * w * (1 - ratio))
    python, rng = random.Random(0), np.random.default_rng(0)
    theirs = [beits(python, h, w, count, 16 * h * w / 196) for _ in range(n)]
    add, short, ours = masks._add_block, [], []

    def recorded(rng: np.random.Generator, mask: np.ndarray, least: float, missing: int) -> bool:
        found = add(rng, mask, least, missing)
        if not found:
            short.append(mask.copy())
        return found

    monkeypatch.setattr(masks, "_add_block", recorded)
    draw = sampler("block", grid, ratio)
    for _ in range(n):
        short.clear()
        whole = removed(draw(rng), grid)
        ours.append(short[0] if short else whole)
    for name in features(ours[0]):
        a, b = (np.array([features(mask)[name] for mask in made], float) for made in (ours, theirs))
        error = math.hypot(a.std(), b.std()) / math.sqrt(n)
        assert abs(a.mean() - b.mean()) <= 4.5 * error, (name, a.mean(), b.mean())
    frequency = [np.mean(made, 0) for made in (ours, theirs)]
    assert np.abs(frequency[0] - frequency[1]).max() < 5 * math.sqrt(0.5 / n)


def test_area_aspect_and_position_of_the_first_block() -> None:
    """On a fine grid, where rounding to patches is negligible."""
    rng, grid = np.random.default_rng(0), (400, 500)
    made = []
    for _ in range(1500):
        mask = np.zeros(grid, bool)
        assert masks._add_block(rng, mask, 800, 8000)
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        h, w = len(rows), len(cols)
        assert mask.sum() == h * w  # a rectangle
        made.append((h * w, math.log(h / w), rows[0] / (grid[0] - h), cols[0] / (grid[1] - w)))
    area, aspect, top, left = np.array(made).T
    limit = math.log(1 / 0.3)
    assert kstest(area, "uniform", (800, 7200)).pvalue > 1e-4
    assert kstest(aspect, "uniform", (-limit, 2 * limit)).pvalue > 1e-4
    assert kstest(top, "uniform").pvalue > 1e-4
    assert kstest(left, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("grid", [(14, 14), (28, 14), (7, 7), (2, 3), (1, 9)], ids=str)
def test_the_smallest_area_scales_with_the_grid_and_is_halved_if_no_block_fits(
    grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(masks, "_add_block", lambda rng, mask, least, missing: asked.append(least))
    rng = np.random.default_rng(0)
    mask = removed(sampler("block", grid, 0.5)(rng), grid)
    assert asked[0] == pytest.approx(16 * mask.size / 196)
    assert all(a == b if a <= 1 else a == 2 * b for a, b in itertools.pairwise(asked))
    assert mask.sum() == sum(least <= 1 for least in asked)  # single patches, one at a time
    assert not np.array_equal(mask, removed(sampler("block", grid, 0.5)(rng), grid))


def test_blocks_equal_those_of_earlier_versions() -> None:
    """Runs are resumed across versions, so the draws of a key must not change."""
    noise = sampler("block", (14, 14), 0.75)(generator(5, MASK, 2, 7))
    assert np.packbits(noise >= 1).tobytes().hex() == "009c3f70fddfff7ffdfff7ffdffe7ff9ffe3ff0ff83fe0ff80"
    assert (noise[:4] * 2**23).astype(int).tolist() == [7877379, 4394487, 6639798, 884157]


# --- grids


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (12, 16), (2, 2), (2, 10)], ids=str)
def test_a_ratio_of_three_quarters_has_cells_of_two_by_two(grid: tuple[int, int]) -> None:
    expected = np.ones(grid, bool)
    for y in range(0, grid[0], 2):
        for x in range(0, grid[1], 2):
            expected[y, x] = False
    draw, rng = sampler("grid", grid, 0.75), np.random.default_rng(0)
    first = draw(rng)
    assert np.array_equal(removed(first, grid), expected)
    second = draw(rng)
    assert np.array_equal(removed(second, grid), expected)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("grid", "ratio", "cell"),
    [
        ((14, 14), 0.5, (1, 2)),
        ((7, 20), 0.75, (1, 4)),
        ((12, 12), 0.83, (2, 3)),
        ((5, 6), 0.79, (5, 1)),
        ((6, 4), 0.875, (2, 4)),
    ],
    ids=str,
)
def test_cells_are_as_square_as_possible(grid: tuple[int, int], ratio: float, cell: tuple[int, int]) -> None:
    mask = removed(sampler("grid", grid, ratio)(np.random.default_rng(0)), grid)
    ys, xs = np.mgrid[: grid[0], : grid[1]]
    assert np.array_equal(~mask, (ys % cell[0] == 0) & (xs % cell[1] == 0))


@given(grids, st.floats(0, 1))
def test_grids_are_exact_or_refused(grid: tuple[int, int], ratio: float) -> None:
    h, w = grid
    num_keep = int(h * w * (1 - ratio))
    areas = {a * b for a in range(1, h + 1) for b in range(1, w + 1) if h % a == 0 == w % b} - {1}
    try:
        mask = removed(sampler("grid", grid, ratio)(np.random.default_rng(0)), grid)
    except ValueError as error:
        assert num_keep not in {h * w // area for area in areas}
        told = str(error)
        assert f"{h} x {w}" in told
        assert f"mask_ratio {ratio:g} keeps {num_keep} of {h * w}; " in told
        feasible = told.split("feasible ratios: ")[1]
        ratios = [] if feasible == "none" else [float(x) for x in feasible.split(", ")]
        assert ratios == sorted(ratios)
        kept = {int(h * w * (1 - ratio)) for ratio in ratios}
        assert kept == {h * w // area for area in areas}
        for ratio in ratios:  # all listed ratios are valid
            sampler("grid", grid, ratio)
    else:
        assert (~mask).sum() == num_keep
        assert h * w // num_keep in areas


def test_impossible_grid_masks_list_feasible_ratios() -> None:
    with pytest.raises(ValueError, match=re.escape("0.6 keeps 78 of 196; feasible ratios: 0.5, 0.75, 0.857, 0.928,")):
        sampler("grid", (14, 14), 0.6)
    with pytest.raises(ValueError, match=re.escape("feasible ratios: 0.85, 0.97")):
        sampler("grid", (7, 7), 0.75)


# --- files


def drawn_of(path: Path, grid: tuple[int, int], n: int = 60) -> tuple[set[bytes], float]:
    draw, ratio = from_file(path, grid)
    rng = np.random.default_rng(0)
    return {removed(draw(rng), grid).tobytes() for _ in range(n)}, ratio


def some(m: int = 5, grid: tuple[int, int] = (4, 6), count: int = 15, seed: int = 0) -> np.ndarray:
    rows = np.tile(np.arange(grid[0] * grid[1]) < count, (m, 1))
    return np.random.default_rng(seed).permuted(rows, axis=1).reshape(m, *grid)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", ["?", "u1", "<i8", ">i4", "<f2", ">f8"])
def test_masks_are_drawn_from_a_file(tmp_path: Path, dtype: str, flat: bool) -> None:
    made = some()
    stored = made.reshape(5, -1) if flat else made
    np.save(tmp_path / "m.npy", np.asfortranarray(stored.astype(dtype)))
    found, ratio = drawn_of(tmp_path / "m.npy", (4, 6))
    assert found == {mask.tobytes() for mask in made}
    assert int(24 * (1 - ratio)) == 9


def test_masks_of_a_file_are_drawn_uniformly_by_the_generator(tmp_path: Path) -> None:
    made = some(4, (3, 3), 6)
    np.save(tmp_path / "m.npy", made)
    draw, _ = from_file(tmp_path / "m.npy", (3, 3))
    rng, again = np.random.default_rng(0), np.random.default_rng(0)
    places = [mask.ravel().tolist() for mask in made]
    counts = np.zeros(4)
    for _ in range(4000):
        noise = draw(rng)
        assert np.array_equal(noise, draw(again))
        counts[places.index((noise >= 1).tolist())] += 1
    assert (np.abs(counts - 1000) < 140).all()  # five standard deviations
    assert len(np.unique(draw(rng))) == 9


def test_the_ratio_of_a_file_keeps_its_number_of_patches(tmp_path: Path) -> None:
    for num_patches in (2, 3, 10, 49, 100, 196, 257):
        for count in range(1, num_patches, 1 + num_patches // 20):
            np.save(tmp_path / "m.npy", some(1, (1, num_patches), count))
            _, ratio = from_file(tmp_path / "m.npy", (1, num_patches))
            assert int(num_patches * (1 - ratio)) == num_patches - count
            assert 0 < ratio < 1


def test_changes_of_the_file_have_no_effect(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", some())
    draw, _ = from_file(tmp_path / "m.npy", (4, 6))
    before = draw(np.random.default_rng(0))
    (tmp_path / "m.npy").write_bytes(b"")
    assert np.array_equal(before, draw(np.random.default_rng(0)))


class Evil:
    """Creates a file if it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


def bad_files(folder: Path) -> dict[str, tuple[Any, str]]:
    """By name: an array or bytes, and a part of the message."""
    shape = r"\[M, 4, 6\] or \[M, 24\]"
    values = "values must be 0 or 1, mask"
    good = some()
    np.save(folder / "good", good)
    whole = (folder / "good.npy").read_bytes()
    with zipfile.ZipFile(folder / "z", "w") as file:
        file.writestr("masks.npy", whole)
    objects = np.empty((1, 4, 6), object)
    objects[:] = Evil()
    uneven, one_more = some(), some()
    uneven[2, 0, :] = True
    one_more[4].flat[np.flatnonzero(~one_more[4])[0]] = True
    weights, half, unset, negative = (some().astype(np.float32) for _ in range(4))
    weights *= 255
    half[1, 2, 3] = 0.5
    unset[3, 0, 1] = np.nan
    negative[0, 0, 0] = -1
    header = whole[:10] + whole[10:128].replace(b"(5, 4, 6)", b"(5000000000000, 4, 6)")[:118]
    return {
        "empty": (b"", "not a .npy file"),
        "text": (b"0 1 1 0\n1 0 0 1\n", "not a .npy file"),
        "pickle": (pickle.dumps(Evil()), "not a .npy file"),
        "objects": (objects, "not a .npy file"),
        "npz": ((folder / "z").read_bytes(), "not a .npy file"),
        "cut": (whole[:-1], "not a .npy file"),
        "cut header": (whole[:50], "not a .npy file"),
        "no shape": (whole.replace(b"'shape'", b"'shade'"), "not a .npy file"),
        "open bracket": (whole.replace(b"(5, 4, 6), }", b"(5, 4, 6 , {"), "not a .npy file"),
        "promises": (header + whole[128:], "not a .npy file"),
        "scalar": (np.array(True), shape),
        "no masks": (good[:0], shape),
        "one mask": (good[0], shape),
        "other grid": (good.transpose(0, 2, 1), shape),
        "other length": (good.reshape(5, -1)[:, 1:], shape),
        "channels": (good[:, None], shape),
        "words": (good.astype("U1"), "values are <U1"),
        "complex": (good.astype("c8"), "values are complex64"),
        "times": (good.astype("i8").astype("m8[s]"), "values are timedelta64"),
        "records": (good.view([("a", "?")]), "values are "),
        "pixels": (weights, f"{values} 0 has 255.0 at patch"),
        "half": (half, f"{values} 1 has 0.5 at patch 15"),
        "not a number": (unset, f"{values} 3 has nan at patch 1"),
        "negative": (negative, f"{values} 0 has -1.0 at patch 0"),
        "uneven": (uneven, r"4 of 5 masks remove 15 patches, but mask 2 removes 1[6-9];"),
        "one more": (one_more, "4 of 5 masks remove 15 patches, but mask 4 removes 16;"),
        "all removed": (np.ones((2, 24)), "remove all of the 24 patches"),
        "none removed": (np.zeros((2, 24)), "remove none of the 24 patches"),
    }


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_invalid_mask_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (content, expected) in bad_files(tmp_path).items():
        path = tmp_path / f"{name}.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content, allow_pickle=True)
        with pytest.raises(UserError, match=expected) as caught:
            from_file(path, (4, 6))
        assert str(caught.value).startswith(f"--masks {path}: "), name
        assert len(str(caught.value).splitlines()) == 1, name
        path.unlink()
    assert not (tmp_path / "unpickled").exists()


def test_unreadable_mask_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--masks .*absent\.npy: cannot be read \(No such file"):
        from_file(tmp_path / "absent.npy", (4, 6))
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); give a .npy file"):
        from_file(tmp_path, (4, 6))


def test_only_the_first_uneven_masks_are_listed(tmp_path: Path) -> None:
    made = np.concatenate([some(4), some(6, count=14)[:3], some(20, count=13)[:2]])
    np.save(tmp_path / "m.npy", made)
    with pytest.raises(UserError, match=r"4 of 9 .* but mask 4 removes 14, mask 5 removes 14, .* \.\.\.;"):
        from_file(tmp_path / "m.npy", (4, 6))


@pytest.mark.parametrize("counts", [range(2, 400), (1024, 4096, 16384, 65536, 10**6)], ids=["small", "large"])
def test_both_ends_of_the_range_in_the_message_are_accepted(counts):
    for count in counts:
        for ratio in (1e-18, 1 - 1e-12):
            with pytest.raises(UserError, match=r"use \S+ to \S+$") as caught:
                check_mask_ratio(count, ratio)
            low, high = (float(word) for word in caught.value.hint.split() if word[0].isdigit())
            for end in (low, high):
                check_mask_ratio(count, end)
                assert 0 < int(count * (1 - end)) < count


def test_one_patch_cannot_be_masked():
    with pytest.raises(UserError, match="one patch cannot be masked"):
        check_mask_ratio(1, 0.5)


@pytest.mark.parametrize("grid", [(1, 5), (7, 7), (8, 16), (13, 11), (128, 128), (512, 512)], ids=str)
def test_feasible_ratios_in_the_message_are_accepted(grid):
    with pytest.raises(ValueError, match="feasible ratios: ") as caught:
        sampler("grid", grid, 0.123456)
    for ratio in str(caught.value).split("feasible ratios: ")[1].split(", "):
        sampler("grid", grid, float(ratio))
