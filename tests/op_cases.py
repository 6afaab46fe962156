"""Inputs in the layouts that people have, and one way to compare an op with eager torch on them.

Truth is the eager chain in float64; the yardstick is the same eager chain in the tested dtype, differentiated by torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support import assert_no_worse_than_eager
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "strided", "permuted", "expanded")


@dataclass(frozen=True)
class ImageCase:
    """N images of C channels, a grid of patches, their sides in pixels."""

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
    """Judge ``ours`` on ``inputs`` by the eager chain's own error, forward and every gradient, NaN for NaN."""
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
