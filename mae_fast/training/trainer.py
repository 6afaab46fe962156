"""The training loop of all tasks. It can be resumed at any step, and runs in one or several processes."""

import logging
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..console import dispensable_output, quieted
from ..data.cache import Cached
from ..data.check import known_bad
from ..data.folders import some
from ..data.loader import Batch, LoaderConfig, Skipped, choose_decoder
from ..data.sources import Source
from ..errors import LostProcess, UserError, first_line
from ..memory import disable_malloc_trim
from ..models.blocks import set_attention
from ..weights import run_reader
from . import checkpoint
from .config import RunConfig
from .diagnostics import memory_report, profiler
from .distributed import DistContext, init_dist, parallelize
from .nonfinite import NonFiniteGuard
from .optim import Ema, Schedule
from .pixels import json_sides
from .plan import Plan, Stage
from .progress import Progress
from .run_dir import RunFolder, read_log, read_metrics
from .signals import Interrupted, Signals, Stop
from .step import TrainStep
from .task import Task, use_bf16
from .trackers import Track

logger = logging.getLogger(__name__)

# Settings that may change when a run is resumed.
FREE = (
    "num_workers", "cache", "output_dir", "strategy", "execution", "attention", "bad_list", "max_bad_fraction",
    "grad_checkpointing", "log_dir", "wandb", "profile", "dry_run", "eval_every", "eval_only", "predictions", "ema",
    "save_every", "log_every", "keep", "keep_every", "keep_best", "val_loss", "online_eval", "eval_data",
)  # fmt: skip

TaskType = Callable[[Any, DistContext], Task]  # (configuration, dist) -> task


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        output_dir: its folder.
        metrics: the last value of each metric in its log; empty after a dry run.
        step: number of optimizer steps done.
    """

    output_dir: Path
    metrics: dict[str, float]
    step: int

    def __fspath__(self) -> str:
        return os.fspath(self.output_dir)  # a result can be passed instead of the path of a run

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of its log, such as ``{"step": 20, "epoch": 0, "train_loss": 0.9, ...}``.

        The metrics of an evaluation are in a separate line.
        """
        return read_log(self.output_dir) if (self.output_dir / "log.jsonl").exists() else []

    @property
    def best(self) -> Path | None:
        """The best checkpoint; it can be passed instead of the path of a run. None without ``keep_best``."""
        path = self.output_dir / "checkpoints" / run_reader.BEST
        return path if path.exists() else None

    def load_model(self, ema: bool = False) -> Any:
        """Load the model of the newest good checkpoint, in evaluation mode. ``ema``: with the averaged weights."""
        from .tasks import load_model

        return load_model(self.output_dir, ema)


def train(config: RunConfig, task_type: TaskType) -> RunResult:
    """Train a task with ``config``, resuming from the newest good checkpoint in ``config.output_dir``.

    ``torchrun`` may start several processes, which all call this. Outside of the main thread, signals do not save the
    run.

    Raises:
        UserError: if the configuration, the data or the environment do not allow the training.
        KeyboardInterrupt: after Ctrl-C. The run is saved, and the same call resumes it.
        SystemExit: after another signal that ends the process. The run is saved, too.
    """
    signals, step = Signals(), 0
    try:
        goes_on = f"training continues and logs to {config.output_dir / 'log.jsonl'}"
        with (
            dispensable_output(goes_on),
            init_dist(config.device, signals) as dist,
            signals,
            ExitStack() as stack,
        ):
            disable_malloc_trim()
            torch.manual_seed(config.seed)
            try:
                resumed = bool(run_reader.checkpoints_in(config.output_dir / "checkpoints"))
                # A resumed run loads its own weights, so messages about initial weights would mislead.
                with signals.interruptible(), quieted("mae_fast.weights") if resumed else nullcontext():
                    task = task_type(config, dist)
                trainer = Trainer(task, dist, stack)
                step = trainer.run()
                stack.close()  # waits for the last save
                if dist.first and trainer.trained and step == trainer.plan.total_steps:
                    caught = f"{signals.caught.name}: " if signals.caught else ""
                    logger.info(f"{caught}{config.output_dir} is complete and saved{trainer.named_best()}")
            except Stop:
                if dist.first:
                    logger.info("ended before the first step; run the same command again to start")
            except RuntimeError as error:
                if not dist.has_lost(error):
                    raise
                raise LostProcess from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({first_line(error)})",
            "lower --batch-size and raise --accum-iter by the same factor, or use --grad-checkpointing; --dry-run "
            "shows what a step takes",
        ) from error
    if signals.caught == signal.SIGINT:
        raise Interrupted
    if signals.caught:
        sys.exit(signals.exit_status())
    return RunResult(config.output_dir, {} if config.dry_run else read_metrics(config.output_dir), step)


