"""Tokens of a discrete VAE as a target (Bao et al., BEiT, ICLR 2022): the row "dVAE token" of the paper's Table 1d.

Shapes: N images, L patches, R predicted patches per image, E decoder width, V tokens in the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...ops.patches import image_size
from ..blocks import apply_linear
from .dvae import Tokenizer

MAX_LOGITS = 2**23  # number of logits that are in memory at a time


class TokenTarget(nn.Module):
    """Predict the token that a frozen ``tokenizer`` assigns to each patch, as logits [V]."""

    def __init__(self, tokenizer: Tokenizer, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch, self.tokenizer = patch, tokenizer.requires_grad_(False).eval()
        self.size: int = tokenizer.config["vocab_size"]

    def train(self, mode: bool = True) -> "TokenTarget":
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, ids: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Tokens int64 [N, R] of the patches ``ids`` [N, R].

        Args:
            images: uint8 [N, H, W, 3], or floating [N, 3, H, W], standardised with ``mean`` and ``std`` [3].
        """
        raw = images.dtype == torch.uint8
        if raw:
            pixels = images.permute(0, 3, 1, 2).float() / 255
        else:
            pixels = images.float() * std.float()[:, None, None] + mean.float()[:, None, None]
        _, height, width = image_size(images, raw)
        tokens: Tensor = self.tokenizer.tokens(pixels, (height // self.patch[0], width // self.patch[1]))
        return tokens.gather(1, ids)

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor, ids: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Cross-entropy of logits ``pred`` [N, R, V] on removed patches, weighted by ``mask`` [N, R]."""
        tokens = self(images, ids, mean, std)
        wide = torch.promote_types(pred.dtype, torch.float32)
        each = F.cross_entropy(pred.flatten(0, 1).to(wide), tokens.flatten(), reduction="none")
        weights = mask.flatten().to(wide)
        return (each * weights).sum() / weights.sum()

    def loss_of_decoded(self, layer: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of the logits ``layer(x)``, x [N, R, E], for ``tokens`` [N, R].

        To save memory, the logits are computed in parts of ``MAX_LOGITS``, and again in the backward pass. With a
        vocabulary of 8192, this halves the memory and takes 10 % more time.
        """

        def summed(rows: Tensor, wanted: Tensor) -> Tensor:
            logits = apply_linear(layer, rows)
            return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="sum")

        rows, wanted = x.flatten(0, 1), tokens.flatten()
        step = max(1, MAX_LOGITS // self.size)
        if len(rows) <= step:
            return summed(rows, wanted) / len(rows)
        parts: list[Any] = [
            checkpoint(summed, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(torch.split(rows, step), torch.split(wanted, step), strict=True)
        ]
        return torch.stack(parts).sum() / len(rows)
