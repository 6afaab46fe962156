"""What pre-training steps cost: FLOPs by ``models.flops``; time and memory measured side by side.

A measured step is the forward and backward pass of ``model.loss`` on random images that are in memory, in the dtype
that training takes. The optimiser's part is left out: it does not depend on the batch, which is small here.
"""

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench.timing import interleave, machine, peak_memory, ratio
from ..errors import UserError
from ..memory import disable_malloc_trim
from ..models.flops import Sizes, train_flops
from ..models.mae import MaskedAutoencoderViT, build
from ..models.reference import ReferenceMAE
from ..training.config import PRESETS, PretrainConfig
from ..training.task import use_bf16
from ..training.tasks.pretrain import model_options
from .paper import MASK_TOKEN_FLOPS, SPEEDUP


@dataclass(frozen=True)
class Case:
    """What a step's cost depends on: a model, by factory and JSON arguments, and the mask ratio."""

    model: str
    options: str
    mask_ratio: float = 0.75

    @classmethod
    def of(cls, config: PretrainConfig) -> "Case":
        """What ``config`` trains."""
        return cls(config.model, json.dumps(model_options(config), sort_keys=True), config.mask_ratio)

    def build(self, device: str = "cpu") -> MaskedAutoencoderViT:
        """The model, with random weights."""
        with torch.device(device):
            return build(self.model, **json.loads(self.options))

    def flops(self) -> float:
        """Of one image's training step, as published; a target's own, a tokenizer's say, are left out."""
        return train_flops(Sizes.of(self.build("meta")), self.mask_ratio).total


@dataclass(frozen=True)
class Measured:
    """Median time of a step in ms and over the baseline's; bytes of the process and those above weights and gradients.

    On a GPU, bytes of its memory.
    """

    ms: float
    ratio: float
    peak: int
    above: int


@dataclass(frozen=True)
class MeasureOptions:
    """Images of a step, rounds of steps, and the trainer's words for where and in which dtype."""

    batch_size: int = 8
    rounds: int = 5
    device: str = "auto"
    dtype: str = "auto"


def measure(cases: dict[str, Case], baseline: str, options: MeasureOptions) -> dict[str, Measured | str]:
    """Steps of each case, interleaved with the baseline's in a process each; or one line on why there are none.

    Two processes live at a time, so that two models have to fit into memory. Before a model is timed, its loss has to
    agree with the reference's.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # the children need what training in this process has kept
    found: dict[Case, Measured | str] = {}
    base = cases[baseline]
    try:
        with _child(base, options) as (step, memory):
            alone = interleave({"base": step}, options.rounds, warmup=1)["base"]
            found[base] = Measured(statistics.median(alone) * 1e3, 1.0, **memory)
            for case in cases.values():
                if case not in found:
                    found[case] = _beside(step, case, options)
    except UserError as error:
        return dict.fromkeys(cases, f"the default's step cannot be measured: {error}")
    return {name: found[case] for name, case in cases.items()}


def _beside(base: Any, case: Case, options: MeasureOptions) -> Measured | str:
    try:
        with _child(case, options) as (step, memory):
            times = interleave({"base": base, "case": step}, options.rounds, warmup=1)
    except UserError as error:
        return str(error)
    return Measured(statistics.median(times["case"]) * 1e3, ratio(times, "case", "base"), **memory)


@contextmanager
def _child(case: Case, options: MeasureOptions) -> Iterator[tuple[Any, dict[str, int]]]:
    """A function that takes one step in a process of its own, and ``peak_memory`` of that process.

    Raises:
        UserError: if its loss is wrong, or the process dies.
    """
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, case, options), daemon=True)
    process.start()
    theirs.close()  # so that a child that dies is an EOFError here

    def answer() -> Any:
        try:
            said = pipe.recv()
        except (EOFError, ConnectionError) as error:
            process.join()
            raise UserError(
                f"the process died (exit status {process.exitcode}), of lack of memory perhaps",
                "lower --batch-size",
            ) from error
        if isinstance(said, str):
            raise UserError(said)
        return said

    def step() -> None:
        pipe.send("step")
        answer()

    try:
        yield step, answer()
    finally:
        pipe.close()
        process.join()


def _serve(pipe: Connection, case: Case, options: MeasureOptions) -> None:
    """The child's side: the gate and the memory, then a step per message until the parent is gone."""
    try:
        step = _stepper(case, options)
        pipe.send(peak_memory(step, lambda: step(keep_gradients=True)))
        while True:
            pipe.recv()
            step()
            pipe.send(True)
    except EOFError:
        return
    except Exception as error:  # whatever it is, the parent tells of it
        pipe.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _stepper(case: Case, options: MeasureOptions) -> Any:
    """The step as a function; ``keep_gradients``: they stay allocated after it.

    Raises:
        UserError: if its loss is not the reference's.
    """
    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    bf16 = use_bf16(options.dtype, device)
    disable_malloc_trim()
    torch.manual_seed(0)
    model = case.build().to(device)
    drawing = torch.Generator().manual_seed(0)
    size = (options.batch_size, *model.patch_embed.img_size, model.in_chans)
    images = torch.randint(256, size, generator=drawing, dtype=torch.uint8).to(device)
    noise = torch.rand(options.batch_size, model.patch_embed.num_patches, generator=drawing).to(device)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model.loss(images, case.mask_ratio, noise)

    check(float(loss().detach()), model, images, noise, case.mask_ratio, bf16)

    def step(keep_gradients: bool = False) -> None:
        model.zero_grad(set_to_none=not keep_gradients)
        loss().backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not keep_gradients:
            model.zero_grad()  # who waits for its turn holds none

    return step


