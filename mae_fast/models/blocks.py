"""Transformer layers with the published names. Shapes: N images, T tokens, D width, H heads."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.add_layer_norm import add_layer_norm
from ..ops.attention import attention, each_sequence
from ..ops.autocast import autocast_dtype
from ..ops.linear import linear
from ..ops.mlp import mlp
from ..ops.native import has_kernel
from ..ops.patches import patch_sides
from ..ops.recompute import recomputing

NormLayer = Callable[[int], nn.Module]
Open = tuple[Tensor, Tensor | None]  # a branch's output and the bias that is still to be added to it
State = tuple[Tensor, Tensor | None, Tensor | None]  # x, residual, shift: stands for x + (residual + shift)


def at_least(least: int, **sizes: int) -> None:
    """Raise ``ValueError`` if one of ``sizes``, by their names, is below ``least``."""
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} must be {least} or more, got {size}")


class PatchEmbed(nn.Module):
    """Convolution that embeds every patch: [N, C, H, W] -> [N, L, D]. The MAE itself embeds the visible ones only."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        at_least(1, in_chans=in_chans, embed_dim=embed_dim)
        self.img_size = patch_sides(img_size)
        self.patch_size = patch_sides(patch_size)
        (height, width), (p, q) = self.img_size, self.patch_size
        if min(height, width, p, q) < 1 or height % p or width % q:
            raise ValueError(
                f"the image size must be a multiple of the patch size: got img_size={img_size}, "
                f"patch_size={patch_size}; the nearest sizes are {max(height // p, 1) * p} x {max(width // q, 1) * q}"
                if min(p, q) > 0
                else f"patch_size must be positive, got {patch_size}"
            )
        self.grid_size = (height // p, width // q)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.proj(x)
        return embedded.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Windows:
    """Of ``side`` x ``side`` patches, side by side on a ``grid`` of (rows, columns); the last ones reach beyond it."""

    grid: tuple[int, int]
    side: int

    @property
    def count(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return -(-self.grid[0] // self.side), -(-self.grid[1] // self.side)

    def split(self, x: Tensor) -> Tensor:
        """Patches [N, h * w, D] of the grid -> windows [N * count, side * side, D], 0 where they reach beyond it."""
        (n, _, d), (h, w), (rows, columns), side = x.shape, self.grid, self.count, self.side
        x = F.pad(x.reshape(n, h, w, d), (0, 0, 0, columns * side - w, 0, rows * side - h))
        x = x.reshape(n, rows, side, columns, side, d).transpose(2, 3)
        return x.reshape(n * rows * columns, side * side, d)

    def join(self, x: Tensor) -> Tensor:
        """``split``'s inverse, without what lies beyond the grid."""
        (m, _, d), (h, w), (rows, columns), side = x.shape, self.grid, self.count, self.side
        n = m // (rows * columns)
        x = x.reshape(n, rows, columns, side, side, d).transpose(2, 3).reshape(n, rows * side, columns * side, d)
        return x[:, :h, :w].reshape(n, h * w, d)


Kind = TypeVar("Kind", bound=nn.Module)


def plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether ``module`` is torch's own ``kind`` and nobody looks in: then an op may do its work with its weights."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks)


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, by our op if it is a plain ``nn.Linear``."""
    out: Tensor = linear(x, layer.weight, layer.bias) if plain(layer, nn.Linear) else layer(x)
    return out


class Attention(nn.Module):
    """Multi-head self-attention on one packed projection (rows of ``qkv``: q, then k, then v)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        at_least(1, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"the width must be a multiple of the number of heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return _added(*self.open(x))

    def open(self, x: Tensor, lengths: tuple[int, ...] | None = None) -> Open:
        """``forward(x)``, with the last bias left to the norm that follows; ``lengths`` as ``attention`` has them."""
        if plain(self.qkv, nn.Linear) and self.qkv.bias is not None and leaves_biases(x):
            bias = self.qkv.bias
            packed = linear(x, self.qkv.weight, bias, bias_gradient=False)
        else:
            packed, bias = apply_linear(self.qkv, x), None
        return _open_linear(self.proj, attention(packed, self.num_heads, lengths, bias))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        at_least(1, hidden=hidden)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return _added(*self.open(x))

    def open(self, x: Tensor) -> Open:
        """``forward(x)``, with the last bias left to the norm that follows."""
        layers = plain(self.fc1, nn.Linear) and plain(self.fc2, nn.Linear)
        biases = self.fc1.bias is not None and self.fc2.bias is not None
        if not layers or not biases or not plain(self.act, nn.GELU) or self.act.approximate != "none":
            return _open_linear(self.fc2, self.act(apply_linear(self.fc1, x)))
        own, left = _split_bias(self.fc2, x)
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, own), left


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): in training, each image's rows of a branch are 0 with probability
    ``drop_prob``, else divided by 1 - ``drop_prob``."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"the drop path rate must be at least 0 and below 1, got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"{self.drop_prob:g}"


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)); with ``drop_path``, branches may be left
    out."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: NormLayer = nn.LayerNorm,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, windows: Windows | None = None) -> Tensor:
        return joined(*self.open(x, windows=windows))

    def open(
        self, x: Tensor, residual: Tensor | None = None, shift: Tensor | None = None,
        lengths: tuple[int, ...] | None = None, windows: Windows | None = None,
    ) -> State:  # fmt: skip
        """The block on ``x + (residual + shift)``, its own last addition left open in the same way.

        The next norm makes that addition in its own pass over memory. With ``windows`` patches attend to their own
        window only: what is normed is padded with 0, so that padding's keys and values are the biases of ``qkv``.
        """
        attend = partial(_branch, self.attn, self.drop_path, lengths=lengths, windows=windows)
        x, attended, shift = normalised((x, residual, shift), self.norm1, attend)
        return normalised((x, attended, shift), self.norm2, partial(_branch, self.mlp, self.drop_path))


