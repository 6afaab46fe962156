"""The discrete VAE of DALL-E (Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021).

Shapes: N images, C channels, H x W pixels, V codes, h x w tokens of f x f pixels each, L = h * w. Pixels are floating,
in 0..1. Architecture and parameter names are those of the published DALL-E encoder and decoder.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

EPS = 0.1  # pixels are mapped to EPS..1 - EPS, where their logits are finite
STEP = 4 * (1 - 2 * EPS) / 255  # difference of logits between mid grey and the next 8-bit value
NAME = "dvae"  # name of the model in checkpoints
FIRST, LAST = "blocks.input.w", "blocks.output.conv.b"  # first and last tensor of a tokenizer
ENCODER, DECODER = (3, 3, 3, 1), (1, 3, 3, 3)  # kernel sizes in a block


class Conv(nn.Module):
    """Convolution that keeps the size. Its weight is ``w`` [out, in, kernel, kernel], its bias ``b`` [out]."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """``id_path(x) + gain * res_path(x)``."""

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        self.gain, self.grad_checkpointing = gain, False
        self.id_path = nn.Identity() if n_in == n_out else Conv(n_in, n_out, 1)
        widths = [n_in, *[n_out // 4] * (len(kernels) - 1), n_out]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            made: Tensor = checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False)
            return made
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return y


def _groups(widths: Sequence[int], blocks: int, kernels: Sequence[int], resize: nn.Module) -> list[tuple[str, Any]]:
    """Modules group_1, group_2, ...: each goes from one of ``widths`` to the next. ``resize`` is between them."""
    count = len(widths) - 1
    groups = []
    for i in range(count):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for j in range(blocks):
            n_in = widths[i] if j == 0 else widths[i + 1]
            layers[f"block_{j + 1}"] = Block(n_in, widths[i + 1], kernels, 1 / (count * blocks) ** 2)
        if i + 1 < count:
            layers["resize"] = resize
        groups.append((f"group_{i + 1}", nn.Sequential(layers)))
    return groups


def _output(n_in: int, n_out: int) -> tuple[str, nn.Module]:
    return "output", nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", Conv(n_in, n_out, 1))]))


class Tokenizer(nn.Module):
    """The encoder: pixels to logits, one code per ``factor`` x ``factor`` pixels, with ``factor`` = 2**(groups - 1).

    It has ``blocks_per_group`` residual blocks at each of ``groups`` resolutions. The first group has ``hidden``
    channels, and each following group has twice as many. The defaults are the published sizes.

    Raises:
        ValueError: unless all sizes are positive and ``hidden`` is a multiple of 4.
    """

    def __init__(
        self, vocab_size: int = 8192, hidden: int = 256, groups: int = 4, blocks_per_group: int = 2, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = {
            "vocab_size": vocab_size,
            "hidden": hidden,
            "groups": groups,
            "blocks_per_group": blocks_per_group,
            "in_chans": in_chans,
        }
        if min(self.config.values()) < 1 or hidden % 4:
            raise ValueError(f"tokenizer: sizes must be positive, and hidden a multiple of 4, got {self.config}")
        self.factor = 2 ** (groups - 1)
        widths = [hidden, *(hidden * 2**i for i in range(groups))]
        self.blocks = nn.Sequential(
            OrderedDict(
                [
                    ("input", Conv(in_chans, hidden, 7)),
                    *_groups(widths, blocks_per_group, ENCODER, nn.MaxPool2d(2)),
                    _output(widths[-1], vocab_size),
                ]
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, C, H, W] -> logits [N, V, h, w]. Pixels are first mapped to EPS..1 - EPS, as published.

        Raises:
            ValueError: if the number of dimensions or channels is wrong.
        """
        if pixels.ndim != 4 or pixels.shape[1] != self.config["in_chans"]:
            raise ValueError(
                f"tokenizer: pixels must be [N, {self.config['in_chans']}, H, W], got {list(pixels.shape)}"
            )
        logits: Tensor = self.blocks(_mapped(pixels))
        return logits

    @torch.no_grad()
    def tokens(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """The most likely codes, int64 [N, L], in row-major order of a ``grid`` of h x w tokens.

        Pixels [N, C, H, W] are resized to h * factor x w * factor if necessary (bicubic, antialiased, clamped to 0..1).
        The computation is in the precision of the weights, even under autocast, and without gradients.

        Raises:
            ValueError: as ``forward``.
        """
        height, width = (side * self.factor for side in grid)
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.to(self.get_parameter(FIRST).dtype)
            if pixels.shape[2:] != (height, width):
                pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
            logits: Tensor = self(pixels)
        return logits.argmax(1).flatten(1)


class Decoder(nn.Module):
    """The decoder: codes [N, V, h, w], one-hot or relaxed, to 2C values per pixel [N, 2C, H, W].

    The values are C means of the pixel's logit, then C logarithms of its scale. The first layer, ``blocks.input``, is
    the codebook, with one vector per code.
    """

    def __init__(self, vocab_size: int, hidden: int, groups: int, blocks_per_group: int, in_chans: int) -> None:
        super().__init__()
        codes = hidden // 2
        widths = [codes, *(hidden * 2**i for i in reversed(range(groups)))]
        self.blocks = nn.Sequential(
            OrderedDict(
                [
                    ("input", Conv(vocab_size, codes, 1)),
                    *_groups(widths, blocks_per_group, DECODER, nn.Upsample(scale_factor=2, mode="nearest")),
                    _output(hidden, 2 * in_chans),
                ]
            )
        )

    def forward(self, codes: Tensor) -> Tensor:
        values: Tensor = self.blocks(codes)
        return values


class DVAE(nn.Module):
    """A ``Tokenizer`` as ``encoder``, and a ``decoder``. Arguments and errors are those of ``Tokenizer``."""

    def __init__(self, **config: int) -> None:
        super().__init__()
        self.encoder = Tokenizer(**config)
        self.decoder = Decoder(**self.encoder.config)

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Recompute the activations inside each block in the backward pass."""
        for module in self.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = on

    def loss(self, pixels: Tensor, temperature: float | Tensor, kl_weight: float | Tensor) -> Tensor:
        """The negative evidence lower bound in nats per value (one channel of a pixel), scalar:

            codes = softmax((logits + gumbel noise) / temperature)                            # relaxed, [N, V, h, w]
            loss = -log p(pixels | decoder(codes)) + kl_weight * KL(softmax(logits) || uniform)

        ``p`` is the paper's logit-Laplace distribution, the sigmoid of a Laplace variable, with support 0..1. Its scale
        is learned, with one step of 8-bit pixels as the minimum. The scale balances reconstruction and divergence, so
        ``kl_weight`` has the same effect for all images. The noise comes from torch's generator. Height and width of
        pixels [N, C, H, W] must be multiples of ``encoder.factor``.
        """
        logits = _wide(self.encoder(pixels))
        codes = F.gumbel_softmax(logits, temperature, dim=1)  # type: ignore[arg-type]  # a tensor works, too
        mean, log_scale = _wide(self.decoder(codes)).chunk(2, 1)  # [N, C, H, W] each
        target = _mapped(_wide(pixels))
        scale = log_scale.exp() + STEP  # without STEP, the likelihood of constant areas is unbounded
        nll = (target.logit() - mean).abs() / scale + (2 * scale * target * (1 - target)).log()
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * log_q).sum(1) + math.log(logits.shape[1])  # [N, h, w]
        loss: Tensor = nll.mean() + kl_weight * kl.mean() / (pixels[0].numel() / kl[0].numel())
        return loss

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [N, C, H, W] reconstructed from the most likely codes, and these codes, int64 [N, h, w]."""
        logits = self.encoder(pixels)
        tokens = logits.argmax(1)
        codes = F.one_hot(tokens, logits.shape[1]).movedim(3, 1).to(logits.dtype)
        mean, _ = _wide(self.decoder(codes)).chunk(2, 1)
        return ((mean.sigmoid() - EPS) / (1 - 2 * EPS)).clamp(0, 1), tokens


def _mapped(pixels: Tensor) -> Tensor:
    return (1 - 2 * EPS) * pixels + EPS


def _wide(x: Tensor) -> Tensor:
    """``x`` in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
