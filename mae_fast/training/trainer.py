"""The loop that every training verb runs in: resumable at any step, in one process or several."""

import logging
import math
import os
import signal
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..data.cache import Cached
from ..data.check import known_bad
from ..data.loader import Batch, Skipped, choose_decoder
from ..data.sources import Source
from ..errors import UserError
from ..memory import disable_malloc_trim
from ..weights import run_reader
from . import checkpoint
from .config import RunConfig
from .distributed import Processes, processes, spread
from .nonfinite import Guard
from .optim import Ema, Schedule
from .progress import Progress, peak_memory
from .run_dir import RunFolder, read_metrics
from .signals import Signals, Stop
from .step import TrainStep
from .trackers import Track

logger = logging.getLogger(__name__)

AnyBatch = TypeVar("AnyBatch", bound=Batch)


def wants_bf16(dtype: str, device: torch.device) -> bool:
    """Whether to autocast to bf16: asked for, or ``auto`` on a device with bf16 matrix instructions."""
    if dtype != "auto":
        return dtype == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _values(losses: list[torch.Tensor], among: Processes) -> list[float]:
    return [float(x) for x in among.mean(torch.stack(losses))] if losses else []


def _silent(*_: object) -> None:
    """Print nothing: another process does."""


# What may change when a run goes on.
FREE = (
    "num_workers", "cache", "output_dir", "strategy", "execution", "bad_list", "max_bad_fraction", "grad_checkpointing",
    "log_dir", "wandb", "profile", "dry_run", "eval_every", "eval_only", "predictions", "ema",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How many images make a step, and how many steps an epoch and the run."""

    images_per_step: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, images_per_step: int, source: Source, repeats: int, epochs: int) -> "Plan":
        """The last images of an epoch that make no whole step are left out.

        Raises:
            UserError: if there is none.
        """
        steps_per_epoch = len(source) * repeats // images_per_step
        if steps_per_epoch == 0:
            raise UserError(
                f"{source.root} holds {len(source)} images, fewer than one step of {images_per_step}",
                "lower --batch-size or --accum-iter",
            )
        return cls(images_per_step, steps_per_epoch, steps_per_epoch * epochs)


class Task(ABC):
    """What is trained, and on what.

    Attributes:
        config: of the run, with what the task has settled in it.
        source: the images to train on.
        model: on its device, with its initial weights.
        size: height and width of its images, in pixels.
        channels: of its images.
        settings: what the run is bound to besides its configuration, JSON.
        state: what a checkpoint tells of the model, JSON.
        title: of the run, for people.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        schedule: how the learning rate falls, as ``optim.Schedule`` names it.
    """

    config: RunConfig
    source: Source
    model: Any
    size: tuple[int, int]
    channels: int
    settings: dict[str, Any]
    state: dict[str, Any]
    title: str
    eval_every: int = 1
    schedule: Literal["cosine", "linear", "step"] = "cosine"

    @abstractmethod
    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        """Of the model's trained weights."""

    @abstractmethod
    def batches(self, source: Source, **options: Any) -> Iterator[Batch]:
        """Training batches of ``source``; ``options`` as ``data.loader.training_batches`` takes them."""

    @abstractmethod
    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        """What ``loss`` takes of a batch: images, and noise or targets. ``micro_step``: its number in the run."""

    @abstractmethod
    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        """Scalar; the same model, perhaps in shards."""

    def prepare(self, batches: Iterator[Batch], among: Processes) -> None:  # noqa: B027
        """Look at an epoch's training batches before a run's first step, and not when it is resumed."""

    def drawing(self) -> Callable[[], Any] | None:
        """A function that draws a picture for the trackers; all processes call it."""
        return None

    def evaluation(self) -> Callable[[], dict[str, float]] | None:
        """A function that gives figures of the model as it is, for the log; all processes call it."""
        return None


def held_out(batches: Iterator[AnyBatch], source: Source, config: RunConfig, among: Processes) -> Iterator[AnyBatch]:
    """The batches of an evaluation of ``source``; bad images are counted, and a signal ends it in all processes.

    Raises:
        Stop: after a signal.
        UserError: if too many images cannot be used.
    """
    skipped = Skipped(source, config.max_bad_fraction)
    for batch in among.until_stopped(batches):
        skipped.add(batch)
        yield batch


TaskType = Callable[[Any, Processes], Task]  # makes a task, given its configuration


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        output_dir: its folder.
        metrics: the last value of each figure in its log; none after a dry run.
        step: optimiser steps done.
    """

    output_dir: Path
    metrics: dict[str, float]
    step: int


def train(config: RunConfig, task_type: TaskType) -> RunResult:
    """Train a task as ``config`` says, resuming from the newest good checkpoint in ``config.output_dir``.

    In each process that ``torchrun`` has started, or in this one alone. It also works outside of the main thread, but
    signals do not save the run there.

    Raises:
        UserError: on anything that the user has to change.
        KeyboardInterrupt: after Ctrl-C. The run is saved, and the same call resumes it.
        SystemExit: after another signal that asks for the end, likewise.
    """
    signals, step = Signals(), 0
    try:
        with processes(config.device, signals) as among, signals, ExitStack() as stack:
            disable_malloc_trim()
            torch.manual_seed(config.seed)
            try:
                with signals.interruptible():
                    task = task_type(config, among)
                step = _train(task.config, task, among, stack)
            except Stop:
                if among.first:
                    logger.info("ended before a step was done; run the same line again")
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full ({str(error).splitlines()[0]})",
            "lower --batch-size and raise --accum-iter as much, or use --grad-checkpointing; --dry-run shows what a "
            "step takes",
        ) from error
    if signals.caught == signal.SIGINT:
        raise KeyboardInterrupt
    if signals.caught:
        sys.exit(signals.exit_status())
    return RunResult(config.output_dir, {} if config.dry_run else read_metrics(config.output_dir), step)


def _train(config: RunConfig, task: Task, among: Processes, stack: ExitStack) -> int:
    signals = among.signals
    say, tell = (logger.info, logger.warning) if among.first else (_silent, _silent)
    source, model = task.source, task.model
    bad = known_bad(source, task.channels, config.bad_list)
    plan = Plan.of(config.batch_size * config.accum_iter * among.world, source, config.crops_per_image, config.epochs)
    decoder, why = choose_decoder() if config.image_decoder == "auto" else (config.image_decoder, "")
    # What a run is resumed with may be spread otherwise over processes and micro-batches.
    settings = config.model_dump(mode="json", exclude={*FREE, "batch_size", "accum_iter"})
    settings |= {name: os.path.abspath(x) for name, x in config if name in settings and isinstance(x, Path)}
    settings |= {"images_per_step": plan.images_per_step, "image_decoder": decoder, "images": source.fingerprint[:16]}
    settings |= task.settings
    run = RunFolder(config.output_dir, {name: field.default for name, field in type(config).model_fields.items()})
    if config.dry_run:
        run.check(settings)
    elif among.first:
        stack.enter_context(closing(run)).open(settings)
        checkpoint.remove_leftovers(run.checkpoints)

    lr = config.lr or config.blr * plan.images_per_step / 256
    bf16 = wants_bf16(config.dtype, among.device)
    spread_model = spread(model, task.loss, config.strategy, among)
    optimizer = task.optimizer(lr, torch.bfloat16 if bf16 else None)
    ema = Ema(model, config.ema_decay) if config.ema_decay else None
    averages = ema.averages if ema else {}
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    schedule = Schedule(
        optimizer, kind=task.schedule, warmup_steps=warmup_steps, total_steps=plan.total_steps, min_lr=config.min_lr
    )
    step = 0
    found = _newest(run, among)
    if found:
        found.load(model, optimizer, averages)
        step = found.step
        say(f"resuming {run.path} at step {step} of {plan.total_steps}")
    to_evaluate = bool(found and found.state.get("to_evaluate"))  # a signal came before that was done
    if step == plan.total_steps and not to_evaluate:
        say(f"{run.path} is finished: {plan.total_steps} steps, {config.epochs} epochs")
        return step
    track = None
    if among.first and not config.dry_run:
        run.rewind_log(step)
        track = stack.enter_context(closing(Track(run, config.log_dir, config.wandb, settings, step)))

    if config.cache:
        with signals.interruptible():
            source = Cached(source, task.channels, config.exif, config.num_workers)
    say(
        f"{task.title}, {len(source)} images, {config.epochs} epochs = {plan.total_steps} steps of "
        f"{plan.images_per_step} images, lr {lr:.2e}, {'bf16' if bf16 else 'fp32'} on {among.device}"
        f"{(among.world > 1 and f', {among.world} processes ({config.strategy})') or ''}, "
        f"decoded by {decoder}{why and f' ({why})'}"
    )
    options = {
        "size": task.size,
        "channels": task.channels,
        "batch_size": config.batch_size,
        "batches_per_epoch": plan.steps_per_epoch * config.accum_iter,
        "seed": config.seed,
        "rank": among.rank,
        "world": among.world,
        "decoder": decoder,
        "repeats": config.crops_per_image,
        "exif": config.exif,
        "bad": bad,
        "num_workers": config.num_workers,
        "device": among.device,
    }
    if not found and not config.dry_run:
        with signals.interruptible():
            task.prepare(task.batches(source, epochs=1, **options), among)
    batches = task.batches(source, epochs=config.epochs, first=step * config.accum_iter, **options)
    stack.callback(getattr(batches, "close", lambda: None))
    skipped = Skipped(source, config.max_bad_fraction)
    saved_state = found.state if found else {}
    losses = [torch.tensor(x, device=among.device) for x in saved_state.get("losses", ())]
    model.train()
    saver = stack.enter_context(closing(checkpoint.Saver(run.checkpoints)))
    draw = task.drawing() if config.log_dir or config.wandb else None
    evaluate = task.evaluation()

    def roll_back() -> None:
        saver.wait()
        good = _newest(run, among, guard.bad_steps)
        if good is None:
            tell("there is no checkpoint to go back to")
            return
        good.load(model, optimizer, averages)
        take.recapture()
        tell(f"went back to the weights of step {good.step}")

    guard = Guard(
        model, optimizer, run.path / "not_finite", config.seed, among, roll_back, tell, config.clip_grad,
        saved_state.get("guard"),
    )  # fmt: skip
    take = TrainStep(
        model, spread_model, guard.update, optimizer,
        accum_iter=config.accum_iter, bf16=bf16, form=config.execution, tell=tell,
    )  # fmt: skip
    first_step, last_step = step, step + 1 if config.dry_run else plan.total_steps
    progress = stack.enter_context(
        Progress(plan.total_steps, step, plan.images_per_step, plan.steps_per_epoch, quiet=not among.first)
    )
    profiler = stack.enter_context(_profiler(config.profile if among.first else None))
    kept = len(losses)  # those of whole steps

    def save() -> None:
        guard.settle()
        del losses[kept:]
        state = task.state | {"losses": _values(losses, among), "guard": guard.state()}  # losses: not logged yet
        state |= {"to_evaluate": True} if to_evaluate else {}
        saved = checkpoint.snapshot(step, model, optimizer, state, averages)
        if among.first:
            saver.save(saved, guard.bad_steps)

    def rescue() -> None:
        """Save what has been done, from anywhere between two steps."""
        if step > first_step and not config.dry_run:
            save()
            saver.wait()

    def evaluate_model() -> None:
        nonlocal to_evaluate
        assert evaluate
        guard.settle()
        to_evaluate = True
        figures = _evaluated(evaluate, model, ema, among)
        to_evaluate = False
        epochs = step // plan.steps_per_epoch
        if track:
            track.scalars({"step": step, "epoch": epochs - 1, **figures})
        say(f"epoch {epochs}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    if to_evaluate and evaluate:
        try:
            evaluate_model()
        except Stop:
            return step
        save()
    while step < last_step:
        rate = schedule.set(step)
        ids: list[int] = []
        for micro in range(config.accum_iter):
            try:
                with progress.waiting(), signals.interruptible(rescue):
                    batch = next(batches)
            except (Stop, UserError) as error:
                if among.world == 1:  # several would have to agree on it
                    what = "saving" if step > first_step else "ending"
                    say(f"{what} {run.path} at step {step}: run the same line again to go on")
                    rescue()
                if isinstance(error, Stop):
                    return step
                raise
            skipped.add(batch)
            ids += batch.ids.tolist()
            images, other = task.inputs(batch.to(among.device), step * config.accum_iter + micro)
            losses.append(take.backward(images, other, micro))
        step, kept = step + 1, len(losses)
        guard.settle()
        guard.watch(take.update(), step, ids)
        if ema:
            ema.update()
        profiler()
        if config.dry_run:
            break
        ending = among.any(signals.caught is not None)
        mean_loss = None
        if step % config.log_every == 0 or step == plan.total_steps:
            finite = [x for x in _values(losses, among) if math.isfinite(x)]
            mean_loss = statistics.fmean(finite) if finite else None
            losses.clear()
            kept = 0
            total_skipped = among.sum(len(skipped))
            if track:
                track.scalars(
                    {
                        "step": step,
                        "epoch": (step - 1) // plan.steps_per_epoch,
                        "train_loss": mean_loss,
                        "train_lr": rate,
                        "images_per_s": round(progress.images_per_s(step), 1),
                        "waiting": round(progress.share_waiting(), 4),
                        "skipped": total_skipped,
                        "not_finite": len(guard.bad_steps),
                    }
                )
        progress.update(step, rate, mean_loss, len(skipped))
        epochs, rest = divmod(step, plan.steps_per_epoch)
        if evaluate and rest == 0 and (epochs % task.eval_every == 0 or step == plan.total_steps):
            try:
                evaluate_model()
            except Stop:
                ending = True
        if step % config.save_every == 0 or step == plan.total_steps or ending:
            save()
            if draw and not ending:
                image = draw()
                if track:
                    track.picture(step, image)
        if ending:
            say(f"saving {run.path} at step {step}: run the same line again to go on")
            return step
    if config.dry_run:
        say(_memory(model, optimizer, averages, among))
    return step


def _evaluated(
    evaluate: Callable[[], dict[str, float]], model: nn.Module, ema: Ema | None, among: Processes
) -> dict[str, float]:
    """The figures, and with averages those of the averaged weights as ``<name>_ema``."""
    among.share(model.buffers())

    def evaluated() -> dict[str, float]:
        found = evaluate()
        if isinstance(model, FSDPModule):  # a forward pass without a backward one leaves some weights whole
            model.reshard()
        return found

    model.eval()
    figures = evaluated()
    if ema:
        with ema.swapped():
            figures |= {f"{name}_ema": value for name, value in evaluated().items()}
    model.train()
    return figures


def _newest(run: RunFolder, among: Processes, bad_steps: Set[int] | None = None) -> run_reader.Checkpoint | None:
    """``run_reader.newest_checkpoint`` as the first process sees it, so that all go on from the same one."""
    found = run_reader.newest_checkpoint(run.checkpoints, bad_steps) if among.first else None
    step = among.agree(found.step if found else -1)
    if found or step < 0:
        return found
    path = run_reader.checkpoint_path(run.checkpoints, step)
    if not path.exists():
        raise UserError(f"process {among.rank} does not see {path}: all must share --output-dir")
    return run_reader.find_checkpoint(path)


@contextmanager
def _profiler(path: Path | None) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each step; writes a trace of steps 4 to 6 to ``path``."""
    if path is None:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    def write(profiler: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info(f"wrote {path}")

    with profile(schedule=schedule(wait=2, warmup=1, active=3, repeat=1), on_trace_ready=write) as profiler:
        yield profiler.step


def _memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, torch.Tensor], among: Processes
) -> str:
    """A line that says what a step's memory went to, in this process."""

    def size(tensors: Iterator[torch.Tensor]) -> int:
        local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
        return sum(x.numel() * x.element_size() for x in local)

    state = (x for of_one in optimizer.state.values() for x in of_one.values() if isinstance(x, torch.Tensor))
    parts = {
        "weights": size(iter(model.parameters())),
        "gradients": size(p for p in model.parameters() if p.requires_grad),
        "optimiser": size(state),
        **({"averages": size(iter(averages.values()))} if averages else {}),
    }
    peak = peak_memory()
    if among.device.type == "cuda":
        whole, of = torch.cuda.get_device_properties(among.device).total_memory, "the GPU's"
    else:
        whole, of = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's"
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    rest = (peak - sum(parts.values())) / 2**30
    return (
        f"dry run: one step done, nothing saved. Memory of a process at its peak: {peak / 2**30:.2f} GiB of {of} "
        f"{whole / 2**30:.1f}: {listed}, activations and all else {rest:.2f}"
    )
