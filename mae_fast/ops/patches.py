"""Images as rows of patches, and back; used by the references of the ops.

Shapes: N images, C channels, H x W pixels, patches of p x q pixels, L = (H/p) * (W/q) patches in row-major order.
An image batch is either floating [N, C, H, W], already standardised, or uint8 [N, H, W, C] with the ``mean`` and
``std`` [C] (in units of 0..1) that standardise it.
"""

import torch
from torch import Tensor


def patch_sides(patch: int | tuple[int, int]) -> tuple[int, int]:
    """``patch`` as (height, width)."""
    return (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])


def image_size(images: Tensor) -> tuple[int, int, int]:
    """(C, H, W) of a batch in either layout."""
    _, *rest = images.shape
    if images.dtype == torch.uint8:
        return rest[2], rest[0], rest[1]
    return rest[0], rest[1], rest[2]


def check_images(op: str, images: Tensor, patch: tuple[int, int], mean: Tensor | None, std: Tensor | None) -> int:
    """Raise ``ValueError`` unless ``op`` can cut ``images`` into patches; return their number L."""
    layout = "uint8 [N, H, W, C]" if images.dtype == torch.uint8 else "floating [N, C, H, W]"
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"{op}: images must be floating [N, C, H, W] or uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}"
        )
    channels, height, width = image_size(images)
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"{op}: the patch size {patch} must divide the image size, got {height} x {width} pixels "
            f"in images {layout} = {list(images.shape)}"
        )
    if images.dtype == torch.uint8:
        if mean is None or std is None or mean.shape != (channels,) or std.shape != (channels,):
            got = [None if t is None else list(t.shape) for t in (mean, std)]
            raise ValueError(f"{op}: uint8 images need mean and std of shape [{channels}], got {got}")
    elif mean is not None or std is not None:
        raise ValueError(f"{op}: floating images are taken as already standardised, mean and std must be None")
    return (height // patch[0]) * (width // patch[1])


def standardise(images: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """[N, C, H, W]: floating images as they are, uint8 ones as ``(images / 255 - mean) / std`` in fp32 or wider."""
    if mean is None or std is None:
        return images
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scaled = (images.to(dtype) / 255 - mean.to(dtype)) / std.to(dtype)
    return scaled.permute(0, 3, 1, 2)


def patchify(images: Tensor, patch: int | tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, L, p*q*C], pixel by pixel with the channel fastest (the order of ``pred`` and the target)."""
    p, q = patch_sides(patch)
    n, c, height, width = images.shape
    if height % p or width % q:
        raise ValueError(f"patchify: the patch size ({p}, {q}) must divide the image size, got {height} x {width}")
    h, w = height // p, width // q
    return images.reshape(n, c, h, p, w, q).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, p * q * c)


def unpatchify(rows: Tensor, patch: int | tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[N, L, p*q*C] -> [N, C, H, W]; the inverse of ``patchify`` for a ``grid`` of (H/p, W/q) patches."""
    p, q = patch_sides(patch)
    h, w = grid
    n, num_patches, values = rows.shape
    if num_patches != h * w or values % (p * q):
        raise ValueError(
            f"unpatchify: rows must be [N, {h * w}, {p * q} * C] for a grid of {h} x {w} patches of {p} x {q} pixels, "
            f"got {list(rows.shape)}"
        )
    c = values // (p * q)
    return rows.reshape(n, h, w, p, q, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * p, w * q)
