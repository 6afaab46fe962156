"""What is timed: each op as the training step of ViT-B/16 and ViT-L/16 calls it, forward and backward.

Batch 32 on a CPU and 256 on a GPU, where the calls are captured as CUDA graphs, which leave the gaps between launches
out: an eager chain costs more than its row says.

A contender is the eager chain that the op takes the place of, the same chain under torch.compile, and the op. bf16
means the way autocast has it: fp32 images, weights and tables, bf16 products and predictions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_fast.bench import graphed
from mae_fast.ops.decoder_tokens import decoder_tokens
from mae_fast.ops.embed_visible import embed_visible
from mae_fast.ops.masked_loss import masked_loss
from mae_fast.ops.patches import patchify
from mae_fast.ops.random_masking import random_masking

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 256 if DEVICE == "cuda" else 32
L, K, P, SIDE, E = 196, 49, 768, 224, 512
WIDTHS = {"ViT-B/16": 768, "ViT-L/16": 1024}
REPEATS = 10 if DEVICE == "cuda" else 1  # steps in one timed call
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """``eager`` and ``ours`` map ``inputs`` to a tensor or a tuple; gradients go to what ``requires_grad``.

    ``bytes_moved`` is the least that forward and backward have to read and write.
    """

    op: str
    model: str
    dtype: str
    inputs: tuple[Tensor, ...]
    eager: Callable[..., object]
    ours: Callable[..., object]
    bytes_moved: int

    def __str__(self) -> str:
        return f"{self.op} {self.model} {self.dtype}"

    def contenders(self) -> dict[str, Callable[[], object]]:
        """Calls to be timed, each of ``REPEATS`` steps."""
        return {name: graphed(call, REPEATS) if DEVICE == "cuda" else call for name, call in self.calls().items()}

    def calls(self) -> dict[str, Callable[[], list[Tensor]]]:
        compiled = torch.compile(self.eager)
        return {"eager": self.call(self.eager), "compile": self.call(compiled), "mae_fast": self.call(self.ours)}

    def call(self, f: Callable[..., object]) -> Callable[[], list[Tensor]]:
        """Forward and, where something requires it, backward; returns outputs and gradients."""
        leaves = [x for x in self.inputs if x.requires_grad]

        def step() -> list[Tensor]:
            autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=self.dtype == "bf16")
            with autocast:
                out = f(*self.inputs)
            outputs = list(out) if isinstance(out, tuple) else [out]
            if not leaves:
                return outputs
            cotangent = torch.ones_like(outputs[0])
            return [outputs[0].detach(), *torch.autograd.grad(outputs[0], leaves, cotangent)]

        return step

    def gate(self) -> None:
        """The contenders agree, or there is no row."""
        results = {name: call() for name, call in self.calls().items()}
        for name in ("compile", "mae_fast"):
            for a, b in zip(results[name], results["eager"], strict=True):
                if not a.is_floating_point():
                    assert torch.equal(a, b), (str(self), name)
                else:
                    error = (a.double() - b.double()).abs().max().item()
                    limit = (2e-4 if self.dtype == "fp32" else 2e-2) * max(1e-6, b.abs().max().item())
                    assert error <= limit, (str(self), name, error, limit)


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


def _tokens(x: Tensor, token: Tensor, ids_restore: Tensor, pos: Tensor) -> Tensor:
    joined = torch.cat([x[:, 1:], token.expand(len(x), L + 1 - x.shape[1], -1)], dim=1)
    joined = torch.gather(joined, 1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :1], joined], dim=1) + pos


def _loss(images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    target = patchify(images, 16)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(-1)
    return (loss * mask).sum() / mask.sum()


def problems() -> list[Problem]:
    """Every op at every size and dtype that its cost depends on."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 for everyone; torch's matrix products have it so anyway
    with torch.device(DEVICE):
        return _problems()


def _problems() -> list[Problem]:
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
