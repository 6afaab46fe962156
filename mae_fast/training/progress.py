"""Show the progress of a run: a bar in a terminal, a line updated in place in a notebook, plain lines elsewhere."""

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
    """A line of text below a notebook cell, updated in place. It needs no widgets, and is saved with the notebook."""

    def __init__(self) -> None:
        from IPython.display import display

        self.handle = display({"text/plain": "starting"}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        self.shown_at = 0.0

    def show(self, text: str, now: bool) -> None:
        """Show ``text``, at most every half second unless ``now``."""
        if now or time.perf_counter() - self.shown_at > 0.5:
            self.handle.update({"text/plain": text}, raw=True)
            self.shown_at = time.perf_counter()


class Progress:
    """Call ``update`` after each step. The loss is shown only when it is logged, so that steps need not wait for it."""

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
        """Measure rates from now on, after ``step`` steps."""
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
        """Context for waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context for anything but training. Rates do not count its time."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def share_waiting(self) -> float:
        """Share of the time since ``restart`` that training spent waiting for data."""
        return self.waited / (time.perf_counter() - self.start)

    def images_per_s(self, step: int) -> float:
        """Mean images per second since ``restart``: since the run started, resumed, or changed the image size."""
        images = (step - self.first) * self.plan.stage(self.first).images_per_step
        return images / (time.perf_counter() - self.start)

    def _seconds_left(self, step: int) -> float:
        """Estimated time left, at the mean pixels per second so far."""
        done, pixels = self.plan.pixels(self.first), self.plan.pixels(step)
        left = self.plan.pixels(self.plan.total_steps) - pixels
        return left * (time.perf_counter() - self.start) / (pixels - done)

    def update(self, step: int, lr: float, loss: float | None, skipped: int) -> None:
        """Show that ``step`` optimizer steps are done. ``loss``: the mean since the last log, or None between logs."""
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
    """Peak memory of this process in bytes, on its GPU if it uses one."""
    import torch

    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return resident("VmHWM")
