"""The process that measures one contender: for ``mae-fast bench``, ``benchmarks/gpu`` and the cost of ablations.

A contender has a process of its own, so it shares no heap, settings or memory pages with another. Its memory is what it
alone takes, and running out of memory ends no other contender.
"""

import gc
import logging
import math
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..memory import raise_mmap_threshold
from . import contenders
from .case import Case
from .contenders import EAGER, Step, images, noise
from .gemm_lower_bound import gemm_lower_bound
from .timing import peak_memory

GATE_STEPS = 2  # of training: the second loss depends on every gradient and on the update
LEAST_SECONDS = 0.2  # of a turn
GEMM_LOWER_BOUND = "products"  # not a contender: the matrix products of the step alone
GRAPH_STEPS = 13  # after which a graph is captured
Gate = tuple[list[np.ndarray], list[np.ndarray]]


class Unavailable(Exception):
    """A figure that cannot be measured, and the reason in one line.

    Attributes:
        kind: "failed"; "skipped" if another project's package is not installed; "left out" if the time is up.
    """

    def __init__(self, reason: str, kind: str = "failed") -> None:
        super().__init__(reason)
        self.kind = kind


class StepTimer:
    """Times a step in this process.

    Attributes:
        step: the timed function.
        steps: repetitions in a turn.
        device: "cpu" or "cuda".
    """

    step: Callable[..., object]
    steps = 1
    device = "cpu"

    def turn(self) -> float:
        """Seconds per step, averaged over ``steps`` in a row."""
        if self.device == "cuda":
            self._seconds(2)  # allocate again what the last turn released
        seconds = self._seconds(self.steps) / self.steps
        release_memory()  # for the next contender
        return seconds

    def fill_turn(self) -> None:
        """Set ``steps`` so that a turn takes ``LEAST_SECONDS``."""
        self.steps = math.ceil(LEAST_SECONDS / self._seconds(1))

    def _seconds(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def release_memory() -> None:
    """Return the cached memory of a GPU."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Prepared(NamedTuple):
    """The results that contenders must agree on, and ``peak_memory``."""

    results: list[np.ndarray]
    memory: dict[str, int]


@dataclass
class Contender(StepTimer):
    """A contender of a benchmark case, by its name in ``contenders``."""

    name: str
    case: Case
    builder: Callable[..., Step] = contenders.build

    def __post_init__(self) -> None:
        self.device = self.case.device

    def gate(self) -> Gate:
        """The results of eager torch in fp32, and in the dtype of the case. The name may have a predict ratio."""
        eager = EAGER.get(self.case.task, "reference") + self.name.removeprefix("gate")
        truth = self._results(self.build(eager, bf16=False))
        if self.case.dtype == "fp32":
            return truth, truth
        return truth, self._results(self.build(eager, bf16=True))

    def prepare(self) -> Prepared:
        """Build and compile the step, take the first results, and measure the memory of a step."""
        results: list[np.ndarray] = []
        memory: dict[str, int] = {}
        if self.name == GEMM_LOWER_BOUND:
            self.step = gemm_lower_bound(self.build("mae_fast", self.case.bf16), self.case.dtype)
        else:
            step = self.step = self.build(self.name, self.case.bf16)
            results = self._results(step)
            for _ in range(GRAPH_STEPS if "graph" in self.name else 0):
                step()
            memory = peak_memory(step, lambda: step(keep_gradients=True))
        self.fill_turn()
        return Prepared(results, memory)

    def build(self, name: str, bf16: bool) -> Step:
        """The step of the contender called ``name``; all get the same weights, images and masks."""
        case = self.case
        torch.backends.cudnn.allow_tf32 = False  # torch's matrix products do not use it by default
        x = images(case.model, case.batch, case.image_size).to(case.device)
        masks = noise(case.model, case.batch, case.image_size).to(case.device)
        return self.builder(name, case.model, x, bf16, case.task, masks, case.mask_ratio)

    def _results(self, step: Step) -> list[np.ndarray]:
        count = GATE_STEPS if self.case.trains else 1
        return [step(exact=True).float().cpu().numpy() for _ in range(count)]


class Worker:
    """A process that makes ``contender(*args)`` and calls its methods.

    Args:
        deadline: of each answer, on ``time.monotonic``.
    """

    def __init__(self, name: str, contender: Callable[..., Any], *args: Any, deadline: float | None = None) -> None:
        self.name, self.deadline = name, deadline
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, contender, args), daemon=True)
        self.process.start()
        theirs.close()  # reading from the pipe of a dead process is then an EOFError

    def ask(self, method: str, *args: Any) -> Any:
        """The result of a method of the contender.

        Raises:
            Unavailable: if there is none, or not in time.
        """
        try:
            self.pipe.send((method, args))
            if not self.pipe.poll(None if self.deadline is None else max(0.0, self.deadline - time.monotonic())):
                raise Unavailable("not done in time", "left out")
            failure, answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            why = f"its process died (exit status {self.process.exitcode}), perhaps out of memory"
            raise Unavailable(why) from error
        if failure:
            raise Unavailable(answer, failure)
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        if self.deadline is None or time.monotonic() < self.deadline:
            self.process.join(10)
        self.process.kill()
        self.process.join()


def serve(pipe: Connection, contender: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Call the methods that the parent asks for, until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the kernel then ends this process, not its parent
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile warns of a missing GPU
    raise_mmap_threshold()  # for every contender
    made = contender(*args)
    while True:
        try:
            method, of_method = pipe.recv()
        except EOFError:
            return
        answer: tuple[str | None, Any]
        try:
            answer = None, getattr(made, method)(*of_method)
        except Exception as error:  # any error of a contender is a result
            missing = isinstance(error, ImportError) and not str(getattr(made, "name", "")).startswith("mae_fast")
            answer = "skipped" if missing else "failed", one_line(error)
        if answer[0]:
            gc.collect()  # the traceback's objects
            with suppress(Exception):
                release_memory()
        pipe.send(answer)


def take_turns(
    workers: dict[str, Worker],
    rounds: int,
    deadline: float,
    drop: Callable[[str, Unavailable], object],
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds per step by worker and round, after ``warmup`` uncounted rounds; fewer rounds after ``deadline``.

    Args:
        drop: called with the name and the error of a worker that fails; it takes no more turns.
    """
    times: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(warmup + rounds):
        if number > warmup and time.monotonic() > deadline:
            break
        for name in list(times):
            try:
                seconds = workers[name].ask("turn")
            except Unavailable as error:
                drop(name, error)
                del times[name]
                continue
            if number >= warmup:
                times[name].append(seconds)
    complete = min(map(len, times.values()), default=0)
    return {name: found[:complete] for name, found in times.items() if complete}


def one_line(error: Exception) -> str:
    """The type of an error and the first line of its message; for a missing package, how to install it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed: pip install {error.name.partition('.')[0]}"
    said = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0].strip() if said else 'no message'}"[:300]
