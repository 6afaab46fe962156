"""The time of a GPU's training step, predicted from counted work and data sheets. Nothing here is a measurement.

Each part of the step takes the longest of three times: the bytes that it moves over the bandwidth of memory, its
instructions over the rate at which they are issued, and its products over the rate of the tensor cores.
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
class Setting:
    """What a step trains on, at mask ratio 0.75: ``images`` of ``image_size`` pixels (None: the model's own)."""

    images: int = BATCH
    image_size: int | None = None
    predict_ratio: float = 1.0

    def sizes(self, model: str) -> Sizes:
        """Those of ``model`` for images of this size."""
        return Sizes.of_config(MAE_CONFIGS[MODELS[model]], self.image_size)

    def tokens(self, sizes: Sizes) -> tuple[int, int, int]:
        """Tokens of an image in the encoder, in the decoder, and predicted ones."""
        kept = sizes.patches // 4
        predicted = num_predicted(sizes.patches - kept, self.predict_ratio)
        return 1 + kept, 1 + kept + predicted, predicted

    def counts(self, model: str) -> Counts:
        """``STEPS`` for this setting: all bytes but AdamW's grow as the values of the tokens in all blocks."""

        def values(setting: Setting) -> int:
            sizes = setting.sizes(model)
            encoder, decoder, predicted = setting.tokens(sizes)
            in_decoder = (sizes.decoder_depth - 1) * decoder + predicted  # the last block computes predicted tokens
            return setting.images * (sizes.depth * encoder * sizes.width + in_decoder * sizes.decoder_width)

        larger = values(self) / values(Setting())
        return {part: (n, moved * (1 if part == "AdamW" else larger)) for part, (n, moved) in STEPS[model].items()}


@dataclass(frozen=True)
class Attention:
    """One attention layer: ``layers`` times, on ``tokens`` of ``heads`` of ``size`` values, for each of ``images``."""

    layers: int
    tokens: int
    heads: int
    size: int
    images: int = BATCH

    @property
    def moved(self) -> int:
        """Proportional to the bytes that it moves."""
        return self.layers * self.tokens * self.heads * self.size

    def scores(self, rows: int, cols: int) -> int:
        """Scores of ``images`` in tiles of ``rows`` x ``cols``, with those of padding."""
        padded = ceil(self.tokens / rows) * rows * ceil(self.tokens / cols) * cols
        return self.images * self.layers * self.heads * padded

    def products(self, library: bool) -> tuple[int, int]:
        """Scores, and FLOPs on the tensor cores: two products forward, five backward, or seven with several tiles."""
        tile = (128, 128) if library else (64, 32) if self.size <= 64 else (32, 32)
        scores = self.scores(*tile)
        number = 2 + (5 if library or self.tokens <= tile[0] else 7)
        return scores, 2 * scores * number * 2 ** ceil(log2(self.size))


def attentions(model: str, setting: Setting = Setting()) -> list[Attention]:
    """The encoder's and the decoder's."""
    config, sizes = MAE_CONFIGS[MODELS[model]], setting.sizes(model)
    encoder, decoder = config["num_heads"], config["decoder_num_heads"]
    seen, decoded, _ = setting.tokens(sizes)
    return [
        Attention(sizes.depth, seen, encoder, sizes.width // encoder, setting.images),
        Attention(sizes.decoder_depth, decoded, decoder, sizes.decoder_width // decoder, setting.images),
    ]


def linear_layers(sizes: Sizes, setting: Setting) -> Iterator[tuple[int, int, int, int]]:
    """(number, rows, inputs, outputs) of the blocks' linear layers, which are nearly all."""
    seen, decoded, _ = setting.tokens(sizes)
    encoder = setting.images * seen, sizes.width, sizes.depth
    decoder = setting.images * decoded, sizes.decoder_width, sizes.decoder_depth
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


def waves(sizes: Sizes, gpu: Gpu, setting: Setting = Setting()) -> float:
    """``idle`` of all products of a step, on average."""
    flops = wasted = 0.0
    for number, rows, inputs, outputs in linear_layers(sizes, setting):
        for shape in ((rows, outputs), (rows, inputs), (outputs, inputs)):  # the output, the gradients of both operands
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
    """Seconds of each part of a training step, launches included.

    Args:
        counts: of another implementation, which computes every product of the published model; None: ours.
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


# Parts of a training by their share of the epochs. Smaller images come in larger batches, so that steps take as long.
Training = tuple[tuple[float, Setting], ...]
TRAININGS: dict[str, Training] = {
    "plain": ((1.0, Setting()),),
    "--predict-ratio 0.5": ((1.0, Setting(predict_ratio=0.5)),),
    "--predict-ratio 0.25": ((1.0, Setting(predict_ratio=0.25)),),
    "112:0.4,160:0.3,224:0.3": ((0.4, Setting(1024, 112)), (0.3, Setting(512, 160)), (0.3, Setting())),
    "both, with 0.5": (
        (0.4, Setting(1024, 112, 0.5)), (0.3, Setting(512, 160, 0.5)), (0.3, Setting(predict_ratio=0.5)),
    ),
}  # fmt: skip
IMAGENET, EPOCHS = 1_281_167, 800


def predicted_hours(model: str, gpu: Gpu, training: Training, gpus: int = 8) -> float:
    """Hours of ``EPOCHS`` epochs of ImageNet at best, when neither the loader nor the network between GPUs slows it."""
    per_image = 0.0
    for share, setting in training:
        per_image += share * sum(predicted_seconds(model, gpu, setting=setting).values()) / setting.images
    return per_image * IMAGENET * EPOCHS / gpus / 3600


def _hours() -> Any:
    """A table of ``predicted_hours`` of ViT-B/16."""
    from rich.table import Table

    gpus = ("A100 40GB", "A100 80GB", "H100 SXM")
    table = Table("training", *(f"8 x {gpu}" for gpu in gpus), box=None, padding=(0, 1, 0, 0))
    table.title = f"Predicted hours, not measured: ViT-B/16, {EPOCHS} epochs of ImageNet ({IMAGENET:,} images)"
    table.caption = (
        "112:0.4,160:0.3,224:0.3 is a resolution schedule: image sizes and shares of the epochs, with 1024, 512 and "
        f"{BATCH} images per GPU and step. The loader and the exchange of gradients are not counted."
    )
    for name, training in TRAININGS.items():
        best = [predicted_hours("ViT-B/16", GPUS[gpu], training) for gpu in gpus]
        table.add_row(name, *(f"{hours:.1f} to {hours * SHORTFALL:.1f}" for hours in best))
    return table


def print_predictions() -> None:
    """Tables of ``predicted_seconds``, the step and its parts, for every model and GPU, and of ``predicted_hours``.

    All fit 80 columns.
    """
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
    Console().print(steps, "", table, "", _hours(), sep="\n")
