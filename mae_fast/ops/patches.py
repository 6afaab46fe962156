"""Images as rows of patches, and back; used by the references of the ops.

Shapes: N images, C channels, H x W pixels, patches of p x q pixels, L = (H/p) * (W/q) patches in row-major order.
An image batch is either standardised, floating [N, C, H, W], or raw pixels [N, H, W, C] of one of ``RAW_DTYPES`` with
the ``mean`` and ``std`` [C] that standardise them: for uint8 pixels in units of 0..1, for others in the pixels' own.
Raw values may be missing: NaN, and the value ``nodata`` if one is given.
"""

import torch
from torch import Tensor

from ..pixel_dtypes import PIXEL_DTYPES


def patch_sides(patch: int | tuple[int, int]) -> tuple[int, int]:
    """``patch`` as (height, width)."""
    return (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])


def check_tensor(name: str, x: object) -> None:
    """Raise ``TypeError`` unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
        hint = ": convert it with torch.from_numpy" if kind == "numpy.ndarray" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}{hint}")


RAW_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in PIXEL_DTYPES)


def is_raw(images: Tensor, channels: int) -> bool:
    """Whether a batch holds raw pixels [N, H, W, C]: integers, or floats whose last axis alone has ``channels`` values.

    Standardised images [N, C, H, W] are floats, too. A batch that could be either is taken as standardised.
    """
    if not images.is_floating_point():
        return True
    return images.ndim == 4 and images.shape[1] != channels and images.shape[3] == channels


def image_size(images: Tensor, raw: bool) -> tuple[int, int, int]:
    """(C, H, W) of a batch. ``raw``: raw pixels [N, H, W, C], not standardised images [N, C, H, W]."""
    _, *rest = images.shape
    return (rest[2], rest[0], rest[1]) if raw else (rest[0], rest[1], rest[2])


def may_miss(images: Tensor, mean: Tensor | None, nodata: float | None) -> bool:
    """Whether values of ``images`` may be missing."""
    return mean is not None and (images.is_floating_point() or nodata is not None)


def check_images(
    op: str,
    images: Tensor,
    patch: tuple[int, int],
    mean: Tensor | None,
    std: Tensor | None,
    nodata: float | None = None,
) -> int:
    """Raise ``ValueError`` unless ``op`` can cut ``images`` into patches; return their number L."""
    check_tensor(f"{op}: images", images)
    raw = mean is not None or not images.is_floating_point()
    layout = f"{images.dtype} [N, H, W, C]" if raw else "floating [N, C, H, W]"
    if images.ndim != 4 or not (images.dtype in RAW_DTYPES if raw else images.is_floating_point()):
        raise ValueError(
            f"{op}: images must be floating [N, C, H, W], standardised, or raw pixels [N, H, W, C] of "
            f"{', '.join(PIXEL_DTYPES)} with mean and std, got {images.dtype} {list(images.shape)}"
        )
    channels, height, width = image_size(images, raw)
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"{op}: the patch size {patch} must divide the image size, got {height} x {width} pixels "
            f"in images {layout} = {list(images.shape)}"
        )
    if raw:
        if mean is None or std is None or mean.shape != (channels,) or std.shape != (channels,):
            got = [None if t is None else list(t.shape) for t in (mean, std)]
            raise ValueError(f"{op}: raw images {layout} need mean and std of shape [{channels}], got {got}")
        if images.requires_grad:
            raise ValueError(f"{op}: raw images have no gradient: standardise them, and give no mean and std")
    elif std is not None or nodata is not None:
        raise ValueError(f"{op}: images without mean are already standardised, std and nodata must be None")
    return (height // patch[0]) * (width // patch[1])


def standardise(images: Tensor, mean: Tensor | None, std: Tensor | None, nodata: float | None = None) -> Tensor:
    """[N, C, H, W]: standardised images as they are, raw ones as ``(images - mean) / std`` in fp32 or wider.

    Bytes are divided by 255 first. Missing values are NaN.
    """
    if mean is None or std is None:
        return images
    dtype = torch.promote_types(mean.dtype, torch.float32)
    values = images.to(dtype)
    scaled = ((values / 255 if images.dtype == torch.uint8 else values) - mean.to(dtype)) / std.to(dtype)
    if nodata is not None:  # compared in the dtype of the pixels
        missing = images == nodata if images.is_floating_point() else values == nodata
        scaled = scaled.masked_fill(missing, float("nan"))
    return scaled.permute(0, 3, 1, 2)


def without_missing(images: Tensor, mean: Tensor, std: Tensor, nodata: float | None = None) -> Tensor:
    """Raw ``images`` standardised, [N, C, H, W]; the mean stands for missing values."""
    standard = standardise(images, mean, std, nodata)
    return standard.masked_fill(standard.isnan(), 0) if may_miss(images, mean, nodata) else standard


def patchify(images: Tensor, patch: int | tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, L, p*q*C], pixel by pixel with the channel fastest (the order of ``pred`` and the target)."""
    p, q = patch_sides(patch)
    check_tensor("images", images)
    if images.ndim != 4:
        raise ValueError(f"patchify: images must be [N, C, H, W], got {list(images.shape)}")
    n, c, height, width = images.shape
    if height % p or width % q:
        raise ValueError(f"patchify: the patch size ({p}, {q}) must divide the image size, got {height} x {width}")
    h, w = height // p, width // q
    return images.reshape(n, c, h, p, w, q).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, p * q * c)


def unpatchify(rows: Tensor, patch: int | tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[N, L, p*q*C] -> [N, C, H, W]; the inverse of ``patchify`` for a ``grid`` of (H/p, W/q) patches."""
    p, q = patch_sides(patch)
    h, w = grid
    check_tensor("rows", rows)
    if rows.ndim != 3 or rows.shape[1] != h * w or rows.shape[2] % (p * q):
        raise ValueError(
            f"unpatchify: rows must be [N, {h * w}, {p * q} * C] for a grid of {h} x {w} patches of {p} x {q} pixels, "
            f"got {list(rows.shape)}"
        )
    n, _, values = rows.shape
    c = values // (p * q)
    return rows.reshape(n, h, w, p, q, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * p, w * q)
