"""Reconstruct masked images with a pre-trained model, and write a picture or a page."""

import logging
import textwrap
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import masks
from ..data.loader import centred_image
from ..data.masks import check_mask_ratio
from ..data.pixel_format import PixelFormat
from ..data.rng import MASK, generator
from ..data.sources import Source
from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from ..models.reconstruction import Reconstruction, psnr, reconstruct, resized_copy, sheet
from ..models.targets import TokenTarget
from ..weights.create import LoadedModel, has_decoder, load_encoder
from .images import (
    MAX_PATCHES,
    PAGES,
    PICTURES,
    UnusableImages,
    check_output,
    find_images,
    preprocessing_of,
    whole_image,
    write_file,
)
from .page import page

logger = logging.getLogger(__name__)

MASK_RATIO = 0.75  # default if the weights do not record it, as in the paper
NEEDED = "give a run of pre-training, or weights with its decoder"
PSNR_IS = "Peak signal-to-noise ratio of the removed pixels, all bands pooled. The peak is {}. "
CAPTION = 130  # characters per line of the caption above a picture
BY_BAND = 4  # minimum number of channels to show the PSNR per band
FILL_IS = "Fill: all removed pixels in the mean colour of the visible ones."
NORMALISED_IS = (
    "The model predicts patches of mean 0 and variance 1. Here they are shown with the mean and variance of the "
    "original patch, which the model does not know and which improves the PSNR. The fill uses the same help: each "
    "removed patch has the mean of its original."
)


@dataclass(frozen=True)
class ReconstructOptions:
    """Options of reconstructions.

    Attributes:
        whole: use images in their own size and aspect ratio, instead of center crops of the model's size.
        paste_visible: show the original visible patches instead of their predictions.
        show: the number of images to show, evenly spaced.
        ema: use the averaged weights of the run.
        model: name of the model, needed if the weights do not determine its sizes.
        show_bands: numbers of the bands to show: one as grey, or three as red, green and blue. Empty: the first ones.
    """

    whole: bool = False
    paste_visible: bool = False
    show: int = 12
    ema: bool = False
    model: str | None = None
    show_bands: tuple[int, ...] = ()

    def channels(self, pixels: PixelFormat) -> list[int]:
        """Indices of the channels to show; empty for the default ones.

        Raises:
            UserError: if the model does not have them.
        """
        known = pixels.bands or tuple(range(1, pixels.channels + 1))
        if len(self.show_bands) not in (0, 1, 3) or not {*self.show_bands} <= {*known}:
            shown = ",".join(map(str, self.show_bands))
            raise UserError(
                f"--show-bands {shown}: the model has the bands {', '.join(map(str, known))}",
                "give one of them, or three as red, green and blue",
            )
        return [known.index(band) for band in self.show_bands]


