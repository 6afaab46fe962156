"""Transformer layers, under the names of the published code. Shapes: N images, T tokens, D width, H heads."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attention import Backend, attention, each_sequence
from ..ops.linear import linear
from ..ops.mlp import mlp
from ..ops.native import has_kernel
from ..ops.patches import patch_sides
from .residual import BranchOutput, Residual, add_bias, is_plain_layer_norm, is_unhooked

NormLayer = Callable[[int], nn.Module]


def at_least(least: int, **sizes: int) -> None:
    """Raise ``ValueError`` if one of the named ``sizes`` is below ``least``."""
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} must be {least} or more, got {size}")


class PatchEmbed(nn.Module):
    """Convolution that embeds every patch: [N, C, H, W] -> [N, L, D]. The MAE embeds only the visible patches."""

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
                f"patch_size={patch_size}; the nearest size is {max(height // p, 1) * p} x {max(width // q, 1) * q}"
                if min(p, q) > 0
                else f"patch_size must be positive, got {patch_size}"
            )
        self.grid_size = (height // p, width // q)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.proj(x)
        return embedded.flatten(2).transpose(1, 2)


def is_plain_patch_embed(embed: nn.Module) -> bool:
    """Whether an op can embed patches with the weights of ``embed``: it is unhooked and convolves each patch once."""
    if not (is_unhooked(embed, PatchEmbed) and is_unhooked(conv := embed.proj, nn.Conv2d)):
        return False
    once = conv.kernel_size == conv.stride == embed.patch_size
    return once and (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)


@dataclass(frozen=True)
class Windows:
    """Windows of ``side`` x ``side`` patches on a ``grid`` of (rows, columns). The last ones may reach beyond it."""

    grid: tuple[int, int]
    side: int

    @property
    def count(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return -(-self.grid[0] // self.side), -(-self.grid[1] // self.side)

    def split(self, x: Tensor) -> Tensor:
        """Patches [N, h * w, D] -> windows [N * count, side * side, D], with zeros beyond the grid."""
        (n, _, d), (h, w), (rows, columns), side = x.shape, self.grid, self.count, self.side
        x = F.pad(x.reshape(n, h, w, d), (0, 0, 0, columns * side - w, 0, rows * side - h))
        x = x.reshape(n, rows, side, columns, side, d).transpose(2, 3)
        return x.reshape(n * rows * columns, side * side, d)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of ``split``. It drops the padding."""
        (m, _, d), (h, w), (rows, columns), side = x.shape, self.grid, self.count, self.side
        n = m // (rows * columns)
        x = x.reshape(n, rows, columns, side, side, d).transpose(2, 3).reshape(n, rows * side, columns * side, d)
        return x[:, :h, :w].reshape(n, h * w, d)


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, computed by our op if ``layer`` is a plain ``nn.Linear`` without hooks."""
    out: Tensor = linear(x, layer.weight, layer.bias) if is_unhooked(layer, nn.Linear) else layer(x)
    return out


def defers_biases(x: Tensor) -> bool:
    """Whether a linear layer on ``x`` leaves its bias, or the gradient of its bias, to the next op.

    The next op reads the output and its gradient in any case. The linear layer would need one more pass over the
    gradient to sum it. Returns True on GPUs only.
    """
    return x.is_cuda and has_kernel("add_layer_norm", "cuda") and not torch.compiler.is_compiling()


def _split_bias(layer: nn.Linear, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The bias of ``layer`` as (bias to add now, bias to leave to the next norm). One of them is None."""
    return (None, layer.bias) if defers_biases(x) else (layer.bias, None)


def _apply_last_linear(layer: nn.Module, x: Tensor) -> BranchOutput:
    """``layer(x)`` as (output, bias that the next norm has to add)."""
    if not is_unhooked(layer, nn.Linear):
        return layer(x), None
    bias, deferred = _split_bias(layer, x)
    return linear(x, layer.weight, bias), deferred


