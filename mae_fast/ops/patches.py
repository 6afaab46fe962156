"""Convert images to rows of patches and back. The references of the ops use this.

Shapes: N images, C channels, H x W pixels, patches of p x q pixels, L = (H/p) * (W/q) patches in row-major order.
An image batch is either standardised, floating [N, C, H, W], or raw pixels [N, H, W, C] of one of ``RAW_DTYPES`` with
their ``mean`` and ``std`` [C]. These are fractions of 255 for uint8 pixels, and in the units of the pixels otherwise.
Raw values are missing if they are NaN or equal ``nodata``.
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
    """Whether a batch holds raw pixels [N, H, W, C] and not standardised images [N, C, H, W].

    Integers are raw pixels. Floats are raw pixels only if the last axis has ``channels`` values and the second has not.
    """
    if not images.is_floating_point():
        return True
    return images.ndim == 4 and images.shape[1] != channels and images.shape[3] == channels


def image_size(images: Tensor, raw: bool) -> tuple[int, int, int]:
    """(C, H, W) of a batch of raw pixels [N, H, W, C] if ``raw``, else of standardised images [N, C, H, W]."""
    _, *rest = images.shape
    return (rest[2], rest[0], rest[1]) if raw else (rest[0], rest[1], rest[2])


def may_have_missing(images: Tensor, mean: Tensor | None, nodata: float | None) -> bool:
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
    """The number L of patches of ``images``. Raises ``ValueError`` if ``op`` cannot split them into patches."""
    check_tensor(f"{op}: images", images)
    raw = mean is not None or not images.is_floating_point()
    layout = f"{images.dtype} [N, H, W, C]" if raw else "floating [N, C, H, W]"
    if images.ndim != 4 or not (images.dtype in RAW_DTYPES if raw else images.is_floating_point()):
        raise ValueError(
            f"{op}: images must be standardised, floating [N, C, H, W], or raw pixels [N, H, W, C] of "
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
            raise ValueError(f"{op}: raw images cannot require a gradient: standardise them, and pass no mean and std")
    elif std is not None or nodata is not None:
        raise ValueError(f"{op}: std and nodata must be None without mean, as the images are already standardised")
    return (height // patch[0]) * (width // patch[1])


def standardise(images: Tensor, mean: Tensor | None, std: Tensor | None, nodata: float | None = None) -> Tensor:
    """Standardise raw images as ``(images - mean) / std`` in fp32 or wider; uint8 values are divided by 255 first.

    Missing values become NaN. Images without ``mean`` are returned unchanged. The result is [N, C, H, W].
    """
    if mean is None or std is None:
        return images
    dtype = torch.promote_types(mean.dtype, torch.float32)
    values = images.to(dtype)
    scaled = ((values / 255 if images.dtype == torch.uint8 else values) - mean.to(dtype)) / std.to(dtype)
    if nodata is not None:  # compare in the dtype of the pixels
        missing = images == nodata if images.is_floating_point() else values == nodata
        scaled = scaled.masked_fill(missing, float("nan"))
    return scaled.permute(0, 3, 1, 2)


def without_missing(images: Tensor, mean: Tensor, std: Tensor, nodata: float | None = None) -> Tensor:
    """Standardise raw ``images`` to [N, C, H, W], with the mean in place of missing values."""
    standard = standardise(images, mean, std, nodata)
    return standard.masked_fill(standard.isnan(), 0) if may_have_missing(images, mean, nodata) else standard


def patchify(images: Tensor, patch: int | tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, L, p*q*C]. Values are ordered [p, q, c], as in predictions and targets."""
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
