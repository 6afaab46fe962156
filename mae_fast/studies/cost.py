"""The cost of pre-training steps: FLOPs from ``models.flops``, and measured time and memory.

A measured step is the forward and backward pass of ``model.loss`` on random images in memory, in the dtype of training.
It excludes the optimizer: its cost does not depend on the batch size, and would weigh too much in small batches.
"""

import json
import logging
import math
import statistics
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench.formats import cell, markdown_table
from ..bench.timing import machine, peak_memory, ratio
from ..bench.worker import StepTimer, Unavailable, Worker, take_turns
from ..memory import disable_malloc_trim
from ..models.flops import Sizes, train_flops
from ..models.mae import MaskedAutoencoderViT, build
from ..models.reference import ReferenceMAE
from ..training.config import PretrainConfig
from ..training.presets import PRESETS
from ..training.task import use_bf16
from ..training.tasks.pretrain import model_options
from .paper import MASK_TOKEN_FLOPS, SPEEDUP

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """The settings that determine the cost of a step.

    Attributes:
        model: name of the model factory.
        options: arguments of the factory, as JSON.
    """

    model: str
    options: str
    mask_ratio: float = 0.75
    predict_ratio: float = 1.0

    @classmethod
    def of(cls, config: PretrainConfig) -> "Variant":
        """The variant that ``config`` trains."""
        options = json.dumps(model_options(config), sort_keys=True)
        return cls(config.model, options, config.mask_ratio, config.predict_ratio)

    def build(self, device: str = "cpu") -> MaskedAutoencoderViT:
        """The model, with random weights."""
        with torch.device(device):
            return build(self.model, **json.loads(self.options))

    def flops(self) -> float:
        """FLOPs of a training step per image, for the published model, without those of a tokenizer."""
        return train_flops(Sizes.of(self.build("meta")), self.mask_ratio, predict_ratio=self.predict_ratio).total


@dataclass(frozen=True)
class Measured:
    """The measured cost of a step.

    Attributes:
        ms: median time.
        ratio: time divided by that of the baseline.
        peak: peak memory of the process, or of the GPU, in bytes.
        above: the part of the peak above weights and gradients.
    """

    ms: float
    ratio: float
    peak: int
    above: int


@dataclass(frozen=True)
class MeasureOptions:
    """Images per step, number of rounds, and the device and dtype, as in the flags of training."""

    batch_size: int = 8
    rounds: int = 5
    device: str = "auto"
    dtype: str = "auto"