class Trainer:
    """Trains a task in the folder of a run.

    Args:
        stack: closed at the end of the run, however it ends.

    Attributes:
        step: number of optimizer steps done.
        losses: losses of the micro-batches since the last line of the log.
        complete: how many of the losses belong to complete steps.
        to_evaluate: whether the evaluation of this step is pending, because a signal came before it.
        best: metric, value and step of the best evaluation so far. Without ``keep_best``, or with another metric, it
            stays that of the checkpoint ``best``.
        failure: the error that ends this process, one of several, after all processes have saved.
    """

    failure: UserError | None = None
    trained = False  # whether ``run`` has trained

    def __init__(self, task: Task, dist: DistContext, stack: ExitStack) -> None:
        self.config, self.task, self.dist, self.stack = task.config, task, dist, stack
        self.signals, self.model = dist.signals, task.model
        self.step, self.complete, self.to_evaluate = 0, 0, False
        self.losses: list[Tensor] = []
        self.best: dict[str, Any] | None = None

    def run(self) -> int:
        """Train until the end or until a signal. Returns the number of optimizer steps done."""
        found = self._resume()
        if self.step == self.plan.total_steps and not self.to_evaluate:
            logger.info(f"{self.run_dir.path} is finished: {self.step} steps, {self.config.epochs} epochs")
            self._report_unknown_best(found)
            return self.step
        self._start(found)
        self.trained = not self.config.dry_run
        try:
            with suppress(Stop):
                self._train()
        except RuntimeError as error:
            if not self.dist.has_lost(error):
                raise
            self._save_alone()
            raise LostProcess from error
        if self.failure:
            raise self.failure
        return self.step

    def named_best(self) -> str:
        """The end of a message that names the best checkpoint; empty without one."""
        if not self.best:
            return ""
        metric, value, step = (self.best[name] for name in ("metric", "value", "step"))
        folder = self.run_dir.checkpoints / run_reader.BEST
        newest = "commands given the path of the run use its newest checkpoint"
        return f"; best {metric} {value:.4g} at step {step}: {folder}; {newest}"

    def _train(self) -> None:
        if self.to_evaluate and not self.config.dry_run:
            self._evaluate()
            self._save()
        while self.step < self.last_step:
            rate = self.schedule.set(self.plan.position(self.step))
            self._take_step()
            if self.config.dry_run:
                report = memory_report(self.model, self.optimizer, self.averages, self.dist.device)
                several = len(self.plan.stages) > 1
                logger.info(report + f"; in the largest stage: {self.stage}" * several)
                break
            ending = self.dist.any(self.signals.caught is not None or self.failure is not None)
            ending = self._log_and_evaluate(rate) or ending
            self._save_when_due(ending)
            if ending and self.step < self.plan.total_steps:
                self._end_with_save(self.saver.check)  # waits for the save
                break
            if self.step == self.stage.last_step < self.plan.total_steps:
                self._start_stage(self.plan.stage(self.step))

    def prepare(self) -> None:
        """Plan the run, without writing. After it, ``run_dir.check(settings)`` checks that the run fits its folder."""
        config, task, dist = self.config, self.task, self.dist
        if config.attention in ("triton", "xformers") and dist.device.type != "cuda":
            raise UserError(f"--attention {config.attention} needs a GPU", "leave it out, or use sdpa")
        self.plan = Plan.of(config, task.size, task.source, dist.world)
        channels, heights = task.pixels.channels, {stage.size[0] for stage in self.plan.stages}
        if task.pixels.torch_dtype.is_floating_point and channels in heights:
            raise UserError(
                f"images with {channels} floating-point bands and a height of {channels} pixels are ambiguous: "
                "[N, H, W, C] looks like [N, C, H, W]",
                "give another --img-size or --input-size, or fewer --bands",
            )
        self.bad = known_bad(task.source, task.pixels, config.bad_list)
        self.decoder, self.decoder_reason = (
            choose_decoder(task.pixels) if config.image_decoder == "auto" else (config.image_decoder, "")
        )
        self.settings = self._settings()
        lowest = min(map(self._peak_lr, self.plan.stages))
        if config.min_lr > lowest:
            raise UserError(
                f"--min-lr {config.min_lr:g} is above the learning rate, {lowest:g}", "lower --min-lr, or raise --lr"
            )
        self._check_metric()
        defaults = {name: field.default for name, field in type(config).model_fields.items()}
        sources = {"images": task.source} | ({"val_images": task.val} if "val_images" in task.settings else {})
        self.run_dir = RunFolder(config.output_dir, defaults, sources)

    def _resume(self) -> run_reader.Checkpoint | None:
        """Open the folder, build model and optimizer, and load the newest checkpoint, if there is one."""
        config, task, dist = self.config, self.task, self.dist
        self.prepare()
        if config.dry_run:
            self.run_dir.check(self.settings)
        elif dist.first:
            self.stack.enter_context(closing(self.run_dir)).open(self.settings)
            checkpoint.remove_leftovers(self.run_dir.checkpoints)

        self.bf16 = use_bf16(config.dtype, dist.device)
        set_attention(self.model, config.attention)
        self.parallel_model = parallelize(self.model, task.loss, config.strategy, dist)
        self.optimizer = task.optimizer(self._peak_lr(self.plan.stages[0]), torch.bfloat16 if self.bf16 else None)
        self.ema = Ema(self.model, config.ema_decay) if config.ema_decay else None
        self.averages = self.ema.averages if self.ema else {}
        self.schedule = self._schedule(self.plan.stages[0])
        found = self._newest_checkpoint()
        if found:
            self._check_classes(found)
            self.step, self.to_evaluate = found.step, bool(found.state.get("to_evaluate"))
            if found.slimmed and (self.step < self.plan.total_steps or self.to_evaluate):
                raise UserError(
                    f"{self.run_dir.path} cannot resume from step {self.step}: 'mae-fast slim' removed the state of "
                    "its optimizer",
                    "start a new run from its weights, in another --output-dir",
                )
            if dist.first and not config.dry_run:
                checkpoint.link_best(self.run_dir.checkpoints, found.state)
            found.load(self.model, self.optimizer, self.averages)
        self._change_epochs()
        if found:
            logger.info(f"resuming {self.run_dir.path} at step {self.step} of {self.plan.total_steps}")
        return found

    def _peak_lr(self, stage: Stage) -> float:
        """The peak learning rate of ``stage``."""
        return self.config.lr or self.config.blr * stage.images_per_step / 256

    def _schedule(self, stage: Stage) -> Schedule:
        """The learning rate schedule of ``stage``, as a function of ``Plan.position``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self._peak_lr(stage)  # timm scales initial_lr
        steps_per_epoch = self.plan.stages[-1].steps_per_epoch
        return Schedule(
            self.optimizer,
            kind=self.task.schedule,
            warmup_steps=round(self.config.warmup_epochs * steps_per_epoch),
            total_steps=self.config.epochs * steps_per_epoch,
            min_lr=self.config.min_lr,
        )

    def _check_metric(self) -> None:
        """Raise ``UserError`` if the run does not evaluate the metric of ``keep_best``."""
        names = list(self.task.metric_names)
        if self.config.ema_decay:
            names += [f"{name}_ema" for name in names]
        if self.config.keep_best is not None and self.config.keep_best not in names:
            raise UserError(
                f"--keep-best {self.config.keep_best} is not a metric of this run",
                f"give one of {', '.join(names)}" if names else "leave it out: the run has no evaluation",
            )

    def _check_classes(self, found: run_reader.Checkpoint) -> None:
        """Raise ``UserError`` if the classes of the run have other names, even if the labels are the same numbers."""
        there, now = found.state.get("classes"), self.task.state.get("classes")
        if there is not None and now is not None and there != now:
            raise UserError(
                f"{self.run_dir.path} has the classes {some(there)}, but the images now have {some(now)}",
                "use images with the classes of the run, or choose a new --output-dir",
            )

    def _change_epochs(self) -> None:
        """Continue with another number of epochs than in the run so far.

        Raises:
            UserError: if the run has already done more epochs.
        """
        epochs, before = self.config.epochs, self.run_dir.epochs_before
        done = self.plan.epoch(self.step)
        if self.step > self.plan.total_steps:
            raise UserError(
                f"--epochs {epochs}: {self.run_dir.path} has already done {done:.4g} epochs",
                f"give {math.ceil(done)} or more, or choose a new --output-dir",
            )
        if before in (None, epochs):
            return
        logger.info(
            f"{self.run_dir.path}: {epochs} epochs instead of {before}. From epoch {done:.4g} on, the learning rate "
            f"follows the {self.task.schedule} schedule of {epochs} epochs: {self.schedule.set(self.step):.2e} now"
        )
        if self.dist.first and not self.config.dry_run:
            self.run_dir.write_config(self.settings)

    def _settings(self) -> dict[str, Any]:
        """JSON that must not change when the run is resumed."""
        config = self.config
        # The numbers of processes and of micro-batches may change, if the number of images per step does not.
        settings = config.model_dump(mode="json", exclude={*FREE, "batch_size", "accum_iter"})
        settings |= {name: os.path.abspath(x) for name, x in config if name in settings and isinstance(x, Path)}
        settings |= {"images_per_step": self.plan.stages[-1].images_per_step, "image_decoder": self.decoder}
        return settings | {"images": self.task.source.fingerprint[:16]} | self.task.settings

    def _start(self, found: run_reader.Checkpoint | None) -> None:
        """Create the objects of the loop: loader, trackers, step, saver."""
        config, task, dist, signals = self.config, self.task, self.dist, self.signals
        saved_state = found.state if found else {}
        self.track = None
        if dist.first and not config.dry_run:
            self.run_dir.rewind_log(self.step)
            track = Track(self.run_dir, config.log_dir, config.wandb, self.settings, self.step)
            self.track = self.stack.enter_context(closing(track))
        source = task.source
        if config.cache:
            with signals.interruptible():
                source = Cached(source, task.pixels, config.num_workers)
        logger.info(self._title(source))
        self.make_batches = partial(task.batches, source)
        if not found and not config.dry_run:
            with signals.interruptible():
                task.prepare(self.make_batches(replace(self._loader_config(self.plan.stages[-1]), epochs=1)), dist)
        self.batches: Iterator[Batch] = iter(())
        self.stack.callback(self._close_batches)
        self.skipped = Skipped(source, config.max_bad_fraction)
        self.losses = [torch.tensor(x, device=dist.device) for x in saved_state.get("losses", ())]
        self.complete = len(self.losses)
        self.model.train()
        kept = config.keep_every and range(config.keep_every, config.epochs + 1, config.keep_every)
        steps = frozenset(map(self.plan.step_of_epoch, kept or ()))
        saver = checkpoint.Saver(self.run_dir.checkpoints, checkpoint.Retention(config.keep, steps))
        self.saver = self.stack.enter_context(closing(saver))
        self.best = saved_state.get("best")
        self.draw = task.drawing() if config.log_dir or config.wandb else None
        self.evaluation = task.evaluation()
        self.guard = NonFiniteGuard(
            self.model, self.optimizer, self.run_dir.path / "not_finite", config.seed, dist, self._roll_back,
            config.clip_grad, saved_state.get("guard"),
        )  # fmt: skip
        self.train_step = TrainStep(
            self.model, self.parallel_model, self.guard.update, self.optimizer,
            accum_iter=config.accum_iter, bf16=self.bf16, execution=config.execution,
        )  # fmt: skip
        self.first_step = self.step
        self.last_step = self.step + 1 if config.dry_run else self.plan.total_steps
        self._start_stage(self.plan.largest if config.dry_run else self.plan.stage(self.step))
        self.progress = self.stack.enter_context(Progress(self.plan, self.step, quiet=not dist.first))
        self.profiler = self.stack.enter_context(profiler(config.profile if dist.first else None))

    def _start_stage(self, stage: Stage) -> None:
        """Set up loader, schedule and step for ``stage``."""
        self._close_batches()  # frees the memory and cores of its processes
        self.stage, self.schedule = stage, self._schedule(stage)
        done = 0 if self.config.dry_run else self.step - stage.first_step
        self.batches = self.make_batches(self._loader_config(stage, done * self.config.accum_iter))
        if self.step > self.first_step:
            self.train_step.change_shapes()
            self.progress.restart(self.step)
        if len(self.plan.stages) > 1:
            epoch, rate = self.plan.epoch(self.step), self._peak_lr(stage)
            logger.info(f"from epoch {epoch:.4g} on: {stage}, peak lr {rate:.2e}")

    def _close_batches(self) -> None:
        getattr(self.batches, "close", lambda: None)()

    def _title(self, source: Source) -> str:
        config, plan, dist = self.config, self.plan, self.dist
        parallel = f", {dist.world} processes ({config.strategy})" if dist.world > 1 else ""
        reason = f" ({self.decoder_reason})" if self.decoder_reason else ""
        one = plan.stages[0]
        steps = f"of {one.images_per_step} images, lr {self._peak_lr(one):.2e}"
        if len(plan.stages) > 1:
            steps = f"in {len(plan.stages)} stages"
        return (
            f"{self.task.title}, {len(source)} images, {config.epochs} epochs = {plan.total_steps} steps {steps}, "
            f"{'bf16' if self.bf16 else 'fp32'} on {dist.device}"
            f"{parallel}, decoded by {self.decoder}{reason}"
        )

    def _loader_config(self, stage: Stage, first: int = 0) -> LoaderConfig:
        """The loader configuration for the batches of ``stage``, starting at batch number ``first``."""
        config = self.config
        return LoaderConfig(
            size=stage.size,
            batch_size=stage.batch_size,
            epochs=stage.epochs,
            first_epoch=stage.first_epoch,
            batches_per_epoch=stage.steps_per_epoch * config.accum_iter,
            first=first,
            seed=config.seed,
            rank=self.dist.rank,
            world=self.dist.world,
            decoder=self.decoder,
            repeats=config.crops_per_image,
            pixels=self.task.pixels.of_decoded if config.cache else self.task.pixels,
            bad=self.bad,
            num_workers=config.num_workers,
            device=self.dist.device,
        )

    def _take_step(self) -> None:
        """Run forward and backward of each micro-batch, then update the weights."""
        ids: list[int] = []
        for micro in range(self.config.accum_iter):
            micro_step = self.step * self.config.accum_iter + micro
            batch = self._next_batch(micro_step)
            self.skipped.add(batch)
            ids += batch.ids.tolist()
            with self.signals.guarded(self._rescue):  # takes long for a large model on a CPU
                images, other = self.task.inputs(batch.to(self.dist.device), micro_step)
                loss = self.train_step.backward(images, other, micro)
            self.losses.append(loss)
        self.step, self.complete = self.step + 1, len(self.losses)
        self.guard.resolve()
        self.guard.record(self.train_step.update(), self.step, ids)
        if self.ema:
            self.ema.update()
        self.profiler()

    def _next_batch(self, micro_step: int) -> Batch:
        """The next batch. If a signal or an error ends the wait, the run is saved before the exception is raised."""
        try:
            with self.progress.waiting(), self.signals.interruptible(self._rescue):
                return next(self.batches)
        except (Stop, Exception) as error:
            if self.dist.world == 1:
                self._end_with_save(self._rescue)
                raise
            if not isinstance(error, UserError) or self.failure or not self.config.num_workers:
                raise
            # All processes must save the same step, so this one finishes the step, without worker processes.
            self.failure = error
            first = micro_step - self.stage.first_step * self.config.accum_iter
            self.batches = self.make_batches(replace(self._loader_config(self.stage, first), num_workers=0))
            return next(self.batches)

    def _save_alone(self) -> None:
        """Save without the other processes, if this is rank 0 and has all weights.

        For the steps that are not logged yet, the next line of the log then has the mean loss of this process only.
        """
        if self.dist.first and self.config.strategy == "ddp":
            self.dist = self.guard.dist = replace(self.dist, world=1, control=None)
            self._end_with_save(self._rescue)

    def _end_with_save(self, save: Callable[[], None]) -> None:
        """Call ``save``, which raises ``UserError`` if it fails, and log whether the complete steps are saved."""
        where = f"{self.run_dir.path} at step {self.step}"
        if self.step == self.first_step or self.config.dry_run:
            logger.info(f"ending {where}: run the same command again to resume")
            return
        logger.info(f"saving {where}")
        try:
            save()
        except UserError as error:
            found = run_reader.newest_checkpoint(self.run_dir.checkpoints)
            newest = f"the newest checkpoint is {found.path}" if found else "there is no checkpoint"
            logger.warning(f"nothing was saved at step {self.step}, {newest}: {error}")
        else:
            logger.info(f"saved {where}: run the same command again to resume")

    def _log_and_evaluate(self, rate: float) -> bool:
        """Log the step and, at the end of an epoch, evaluate. Returns whether a signal or an error has ended it."""
        self._log(rate)  # if the line cannot be written, the step is not saved, so a resumed run does and logs it again
        try:
            self._evaluate_when_due()
        except Stop:
            return True
        except Exception as error:
            if self.dist.world == 1:
                self._end_with_save(self._rescue)
                raise
            if not isinstance(error, UserError):
                raise
            self.failure = error
            return True
        return False

    def _log(self, rate: float) -> None:
        """Show progress, and write a line of the log every ``log_every`` steps."""
        mean_loss = None
        if self.step % self.config.log_every == 0 or self.step == self.stage.last_step:
            finite = [x for x in self._mean_losses() if math.isfinite(x)]
            mean_loss = statistics.fmean(finite) if finite else None
            self.losses.clear()
            self.complete = 0
            total_skipped = self.dist.sum(len(self.skipped))
            if self.track:
                self.track.scalars(
                    {
                        **self._place(self.plan.epochs_and_steps(self.step - 1)[0]),
                        "train_loss": mean_loss,
                        "train_lr": rate,
                        "images_per_s": round(self.progress.images_per_s(self.step), 1),
                        "waiting": round(self.progress.share_waiting(), 4),
                        "skipped": total_skipped,
                        "not_finite": len(self.guard.bad_steps),
                    }
                    | ({"img_size": json_sides(self.stage.size)} if len(self.plan.stages) > 1 else {})
                )
        self.progress.update(self.step, rate, mean_loss, len(self.skipped))

    def _place(self, epoch: int) -> dict[str, float]:
        """The first entries of a line of the log: the position in the run in steps, epochs and images."""
        done = {"epochs": round(self.plan.epoch(self.step), 4), "images": self.plan.images(self.step)}
        return {"step": self.step, "epoch": epoch, **done}

    def _mean_losses(self) -> list[float]:
        """The losses of the micro-batches, averaged over the processes."""
        return [float(x) for x in self.dist.mean(torch.stack(self.losses))] if self.losses else []

    def _evaluate_when_due(self) -> None:
        epochs, rest = self.plan.epochs_and_steps(self.step)
        if not rest and (epochs % self.task.eval_every == 0 or self.step == self.plan.total_steps):
            self._evaluate()

    def _evaluate(self) -> None:
        """Evaluate the model, and the averaged weights with metrics ``<name>_ema``; log the metrics."""
        if not self.evaluation:
            return
        self.guard.resolve()
        self.to_evaluate = True
        self.dist.share(self.model.buffers())
        self.model.eval()
        with self.progress.paused():
            with self.signals.guarded(self._rescue):
                metrics = self._metrics()
            if self.ema:
                with self.ema.swapped():
                    metrics |= {f"{name}_ema": value for name, value in self._metrics().items()}
        self.model.train()
        self.to_evaluate = False
        self._note_best(metrics)
        epochs, _ = self.plan.epochs_and_steps(self.step)
        if self.track:
            self.track.scalars({**self._place(epochs - 1), **metrics})
        figures = {name: value for name, value in metrics.items() if isinstance(value, float)}
        logger.info(f"epoch {epochs}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if self.step == self.plan.total_steps and (text := self.task.summary(metrics)):
            logger.info(text)

    def _note_best(self, metrics: dict[str, Any]) -> None:
        """Record this step as the best one if its metric is better than all earlier ones."""
        name = self.config.keep_best
        if name is None:
            return
        value = float(metrics[name])
        if not math.isfinite(value):
            logger.warning(f"--keep-best {name}: the value {value} at step {self.step} is ignored")
        before = self.best["value"] if self.best and self.best["metric"] == name else math.nan
        better = value < before if name.startswith("val_loss") else value > before
        if self.dist.agree(int(better or (math.isnan(before) and math.isfinite(value)))):
            self.best = {"metric": name, "value": value, "step": self.step}

    def _report_unknown_best(self, found: run_reader.Checkpoint | None) -> None:
        """Warn if a finished run has no best value of the metric of ``keep_best``."""
        name, best = self.config.keep_best, found.state.get("best") if found else None
        if name is not None and (best is None or best["metric"] != name):
            logger.warning(
                f"--keep-best {name}: the run is finished and is not evaluated again, so checkpoints/best does not "
                "change. Increase --epochs to evaluate again, or use --eval-only to evaluate a checkpoint"
            )

    def _metrics(self) -> dict[str, Any]:
        assert self.evaluation
        found = self.evaluation()
        if isinstance(self.model, FSDPModule):  # a forward pass without a backward pass leaves some weights unsharded
            self.model.reshard()
        return found

    def _save_when_due(self, ending: bool) -> None:
        due = self.step % self.config.save_every == 0 or self.step == self.plan.total_steps or ending
        best = self.best is not None and self.best["step"] == self.step
        if not (due or best or self.step in self.saver.retention.steps):
            return
        self._save()
        if self.draw and not ending:
            image = self.draw()
            if self.track:
                self.track.picture(self.step, image)

    def _save(self) -> None:
        self.guard.resolve()
        del self.losses[self.complete :]
        # The losses of the steps that are not in the log yet.
        state = self.task.state | {"losses": self._mean_losses(), "guard": self.guard.state()}
        if self.to_evaluate:
            state["to_evaluate"] = True
        if self.best:
            state["best"] = self.best
        saved = checkpoint.snapshot(self.step, self.model, self.optimizer, state, self.averages)
        if self.dist.first:
            self.saver.save(saved, self.guard.bad_steps)

    def _rescue(self) -> None:
        """Save the complete steps. It can be called at any point between two updates of the weights.

        Raises:
            UserError: if they cannot be saved.
        """
        if self.step > self.first_step and not self.config.dry_run:
            self.guard.forget_unfinished_step()
            self._save()
            self.saver.check()

    def _roll_back(self) -> None:
        """Load the weights of the newest good checkpoint: its weights and the gradients of its next step are finite."""
        self.saver.wait()
        good = self._newest_checkpoint(self.guard.bad_steps)
        if good:
            good.load(self.model, self.optimizer, self.averages)
            self.train_step.recapture()
        if self.dist.first:
            logger.warning(
                f"rolled back to the weights of step {good.step}" if good else "there is no checkpoint to roll back to"
            )

    def _newest_checkpoint(self, bad_steps: Set[int] | None = None) -> run_reader.Checkpoint | None:
        """The newest checkpoint that rank 0 sees, so that all processes resume from the same one."""
        folder = self.run_dir.checkpoints
        found = run_reader.newest_checkpoint(folder, bad_steps) if self.dist.first else None
        step = self.dist.agree(found.step if found else -1)
        if found or step < 0:
            return found
        path = run_reader.checkpoint_path(folder, step)
        if not path.exists():
            raise UserError(f"process {self.dist.rank} does not see {path}", "put --output-dir on a shared file system")
        return run_reader.find_checkpoint(path)
