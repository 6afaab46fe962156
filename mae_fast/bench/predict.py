"""What a training step must cost: its FLOPs, GPUs' data sheets, and a roofline of the two.

Nothing here is a measurement. Letters: N images, L patches, K kept, D encoder width, E decoder width, P values per
patch, T tokens.
"""

from dataclasses import dataclass
from typing import Any


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
    encoder_mask_token: bool = False
    predicted: int | None = None  # values predicted per patch; None: P

    @classmethod
    def of(cls, model: Any) -> "Sizes":
        """Those of a ``MaskedAutoencoderViT``."""
        return cls(
            patches=model.patch_embed.num_patches,
            values=model.patch_embed.proj.weight[0].numel(),
            width=model.cls_token.shape[2],
            depth=len(model.blocks),
            decoder_width=model.decoder_embed.out_features,
            decoder_depth=len(model.decoder_blocks),
            mlp_ratio=model.blocks[0].mlp.fc1.out_features / model.cls_token.shape[2],
            encoder_mask_token=model.encoder_mask_token is not None,
            predicted=model.decoder_pred.out_features,
        )


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
    of the pixels is taken, as ``model.loss`` does it. What turns pixels into a target, a tokenizer say, is left out.
    """
    length, kept = sizes.patches, int(sizes.patches * (1 - mask_ratio))
    seen = 1 + (length if sizes.encoder_mask_token else kept)
    gemm = attention = 0.0
    for tokens, width, depth in (
        (seen, sizes.width, sizes.depth),
        (1 + length, sizes.decoder_width, sizes.decoder_depth),
    ):
        gemm += 3 * depth * 2 * tokens * width**2 * (4 + 2 * sizes.mlp_ratio)
        attention += 3 * depth * 4 * tokens**2 * width
    gemm += 3 * 2 * seen * sizes.width * sizes.decoder_width
    embedded, predicted, passes = (kept, length - kept, 2) if least else (length, 1 + length, 3)
    gemm += passes * 2 * embedded * sizes.values * sizes.width
    gemm += 3 * 2 * predicted * sizes.decoder_width * (sizes.predicted or sizes.values)
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


@dataclass(frozen=True)
class Counted:
    """(launches, bytes) of a training step of ``BATCH`` images, as ``tests/gpu_proof/step.py`` counts them.

    Images and weights in fp32, bf16 autocast, each tensor of a launch read or written once.
    """

    gemm: tuple[int, float]
    attention: tuple[int, float]
    elementwise: tuple[int, float]
    optimiser: tuple[int, float]

    @property
    def launches(self) -> int:
        return sum(n for n, _ in (self.gemm, self.attention, self.elementwise, self.optimiser))


BATCH = 256
STEPS = {
    "ViT-B/16": Counted((248, 32.51e9), (40, 7.86e9), (246, 37.35e9), (6, 4.24e9)),
    "ViT-L/16": Counted((392, 53.16e9), (64, 12.60e9), (378, 59.23e9), (6, 12.51e9)),
    "ViT-H/14": Counted((488, 97.17e9), (80, 22.96e9), (466, 105.97e9), (6, 24.95e9)),
}


@dataclass(frozen=True)
class Assumed:
    """Shares of the data sheet's rates that are reached, and seconds lost between launches."""

    gemm: float
    attention: float
    memory: float
    gap: float


ASSUMED = (Assumed(1, 1, 1, 0), Assumed(0.65, 0.35, 0.85, 0), Assumed(0.65, 0.35, 0.85, 2e-6))


def predicted_seconds(model: str, gpu: Gpu, assumed: Assumed) -> float:
    """The roofline of a training step of ``BATCH`` images:

        sum over groups of max(FLOPs / (share * peak), bytes / (share * bandwidth)) + launches * gap

    Attention takes 3.5 / 3 of its FLOPs: its backward pass computes the scores again.
    """
    flops, counted = train_flops(MODELS[model], least=True), STEPS[model]
    work = (
        (BATCH * flops.gemm / assumed.gemm, counted.gemm),
        (BATCH * flops.attention * 3.5 / 3 / assumed.attention, counted.attention),
        (0.0, counted.elementwise),
        (0.0, counted.optimiser),
    )
    bandwidth = assumed.memory * gpu.bandwidth
    return sum(max(f / gpu.peak, moved / bandwidth) for f, (_, moved) in work) + counted.launches * assumed.gap


def print_predictions() -> None:
    """A table of ``predicted_seconds``: every model, GPU and assumption."""
    from rich.console import Console
    from rich.table import Table

    columns = ("model", "GPU", "step", "images/s", "MFU", "GEMM", "attention", "memory", "launch")
    table = Table(*columns, box=None, padding=(0, 1, 0, 0))
    table.title = f"Predicted, not measured: {BATCH} images a step, mask ratio 0.75, bf16, with AdamW"
    table.caption = (
        "A roofline of counted FLOPs and bytes, if products, attention and memory reach these shares of the data "
        "sheet's rates and each launch loses that time (0: CUDA graph). Whether the GPU holds it is not looked at."
    )
    for model, sizes in MODELS.items():
        for name, gpu in GPUS.items():
            for a in ASSUMED:
                seconds = predicted_seconds(model, gpu, a)
                mfu = BATCH * train_flops(sizes).total / seconds / gpu.peak
                predicted = f"{seconds * 1e3:.1f} ms", f"{BATCH / seconds:.0f}", f"{mfu:.0%}"
                shares = f"{a.gemm:.0%}", f"{a.attention:.0%}", f"{a.memory:.0%}", f"{a.gap * 1e6:g} us"
                table.add_row(model, name, *predicted, *shares)
    Console().print(table)