def measure(variants: dict[str, Variant], baseline: str, options: MeasureOptions) -> dict[str, Measured | str]:
    """The cost of each variant, timed in turns with the baseline; or a line that says why it could not be measured.

    Two worker processes run at a time, so two models must fit into memory.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # leave the memory to the workers
    base = variants[baseline]
    with closing(Worker("base", VariantStep, base, options)) as worker:
        try:
            found: dict[Variant, Measured | str] = {base: timed(worker, None, options)}
        except Unavailable as error:
            return dict.fromkeys(variants, f"the step of the default row failed: {error}; lower --batch-size")
        for variant in variants.values():
            if variant not in found:
                with closing(Worker("variant", VariantStep, variant, options)) as other:
                    try:
                        found[variant] = timed(other, worker, options)
                    except Unavailable as error:
                        found[variant] = str(error)
    return {name: found[variant] for name, variant in variants.items()}


def timed(worker: Worker, base: Worker | None, options: MeasureOptions) -> Measured:
    """The cost of a worker's steps, timed in turns with those of ``base``.

    Raises:
        Unavailable: if one of the two fails.
    """

    def fail(name: str, error: Unavailable) -> None:
        raise error

    memory = worker.ask("prepare")
    workers = {"base": base, "variant": worker} if base else {"variant": worker}
    times = take_turns(workers, options.rounds, math.inf, fail)
    to_base = ratio(times, "variant", "base") if base else 1.0
    return Measured(statistics.median(times["variant"]) * 1e3, to_base, **memory)


@dataclass
class VariantStep(StepTimer):
    """The step of a variant, in a worker process. It is timed only if its loss agrees with that of the reference."""

    variant: Variant
    options: MeasureOptions

    def prepare(self) -> dict[str, int]:
        """Build the step, check its loss, and measure its memory."""
        self.build()
        memory = peak_memory(self.step, lambda: self.step(keep_gradients=True))
        self.fill_turn()
        return memory

    def build(self) -> MaskedAutoencoderViT:
        """Build the model and its step; ``keep_gradients`` is as in ``bench.contenders.Step``."""
        options, variant = self.options, self.variant
        self.device = options.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(self.device)
        bf16 = use_bf16(options.dtype, device)
        disable_malloc_trim()
        torch.manual_seed(0)
        model = self.variant.build().to(device)
        drawing = torch.Generator().manual_seed(0)
        size = (options.batch_size, *model.patch_embed.img_size, model.in_chans)
        images = torch.randint(256, size, generator=drawing, dtype=torch.uint8).to(device)
        noise = torch.rand(options.batch_size, model.patch_embed.num_patches, generator=drawing).to(device)

        def loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return model.loss(images, variant.mask_ratio, noise, predict_ratio=variant.predict_ratio)

        def step(keep_gradients: bool = False) -> None:
            model.zero_grad(set_to_none=not keep_gradients)
            loss().backward()  # type: ignore[no-untyped-call]
            if not keep_gradients:
                model.zero_grad()  # free the memory while other contenders run

        check(float(loss().detach()), model, images, noise, variant, bf16)
        self.step = step
        return model


@torch.no_grad()
def check(
    loss: float, model: MaskedAutoencoderViT, images: Tensor, noise: Tensor, variant: Variant, bf16: bool
) -> None:
    """Compare ``loss`` with that of the eager reference. It may differ by rounding and twice the error of autocast.

    Args:
        images: uint8 [N, H, W, C].
        noise: [N, L].

    Raises:
        Unavailable: if the difference is larger.
    """
    mean, std = (x[:, None, None] for x in (model.pixel_mean, model.pixel_std))
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    reference = ReferenceMAE.of(model)

    def eager_loss() -> float:
        if variant.predict_ratio < 1:
            return float(reference.predict_ratio_loss(pixels, variant.mask_ratio, noise, variant.predict_ratio))
        return float(reference(pixels, variant.mask_ratio, noise)[0])

    exact = eager_loss()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        eager = eager_loss()
    allowed = 2 * abs(eager - exact) + (2e-3 if bf16 else 1e-5) * abs(exact)
    if not abs(loss - exact) <= allowed:  # also if it is NaN
        raise Unavailable(f"wrong loss: {loss:.6g}, but the reference has {exact:.6g}; the step is not timed")


def speed(presets: list[str], output: Path, options: MeasureOptions) -> list[dict[str, Any]]:
    """Measure Table 2 of the paper on this machine: training with and without mask tokens in the encoder.

    Without mask tokens, a decoder of one block is measured, too. The table is logged, and written to speed.md and
    speed.json in ``output``.

    Returns:
        The rows. If a row could not be measured, its figures are None, and ``failed`` is the reason.
    """
    rows = [row for preset in presets for row in speed_rows(preset, options)]
    here = machine()
    text = speed_table(rows, options, here)
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.md").write_text(text)
    (output / "speed.json").write_text(json.dumps({"machine": here, **asdict(options), "rows": rows}, indent=1) + "\n")
    logger.info("%swrote %s and %s", text, output / "speed.md", output / "speed.json")
    return rows


def speed_rows(preset: str, options: MeasureOptions) -> list[dict[str, Any]]:
    """The rows of one model: with mask tokens, without, and without mask tokens but with one decoder block."""
    named = {name: PRESETS[preset][name] for name in ("model", "input_size") if name in PRESETS[preset]}
    config = PretrainConfig(data_path=Path(), output_dir=Path(), **named)
    depth = Sizes.of(Variant.of(config).build("meta")).decoder_depth
    kinds = ((True, depth), (False, depth), (False, 1))
    variants = {
        str(kind): Variant.of(config.model_copy(update={"encoder_mask_token": kind[0], "decoder_depth": kind[1]}))
        for kind in kinds
    }
    baseline = str(kinds[0])
    measured = measure(variants, baseline, options)
    rows = []
    for (mask_tokens, blocks), (name, variant) in zip(kinds, variants.items(), strict=True):
        one, flops = measured[name], variant.flops()
        in_paper = (preset, mask_tokens, blocks) == ("large", False, 8)
        rows.append(
            {
                "preset": preset,
                "encoder_mask_token": mask_tokens,
                "decoder_depth": blocks,
                "flops": flops,
                "fewer_flops": variants[baseline].flops() / flops,
                "faster": None if isinstance(one, str) else 1 / one.ratio,
                "paper_faster": None if mask_tokens else SPEEDUP.get((preset, blocks)),
                "paper_fewer_flops": MASK_TOKEN_FLOPS if in_paper else None,
                **({"failed": one} if isinstance(one, str) else asdict(one)),
            }
        )
    return rows


def speed_table(rows: list[dict[str, Any]], options: MeasureOptions, here: dict[str, Any]) -> str:
    """The rows of ``speed`` as Markdown."""
    figures = {
        "GFLOPs per image": ("flops", 1e9, ".4g"), "FLOPs reduction": ("fewer_flops", 1, ".2f"),
        "paper": ("paper_fewer_flops", 1, ".2f"), "step, ms": ("ms", 1, ".0f"), "speedup": ("faster", 1, ".2f"),
        "paper ": ("paper_faster", 1, ".2f"), "memory above weights and gradients, MiB": ("above", 2**20, ".0f"),
    }  # fmt: skip
    cells = []
    for row in rows:
        label = f"{row['preset']}, {'with' if row['encoder_mask_token'] else 'without'} mask tokens"
        cells.append([label, str(row["decoder_depth"]), *(cell(row, *figure) for figure in figures.values())])
    text = markdown_table(["encoder", "decoder blocks", *map(str.strip, figures)], cells) + "\n\n"
    for row in rows:
        if "failed" in row:
            text += f"{row['preset']}, {row['decoder_depth']} blocks: not measured: {row['failed']}\n\n"
    return text + (
        f"Step: forward and backward pass of {options.batch_size} images, without the optimizer, on "
        f"{here['gpu'] or here['cpu']}, {here['threads']} threads; median of {options.rounds} rounds, interleaved with "
        "the encoder with mask tokens. Paper: Tables 1c and 2, complete training on 128 TPU-v3 cores.\n"
    )
