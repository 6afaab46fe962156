"""The command that shows what a pre-trained model makes of masked images."""

from pathlib import Path

import numpy as np
import torch

from ..data.keyed import mask_noise
from ..data.loader import centred_image
from ..data.sources import Files, Source, open_source
from ..errors import UserError
from ..interop.pretrained import of_run
from ..models.mae import MaskedAutoencoderViT
from ..models.reconstruction import Reconstruction, picture, psnr, reconstruct
from ..training.pretrain import check_mask_ratio


def _find_images(images: list[Path]) -> list[tuple[Source, int]]:
    found: list[tuple[Source, int]] = []
    for path in images:
        if path.is_file() and path.suffix != ".tar":
            found.append((Files(path.parent, [path.name]), 0))
        else:
            source = open_source(path, "val")
            found += [(source, i) for i in range(len(source))]
    return found


def reconstruct_files(
    run: Path,
    images: list[Path],
    output: Path,
    mask_ratio: float | None = None,
    paste_visible: bool = False,
    show: int = 12,
    seed: int = 0,
    ema: bool = False,
) -> tuple[float, float]:
    """Reconstruct image files with the newest checkpoint of ``run``; write the picture and print the PSNR.

    The error is over all images, the picture shows ``show`` of them, evenly spaced. ``ema``: with the averaged weights.

    Returns:
        PSNR in dB on the removed patches: of the model, and of filling them with the mean visible colour.

    Raises:
        UserError: on anything that the user has to change.
    """
    model, found = of_run(run, ema)
    if not isinstance(model, MaskedAutoencoderViT):
        raise UserError(f"{run} is a classifier's, which reconstructs nothing; give a run of pre-training")
    ratio = found.state["mask_ratio"] if mask_ratio is None else mask_ratio
    num_patches = model.patch_embed.num_patches
    check_mask_ratio(num_patches, ratio)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output {output}: give a picture's name, such as {output.with_suffix('.png')}")
    files = _find_images(images)
    size = model.patch_embed.img_size

    shown = set(np.linspace(0, len(files) - 1, min(show, len(files))).round().astype(int).tolist())
    errors, fills, kept = [], [], []
    for start in range(0, len(files), 64):
        batch = range(start, min(start + 64, len(files)))
        pixels = torch.stack([centred_image(*files[i], size, model.in_chans) for i in batch])
        noise = torch.from_numpy(np.stack([mask_noise(seed, 0, i, num_patches) for i in batch]))
        part = reconstruct(model, pixels, noise, ratio, paste_visible)
        errors.append(part.squared_error)
        fills.append(part.mean_fill_error)
        chosen = [i - start for i in batch if i in shown]
        kept.append(tuple(t[chosen] for t in (part.original, part.masked, part.predicted, part.mask)))
    error, fill = torch.cat(errors), torch.cat(fills)
    original, masked, predicted, mask = (torch.cat(parts) for parts in zip(*kept, strict=True))

    pixels_line = (
        "normalised pixels: shown with the mean and variance of the original patches"
        if model.norm_pix_loss
        else f"removed patches: {psnr(error):.2f} dB; filled with the mean visible colour: {psnr(fill):.2f} dB"
    )
    visible_line = "visible patches as they are" if paste_visible else "visible patches as predicted"
    caption = (
        f"masked | reconstruction | original     {ratio:.0%} of the patches removed, {visible_line}\n{pixels_line}"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = Reconstruction(original, masked, predicted, mask, error, fill)
    picture(parts, caption).save(output)
    print(f"{len(files)} images, checkpoint {found.path.name}: {pixels_line}")
    print(f"wrote {output}")
    return psnr(error), psnr(fill)
