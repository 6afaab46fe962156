"""Predicts the time of a training step on a GPU from counted work and data sheets. Nothing here is measured.

The time of each part of the step is the largest of three quotients: bytes moved / memory bandwidth, instructions /
issue rate, and FLOPs of matrix products / rate of the tensor cores.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from ..models.flops import Sizes, train_flops
from ..models.sizes import MAE_CONFIGS, num_predicted

MODELS = {
    "ViT-B/16": "mae_vit_base_patch16_dec512d8b",
    "ViT-L/16": "mae_vit_large_patch16_dec512d8b",
    "ViT-H/14": "mae_vit_huge_patch14_dec512d8b",
}


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    Attributes:
        name: as reported by the driver.
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
        """Thread instructions per second: each multiprocessor issues the instructions of four warps per clock cycle."""
        return 128 * self.multiprocessors * self.clock


GPUS = {
    "A100 40GB": Gpu("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12, 108, 1.41e9),
    "A100 80GB": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12, 108, 1.41e9),
    "H100 SXM": Gpu("NVIDIA H100 80GB HBM3", 989.4e12, 3.35e12, 132, 1.83e9),
    "H200": Gpu("NVIDIA H200", 989.4e12, 4.8e12, 132, 1.83e9),
}

Counts = dict[str, tuple[int, float]]  # launches and bytes of each part of a step

BATCH = 256
# A step of BATCH images, as counted and printed by ``python -m gpu_proof.step`` (in tests/). Images and weights are
# fp32, autocast is bf16, and each launch reads or writes each of its tensors once.
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
# Thread instructions in the machine code for sm_90, forward and backward, as printed by ``python -m
# gpu_proof.instructions``.
PER_VALUE = {"GELU": 52, "layer norm": 40}
PER_SCORE = {32: 46, 64: 76, 80: 168}  # attention, by head size; scores of padding count
BYTES_PER_VALUE = {"GELU": 10, "layer norm": 28}  # bytes that these kernels move


@dataclass(frozen=True)
class Reached:
    """The shares of the data sheet's rates that kernels reach, and the overhead of a launch in seconds."""

    products: float
    attention: float
    memory: float
    issue: float
    launch: float


# On an H100, a product of 8192 x 8192 matrices reached 0.81 of the peak, and a copy 0.85 of the bandwidth. Triton's
# attention kernels use instructions that reach about 0.6 of the peak. The other two values are assumptions.
BEST = Reached(products=0.81, attention=0.6, memory=0.85, issue=0.8, launch=1e-6)
# One step was measured on an H100: the eager reference under torch.compile took 57.4 ms (torch 2.11). For the plan of
# torch.compile, this prediction with BEST is 46.6 ms. We assume that our step can miss its prediction by as much.
SHORTFALL = 57.4 / 46.6


@dataclass(frozen=True)
class Setting:
    """The images of a step, at mask ratio 0.75. An ``image_size`` of None is the default of the model."""

    images: int = BATCH
    image_size: int | None = None
    predict_ratio: float = 1.0

    def sizes(self, model: str) -> Sizes:
        """The sizes of ``model`` for images of this size."""
        return Sizes.of_config(MAE_CONFIGS[MODELS[model]], self.image_size)

    def tokens(self, sizes: Sizes) -> tuple[int, int, int]:
        """The tokens per image in the encoder, in the decoder, and in the loss."""
        kept = sizes.patches // 4
        predicted = num_predicted(sizes.patches - kept, self.predict_ratio)
        return 1 + kept, 1 + kept + predicted, predicted

    def counts(self, model: str) -> Counts:
        """``STEPS`` scaled to this setting: all bytes except AdamW's are proportional to the size of all tokens."""

        def values(setting: Setting) -> int:
            sizes = setting.sizes(model)
            encoder, decoder, predicted = setting.tokens(sizes)
            in_decoder = (sizes.decoder_depth - 1) * decoder + predicted  # the last block computes no others
            return setting.images * (sizes.depth * encoder * sizes.width + in_decoder * sizes.decoder_width)

        scale = values(self) / values(Setting())
        return {part: (n, moved * (1 if part == "AdamW" else scale)) for part, (n, moved) in STEPS[model].items()}