@dataclass(frozen=True)
class Masking:
    """Options of the masks. Empty settings default to those of the training run.

    Attributes:
        ratios: mask ratios; the images are reconstructed once for each.
        file: file of masks, see ``data.masks.from_file``; replaces ratios and kind.
    """

    ratios: Sequence[float] = ()
    kind: Literal["random", "block", "grid"] | None = None
    file: Path | None = None
    seed: int = 0

    def completed(self, state: Mapping[str, Any], grid: tuple[int, int]) -> "Masking":
        """A copy with empty settings taken from the ``state`` of a checkpoint, or from the file for this ``grid``."""
        if self.file and (self.ratios or self.kind):
            raise UserError(
                f"--masks {self.file} already gives the masks",
                "leave --mask-ratio and --mask-sampling out",
            )
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
        """The sampler of masks for a grid and ratio, after ``completed``.

        Raises:
            UserError: if the grid has no masks of this kind.
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


class _Images:
    """Iterates over batches of images: their indices, raw pixels [N, H, W, C], and the noise [N, L] of each mask ratio.

    Unusable images are skipped with a warning. Whole images come one at a time.
    """

    def __init__(
        self,
        files: list[tuple[Source, int]],
        model: MaskedAutoencoderViT,
        masking: Masking,
        whole: bool,
        pixels: PixelFormat,
    ) -> None:
        self.files, self.model, self.masking, self.whole, self.pixels = files, model, masking, whole, pixels
        self.unusable, self.reduced = UnusableImages(), 0
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
                    self.unusable.add(error)
            if usable:
                pixels, noises = zip(*usable.values(), strict=True)
                yield list(usable), torch.stack(pixels), [torch.stack(x) for x in zip(*noises, strict=True)]

    def _load(self, i: int) -> tuple[Tensor, list[Tensor]]:
        """Pixels [H, W, C], and the noise [L] for each ratio."""
        source, index = self.files[i]
        embed = self.model.patch_embed
        grid = embed.grid_size
        if self.whole:
            pixels, reduced = whole_image(source, index, embed.patch_size, self.pixels)
            self.reduced += reduced
            grid = pixels.shape[0] // embed.patch_size[0], pixels.shape[1] // embed.patch_size[1]
        else:
            pixels = centred_image(source, index, embed.img_size, self.pixels)
        try:
            samplers = [self.sampler(grid, ratio) for ratio in self.masking.ratios]
        except UserError as error:
            raise UserError(f"cannot mask image {str(source.root / source.names[index])!r}: {error}") from error
        drawn = [sampler(generator(self.masking.seed, MASK, 0, i)) for sampler in samplers]
        return pixels, [torch.from_numpy(noise) for noise in drawn]

    def __str__(self) -> str:
        (h, w), (rows, columns) = self.model.patch_embed.img_size, self.model.patch_embed.grid_size
        if not self.whole:
            return f"center crops of {h} x {w} pixels"
        reduced = f"; {self.reduced} scaled down to {MAX_PATCHES:,} patches" if self.reduced else ""
        return f"whole images, with position tables resized from {rows} x {columns} patches{reduced}"


def reconstruct_files(
    weights: str | Path,
    images: Sequence[Path],
    output: Path,
    masking: Masking = Masking(),
    options: ReconstructOptions = ReconstructOptions(),
) -> dict[float, tuple[float, float]]:
    """Reconstruct image files with a masked autoencoder, write a picture or a page, and log the PSNR of all images.

    Unusable images are skipped with a warning.

    Args:
        weights: see ``load_encoder``. Images are rotated by their EXIF orientation if the run did so.
        output: a picture (.png, .jpg, .webp), or a self-contained page (.html).

    Returns:
        Mask ratio -> PSNR in dB on the removed patches of the model, and of a constant fill (see
        ``Reconstruction.fill_error``).

    Raises:
        UserError: if an option is invalid, the weights have no decoder of pixels, or no image can be used.
    """
    if options.show < 1:
        raise UserError(f"--show {options.show} is out of range", "give 1 or more")
    loaded = _load(weights, options)
    model = loaded.model
    assert isinstance(model, MaskedAutoencoderViT)
    files = find_images(images)
    check_output(output, files, PICTURES + PAGES)
    if options.whole and masking.file:
        raise UserError(f"--masks {masking.file} requires images of one size", "leave --whole out")
    recorded = (
        loaded.checkpoint.state if loaded.checkpoint else {"mask_ratio": loaded.metadata.mask_ratio or MASK_RATIO}
    )
    masking = masking.completed(recorded, model.patch_embed.grid_size)
    batches = _Images(files, model, masking, options.whole, preprocessing_of(loaded).pixels)
    options.channels(batches.pixels)  # raise an error before the work
    shown, errors, peak = _reconstruct_all(batches, options)
    if not shown:
        raise UserError(f"none of {len(files)} images can be used: see the warnings above")
    step = f", step {loaded.checkpoint.step:,}" if loaded.checkpoint else ""
    origin = f"{weights}{step}{', averaged weights' if options.ema else ''}"
    psnrs = {ratio: (psnr(ours, peak), psnr(fill, peak)) for ratio, (ours, fill) in errors.items()}
    report = _Report(origin, options, batches, shown, psnrs, errors, peak)
    if output.suffix.lower() in PAGES:
        content = report.page().encode(errors="backslashreplace")
        write_file(output, lambda file: file.write_bytes(content))
    else:
        picture, kind = report.picture(), Image.registered_extensions()[output.suffix.lower()]
        write_file(output, lambda file: picture.save(file, kind))
    for line in report.lines():
        logger.info("%s, %s: %s", report.used(), origin, line)
    logger.info("wrote %s", output)
    return psnrs


def _load(weights: str | Path, options: ReconstructOptions) -> LoadedModel:
    """Load the model. Raises ``UserError`` if it does not predict pixels."""
    loaded = load_encoder(weights, options.model, options.ema)
    model = loaded.model
    if not isinstance(model, MaskedAutoencoderViT):
        if options.model:
            message = f"--model {options.model} is a classifier, which cannot reconstruct"
            raise UserError(message, "give a mae_vit_ model")
        if loaded.checkpoint:
            raise UserError(f"{weights} is a run of a classifier, which cannot reconstruct", NEEDED)
    if not isinstance(model, MaskedAutoencoderViT) or (options.model and not has_decoder(weights)):
        raise UserError(f"{weights} has no decoder and cannot reconstruct", NEEDED)
    if isinstance(model.target, TokenTarget):
        raise UserError(
            f"{weights} predicts tokens instead of pixels, which cannot be shown", "give a run with another --target"
        )
    if not loaded.checkpoint and loaded.metadata.norm_pix_loss is None:
        logger.warning(
            "%s does not record whether it was trained with --norm-pix-loss, so predictions are shown as pixels. If "
            "they look wrong, run 'mae-fast convert ... --norm-pix-loss' to record it",
            weights,
        )
    return loaded


@dataclass(frozen=True)
class _Report:
    """The texts about all reconstructions, for the picture, the page and the log."""

    origin: str
    options: ReconstructOptions
    batches: _Images
    shown: list[tuple[str, list[Reconstruction]]]
    psnrs: dict[float, tuple[float, float]]
    errors: dict[float, tuple[Tensor, Tensor]]
    peak: Tensor

    @property
    def note(self) -> str:
        """How the predictions are shown as pixels; empty if they are pixels."""
        return self.shown[0][1][0].note

    def labels(self) -> list[str]:
        """The mask ratios, in percent."""
        masking = self.batches.masking
        ratios = [part.mask.mean().item() for part in self.shown[0][1]] if masking.file else masking.ratios
        return [f"{100 * ratio:.3g}%" for ratio in ratios]

    def removed(self) -> str:
        return f"{', '.join(self.labels())} of the patches removed by {self.batches.masking}"

    def visible(self) -> str:
        return f"visible patches: {'original' if self.options.paste_visible else 'predicted'}"

    def used(self) -> str:
        count, skipped = len(self.batches.files), self.batches.unusable.count
        return f"{count - skipped} of {count} images ({skipped} cannot be used)" if skipped else f"{count} images"

    def lines(self) -> list[str]:
        if self.batches.model.norm_pix_loss:  # the mean and variance of the original improve the PSNR
            return [self.note]
        labels = [f"{label} " if len(self.psnrs) > 1 else "" for label in self.labels()]
        lines = [
            f"{label}removed patches: PSNR {ours:.2f} dB; filled with the mean visible colour: {fill:.2f} dB"
            for label, (ours, fill) in zip(labels, self.psnrs.values(), strict=True)
        ]
        bands = [f"{label}PSNR in dB by band: {line}" for label, line in zip(labels, self.by_band(), strict=False)]
        return lines + bands

    def by_band(self) -> list[str]:
        """The PSNR of each band in dB, as a text per mask ratio; empty if there are few bands."""
        if len(self.peak) < BY_BAND:
            return []
        bands = self.batches.pixels.bands or range(1, len(self.peak) + 1)
        return [
            ", ".join(f"{band}: {psnr(ours[:, i : i + 1], self.peak[i]):.1f}" for i, band in enumerate(bands))
            for ours, _ in self.errors.values()
        ]

    def peak_words(self) -> str:
        """A text that describes the peak of the PSNR."""
        pixels = self.batches.pixels
        if pixels.dtype == "uint8":
            return "the range of 8 bits"
        what = "the range of --clip" if pixels.clip else "the range of the values of these images"
        return f"{what}: {', '.join(f'{x:.4g}' for x in self.peak.tolist())}"

    def page(self) -> str:
        labels = self.labels()
        psnrs = zip(labels, self.psnrs.values(), strict=True)
        facts = {
            "weights": self.origin,
            "images": f"{self.used()}, {len(self.shown)} of them shown; {self.batches}",
            "masks": f"{self.removed()}, seed {self.batches.masking.seed}",
            "reconstruction": f"{self.visible()}; {self.note or 'the model predicts pixels'}",
            "PSNR, all images": "; ".join(f"{label} {ours:.2f} dB (fill {fill:.2f})" for label, (ours, fill) in psnrs),
            **({"PSNR by band": "; ".join(self.by_band())} if self.by_band() else {}),
            "explanation": PSNR_IS.format(self.peak_words())
            + (NORMALISED_IS if self.batches.model.norm_pix_loss else FILL_IS),
        }
        return page(f"Reconstructions: {self.origin}", facts, self.shown, labels, self.peak)

    def picture(self) -> Image.Image:
        labels = self.labels()
        caption = [f"{self.removed()}, {self.visible()}"]
        if self.options.whole:
            caption.append(str(self.batches))
        caption += [line for line in self.lines() if line != self.note]
        parts = [reconstructions for _, reconstructions in self.shown]
        lines = [part for line in caption for part in textwrap.wrap(line, CAPTION)]
        return sheet(parts, labels if len(labels) > 1 else [""], "\n".join(lines))


def _reconstruct_all(
    batches: _Images, options: ReconstructOptions
) -> tuple[list[tuple[str, list[Reconstruction]]], dict[float, tuple[Tensor, Tensor]], Tensor]:
    """Reconstruct all images.

    Returns:
        Names and reconstructions of ``options.show`` images; mask ratio -> squared_error and fill_error of all images,
        [N, C] each; the peak of the PSNR, which is the range of each channel, [C].
    """
    model, ratios, files = batches.model, batches.masking.ratios, batches.files
    to_show = np.linspace(0, len(files) - 1, min(options.show, len(files))).round().astype(int)
    wanted, channels = deque(to_show.tolist()), options.channels(batches.pixels)
    shown, ranges = [], []
    errors: dict[float, list[tuple[Tensor, Tensor]]] = {ratio: [] for ratio in ratios}
    for indices, pixels, noises in batches:
        sized = resized_copy(model, (pixels.shape[1], pixels.shape[2])) if options.whole else model
        parts = [
            reconstruct(sized, pixels, noise, ratio, options.paste_visible, batches.pixels.clip)
            for noise, ratio in zip(noises, ratios, strict=True)
        ]
        for ratio, part in zip(ratios, parts, strict=True):
            errors[ratio].append((part.squared_error, part.fill_error))
        ranges.append(torch.stack([parts[0].lowest, parts[0].highest]))
        for k, i in enumerate(indices):
            if wanted and i >= wanted[0]:  # i is larger if the wanted image is unusable
                wanted.popleft()
                source, index = files[i]
                of_image = [part[k].of_channels(channels) if channels else part[k] for part in parts]
                shown.append((str(source.root / source.names[index]), of_image))
    pooled = {
        ratio: (torch.cat([x for x, _ in each]), torch.cat([x for _, x in each]))
        for ratio, each in errors.items()
        if each
    }
    return shown, pooled, _peak(batches.pixels, ranges)


def _peak(pixels: PixelFormat, ranges: list[Tensor]) -> Tensor:
    """The range of each channel [C]: 1 for uint8, else that of --clip, else that of ``ranges`` [2, N, C]."""
    if pixels.dtype == "uint8" or not ranges:
        return torch.ones(pixels.channels)
    lowest, highest = torch.cat(ranges, 1)
    peak = highest.amax(0) - lowest.amin(0)
    if pixels.clip:
        low, high = torch.tensor(pixels.clip).expand(pixels.channels, 2).unbind(1)
        peak = high - low
    return torch.where((peak > 0) & peak.isfinite(), peak, 1)
