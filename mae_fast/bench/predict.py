"""The time of a GPU's training step, predicted from counted work and data sheets. Nothing here is a measurement.

Each part of the step takes the longest of three times: the bytes that it moves over the bandwidth of memory, its
instructions over the rate at which they are issued, and its products over the rate of the tensor cores.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log2

from ..models.flops import Sizes, train_flops
from ..models.sizes import MAE_CONFIGS

MODELS = {
    "ViT-B/16": "mae_vit_base_patch16_dec512d8b",
    "ViT-L/16": "mae_vit_large_patch16_dec512d8b",
    "ViT-H/14": "mae_vit_huge_patch14_dec512d8b",
}


@dataclass(frozen=True)
class Gpu:
    """A data sheet; ``name`` as the driver gives it.

    Attributes:
        peak: dense bf16 FLOP/s of the tensor cores.
        bandwidth: bytes/s of memory.
        clock: boost clock in Hz.
    """

    name: str
    peak: float
    bandwidth: float
    multiprocessors: int
    clock: float

    @property
    def issue(self) -> float:
        """Instructions of single threads per second: each multiprocessor issues those of four warps in a clock."""
        return 128 * self.multiprocessors * self.clock


GPUS = {
    "A100 40GB": Gpu("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12, 108, 1.41e9),
    "A100 80GB": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12, 108, 1.41e9),
    "H100 SXM": Gpu("NVIDIA H100 80GB HBM3", 989.4e12, 3.35e12, 132, 1.83e9),
    "H200": Gpu("NVIDIA H200", 989.4e12, 4.8e12, 132, 1.83e9),
}

Counts = dict[str, tuple[int, float]]  # launches and bytes of each part of a step

BATCH = 256
# A step of BATCH images, as ``python -m gpu_proof.step`` (in tests/) counts and prints it. Images and weights are in
# fp32, autocast in bf16, and each tensor of a launch is read or written once.
STEPS: dict[str, Counts] = {
    "ViT-B/16": {
        "products": (248, 32.04e9),
        "attention": (40, 7.67e9),
        "GELU": (40, 12.76e9),
        "layer norm": (84, 18.62e9),
        "other": (16, 0.91e9),
        "AdamW": (4, 3.80e9),
    },
    "ViT-L/16": {
        "products": (392, 52.68e9),
        "attention": (64, 12.09e9),
        "GELU": (64, 20.65e9),
        "layer norm": (132, 29.89e9),
        "other": (16, 0.96e9),
        "AdamW": (4, 11.19e9),
    },
    "ViT-H/14": {
        "products": (488, 96.56e9),
        "attention": (80, 23.28e9),
        "GELU": (80, 37.79e9),
        "layer norm": (164, 54.35e9),
        "other": (16, 1.15e9),
        "AdamW": (4, 22.33e9),
    },
}
# Instructions of single threads in the machine code for sm_90, forward and backward. ``python -m
# gpu_proof.instructions`` prints them.
PER_VALUE = {"GELU": 52, "layer norm": 40}
PER_SCORE = {32: 46, 64: 76, 80: 168}  # of attention, by head size; scores of padding included
BYTES_PER_VALUE = {"GELU": 10, "layer norm": 28}  # that the same kernels move


@dataclass(frozen=True)
class Reached:
    """Shares of the data sheet's rates that kernels reach, and seconds lost by each launch."""

    products: float
    attention: float
    memory: float
    issue: float
    launch: float


# On an H100, a product of 8192 x 8192 matrices reached 0.81 of the peak, and a copy 0.85 of the bandwidth. Triton's
# kernels for attention use instructions that reach about 0.6 of the peak. The other two are assumed.
BEST = Reached(products=0.81, attention=0.6, memory=0.85, issue=0.8, launch=1e-6)
# One step has been measured on an H100: 57.4 ms of the eager reference under torch.compile (torch 2.11). The same model
# predicts 46.6 ms at BEST for what torch.compile plans. A step of ours may fall short of BEST as much.
SHORTFALL = 57.4 / 46.6


@dataclass(frozen=True)
class Attention:
    """One attention layer: ``layers`` times, on ``tokens`` of ``heads`` of ``size`` values."""

    layers: int
    tokens: int
    heads: int
    size: int

    @property
    def moved(self) -> int:
        """Proportional to the bytes that it moves."""
        return self.layers * self.tokens * self.heads * self.size

    def scores(self, rows: int, cols: int) -> int:
        """Scores of ``BATCH`` images in tiles of ``rows`` x ``cols``, with those of padding."""
        padded = ceil(self.tokens / rows) * rows * ceil(self.tokens / cols) * cols
        return BATCH * self.layers * self.heads * padded

    def products(self, library: bool) -> tuple[int, int]:
        """Scores, and FLOPs on the tensor cores: two products forward, five backward, or seven with several tiles."""
        tile = (128, 128) if library else (64, 32) if self.size <= 64 else (32, 32)
        scores = self.scores(*tile)
        number = 2 + (5 if library or self.tokens <= tile[0] else 7)
        return scores, 2 * scores * number * 2 ** ceil(log2(self.size))


