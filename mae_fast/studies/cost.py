"""The cost of pre-training steps: FLOPs by ``models.flops``; time and memory measured side by side.

A measured step is the forward and backward pass of ``model.loss`` on random images in memory, in the dtype that
training uses. It excludes the optimizer, whose cost does not depend on the batch, which is small here.
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
    """What determines the cost of a step: a model, by its factory and JSON arguments, a mask and a predict ratio."""

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
        """FLOPs of one image's training step, as published, without those of a target such as a tokenizer's."""
        return train_flops(Sizes.of(self.build("meta")), self.mask_ratio, predict_ratio=self.predict_ratio).total


@dataclass(frozen=True)
class Measured:
    """The median time of a step in ms and its ratio to the baseline's; bytes at the peak of a step, and those above
    weights and gradients: of the process, or on a GPU of its memory."""

    ms: float
    ratio: float
    peak: int
    above: int


@dataclass(frozen=True)
class MeasureOptions:
    """Images in a step, rounds, and the device and dtype as flags of training."""

    batch_size: int = 8
    rounds: int = 5
    device: str = "auto"
    dtype: str = "auto"


def measure(variants: dict[str, Variant], baseline: str, options: MeasureOptions) -> dict[str, Measured | str]:
    """The cost of each variant, in turns with the baseline; or the reason in one line why there is none.

    Two worker processes live at a time, so that two models must fit into memory.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # the workers need what training in this process has cached
    base = variants[baseline]
    with closing(Worker("base", VariantStep, base, options)) as worker:
        try:
            found: dict[Variant, Measured | str] = {base: timed(worker, None, options)}
        except Unavailable as error:
            return dict.fromkeys(variants, f"the default's step cannot be measured: {error}; lower --batch-size")
        for variant in variants.values():
            if variant not in found:
                with closing(Worker("variant", VariantStep, variant, options)) as other:
                    try:
                        found[variant] = timed(other, worker, options)
                    except Unavailable as error:
                        found[variant] = str(error)
    return {name: found[variant] for name, variant in variants.items()}


def timed(worker: Worker, base: Worker | None, options: MeasureOptions) -> Measured:
    """The cost of a worker's steps, in turns with those of ``base``.

    Raises:
        Unavailable: if either fails.
    """

    def fail(name: str, error: Unavailable) -> None:
        raise error

    memory = worker.ask("prepare")
    workers = {"base": base, "variant": worker} if base else {"variant": worker}
    times = take_turns(workers, options.rounds, math.inf, fail)
    longer = ratio(times, "variant", "base") if base else 1.0
    return Measured(statistics.median(times["variant"]) * 1e3, longer, **memory)


@dataclass
class VariantStep(StepTimer):
    """The step of a variant, in a worker process. Before it is timed, its loss must agree with the reference's."""

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
                model.zero_grad()  # a waiting contender holds no gradients

        check(float(loss().detach()), model, images, noise, variant, bf16)
        self.step = step
        return model


@torch.no_grad()
def check(
    loss: float, model: MaskedAutoencoderViT, images: Tensor, noise: Tensor, variant: Variant, bf16: bool
) -> None:
    """Compare ``loss`` with the eager reference's. It may differ by rounding and twice the error of eager autocast.

    Args:
        images: uint8 [N, H, W, C].
        noise: [N, L].

    Raises:
        Unavailable: if it differs by more.
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
        raise Unavailable(f"the first loss is {loss:.6g}, the reference's {exact:.6g}: nothing is timed")


def speed(presets: list[str], output: Path, options: MeasureOptions) -> list[dict[str, Any]]:
    """Table 2 of the paper on this machine: the encoder with mask tokens against the encoder without, the latter also
    with a decoder of one block. Logs the table, and writes it to ``output``'s speed.md and speed.json.

    Returns:
        The rows; a figure that could not be measured is None, and ``failed`` is the reason.
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
    """The rows of one model: with mask tokens, without, and without them and with one decoder block."""
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
        "GFLOPs per image": ("flops", 1e9, ".4g"), "FLOPs, times fewer": ("fewer_flops", 1, ".2f"),
        "paper": ("paper_fewer_flops", 1, ".2f"), "step, ms": ("ms", 1, ".0f"), "times faster": ("faster", 1, ".2f"),
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
        f"Forward and backward of {options.batch_size} images, without the optimizer, on {here['gpu'] or here['cpu']}, "
        f"{here['threads']} threads; median of {options.rounds} rounds, interleaved with the encoder that has mask "
        "tokens. Paper: Tables 1c and 2, whole training on 128 TPU-v3 cores.\n"
    )
