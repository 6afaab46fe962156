"""The command that shows what a pre-trained model makes of masked images."""

import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data import masks
from ..data.decode import BadImage, centre_box, crop_resized, decode, size_of
from ..data.loader import centred_image
from ..data.masks import check_mask_ratio
from ..data.rng import MASK, generator
from ..data.sources import Files, Source, open_source
from ..errors import UserError, warn
from ..models.mae import MaskedAutoencoderViT
from ..models.reconstruction import Reconstruction, psnr, reconstruct, resized_copy, sheet
from ..models.targets import TokenTarget
from ..weights.create import load_run
from .page import page

PICTURES, PAGES = (".png", ".jpg", ".jpeg", ".webp"), (".html", ".htm")
MAX_PATCHES = 4096  # of an image that is taken whole: attention takes time in proportion to their square
TOLD = 10  # images that cannot be used; more are counted
FIGURES = "Peak signal-to-noise ratio of the removed pixels alone. "
MEAN_COLOUR = "The fill: all of them in the mean colour of the visible ones."
FLAT = (
    "The model predicts patches of mean 0 and variance 1. Here they have the mean and variance of the original patch, "
    "which the model does not know: the figures have that help. The fill has it, too: each removed patch in the mean "
    "of its original."
)


@dataclass(frozen=True)
class Masking:
    """Which patches are removed. What is not given is as it was in training."""

    ratios: Sequence[float] = ()
    """Shares of patches; the images are reconstructed once for each."""
    kind: Literal["random", "block", "grid"] | None = None
    file: Path | None = None
    """Masks for ``data.masks.from_file``, in place of ratios and a kind."""
    seed: int = 0

    def completed(self, state: Mapping[str, Any], grid: tuple[int, int]) -> "Masking":
        """With what is not given, of a checkpoint's ``state`` or, for its ``grid`` of patches, of the file."""
        if self.file and (self.ratios or self.kind):
            raise UserError(f"--masks {self.file} says what is removed", "leave --mask-ratio and --mask-sampling out")
        if self.file:
            return replace(self, ratios=(masks.from_file(self.file, grid)[1],))
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed} is out of range", f"give 0 to {2**63 - 1}")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise UserError(f"--mask-ratio {ratio:g} is out of range", "give shares above 0 and below 1")
        ratios = tuple(dict.fromkeys(self.ratios or (state["mask_ratio"],)))
        return replace(self, ratios=ratios, kind=self.kind or state.get("mask_sampling", "random"))

    def sampler(self, grid: tuple[int, int], ratio: float) -> masks.Sampler:
        """What draws the masks, once completed.

        Raises:
            UserError: if the grid has no such masks.
        """
        if self.file:
            return masks.from_file(self.file, grid)[0]
        assert self.kind
        check_mask_ratio(grid[0] * grid[1], ratio)
        try:
            return masks.sampler(self.kind, grid, ratio)
        except ValueError as error:
            raise UserError(f"--mask-sampling {self.kind}: {error}") from error

    def __str__(self) -> str:
        return f"masks of {self.file}" if self.file else f"{self.kind} masks"


def _find_images(images: Sequence[Path]) -> list[tuple[Source, int]]:
    found: list[tuple[Source, int]] = []
    for path in images:
        if path.is_file() and path.suffix != ".tar":
            found.append((Files(path.parent, [path.name]), 0))
        else:
            source = open_source(path, "val")
            found += [(source, i) for i in range(len(source))]
    if not found:
        raise UserError("--images names nothing", "give image files or folders")
    return found


def _check_output(output: Path, files: list[tuple[Source, int]]) -> None:
    if output.suffix.lower() not in PICTURES + PAGES:
        picture, web = output.with_suffix(".png"), output.with_suffix(".html")
        raise UserError(
            f"--output {output}",
            f"give a picture's name, such as {picture}, or a page's, such as {web}",
        )
    if output.is_dir():
        raise UserError(f"--output {output} is a folder", f"give a file's name, such as {output / 'picture.png'}")
    place = os.path.realpath(output)
    for source, i in files:
        if isinstance(source, Files) and os.path.realpath(source.root / source.names[i]) == place:
            raise UserError(f"--output {output} is one of the images", "give another name")


