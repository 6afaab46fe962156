"""A roofline of the training step, from its FLOPs and the data sheets of GPUs. Nothing here is a measurement."""

from dataclasses import dataclass

from ..models.flops import Sizes, train_flops
from ..models.sizes import MAE_CONFIGS

MODELS = {
    "ViT-B/16": Sizes.of_config(MAE_CONFIGS["mae_vit_base_patch16_dec512d8b"]),
    "ViT-L/16": Sizes.of_config(MAE_CONFIGS["mae_vit_large_patch16_dec512d8b"]),
    "ViT-H/14": Sizes.of_config(MAE_CONFIGS["mae_vit_huge_patch14_dec512d8b"]),
}


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
    "ViT-B/16": Counted((248, 32.51e9), (40, 7.70e9), (226, 33.45e9), (6, 4.24e9)),
    "ViT-L/16": Counted((392, 53.16e9), (64, 12.07e9), (346, 52.99e9), (6, 12.51e9)),
    "ViT-H/14": Counted((488, 97.17e9), (80, 23.23e9), (426, 94.61e9), (6, 24.95e9)),
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
