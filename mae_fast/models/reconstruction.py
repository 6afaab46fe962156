"""Reconstructions: of which images, as pictures, and their error on the removed patches.

Shapes: N images, C channels, H x W pixels, L patches, P values per patch. Pixels are fp32 in 0..1.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..ops.masked_loss.reference import EPS
from ..ops.patches import patchify, unpatchify
from .mae import MaskedAutoencoderViT

GREY = 0.5  # of removed patches in the picture


@dataclass(frozen=True)
class Reconstruction:
    """``original``, ``masked`` and ``predicted`` [N, C, H, W]; ``mask`` [N, L]; ``squared_error`` and
    ``mean_fill_error`` [N]: mean squared error over the removed pixels, of the prediction (for a model of
    standardised pixels with the original patches' statistics) and of filling them with the mean visible colour."""

    original: Tensor
    masked: Tensor
    predicted: Tensor
    mask: Tensor
    squared_error: Tensor
    mean_fill_error: Tensor


@torch.inference_mode()
def reconstruct(
    model: MaskedAutoencoderViT,
    images: Tensor,
    noise: Tensor,
    mask_ratio: float = 0.75,
    paste_visible: bool = False,
) -> Reconstruction:
    """Mask uint8 ``images`` [N, H, W, C] by ``noise`` [N, L] and predict them; ``paste_visible`` shows the visible
    patches as they are instead of as predicted."""
    patch, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    _, pred, mask = model(images, mask_ratio, noise)
    original = images.permute(0, 3, 1, 2).float() / 255
    mean, std = model.pixel_mean[:, None, None], model.pixel_std[:, None, None]
    if model.norm_pix_loss:
        target = patchify((original - mean) / std, patch)
        pred = pred * (target.var(-1, keepdim=True) + EPS).sqrt() + target.mean(-1, keepdim=True)
    predicted = (unpatchify(pred.float(), patch, grid) * std + mean).clamp(0, 1)

    # [N, L, P]
    rows, predicted_rows, removed = patchify(original, patch), patchify(predicted, patch), mask[:, :, None]
    channels = rows.reshape(*rows.shape[:2], -1, original.shape[1])  # [N, L, pixels, C]
    visible = (1 - removed)[..., None]
    colour = (channels * visible).sum((1, 2)) / (visible.sum((1, 2)) * channels.shape[2])  # [N, C]
    fill_error = (channels - colour[:, None, None]).square().flatten(2)

    def on_removed(error: Tensor) -> Tensor:
        per_image: Tensor = (error.mean(-1) * mask).sum(1) / mask.sum(1)
        return per_image

    shown = rows * (1 - removed) + predicted_rows * removed if paste_visible else predicted_rows
    return Reconstruction(
        original=original,
        masked=unpatchify(rows * (1 - removed) + GREY * removed, patch, grid),
        predicted=unpatchify(shown, patch, grid),
        mask=mask,
        squared_error=on_removed((predicted_rows - rows).square()),
        mean_fill_error=on_removed(fill_error),
    )


def psnr(squared_error: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the pooled mean squared error [N] of pixels in 0..1."""
    return 10 * math.log10(1 / max(squared_error.mean().item(), 1e-12))


def picture(parts: Reconstruction, caption: str) -> Image.Image:
    """Grid of (masked, reconstruction, original) triplets under a caption of one or more lines."""
    n, _, height, width = parts.original.shape
    scale = max(1, 96 // max(height, width))
    columns = max(1, min(3, math.ceil(n / 4)))
    gap = 4
    triplets = []
    for images in zip(parts.masked, parts.predicted, parts.original, strict=True):
        tiles = [torch.nn.functional.pad(image, (0, gap // 2) * 2, value=1.0) for image in images]
        triplets.append(torch.cat(tiles, dim=2))
    blank = torch.ones_like(triplets[0])
    triplets += [blank] * (-n % columns)
    rows = [torch.cat(triplets[i : i + columns], dim=2) for i in range(0, len(triplets), columns)]
    array = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    grid = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).convert("RGB")
    grid = grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)
    font = ImageFont.load_default(14)
    _, _, right, bottom = ImageDraw.Draw(grid).multiline_textbbox((8, 8), caption, font=font)
    canvas = Image.new("RGB", (max(grid.width, int(right) + 8), grid.height + int(bottom) + 8), "white")
    ImageDraw.Draw(canvas).multiline_text((8, 8), caption, fill="black", font=font)
    canvas.paste(grid, (0, canvas.height - grid.height))
    return canvas
