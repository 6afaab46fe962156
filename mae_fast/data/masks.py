"""Random, block and grid masks, and masks from a file, as noise for the model.

The model keeps the K = int(L * (1 - mask_ratio)) of L = h * w patches with the smallest noise. A mask (bool, 1 =
removed) becomes the noise mask + u, with u uniform in [0, 1): below 1 for kept patches, at least 1 for removed ones. So
the model keeps the right patches, in random order.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import UserError, first_line

Sampler = Callable[[np.random.Generator], np.ndarray]
"""Draws the noise of one image, fp32 [L]. It can be pickled, for worker processes."""

ATTEMPTS = 10  # to place a block, before smaller blocks are allowed
LEAST_AREA = 16 / 14**2  # smallest area of a block, as a share of the grid
LOG_ASPECT = math.log(1 / 0.3)  # height / width of a block is from 0.3 to 1 / 0.3


def check_mask_ratio(num_patches: int, mask_ratio: float) -> None:
    """Raise ``UserError`` unless at least one patch stays visible and at least one is removed."""
    if num_patches < 2:
        raise UserError("images of one patch cannot be masked", "use smaller patches, or larger images")
    num_keep = int(num_patches * (1 - mask_ratio))
    if not 0 < num_keep < num_patches:
        what = "no visible" if num_keep <= 0 else "no removed"
        low, high = (_shortest_ratio(num_patches, count) for count in (num_patches - 1, 1))
        raise UserError(f"--mask-ratio {mask_ratio:g} leaves {what} patch of {num_patches}", f"use {low} to {high}")


def sampler(kind: Literal["random", "block", "grid"], grid: tuple[int, int], mask_ratio: float) -> Sampler:
    """A sampler of masks that remove L - int(L * (1 - mask_ratio)) patches.

    Args:
        kind: "random": uniform noise. "block": rectangles, as in BEiT (Bao et al., 2022), but with an exact number of
            patches. "grid": all but the first patch of each cell of a x b patches, with cells as square as possible.
            This is one mask for all images.
        grid: h, w.

    Raises:
        ValueError: if the ratio is not in 0..1, or if no cells of the grid have this ratio. The message then lists the
            possible ratios.
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask_ratio must be in 0..1, got {mask_ratio}")
    num_patches = grid[0] * grid[1]
    num_keep = int(num_patches * (1 - mask_ratio))
    if kind == "random":
        return partial(_random_noise, num_patches=num_patches)
    if kind == "block":
        return partial(_block_noise, grid=grid, num_removed=num_patches - num_keep)
    return partial(_noise_of_one, masks=_grid_mask(grid, mask_ratio)[None])


def from_file(path: Path, grid: tuple[int, int]) -> tuple[Sampler, float]:
    """A sampler that draws one mask of a file for each image, and the mask ratio of the file.

    Args:
        path: .npy [M, h, w] or [M, L], bool or numbers: 0 (kept) or 1 (removed), the same number removed in each.
        grid: h, w of the model's patches.

    Raises:
        UserError: if the file cannot be read or holds anything else.
    """
    h, w = grid
    try:
        # No pickles. Memory mapping refuses a header that is larger than the file, before memory is allocated.
        found = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise UserError(f"--masks {path}: cannot be read ({error.strerror or error})", "give a .npy file") from error
    except Exception as error:  # numpy raises many types on a broken header
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--masks {path}: not a .npy file ({reason})", "write one with numpy.save") from error
    if found.dtype.kind not in "buif":
        raise UserError(f"--masks {path}: values are {found.dtype}", "give bool or numbers, 1 = removed")
    if found.size == 0 or found.shape[1:] not in ((h, w), (h * w,)):
        raise UserError(
            f"--masks {path}: the shape is {list(found.shape)}",
            f"for {h} x {w} patches, give masks of shape [M, {h}, {w}] or [M, {h * w}], with M at least 1",
        )
    numbers = np.array(found).reshape(len(found), -1)
    masks = numbers == 1
    other = ~masks & (numbers != 0)
    if other.any():
        i, patch = np.argwhere(other)[0]
        raise UserError(f"--masks {path}: values must be 0 or 1, mask {i} has {numbers[i, patch]} at patch {patch}")
    counts = masks.sum(1)
    usual = int(np.bincount(counts).argmax())
    odd = np.flatnonzero(counts != usual)
    if len(odd):
        listed = ", ".join(f"mask {i} removes {counts[i]}" for i in odd[:3]) + (" ..." if len(odd) > 3 else "")
        raise UserError(
            f"--masks {path}: {len(masks) - len(odd)} of {len(masks)} masks remove {usual} patches, but {listed}",
            "remove the same number of patches in each mask",
        )
    if usual in (0, h * w):
        raise UserError(
            f"--masks {path}: its masks {'remove all' if usual else 'remove none'} of the {h * w} patches",
            "give both 1 (removed) and 0 (kept)",
        )
    # The middle of all ratios that keep this number of patches, so rounding cannot change the number.
    return partial(_noise_of_one, masks=masks), (usual - 0.5) / (h * w)