def _branch(
    module: nn.Module, drop_path: nn.Module, x: Tensor,
    lengths: tuple[int, ...] | None = None, windows: Windows | None = None,
) -> Open:  # fmt: skip
    """``drop_path(module(x))``, open if it is a plain attention or MLP of which nothing is dropped."""
    x = x if windows is None else windows.split(x)
    if plain(module, Attention):
        out = module.open(x, lengths)
    elif plain(module, Mlp):
        out = module.open(x)
    else:
        out = each_sequence(x, lengths, module), None
    if windows is not None:
        out = windows.join(out[0]), out[1]
    if plain(drop_path, DropPath) and not (drop_path.training and drop_path.drop_prob):
        return out
    return drop_path(_added(*out)), None


def leaves_biases(x: Tensor) -> bool:
    """Whether a linear layer on ``x`` leaves its bias, or its bias's gradient, to the op that has its output in hand
    anyway, where that is free: on GPUs, whose backward otherwise reads the whole gradient once more for its sum."""
    return x.is_cuda and has_kernel("add_layer_norm", "cuda") and not torch.compiler.is_compiling()


def _split_bias(layer: nn.Linear, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The layer's bias: what its product adds, and what is left to the norm that follows."""
    return (None, layer.bias) if leaves_biases(x) else (layer.bias, None)


def _open_linear(layer: nn.Module, x: Tensor) -> Open:
    if not plain(layer, nn.Linear):
        return layer(x), None
    own, left = _split_bias(layer, x)
    return linear(x, layer.weight, own), left


def _added(x: Tensor, shift: Tensor | None) -> Tensor:
    return x if shift is None else x + shift.to(x.dtype)


def joined(x: Tensor, residual: Tensor | None, shift: Tensor | None) -> Tensor:
    """The sum that a ``State`` stands for."""
    return x if residual is None else x + _added(residual, shift)


def normalised(state: State, norm: nn.Module, branch: Callable[[Tensor], Open]) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x = x + (residual + shift)`` and ``branch(norm(x))``; by our op if the norm is a plain layer norm of the last
    dimension.

    The branch keeps x only, not the norm of it, for its backward.
    """
    x, residual, shift = state
    if not plain(norm, nn.LayerNorm) or norm.bias is None or len(norm.normalized_shape) != 1:
        x = joined(*state)
        return x, *branch(norm(x))
    # Autocast would have the branch's linear layer round to its dtype; it leaves float64 alone.
    dtype = autocast_dtype(x.device.type) if x.dtype != torch.float64 else None
    options = norm.weight, norm.bias, norm.eps, dtype
    x, normed = add_layer_norm(x, residual, *options, shift)
    with nullcontext() if _hooked() else recomputing(normed, lambda: add_layer_norm(x, None, *options)[1]):
        return x, *branch(normed)


def _hooked() -> bool:
    """Whether others say what the backward keeps, as torch's checkpointing does: our hooks would hide theirs."""
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def init_weights(module: nn.Module) -> None:
    """Initialise one module in place, for ``Module.apply``: linear xavier-uniform, bias 0; layer norm 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