@dataclass(frozen=True)
class Attention:
    """``layers`` equal attention layers, each on ``tokens`` tokens with ``heads`` heads of ``size`` values."""

    layers: int
    tokens: int
    heads: int
    size: int
    images: int = BATCH

    @property
    def moved(self) -> int:
        """A number proportional to the bytes that the layers move."""
        return self.layers * self.tokens * self.heads * self.size

    def scores(self, rows: int, cols: int) -> int:
        """The number of attention scores in tiles of ``rows`` x ``cols``, including padding."""
        padded = ceil(self.tokens / rows) * rows * ceil(self.tokens / cols) * cols
        return self.images * self.layers * self.heads * padded

    def products(self, library: bool) -> tuple[int, int]:
        """The scores, and the FLOPs on the tensor cores: two products forward, five backward, or seven with several
        tiles."""
        tile = (128, 128) if library else (64, 32) if self.size <= 64 else (32, 32)
        scores = self.scores(*tile)
        number = 2 + (5 if library or self.tokens <= tile[0] else 7)
        return scores, 2 * scores * number * 2 ** ceil(log2(self.size))


def attentions(model: str, setting: Setting = Setting()) -> list[Attention]:
    """The attention layers of the encoder and of the decoder."""
    config, sizes = MAE_CONFIGS[MODELS[model]], setting.sizes(model)
    encoder, decoder = config["num_heads"], config["decoder_num_heads"]
    seen, decoded, _ = setting.tokens(sizes)
    return [
        Attention(sizes.depth, seen, encoder, sizes.width // encoder, setting.images),
        Attention(sizes.decoder_depth, decoded, decoder, sizes.decoder_width // decoder, setting.images),
    ]


def linear_layers(sizes: Sizes, setting: Setting) -> Iterator[tuple[int, int, int, int]]:
    """(number, rows, inputs, outputs) of the linear layers in the blocks, which are nearly all linear layers."""
    seen, decoded, _ = setting.tokens(sizes)
    encoder = setting.images * seen, sizes.width, sizes.depth
    decoder = setting.images * decoded, sizes.decoder_width, sizes.decoder_depth
    for rows, width, depth in (encoder, decoder):
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            yield depth, rows, inputs * width, outputs * width


def idle(rows: int, cols: int, gpu: Gpu) -> float:
    """The slowdown of a product of this shape by idle multiprocessors, in tiles of 128 x 256.

    The last wave of tiles does not occupy all multiprocessors. A product with less than one wave splits its sums.
    """
    tiles = ceil(rows / 128) * ceil(cols / 256)
    waves = tiles / gpu.multiprocessors
    return ceil(waves) / waves if waves > 1 else 1.0


def waves(sizes: Sizes, gpu: Gpu, setting: Setting = Setting()) -> float:
    """The mean of ``idle`` over all products of a step, weighted by FLOPs."""
    flops = wasted = 0.0
    for number, rows, inputs, outputs in linear_layers(sizes, setting):
        for shape in ((rows, outputs), (rows, inputs), (outputs, inputs)):  # output, gradients of input and weight
            flops += number * rows * inputs * outputs
            wasted += number * rows * inputs * outputs * idle(*shape, gpu)
    return wasted / flops


def predicted_seconds(
    model: str,
    gpu: Gpu,
    reached: Reached = BEST,
    counts: Counts | None = None,
    library: bool = False,
    setting: Setting = Setting(),
) -> dict[str, float]:
    """The predicted seconds of each part of a training step, including launches.

    Args:
        counts: counts of another implementation, which computes all products of the published model; None: ours.
        library: whether a library computes attention.
    """
    sizes = setting.sizes(model)
    bandwidth, issue = reached.memory * gpu.bandwidth, reached.issue * gpu.issue
    per_image = train_flops(sizes, predict_ratio=setting.predict_ratio, least=counts is None).gemm
    flops = setting.images * per_image * waves(sizes, gpu, setting)
    counts = counts or setting.counts(model)
    least = {"products": flops / (reached.products * gpu.peak)}
    for part, instructions in PER_VALUE.items():
        values = counts[part][1] / BYTES_PER_VALUE[part] if part in counts else 0
        least[part] = values * instructions / issue
    seconds = {part: max(moved / bandwidth, least.get(part, 0.0)) for part, (_, moved) in counts.items()}
    layers = attentions(model, setting)
    seconds["attention"] = 0.0
    for layer in layers:
        moved = counts["attention"][1] * layer.moved / sum(each.moved for each in layers)
        scores, flops = layer.products(library)
        issued = 0.0 if library else scores * PER_SCORE[layer.size] / issue
        seconds["attention"] += max(moved / bandwidth, flops / (reached.attention * gpu.peak), issued)
    return seconds | {"launches": sum(number for number, _ in counts.values()) * reached.launch}


# The stages of a training run: shares of the epochs and settings. Smaller images have larger batches, so that all steps
# take about the same time.
Training = tuple[tuple[float, Setting], ...]
TRAININGS: dict[str, Training] = {
    "plain": ((1.0, Setting()),),
    "--predict-ratio 0.5": ((1.0, Setting(predict_ratio=0.5)),),
    "--predict-ratio 0.25": ((1.0, Setting(predict_ratio=0.25)),),
    "112:0.4,160:0.3,224:0.3": ((0.4, Setting(1024, 112)), (0.3, Setting(512, 160)), (0.3, Setting())),
    "schedule, predict ratio 0.5": (
        (0.4, Setting(1024, 112, 0.5)), (0.3, Setting(512, 160, 0.5)), (0.3, Setting(predict_ratio=0.5)),
    ),
}  # fmt: skip
IMAGENET, EPOCHS = 1_281_167, 800


def predicted_hours(model: str, gpu: Gpu, training: Training, gpus: int = 8) -> float:
    """Predicted hours of ``EPOCHS`` epochs of ImageNet, without delays by the loader or by communication."""
    per_image = 0.0
    for share, setting in training:
        per_image += share * sum(predicted_seconds(model, gpu, setting=setting).values()) / setting.images
    return per_image * IMAGENET * EPOCHS / gpus / 3600


def _hours() -> Any:
    """The table of ``predicted_hours`` for ViT-B/16."""
    from rich.table import Table

    gpus = ("A100 40GB", "A100 80GB", "H100 SXM")
    table = Table("training", *(f"8 x {gpu}" for gpu in gpus), box=None, padding=(0, 1, 0, 0))
    table.title = f"Predicted hours, not measured: ViT-B/16, {EPOCHS} epochs of ImageNet ({IMAGENET:,} images)"
    table.caption = (
        "112:0.4,160:0.3,224:0.3 is a resolution schedule: image sizes and shares of the epochs, with 1024, 512 and "
        f"{BATCH} images per GPU and step. Data loading and communication between GPUs are not included."
    )
    for name, training in TRAININGS.items():
        best = [predicted_hours("ViT-B/16", GPUS[gpu], training) for gpu in gpus]
        table.add_row(name, *(f"{hours:.1f} to {hours * SHORTFALL:.1f}" for hours in best))
    return table


def print_predictions() -> None:
    """Print tables of predicted steps, their parts, and hours of training, in at most 80 columns."""
    from rich.console import Console
    from rich.table import Table

    parts = [*STEPS["ViT-B/16"], "launches"]
    steps = Table("model", "GPU", "step, ms", "images/s", "MFU", box=None, padding=(0, 1, 0, 0))
    steps.title = f"Predicted, not measured: {BATCH} images per step, mask ratio 0.75, bf16, with AdamW"
    steps.caption = (
        f"The first number assumes that memory reaches {BEST.memory:.0%} of the data sheet's rate, matrix products "
        f"reach {BEST.products:.0%} (in attention {BEST.attention:.0%}), instructions reach {BEST.issue:.0%}, and "
        f"that a launch costs {BEST.launch * 1e6:g} us. The second number is {SHORTFALL:.2f} times the first, because "
        "a compiled step on an H100 took that much longer than predicted. MFU: share of the peak of the tensor cores. "
        "Whether the step fits into the memory of the GPU is not checked."
    )
    table = Table("model", "GPU", *parts, box=None, padding=(0, 1, 0, 0), title="Parts of the step (first number), ms")
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
    Console().print(steps, "", table, "", _hours(), sep="\n")
