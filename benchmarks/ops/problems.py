"""The timed problems: each op with the inputs of a training step of ViT-B/16 and ViT-L/16, forward and backward.

The batch size is 32 on a CPU, 8 for the ops of a transformer block, and 256 on a GPU. On a GPU, calls are captured as
CUDA graphs. This removes the gaps between launches, so an eager chain is slower in practice than in these results. The
optimizer step is part of ``mae-fast bench``.

The contenders are the eager chain that the op replaces, the same chain under torch.compile, and the op. bf16 means
autocast: images, weights and position tables are fp32; products and predictions are bf16. Raw images, [N, H, W, C] of
uint16 or float32, are standardised in each chain. In float images, NaN is a missing pixel.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_fast.bench.timing import graphed, ratio
from mae_fast.memory import raise_mmap_threshold
from mae_fast.models.sizes import ENCODERS
from mae_fast.ops.add_layer_norm import add_layer_norm
from mae_fast.ops.attention import attention
from mae_fast.ops.bias_gelu import bias_gelu
from mae_fast.ops.decoder_tokens import decoder_tokens
from mae_fast.ops.embed_visible import embed_visible
from mae_fast.ops.linear import linear
from mae_fast.ops.masked_loss import masked_loss
from mae_fast.ops.mlp import mlp
from mae_fast.ops.patches import patchify
from mae_fast.ops.random_masking import random_masking

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 256 if DEVICE == "cuda" else 32
IN_BLOCKS = 256 if DEVICE == "cuda" else 8
L, K, P, SIDE, E = 196, 49, 768, 224, 512
BLOCKS = {"decoder": (1 + L, E, 16), "encoder": (1 + K, ENCODERS["base"]["embed_dim"], 12)}  # tokens, width, heads
WIDTHS = {"ViT-B/16": ENCODERS["base"]["embed_dim"], "ViT-L/16": ENCODERS["large"]["embed_dim"]}
REPEATS = 10 if DEVICE == "cuda" else 1  # steps per timed call
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Function = Callable[..., object]


@dataclass(frozen=True)
class Problem:
    """An op with inputs. Gradients are computed for inputs that require them.

    Attributes:
        eager: the eager chain: a function of ``inputs`` that returns a tensor or a tuple.
        ours: the op, with the same arguments and results.
        bytes_moved: the minimum of bytes that forward and backward have to read and write.
    """

    op: str
    model: str
    dtype: str
    inputs: tuple[Tensor, ...]
    eager: Function
    ours: Function
    bytes_moved: int

    def __str__(self) -> str:
        return f"{self.op} {self.model} {self.dtype}"

    def contenders(self) -> dict[str, Callable[[], object]]:
        """The timed calls, each of ``REPEATS`` steps."""
        return {name: graphed(call, REPEATS) if DEVICE == "cuda" else call for name, call in self.calls().items()}

    def calls(self) -> dict[str, Callable[[], list[Tensor]]]:
        compiled = torch.compile(self.eager)
        return {"eager": self.call(self.eager), "compile": self.call(compiled), "mae_fast": self.call(self.ours)}

    def call(self, f: Callable[..., object]) -> Callable[[], list[Tensor]]:
        """A function that runs ``f`` forward and, if an input requires a gradient, backward.

        It returns outputs and gradients.
        """
        leaves = [x for x in self.inputs if x.requires_grad]

        def step() -> list[Tensor]:
            autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=self.dtype == "bf16")
            with autocast:
                out = f(*self.inputs)
            outputs = list(out) if isinstance(out, tuple) else [out]
            if not leaves:
                return outputs
            cotangents = [torch.ones_like(x) for x in outputs]
            return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]

        return step

    def gate(self) -> None:
        """Check that all contenders agree; otherwise, the problem must not be timed."""
        self.compare({name: call() for name, call in self.calls().items()})

    def compare(self, results: dict[str, list[Tensor]]) -> None:
        """Compare all results with those of "eager"."""
        for name in results.keys() - {"eager"}:
            for a, b in zip(results[name], results["eager"], strict=True):
                if not a.is_floating_point():
                    assert torch.equal(a, b), (str(self), name)
                else:
                    error = (a.double() - b.double()).abs().max().item()
                    limit = (2e-4 if self.dtype == "fp32" else 2e-2) * max(1e-6, b.abs().max().item())
                    assert error <= limit, (str(self), name, error, limit)

    def row(self, times: dict[str, list[float]]) -> dict[str, Any]:
        """The median times and the speedups over the baselines, from the seconds of each call by round."""
        ms = {name: statistics.median(t) / REPEATS * 1e3 for name, t in times.items()}
        found = {"problem": str(self), "ms": ms, "GB/s": self.bytes_moved / ms["mae_fast"] / 1e6}
        return found | {f"vs {other}": ratio(times, other, "mae_fast") for other in ("eager", "compile")}


def _masking(noise: Tensor) -> tuple[Tensor, ...]:
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones_like(noise)
    mask[:, :K] = 0
    return ids_shuffle[:, :K], ids_shuffle[:, K:], ids_restore, torch.gather(mask, 1, ids_restore)


def _embed(images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
    x = F.conv2d(images, weight, bias, stride=16).flatten(2).transpose(1, 2) + pos[:, 1:]
    x = torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.cat([(cls + pos[:, :1]).expand(len(x), -1, -1), x], dim=1)


MEAN, STD = 1000.0, 300.0  # of every channel of raw pixels, in their units


def _raw_images(n: int, dtype: torch.dtype) -> Tensor:
    """Raw pixels [N, H, W, C]. In float images, 1 % of the values are missing."""
    values = torch.randn(n, SIDE, SIDE, 3) * STD + MEAN
    if dtype.is_floating_point:
        return values.masked_fill(torch.rand(values.shape) < 0.01, float("nan")).to(dtype)
    return values.clamp(0, 65535).to(dtype)


def _embed_raw(pixels: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
    images = ((pixels.float() - MEAN) / STD).permute(0, 3, 1, 2)
    return _embed(images.nan_to_num() if pixels.is_floating_point() else images, ids, weight, bias, pos, cls)


def _loss_raw(pixels: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    """The loss on normalised targets. Missing values are left out of the error, mean and variance of a patch."""
    images = ((pixels.float() - MEAN) / STD).permute(0, 3, 1, 2)
    if not pixels.is_floating_point():
        return _loss(images, pred, mask)
    target = patchify(images, 16)
    known = ~target.isnan()
    target, count = target.nan_to_num(), known.sum(-1, keepdim=True)
    centred = (target - target.sum(-1, keepdim=True) / count) * known
    target = centred / (centred.square().sum(-1, keepdim=True) / (count - 1) + 1e-6) ** 0.5
    loss = (((pred - target) * known) ** 2).sum(-1) / count[:, :, 0]
    return (loss * mask).sum() / mask.sum()


def _tokens(x: Tensor, token: Tensor, ids_restore: Tensor, pos: Tensor) -> Tensor:
    joined = torch.cat([x[:, 1:], token.expand(len(x), L + 1 - x.shape[1], -1)], dim=1)
    joined = torch.gather(joined, 1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :1], joined], dim=1) + pos


def _loss(images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    target = patchify(images, 16)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(-1)
    return (loss * mask).sum() / mask.sum()


def _attention(qkv: Tensor, heads: int) -> Tensor:
    n, t, width = qkv.shape
    q, k, v = qkv.reshape(n, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width // 3)


def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def problems(n: int = N, in_blocks: int = IN_BLOCKS) -> list[Problem]:
    """Every op at all relevant sizes and dtypes.

    Args:
        n: batch size.
        in_blocks: batch size for the ops of a transformer block.
    """
    torch.manual_seed(0)
    raise_mmap_threshold()
    torch.backends.cudnn.allow_tf32 = False  # no TF32 in fp32, as in matrix products by default
    with torch.device(DEVICE):
        sides = ("decoder", "encoder") if DEVICE == "cuda" else ("decoder",)
        raw = [p for kind in (torch.uint16, torch.float32) for dtype in DTYPES for p in _on_raw_images(n, kind, dtype)]
        blocks = [p for dtype in DTYPES for side in sides for p in _in_blocks(in_blocks, dtype, side)]
        return [*_around_blocks(n), *raw, *blocks]


def _around_blocks(N: int) -> list[Problem]:
    noise, images = torch.rand(N, L), torch.randn(N, 3, SIDE, SIDE)
    ids_keep, _, ids_restore, mask = random_masking(noise, K)
    found = [Problem("random_masking", "any", "fp32", (noise,), _masking, lambda n: random_masking(n, K), N * L * 24)]
    for dtype_name, dtype in DTYPES.items():
        size = dtype.itemsize
        for model, width in WIDTHS.items():
            weight = (torch.randn(width, 3, 16, 16) / 30).requires_grad_()
            bias = torch.zeros(width, requires_grad=True)
            pos, cls = torch.randn(1, 1 + L, width), torch.zeros(1, 1, width, requires_grad=True)
            moved = N * K * P * (4 + 3 * size) + 3 * width * P * 4 + N * (K + 1) * width * (2 * size + 8)
            inputs = (images, ids_keep, weight, bias, pos, cls)
            found.append(Problem("embed_visible", model, dtype_name, inputs, _embed, embed_visible, moved))
        x = torch.randn(N, 1 + K, E, dtype=dtype, requires_grad=True)
        token, pos = torch.zeros(1, 1, E, requires_grad=True), torch.randn(1, 1 + L, E)
        moved = N * (1 + K) * E * 2 * size + N * (1 + L) * E * 8
        inputs = (x, token, ids_restore, pos)
        found.append(Problem("decoder_tokens", "B and L", dtype_name, inputs, _tokens, decoder_tokens, moved))
        pred = torch.randn(N, L, P, dtype=dtype, requires_grad=True)
        moved = 2 * images.nbytes + 3 * pred.nbytes

        def ours(images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
            return masked_loss(images, pred, mask, patch=16, norm_pix=True)

        found.append(Problem("masked_loss", "B and L", dtype_name, (images, pred, mask), _loss, ours, moved))
    return found


def _on_raw_images(n: int, kind: torch.dtype, dtype_name: str) -> list[Problem]:
    """The ops that read images, on raw pixels of dtype ``kind``, for ViT-B/16."""
    dtype, width, images = DTYPES[dtype_name], WIDTHS["ViT-B/16"], _raw_images(n, kind)
    stats = {"mean": torch.full((3,), MEAN), "std": torch.full((3,), STD)}
    ids_keep, _, _, mask = random_masking(torch.rand(n, L), K)
    weight = (torch.randn(width, 3, 16, 16) / 30).requires_grad_()
    bias, pos = torch.zeros(width, requires_grad=True), torch.randn(1, 1 + L, width)
    cls = torch.zeros(1, 1, width, requires_grad=True)
    pred = torch.randn(n, L, P, dtype=dtype, requires_grad=True)

    def loss(images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        return masked_loss(images, pred, mask, patch=16, norm_pix=True, **stats)

    embedding = (images, ids_keep, weight, bias, pos, cls)
    moved = n * K * P * (kind.itemsize + 3 * dtype.itemsize) + 3 * width * P * 4
    moved += n * (K + 1) * width * (2 * dtype.itemsize + 8)
    embed, label = partial(embed_visible, **stats), f"ViT-B/16 {str(kind).removeprefix('torch.')}"
    both = 2 * images.nbytes + 3 * pred.nbytes
    return [
        Problem("embed_visible", label, dtype_name, embedding, _embed_raw, embed, moved),
        Problem("masked_loss", label, dtype_name, (images, pred, mask), _loss_raw, loss, both),
    ]


def _in_blocks(n: int, dtype_name: str, side: str) -> list[Problem]:
    """The ops of a transformer block of the decoder (T = 1 + L tokens) or of the encoder of ViT-B/16."""
    tokens, width, heads = BLOCKS[side]
    dtype = DTYPES[dtype_name]
    size, rows, hidden = dtype.itemsize, n * tokens, 4 * width

    def made(op: str, inputs: tuple[Tensor, ...], eager: Function, ours: Function, moved: int) -> Problem:
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        return Problem(op, side, dtype_name, leaves, eager, ours, moved)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x = x + residual
        return x, F.layer_norm(x, (width,), weight, bias, 1e-6).to(dtype)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, weight, bias, 1e-6, dtype)

    def attended(qkv: Tensor) -> Tensor:
        return _attention(qkv, heads)

    stream = torch.randn(n, tokens, width)  # the residual stream is fp32, even under autocast
    low = stream.to(dtype)
    weight1, weight2 = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    bias1, bias2 = torch.zeros(hidden), torch.zeros(width)
    x, qkv = torch.randn(n, tokens, hidden, dtype=dtype), torch.randn(n, tokens, 3 * width, dtype=dtype)
    found = [
        made("add_layer_norm", (stream, low, bias2 + 1, bias2), add_norm, ours, rows * width * (20 + 4 * size)),
        made("bias_gelu", (x, bias1), lambda x, b: F.gelu(x + b.to(x.dtype)), bias_gelu, rows * hidden * 5 * size),
        made("attention", (qkv,), attended, lambda qkv: attention(qkv, heads), rows * width * 11 * size),
    ]
    if dtype_name == "bf16":  # in fp32, these ops call torch
        weights = 2 * hidden * width * (2 * size + 4)
        mlp_moved = rows * (5 * width + 5 * hidden) * size + weights
        moved = rows * (3 * width + 2 * hidden) * size
        found += [
            made("linear", (low, weight1, bias1), F.linear, linear, moved + weights // 2),
            made("mlp", (low, weight1, bias1, weight2, bias2), _mlp, mlp, mlp_moved),
        ]
    return found