def _random_noise(rng: np.random.Generator, num_patches: int) -> np.ndarray:
    return rng.random(num_patches, dtype=np.float32)


def _noise(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The noise of a mask of any shape. In fp32, u is below 1, and 1 + u is from 1 to 2."""
    noise: np.ndarray = _random_noise(rng, mask.size) + mask.ravel()
    return noise


def _noise_of_one(rng: np.random.Generator, masks: np.ndarray) -> np.ndarray:
    return _noise(rng, masks[rng.integers(len(masks))])


def _block_noise(rng: np.random.Generator, grid: tuple[int, int], num_removed: int) -> np.ndarray:
    return _noise(rng, _block_mask(rng, grid, num_removed))


def _block_mask(rng: np.random.Generator, grid: tuple[int, int], num_removed: int) -> np.ndarray:
    """Mask bool [h, w]: add rectangles, which may overlap, until ``num_removed`` patches are covered.

    If no block of BEiT's smallest area fits, BEiT stops with fewer patches. Here smaller blocks follow, down to single
    patches.
    """
    mask = np.zeros(grid, dtype=bool)
    least = LEAST_AREA * mask.size
    while missing := num_removed - int(mask.sum()):
        if _add_block(rng, mask, least, missing):
            continue
        if least > 1:
            least /= 2
        else:
            mask.flat[rng.choice(np.flatnonzero(~mask))] = True
    return mask


def _add_block(rng: np.random.Generator, mask: np.ndarray, least: float, missing: int) -> bool:
    """Try to add a block with an area from ``least`` to ``missing`` and at most ``missing`` new patches."""
    height, width = mask.shape
    low, high = sorted((max(1.0, least), float(missing)))
    for _ in range(ATTEMPTS):
        area, aspect = rng.uniform(low, high), math.exp(rng.uniform(-LOG_ASPECT, LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h > max(1, height - 1) or w > max(1, width - 1):  # BEiT's blocks do not span the image
            continue
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        block = mask[top : top + h, left : left + w]
        if 0 < block.size - block.sum() <= missing:
            block[:] = True
            return True
    return False


def _grid_mask(grid: tuple[int, int], mask_ratio: float) -> np.ndarray:
    """Mask bool [h, w]: all but the first patch of each cell. For 0.75, cells are 2 x 2 (Fig. 6 of the paper)."""
    h, w = grid
    num_keep = int(h * w * (1 - mask_ratio))
    cells = [(a, b) for a in range(1, h + 1) for b in range(1, w + 1) if h % a == w % b == 0 and a * b > 1]
    fitting = [(a, b) for a, b in cells if a * b * num_keep == h * w]
    if not fitting:
        counts = sorted({h * w // (a * b) for a, b in cells}, reverse=True)
        ratios = ", ".join(f"{_shortest_ratio(h * w, count)}" for count in counts) or "none"
        raise ValueError(
            f"{h} x {w} patches have no grid mask for this ratio: mask_ratio {mask_ratio:g} keeps "
            f"{num_keep} of {h * w}; feasible ratios: {ratios}"
        )
    a, b = min(fitting, key=lambda cell: max(cell) / min(cell))
    mask = np.ones(grid, dtype=bool)
    mask[::a, ::b] = False
    return mask


def _shortest_ratio(num_patches: int, num_keep: int) -> float:
    """The mask ratio with the fewest decimals that keeps ``num_keep`` patches."""
    for digits in range(2, 17):
        scale = 10.0**digits
        below = math.floor((1 - num_keep / num_patches) * scale)
        for ratio in (below / scale, (below - 1) / scale):
            if ratio >= 0 and int(num_patches * (1 - ratio)) == num_keep:
                return ratio
    raise AssertionError(f"no ratio keeps {num_keep} of {num_patches}")
