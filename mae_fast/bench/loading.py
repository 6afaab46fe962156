"""Measures whether the loader or the step limits the speed of training on a folder of images."""

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..data.cache import Cached
from ..data.check import known_bad
from ..data.decode import BadImage, read_header
from ..data.loader import Batch, LoaderConfig, choose_decoder
from ..errors import UserError
from ..memory import disable_malloc_trim
from ..training.config import PretrainConfig
from ..training.distributed import init_dist, parallelize
from ..training.presets import PRESETS
from ..training.step import TrainStep
from ..training.task import use_bf16
from ..training.tasks.pretrain import Pretraining
from .timing import commit, machine, versions

LEAST_SECONDS = 3.0  # for each of the three parts of a round
ENOUGH = 0.9  # above this share of the step's rate, faster loading does not help
OF_MODEL = ("model", "input_size", "norm_pix_loss")  # the settings of a preset that affect the step
SAMPLED = 32  # images whose size decides whether to suggest smaller copies

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loading:
    """The model and the loader, as in the flags of pre-training."""

    model: str = "base"
    dtype: str = "auto"
    device: str = "auto"
    num_workers: int = 2
    decoder: str = "auto"
    repeats: int = 1
    cache: bool = False


def loading(data: Path, options: Loading, batch: int | None, rounds: int, folder: Path) -> dict[str, Any]:
    """Measure images/s of the loader, the step, and both together: medians of interleaved rounds.

    The results are logged, and written to data.json in ``folder``.

    Raises:
        UserError: if training would refuse the images or flags, or if there are fewer images than a batch.
    """
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    decoder, why = choose_decoder() if options.decoder == "auto" else (options.decoder, "")
    config = PretrainConfig(
        data_path=data,
        output_dir=Path(tempfile.gettempdir()),  # nothing is written there
        **{name: value for name, value in PRESETS[options.model].items() if name in OF_MODEL},
        batch_size=batch or (16 if device == "cpu" else 64) * options.repeats,
        image_decoder=decoder,  # type: ignore[arg-type]
        device=device,  # type: ignore[arg-type]
        dtype=options.dtype,  # type: ignore[arg-type]
        num_workers=options.num_workers,
        crops_per_image=options.repeats,
        cache=options.cache,
    )
    with init_dist(device) as dist:
        disable_malloc_trim()
        parts = Parts(config, Pretraining(config, dist), dist)
        rates: dict[str, list[float]] = {"loader": [], "step": [], "both": [], "waiting": []}
        for number in range(rounds):
            for name, value in parts.round(number).items():
                rates[name].append(value)
        found = {name: statistics.median(values) for name, values in rates.items()}
        side = shorter_side(parts.source)
    lines, hints = verdict(found, options, decoder, why, side, parts.size[0])
    head = f"{config.model}, batches of {config.batch_size}, {'bf16' if parts.bf16 else 'fp32'} on {device}, {decoder}"
    logger.info(f"{head}, {options.num_workers} workers; medians of {rounds} interleaved rounds")
    for name, label in (("loader", "loader alone"), ("step", "step alone"), ("both", "both, as in training")):
        low, high = min(rates[name]), max(rates[name])
        logger.info(f"{label:28}{found[name]:10.1f} images/s   ({low:.1f} to {high:.1f})")
    logger.info("\n".join([*lines, *(f"  try: {hint}" for hint in hints)]))
    result = {"machine": machine(), "versions": versions(), "commit": commit(), "rounds": rounds}
    result |= {"data": str(data), **asdict(options), "batch": config.batch_size, "images/s": found, "every": rates}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(result | {"bottleneck": lines, "hints": hints}, indent=1) + "\n")
    logger.info(f"wrote {folder / 'data.json'}")
    return result