@torch.no_grad()
def check(
    loss: float, model: MaskedAutoencoderViT, images: Tensor, noise: Tensor, mask_ratio: float, bf16: bool
) -> None:
    """Raise ``UserError`` unless ``loss`` is the eager reference's: off by no more than twice what autocast does to
    the reference itself, and rounding.

    Args:
        images: uint8 [N, H, W, C].
        noise: [N, L].
    """
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - model.pixel_mean[:, None, None]) / model.pixel_std[
        :, None, None
    ]
    reference = ReferenceMAE.of(model)
    exact = float(reference(pixels, mask_ratio, noise)[0])
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        eager = float(reference(pixels, mask_ratio, noise)[0])
    allowed = 2 * abs(eager - exact) + (2e-3 if bf16 else 1e-5) * abs(exact)
    if not abs(loss - exact) <= allowed:  # NaN, too
        raise UserError(f"the first loss is {loss:.6g}, the reference's {exact:.6g}: nothing is timed")


def speed(presets: list[str], output: Path, options: MeasureOptions) -> list[dict[str, Any]]:
    """The paper's Table 2 on this machine: the encoder with mask tokens against without, the latter also with a decoder
    of one block. Prints it, and writes it to ``output``'s speed.md and speed.json.

    Returns:
        The rows; a figure that could not be measured is None, and ``failed`` says why.
    """
    rows: list[dict[str, Any]] = []
    for preset in presets:
        named = {name: PRESETS[preset][name] for name in ("model", "input_size") if name in PRESETS[preset]}
        config = PretrainConfig(data_path=Path(), output_dir=Path(), **named)
        depth = Sizes.of(Case.of(config).build("meta")).decoder_depth
        cases = {
            key: Case.of(config.model_copy(update=dict(zip(("encoder_mask_token", "decoder_depth"), key, strict=True))))
            for key in ((True, depth), (False, depth), (False, 1))
        }
        baseline = cases[True, depth].flops()
        measured = measure({str(key): case for key, case in cases.items()}, str((True, depth)), options)
        for (encoder, blocks), case in cases.items():
            one = measured[str((encoder, blocks))]
            published = None if encoder else SPEEDUP.get((preset, blocks))
            rows.append(
                {
                    "preset": preset,
                    "encoder_mask_token": encoder,
                    "decoder_depth": blocks,
                    "flops": case.flops(),
                    "fewer_flops": baseline / case.flops(),
                    "faster": None if isinstance(one, str) else 1 / one.ratio,
                    "paper_faster": published,
                    "paper_fewer_flops": MASK_TOKEN_FLOPS if (preset, encoder, blocks) == ("large", False, 8) else None,
                    **({"failed": one} if isinstance(one, str) else asdict(one)),
                }
            )
    lines = [
        "| encoder | decoder blocks | GFLOPs per image | FLOPs, times fewer | paper | step, ms | times faster | paper "
        "| memory above weights and gradients, MiB |",
        "|---|" + "---:|" * 8,
    ]
    for row in rows:
        figures = (
            f"{row['flops'] / 1e9:.4g}", _times(row["fewer_flops"]), _times(row["paper_fewer_flops"]),
            f"{row['ms']:.0f}" if "ms" in row else "-", _times(row["faster"]), _times(row["paper_faster"]),
            f"{row['above'] / 2**20:.0f}" if "above" in row else "-",
        )  # fmt: skip
        what = f"{row['preset']}, {'with' if row['encoder_mask_token'] else 'without'} mask tokens"
        lines.append(f"| {what} | {row['decoder_depth']} | {' | '.join(figures)} |")
    lines.append("")
    for row in rows:
        if "failed" in row:
            lines += [f"{row['preset']}, {row['decoder_depth']} blocks: not measured: {row['failed']}", ""]
    here = machine()
    lines += [
        f"Forward and backward of {options.batch_size} images, without the optimiser, on {here['gpu'] or here['cpu']}, "
        f"{here['threads']} threads; median of {options.rounds} rounds, interleaved with the encoder that has mask "
        "tokens. Paper: Tables 1c and 2, whole training on 128 TPU-v3 cores."
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.md").write_text("\n".join(lines) + "\n")
    (output / "speed.json").write_text(json.dumps({"machine": here, **asdict(options), "rows": rows}, indent=1) + "\n")
    print("\n".join(lines), f"wrote {output / 'speed.md'} and {output / 'speed.json'}", sep="\n")
    return rows


def _times(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"