def whole_image(source: Source, index: int, patch: tuple[int, int], channels: int) -> tuple[Tensor, bool]:
    """One image, uint8 [H, W, C], cut to whole patches at its borders; and whether it has been reduced, which one of
    more than ``MAX_PATCHES`` patches is.

    Raises:
        UserError: naming the image, if it cannot be used.
    """
    try:
        image = decode(source.read(index), channels)
        height, width = size_of(image)
        (p, q), share = patch, min(1.0, math.sqrt(MAX_PATCHES * patch[0] * patch[1] / (height * width)))
        rows, columns = int(height * share / p), int(width * share / q)
        if share < 1:  # a strip is less than a patch high by now, and stays longer than it was to be
            rows, columns = min(max(1, rows), MAX_PATCHES), min(max(1, columns), MAX_PATCHES)
        if not rows or not columns:
            raise BadImage("unsupported", f"{height} x {width} pixels are less than a patch of {p} x {q}")
    except BadImage as bad:
        name = str(source.root / source.names[index])
        raise UserError(f"cannot use image {name!r} ({bad})", "repair or remove it") from bad
    h, w = size = rows * p, columns * q
    box = ((height - h) // 2, (width - w) // 2, h, w) if share == 1 else centre_box(height, width, size)
    return torch.from_numpy(crop_resized(image, box, size, flip=False).copy()), share < 1


class _Images:
    """Batches of images that can be used, as uint8 [N, H, W, C], with their numbers and, for each mask ratio, their
    noise [N, L]. The others are told of and counted. Images that are taken whole come one at a time."""

    def __init__(
        self, files: list[tuple[Source, int]], model: MaskedAutoencoderViT, masking: Masking, whole: bool
    ) -> None:
        self.files, self.model, self.masking, self.whole = files, model, masking, whole
        self.skipped = self.reduced = 0
        self.sampler = cache(masking.sampler)
        if not whole:
            for ratio in masking.ratios:
                self.sampler(model.patch_embed.grid_size, ratio)

    def __iter__(self) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
        step = 1 if self.whole else 64
        for start in range(0, len(self.files), step):
            usable = {}
            for i in range(start, min(start + step, len(self.files))):
                try:
                    usable[i] = self._load(i)
                except UserError as error:
                    self._skip(str(error))
            if usable:
                pixels, noises = zip(*usable.values(), strict=True)
                yield list(usable), torch.stack(pixels), [torch.stack(x) for x in zip(*noises, strict=True)]

    def _load(self, i: int) -> tuple[Tensor, list[Tensor]]:
        """Pixels [H, W, C], and the noise [L] for each ratio."""
        source, index = self.files[i]
        embed = self.model.patch_embed
        grid = embed.grid_size
        if self.whole:
            pixels, reduced = whole_image(source, index, embed.patch_size, self.model.in_chans)
            self.reduced += reduced
            grid = pixels.shape[0] // embed.patch_size[0], pixels.shape[1] // embed.patch_size[1]
        else:
            pixels = centred_image(source, index, embed.img_size, self.model.in_chans)
        try:
            samplers = [self.sampler(grid, ratio) for ratio in self.masking.ratios]
        except UserError as error:
            raise UserError(f"cannot mask image {str(source.root / source.names[index])!r}: {error}") from error
        drawn = [sampler(generator(self.masking.seed, MASK, 0, i)) for sampler in samplers]
        return pixels, [torch.from_numpy(noise) for noise in drawn]

    def __str__(self) -> str:
        """What was taken of the images."""
        (h, w), (rows, columns) = self.model.patch_embed.img_size, self.model.patch_embed.grid_size
        if not self.whole:
            return f"centred crops of {h} x {w} pixels"
        reduced = f"; {self.reduced} reduced to {MAX_PATCHES:,} patches" if self.reduced else ""
        return f"whole images, for which position tables of {rows} x {columns} patches are resized{reduced}"

    def _skip(self, why: str) -> None:
        self.skipped += 1
        if self.skipped <= TOLD:
            warn(f"{why}{'; more will be counted, not told' if self.skipped == TOLD else ''}")


def reconstruct_files(
    run: Path,
    images: Sequence[Path],
    output: Path,
    masking: Masking = Masking(),
    *,
    whole: bool = False,
    paste_visible: bool = False,
    show: int = 12,
    ema: bool = False,
) -> dict[float, tuple[float, float]]:
    """Reconstruct image files with the newest checkpoint of ``run``; write a picture or a page and print the PSNR.

    The error is over all images, the picture shows ``show`` of them, evenly spaced. Images that cannot be used are left
    out, told of and counted.

    Args:
        output: a picture (.png, .jpg, .webp), or a page that needs no other file (.html).
        whole: take images in their own size and aspect, not as centred crops of the model's size.
        paste_visible: show visible patches as they are, not as predicted.
        ema: with the averaged weights.

    Returns:
        For each mask ratio, PSNR in dB on the removed patches: of the model, and of ``Reconstruction.fill_error``.

    Raises:
        UserError: on anything that the user has to change.
    """
    if show < 1:
        raise UserError(f"--show {show} is out of range", "give 1 or more")
    model, found = load_run(run, ema)
    if not isinstance(model, MaskedAutoencoderViT):
        raise UserError(f"{run} is a classifier's, which reconstructs nothing", "give a run of pre-training")
    if isinstance(model.target, TokenTarget):
        raise UserError(
            f"{run} predicts tokens, no pixels: there is nothing to show",
            "give a run with another --target",
        )
    files = _find_images(images)
    _check_output(output, files)
    if whole and masking.file:
        raise UserError(f"--masks {masking.file} is for images of one size", "leave --whole out")
    masking = masking.completed(found.state, model.patch_embed.grid_size)

    batches = _Images(files, model, masking, whole)
    shown, results = _reconstruct_all(batches, paste_visible, show)
    if not shown:
        raise UserError(f"none of {len(files)} images can be used: see above")

    first = shown[0][1]
    shares = [part.mask.mean().item() for part in first] if masking.file else masking.ratios
    labels = [f"{100 * share:.3g}%" for share in shares]
    removed = f"{', '.join(labels)} of the patches removed by {masking}"
    visible = f"visible patches as {'they are' if paste_visible else 'predicted'}"
    used = f"{len(files) - batches.skipped} images"
    if batches.skipped:
        used = f"{len(files) - batches.skipped} of {len(files)} images, as the others cannot be used"
    if model.norm_pix_loss:  # no figures beside those of a fill that knows less than what is shown
        lines = [first[0].note]
    else:
        lines = [
            f"{label if len(labels) > 1 else ''} removed patches: {ours:.2f} dB; "
            f"filled with the mean visible colour: {its:.2f} dB".strip()
            for label, (ours, its) in zip(labels, results.values(), strict=True)
        ]

    if output.suffix.lower() in PAGES:
        pooled = zip(labels, results.values(), strict=True)
        facts = {
            "run": f"{run}, step {found.step:,}{', averaged weights' if ema else ''}",
            "images": f"{used}, of which {len(shown)} are shown; {batches}",
            "masks": f"{removed}, seed {masking.seed}",
            "reconstruction": f"{visible}; {first[0].note or 'the model predicts pixels'}",
            "PSNR, all images": "; ".join(f"{label} {ours:.2f} dB (fill {its:.2f})" for label, (ours, its) in pooled),
            "what that is": FIGURES + (FLAT if model.norm_pix_loss else MEAN_COLOUR),
        }
        content = page(f"Reconstructions: {run}", facts, shown, labels).encode(errors="backslashreplace")
        _replace(output, lambda file: file.write_bytes(content))
    else:
        caption = [
            f"{removed}, {visible}",
            *([str(batches)] if whole else []),
            *(x for x in lines if x != first[0].note),
        ]
        drawn = sheet([parts for _, parts in shown], labels if len(labels) > 1 else [""], "\n".join(caption))
        _replace(output, drawn.save)
    for line in lines:
        print(f"{used}, checkpoint {found.path.name}: {line}")
    print(f"wrote {output}")
    return results


def _reconstruct_all(
    batches: _Images, paste_visible: bool, show: int
) -> tuple[list[tuple[str, list[Reconstruction]]], dict[float, tuple[float, float]]]:
    """Of ``show`` images, evenly spaced, name and reconstructions; and the PSNR of all, as ``reconstruct_files``."""
    model, ratios, files = batches.model, batches.masking.ratios, batches.files
    wanted = deque(np.linspace(0, len(files) - 1, min(show, len(files))).round().astype(int).tolist())
    shown = []
    errors: dict[float, list[tuple[Tensor, Tensor]]] = {ratio: [] for ratio in ratios}
    for numbers, pixels, noises in batches:
        sized = resized_copy(model, (pixels.shape[1], pixels.shape[2])) if batches.whole else model
        pairs = zip(noises, ratios, strict=True)
        parts = [reconstruct(sized, pixels, noise, ratio, paste_visible) for noise, ratio in pairs]
        for ratio, part in zip(ratios, parts, strict=True):
            errors[ratio].append((part.squared_error, part.fill_error))
        for k, i in enumerate(numbers):
            if wanted and i >= wanted[0]:  # beyond it, if that one cannot be used
                wanted.popleft()
                source, index = files[i]
                shown.append((str(source.root / source.names[index]), [part[k] for part in parts]))
    pooled = {ratio: [torch.cat(x) for x in zip(*each, strict=True)] for ratio, each in errors.items() if each}
    return shown, {ratio: (psnr(ours), psnr(fill)) for ratio, (ours, fill) in pooled.items()}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with another file, which then takes ``path``'s place: a failure leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        try:
            write(part)
        except ValueError as error:  # by Pillow, as are the OSErrors without a number
            raise UserError(f"--output {path} cannot be written ({error})", "use .png, or a lower --show") from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise UserError(f"--output {path} cannot be written ({error})", "use .png, or a lower --show") from error
        os.replace(part, path)