class Attention(nn.Module):
    """Multi-head self-attention on one packed projection (rows of ``qkv``: q, then k, then v).

    Attributes:
        backend: the implementation, see ``ops.attention``.
    """

    backend: Backend = "auto"

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        at_least(1, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"the width must be a multiple of the number of heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return add_bias(*self.forward_fused(x))

    def forward_fused(self, x: Tensor, lengths: tuple[int, ...] | None = None, first_query: int = 0) -> BranchOutput:
        """``forward(x)[:, first_query:]`` as (output, bias to add). ``lengths``: see ``ops.attention``."""
        if is_unhooked(self.qkv, nn.Linear) and self.qkv.bias is not None and defers_biases(x):
            bias = self.qkv.bias
            packed = linear(x, self.qkv.weight, bias, bias_gradient=False)
        else:
            packed, bias = apply_linear(self.qkv, x), None
        out = attention(packed, self.num_heads, lengths, bias, self.backend, first_query)
        return _apply_last_linear(self.proj, out)


def set_attention(model: nn.Module, backend: Backend) -> None:
    """Set the attention backend of all blocks of ``model``, see ``ops.attention``."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        at_least(1, hidden=hidden)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return add_bias(*self.forward_fused(x))

    def forward_fused(self, x: Tensor) -> BranchOutput:
        """``forward(x)`` as (output, bias to add)."""
        linears = all(is_unhooked(x, nn.Linear) and x.bias is not None for x in (self.fc1, self.fc2))
        exact_gelu = is_unhooked(self.act, nn.GELU) and self.act.approximate == "none"
        if not (linears and exact_gelu):
            return _apply_last_linear(self.fc2, self.act(apply_linear(self.fc1, x)))
        bias, deferred = _split_bias(self.fc2, x)
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, bias), deferred


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): in training, the branch of an image is 0 with probability
    ``drop_prob``, otherwise divided by 1 - ``drop_prob``."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"the drop path rate must be at least 0 and below 1, got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"{self.drop_prob:g}"


class Block(nn.Module):
    """Pre-norm transformer block: ``x = x + drop_path(attn(norm1(x)))``, then ``x + drop_path(mlp(norm2(x)))``."""

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
        return self.forward_fused(Residual(x), windows=windows).materialize()

    def forward_fused(
        self,
        residual: Residual,
        lengths: tuple[int, ...] | None = None,
        windows: Windows | None = None,
        first_query: int = 0,
    ) -> Residual:
        """``forward(residual.materialize())``. The last addition of the block stays pending.

        Args:
            lengths: lengths of packed sequences, see ``ops.attention``.
            windows: let patches attend only within their window. The normed tokens are padded with zeros, so the keys
                and values of the padding are the biases of ``qkv``.
            first_query: compute only the tokens from this index on. The others serve as keys and values.
        """
        residual = self._attend(residual, lengths, windows, first_query)
        return self._feed_forward(residual)

    def _attend(
        self, residual: Residual, lengths: tuple[int, ...] | None, windows: Windows | None, first_query: int
    ) -> Residual:
        with residual.add_and_norm(self.norm1) as (x, normed):
            if windows is not None:
                normed = windows.split(normed)
            if is_unhooked(self.attn, Attention):
                out, bias = self.attn.forward_fused(normed, lengths, first_query)
            else:
                out, bias = each_sequence(normed, lengths, self.attn)[:, first_query:], None
            if windows is not None:
                out = windows.join(out)
            return self._add(x, out, bias, first_query)

    def _feed_forward(self, residual: Residual) -> Residual:
        with residual.add_and_norm(self.norm2) as (x, normed):
            if is_unhooked(self.mlp, Mlp):
                out, bias = self.mlp.forward_fused(normed)
            else:
                out, bias = self.mlp(normed), None
            return self._add(x, out, bias)

    def _add(self, x: Tensor, out: Tensor, bias: Tensor | None, first_query: int = 0) -> Residual:
        """``x`` and a pending branch output. Stochastic depth scales output and bias, so it needs their sum."""
        if not is_unhooked(self.drop_path, DropPath) or (self.drop_path.training and self.drop_path.drop_prob):
            out, bias = self.drop_path(add_bias(out, bias)), None
        if out.shape[1] != x.shape[1] - first_query:  # ``Residual`` would drop tokens silently
            shapes = f"{list(out.shape)} for {list(x.shape)}"
            raise ValueError(f"attention and MLP must return one token for each input token, got {shapes}")
        return Residual(x, out, bias)


def apply_block(
    block: nn.Module,
    residual: Residual,
    lengths: tuple[int, ...] | None = None,
    windows: Windows | None = None,
    first_query: int = 0,
) -> Residual:
    """Run ``block.forward_fused`` if ``block`` is a plain ``Block`` without hooks.

    Call any other module on the materialized tokens, for one packed sequence at a time.
    """
    if is_unhooked(block, Block):
        return block.forward_fused(residual, lengths, windows, first_query)
    x = residual.materialize()
    x = each_sequence(x, lengths, block) if windows is None else block(x, windows=windows)
    return Residual(x[:, first_query:])


def ignore_order(blocks: Iterable[nn.Module]) -> bool:
    """Whether the output of ``blocks`` for a token does not depend on its position in the sequence.

    True if all their modules are of the usual types and unhooked.
    """
    kinds = (Block, Attention, Mlp, DropPath, nn.Linear, nn.GELU)
    modules = (module for block in blocks for module in block.modules())
    return all(any(is_unhooked(m, kind) for kind in kinds) or is_plain_layer_norm(m) for m in modules)


def init_weights(module: nn.Module) -> None:
    """Initialize one module, for ``Module.apply``: linear xavier-uniform, its bias 0; layer norm 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        for parameter, value in ((module.weight, 1.0), (module.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)
