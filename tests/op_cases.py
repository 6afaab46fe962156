"""Inputs in different memory layouts, and a comparison of an op with eager torch on them.

The correct result is the eager chain in float64. The tolerance is the error of the eager chain in the tested dtype,
with gradients by torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support import assert_no_worse_than_eager
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The error of a C++ kernel for bad arguments. Since torch 2.15, the dispatcher converts it to a RuntimeError.
KERNEL_ERROR = RuntimeError if torch.__version__ >= (2, 15) else ValueError
LAYOUTS = ("contiguous", "strided", "permuted", "expanded")


@dataclass(frozen=True)
class ImageCase:
    """N images of C channels, a grid of patches, and the sides of a patch in pixels."""

    n: int
    c: int
    grid: tuple[int, int]
    patch: tuple[int, int]

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        return f"N{self.n}-C{self.c}-{self.grid[0]}x{self.grid[1]}-p{self.patch[0]}x{self.patch[1]}"


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def permutations(n: int, length: int, seed: int) -> Tensor:
    """A random permutation per row, int64 [n, length]."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=generator) for _ in range(n)]
    return torch.stack(rows) if n else torch.empty(0, length, dtype=torch.int64)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "strided":  # every second element of a NaN-filled buffer, so that a wrong stride shows
        filler = float("nan") if x.is_floating_point() else 0
        buffer = torch.full((*x.shape, 2), filler, dtype=x.dtype)
        buffer[..., 0] = x
        return buffer[..., 0]
    if layout == "permuted":  # dense, last dimension slowest: channels-last for images
        order = (*range(1, x.ndim), 0) if x.ndim < 4 else (0, 2, 3, 1)
        back = [order.index(i) for i in range(x.ndim)]
        return x.permute(order).contiguous().permute(back)
    if layout == "expanded" and x.shape[0]:  # stride 0: all rows are the first one
        return x[:1].expand_as(x)
    return x


RAW_SCALES = {"uint8": (50, 128, 0), "uint16": (8000, 30000, 65535), "int16": (8000, 0, -32768)}


def raw_pixels(images: Tensor, dtype: torch.dtype, missing: bool) -> tuple[Tensor, float | None]:
    """Images [N, C, H, W] of normal values as raw pixels [N, H, W, C], and the value of missing pixels.

    With ``missing``, the left half of the first image and a few values of each image are missing; some floats are NaN.
    """
    values = images.double().permute(0, 2, 3, 1).contiguous()
    if dtype.is_floating_point:
        raw, nodata = values * 40 + 7, -999.0
    else:
        scale, centre, nodata = RAW_SCALES[str(dtype).removeprefix("torch.")]
        raw = (values * scale + centre).round()
        raw = raw.clamp(torch.iinfo(dtype).min + 1, torch.iinfo(dtype).max - 1)
    if not missing:
        return raw.to(dtype), None
    absent = torch.rand(raw.shape, generator=torch.Generator().manual_seed(11)) < 0.2
    absent[:1, :, : raw.shape[2] // 2] = True
    raw = raw.masked_fill(absent, nodata)
    if dtype.is_floating_point:
        raw[:, ::2] = raw[:, ::2].masked_fill(absent[:, ::2], float("nan"))
    return raw.to(dtype), float(nodata)


def raw_stats(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, fp64 [C], for pixels as ``raw_pixels`` makes them."""
    mean, std = (torch.rand(channels, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    scale = {torch.uint8: 1, torch.uint16: 30000, torch.int16: 10000}.get(dtype, 40)
    return mean * scale, (std + 0.1) * scale


def standardised(pixels: Tensor, mean: Tensor, std: Tensor, nodata: float | None) -> Tensor:
    """Raw pixels [N, H, W, C] as images [N, C, H, W] in the dtype of ``mean``, NaN where they are missing."""
    values = pixels.to(mean.dtype)
    scaled = ((values / 255 if pixels.dtype == torch.uint8 else values) - mean) / std
    if nodata is not None:
        scaled[pixels.double() == torch.tensor(nodata, dtype=torch.float64).to(pixels.dtype).double()] = float("nan")
    return scaled.permute(0, 3, 1, 2)


def names(wanted: set[str]) -> str:
    """A test's id, the same in every process."""
    return "+".join(sorted(wanted))


def forward_and_gradients(f: Callable[..., Tensor], inputs: dict[str, Tensor], differentiate: set[str]) -> dict:
    """``out`` and the gradient of every input in ``differentiate``, for a fixed random cotangent."""
    leaves = {name: x.detach().requires_grad_(name in differentiate) for name, x in inputs.items()}
    out = f(**leaves)
    result = {"out": out.detach()}
    if differentiate:
        cotangent = randn(*out.shape, seed=99, dtype=out.dtype)
        wanted = sorted(differentiate)
        grads = torch.autograd.grad(out, [leaves[name] for name in wanted], cotangent)
        result |= {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return result


def compare(
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    differentiate: set[str],
    dtype: torch.dtype,
) -> None:
    """Compare output and gradients of ``ours`` with the eager chain. The tolerance is the error of the eager chain."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    truth = forward_and_gradients(eager, wide, differentiate)
    yardstick = forward_and_gradients(eager, inputs, differentiate)
    found = forward_and_gradients(ours, inputs, differentiate)
    for name, exact in truth.items():
        assert torch.equal(found[name].isnan(), exact.isnan()), name
        for result in (found, yardstick, truth):
            result[name] = result[name].nan_to_num()
        found[name] = found[name].to(yardstick[name].dtype) if name == "out" else found[name]
        if not exact.numel():
            assert found[name].shape == exact.shape, name
            del found[name], yardstick[name]
    truth = {name: exact for name, exact in truth.items() if exact.numel()}
    assert_no_worse_than_eager(found, yardstick, truth, dtype)