def attentions(model: str) -> list[Attention]:
    """The encoder's and the decoder's."""
    config, sizes = MAE_CONFIGS[MODELS[model]], Sizes.of_config(MAE_CONFIGS[MODELS[model]])
    encoder, decoder = config["num_heads"], config["decoder_num_heads"]
    return [
        Attention(sizes.depth, 1 + sizes.patches // 4, encoder, sizes.width // encoder),
        Attention(sizes.decoder_depth, 1 + sizes.patches, decoder, sizes.decoder_width // decoder),
    ]


def linear_layers(sizes: Sizes) -> Iterator[tuple[int, int, int, int]]:
    """(number, rows, inputs, outputs) of the blocks' linear layers, which are nearly all."""
    encoder = BATCH * (1 + sizes.patches // 4), sizes.width, sizes.depth
    decoder = BATCH * (1 + sizes.patches), sizes.decoder_width, sizes.decoder_depth
    for rows, width, depth in (encoder, decoder):
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            yield depth, rows, inputs * width, outputs * width


def idle(rows: int, cols: int, gpu: Gpu) -> float:
    """Times longer than without idle multiprocessors that a product of this shape takes, in tiles of 128 x 256.

    The last wave of tiles does not occupy all multiprocessors. With less than one wave, the sums are split.
    """
    tiles = ceil(rows / 128) * ceil(cols / 256)
    waves = tiles / gpu.multiprocessors
    return ceil(waves) / waves if waves > 1 else 1.0


def waves(sizes: Sizes, gpu: Gpu) -> float:
    """``idle`` of all products of a step, on average."""
    flops = wasted = 0.0
    for number, rows, inputs, outputs in linear_layers(sizes):
        for shape in ((rows, outputs), (rows, inputs), (outputs, inputs)):  # the output, the gradients of both operands
            flops += number * rows * inputs * outputs
            wasted += number * rows * inputs * outputs * idle(*shape, gpu)
    return wasted / flops


def predicted_seconds(
    model: str, gpu: Gpu, reached: Reached = BEST, counts: Counts | None = None, library: bool = False
) -> dict[str, float]:
    """Seconds of each part of a training step of ``BATCH`` images, launches included.

    Args:
        counts: of another implementation, which computes every product of the published model; None: ours.
        library: whether a library computes attention.
    """
    sizes = Sizes.of_config(MAE_CONFIGS[MODELS[model]])
    bandwidth, issue = reached.memory * gpu.bandwidth, reached.issue * gpu.issue
    flops = BATCH * train_flops(sizes, least=counts is None).gemm * waves(sizes, gpu)
    counts = counts or STEPS[model]
    least = {"products": flops / (reached.products * gpu.peak)}
    for part, instructions in PER_VALUE.items():
        values = counts[part][1] / BYTES_PER_VALUE[part] if part in counts else 0
        least[part] = values * instructions / issue
    seconds = {part: max(moved / bandwidth, least.get(part, 0.0)) for part, (_, moved) in counts.items()}
    layers = attentions(model)
    seconds["attention"] = 0.0
    for layer in layers:
        moved = counts["attention"][1] * layer.moved / sum(each.moved for each in layers)
        scores, flops = layer.products(library)
        issued = 0.0 if library else scores * PER_SCORE[layer.size] / issue
        seconds["attention"] += max(moved / bandwidth, flops / (reached.attention * gpu.peak), issued)
    return seconds | {"launches": sum(number for number, _ in counts.values()) * reached.launch}


def print_predictions() -> None:
    """Two tables of ``predicted_seconds``: the step and its parts, for every model and GPU. Both fit 80 columns."""
    from rich.console import Console
    from rich.table import Table

    parts = [*STEPS["ViT-B/16"], "launches"]
    steps = Table("model", "GPU", "step, ms", "images/s", "MFU", box=None, padding=(0, 1, 0, 0))
    steps.title = f"Predicted, not measured: {BATCH} images a step, mask ratio 0.75, bf16, with AdamW"
    steps.caption = (
        f"At best: memory at {BEST.memory:.0%} of the data sheet's rate, matrix products at {BEST.products:.0%} "
        f"(attention's at {BEST.attention:.0%}), instructions at {BEST.issue:.0%}, {BEST.launch * 1e6:g} us a launch. "
        f"The second number is {SHORTFALL:.2f} times the first: one compiled step measured on an H100 took that much "
        "longer. MFU: share of the peak of the tensor cores. Memory is not checked."
    )
    table = Table("model", "GPU", *parts, box=None, padding=(0, 1, 0, 0), title="Parts of the step at best, in ms")
    for model, name in MODELS.items():
        flops = BATCH * train_flops(Sizes.of_config(MAE_CONFIGS[name])).total
        for label, gpu in GPUS.items():
            found = predicted_seconds(model, gpu)
            best = sum(found.values())
            slow = best * SHORTFALL
            step = f"{best * 1e3:.0f} to {slow * 1e3:.0f}", f"{BATCH / slow:.0f} to {BATCH / best:.0f}"
            mfu = f"{flops / slow / gpu.peak:.0%} to {flops / best / gpu.peak:.0%}"
            steps.add_row(model, label, *step, mfu)
            table.add_row(model, label, *(f"{found[part] * 1e3:.1f}" for part in parts))
    Console().print(steps, "", table, sep="\n")
