"""What a training step must cost: its FLOPs, GPUs' data sheets, and a roofline of the two.

Nothing here is a measurement. Letters: N images, L patches, K kept, D encoder width, E decoder width, P values per
patch, T tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What the FLOPs of a masked autoencoder depend on."""

    patches: int  # L
    values: int  # P
    width: int  # D
    depth: int
    decoder_width: int = 512  # E
    decoder_depth: int = 8
    mlp_ratio: float = 4.0


MODELS = {
    "ViT-B/16": Sizes(196, 768, 768, 12),
    "ViT-L/16": Sizes(196, 768, 1024, 24),
    "ViT-H/14": Sizes(256, 588, 1280, 32),
}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply-add being two: of products with weights, and of attention."""

    gemm: float
    attention: float

    @property
    def total(self) -> float:
        return self.gemm + self.attention


def train_flops(sizes: Sizes, mask_ratio: float = 0.75, *, least: bool = False) -> Flops:
    """FLOPs of one image's forward and backward pass, the backward's counted as twice the forward's:

        forward = 2 * tokens * weights                  for each linear layer
                + 4 * tokens ** 2 * width               for each attention, q k^T and its product with v

    As published, all L patches are embedded, and they and the class token predicted: 58.7e9 for ViT-B/16 at mask ratio
    0.75, the numerator of MFU. ``least``: the K visible are embedded, the L - K removed are predicted, and no gradient
    of the pixels is taken, as ``model.loss`` does it.
    """
    length, kept = sizes.patches, int(sizes.patches * (1 - mask_ratio))
    gemm = attention = 0.0
    for tokens, width, depth in (
        (1 + kept, sizes.width, sizes.depth),
        (1 + length, sizes.decoder_width, sizes.decoder_depth),
    ):
        gemm += 3 * depth * 2 * tokens * width**2 * (4 + 2 * sizes.mlp_ratio)
        attention += 3 * depth * 4 * tokens**2 * width
    gemm += 3 * 2 * (1 + kept) * sizes.width * sizes.decoder_width
    embedded, predicted, passes = (kept, length - kept, 2) if least else (length, 1 + length, 3)
    gemm += passes * 2 * embedded * sizes.values * sizes.width
    gemm += 3 * 2 * predicted * sizes.decoder_width * sizes.values
    return Flops(gemm, attention)


@dataclass(frozen=True)
class Gpu:
    """A data sheet: dense bf16 FLOP/s and bytes/s of memory; ``name`` as the driver gives it."""

    name: str
    peak: float
    bandwidth: float


GPUS = {
    "A100 40GB": Gpu("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
    "A100 80GB": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
    "H100 SXM": Gpu("NVIDIA H100 80GB HBM3", 989.4e12, 3.35e12),
}
