"""The progress of a run: a bar on a terminal, a line that changes in place in a notebook, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console

from ..memory import resident
from .plan import Plan

logger = logging.getLogger(__name__)


class _NotebookLine:
    """A line of text below a notebook's cell that changes in place. It needs no widgets, and notebooks save it."""

    def __init__(self) -> None:
        from IPython.display import display

        self.handle = display({"text/plain": "starting"}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        self.shown_at = 0.0

    def show(self, text: str, now: bool) -> None:
        """Show ``text``, unless another one is less than half a second old; ``now``: in any case."""
        if now or time.perf_counter() - self.shown_at > 0.5:
            self.handle.update({"text/plain": text}, raw=True)
            self.shown_at = time.perf_counter()


class Progress:
    """``update`` after each step; loss is shown when it is known, so that no step waits for the device."""

    def __init__(self, plan: Plan, first_step: int, quiet: bool = False) -> None:
        self.plan, self.quiet = plan, quiet
        self.restart(first_step)
        self.fields = dict.fromkeys(("epoch", "loss", "lr", "rate", "waiting", "memory"), "-") | {"skipped": ""}
        self.bar: Any = None
        self.line: _NotebookLine | None = None
        if quiet:
            return
        if Console().is_jupyter:
            self.line = _NotebookLine()
        elif sys.stdout.isatty():
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("epoch {task.fields[epoch]}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[rate]} images/s"),
                progress.TextColumn("waiting {task.fields[waiting]}  {task.fields[memory]}{task.fields[skipped]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("ETA"),
                progress.TimeRemainingColumn(),
            )
            self.task = self.bar.add_task("", total=plan.total_steps, completed=first_step, **self.fields)

    def restart(self, step: int) -> None:
        """Measure rates from now on, when ``step`` steps are done."""
        self.first, self.start, self.waited = step, time.perf_counter(), 0.0

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: rates leave it out."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def share_waiting(self) -> float:
        """Share of the time since ``restart`` in which training waited for data."""
        return self.waited / (time.perf_counter() - self.start)

    def images_per_s(self, step: int) -> float:
        """Mean rate since ``restart``: the start of the run, its resumption, or a change of the images' size."""
        images = (step - self.first) * self.plan.stage(self.first).images_per_step
        return images / (time.perf_counter() - self.start)

    def _seconds_left(self, step: int) -> float:
        """At the rate so far, in pixels."""
        done, pixels = self.plan.pixels(self.first), self.plan.pixels(step)
        left = self.plan.pixels(self.plan.total_steps) - pixels
        return left * (time.perf_counter() - self.start) / (pixels - done)

    def update(self, step: int, lr: float, loss: float | None, skipped: int) -> None:
        """``step`` optimiser steps are done; ``loss`` is the mean since it was last given, or None between logs."""
        rate = self.images_per_s(step)
        self.fields |= {
            "epoch": f"{self.plan.epoch(step):.2f}",
            "lr": f"{lr:.2e}",
            "rate": f"{rate:.0f}",
            "waiting": f"{self.share_waiting():.1%}",
            "skipped": f"  {skipped} images skipped" if skipped else "",
        }
        if loss is not None:
            self.fields |= {"loss": f"{loss:.4f}", "memory": f"{peak_memory() / 2**30:.1f} GiB"}
        if self.bar:
            self.bar.update(self.task, completed=step, **self.fields)
        elif self.line:
            self.line.show(self._text(step), now=step == self.plan.total_steps)
        elif loss is not None and not self.quiet:
            logger.info(self._text(step))

    def _text(self, step: int) -> str:
        text = (
            "epoch {epoch:>6}  step {step}/{total}  loss {loss}  lr {lr}  {rate} images/s  waiting {waiting}  "
            "{memory}  ETA {left:.0f} s{skipped}"
        )
        return text.format(step=step, total=self.plan.total_steps, left=self._seconds_left(step), **self.fields)


def peak_memory() -> int:
    """Bytes: the most that this process has had on its GPU, or else in memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return resident("VmHWM")