class Parts:
    """The loader, the step, and both together, as in training."""

    def __init__(self, config: PretrainConfig, task: Pretraining, dist: Any) -> None:
        self.config, self.task, self.dist = config, task, dist
        self.size, self.bf16 = task.size, use_bf16(config.dtype, dist.device)
        if len(task.source) * config.crops_per_image < config.batch_size:
            raise UserError(
                f"{task.source.root} contains {len(task.source)} images, fewer than a batch of {config.batch_size}",
                "lower --batches",
            )
        self.bad = known_bad(task.source, task.pixels, None)
        self.source = Cached(task.source, task.pixels, config.num_workers) if config.cache else task.source
        optimizer = task.optimizer(1e-4, torch.bfloat16 if self.bf16 else None)
        finite = torch.zeros((), dtype=torch.bool, device=dist.device)

        def update() -> torch.Tensor:
            optimizer.step()
            return finite

        self.train_step = TrainStep(
            task.model, parallelize(task.model, task.loss, "ddp", dist), update, optimizer, bf16=self.bf16
        )
        task.model.train()
        self.fixed: Batch | None = None

    def round(self, seed: int) -> dict[str, float]:
        """Images/s of the loader, the step, and both together, and the share of time spent waiting for images."""
        batches = self._batches(seed)
        with closing(batches):
            self.fixed = next(batches)
            loader, _ = self._rate(batches, step=False)
        fixed = self._repeated()
        next(fixed)
        self._step(self.fixed)
        step, _ = self._rate(fixed, step=True)
        batches = self._batches(seed + 1000)
        with closing(batches):
            self._step(next(batches))
            both, waiting = self._rate(batches, step=True)
        return {"loader": loader, "step": step, "both": both, "waiting": waiting}

    def _rate(self, batches: Iterator[Batch], step: bool) -> tuple[float, float]:
        """Images/s and the share of time spent waiting, over a few seconds. Batches prefetched before do not count."""
        for batch in islice(batches, self.config.num_workers):
            if step:
                self._step(batch)
        start, images, waited = time.perf_counter(), 0, 0.0
        while True:
            begin = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - begin
            if step:
                self._step(batch)
            images += len(batch.images)
            if (seconds := time.perf_counter() - start) > LEAST_SECONDS:
                return images / seconds, waited / seconds

    def _step(self, batch: Batch) -> None:
        images, noise = self.task.inputs(batch.to(self.dist.device), 0)
        self.train_step.backward(images, noise)
        self.train_step.update()
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize()

    def _repeated(self) -> Iterator[Batch]:
        assert self.fixed is not None
        while True:
            yield self.fixed

    def _batches(self, seed: int) -> Any:
        config = self.config
        loader = LoaderConfig(
            size=self.task.size,
            pixels=self.task.pixels,
            batch_size=config.batch_size,
            epochs=10**6,
            seed=seed,
            decoder=choose_decoder()[0] if config.image_decoder == "auto" else config.image_decoder,
            repeats=config.crops_per_image,
            bad=self.bad,
            num_workers=config.num_workers,
            device=self.dist.device,
        )
        return self.task.batches(self.source, loader)


def shorter_side(source: Any) -> float:
    """The median length of the shorter side of a few images, in pixels; NaN if none can be read."""
    sides = []
    for i in range(0, len(source), max(1, len(source) // SAMPLED)):
        try:
            header = read_header(source.read(i), False)
        except BadImage:
            continue
        sides.append(min(header.height, header.width))
    return statistics.median(sides) if sides else float("nan")


def verdict(
    found: dict[str, float], options: Loading, decoder: str, why: str, side: float, size: int
) -> tuple[list[str], list[str]]:
    """Lines that describe the bottleneck, and hints, the cheapest first."""
    loader, step, both = found["loader"], found["step"], found["both"]
    waiting = f"waiting for images takes {found['waiting']:.0%} of the time"
    lines = [f"both together reach {both / min(loader, step):.0%} of the slower rate; {waiting}"]
    if loader >= step:
        lines.insert(0, f"bottleneck: the step; the loader is {loader / step:.1f} times as fast")
    else:
        lines.insert(0, f"bottleneck: the loader; it reaches {loader / step:.0%} of the rate of the step")
    if both >= ENOUGH * step:
        return lines, []
    if loader >= step:
        lines.append("loader and step compete for the cores: faster loading speeds up the step")
    hints = []
    if decoder == "pil":
        hints.append("--image-decoder dali" if not why else f"pip install 'mae_fast[dali]' ({why})")
    cores = len(os.sched_getaffinity(0))
    if loader < step and options.num_workers < cores:
        hints.append(f"--num-workers {cores}")
    if not options.cache:
        hints.append("--cache, if the decoded images fit into memory")
    if side > 1.5 * size:
        hints.append(f"mae-fast data pack: images of {side:.0f} pixels are larger than crops of {size} pixels need")
    if options.repeats == 1:
        hints.append("--crops-per-image 4: four crops per decoded image, but less variety within a batch")
    return lines, hints
