"""The process that measures one contender, for ``mae-fast bench``, ``benchmarks/gpu`` and the cost of ablations.

Each contender has its own process, so it shares neither heap nor settings with others. Its memory can be measured, and
if it runs out of memory, the other contenders continue.
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

GATE_STEPS = 2  # training steps that are compared; the second loss depends on all gradients and on the update
LEAST_SECONDS = 0.2  # duration of a turn
GEMM_LOWER_BOUND = "products"  # not a contender, but the matrix products of the step alone
GRAPH_STEPS = 13  # steps until a CUDA graph has been captured
Gate = tuple[list[np.ndarray], list[np.ndarray]]


class Unavailable(Exception):
    """A measurement is not available; the message is the reason in one line.

    Attributes:
        kind: "failed"; "skipped" if a package of a baseline is not installed; "left out" if the time limit is reached.
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
        """The mean seconds per step over ``steps`` consecutive steps."""
        if self.device == "cuda":
            self._seconds(2)  # allocate the memory again that the last turn released
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
    """Release the cached GPU memory of this process."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Prepared(NamedTuple):
    """The results on which all contenders must agree, and the result of ``peak_memory``."""

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
        """The results of eager torch in fp32, and in the dtype of the case. The name may include a predict ratio."""
        eager = EAGER.get(self.case.task, "reference") + self.name.removeprefix("gate")
        truth = self._results(self.build(eager, bf16=False))
        if self.case.dtype == "fp32":
            return truth, truth
        return truth, self._results(self.build(eager, bf16=True))

    def prepare(self) -> Prepared:
        """Build and compile the step, return its first results, and measure its memory."""
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
        """The step of the contender called ``name``. All contenders have the same weights, images and masks."""
        case = self.case
        torch.backends.cudnn.allow_tf32 = False  # as matrix products, which do not use TF32 by default
        x = images(case.model, case.batch, case.image_size).to(case.device)
        masks = noise(case.model, case.batch, case.image_size).to(case.device)
        return self.builder(name, case.model, x, bf16, case.task, masks, case.mask_ratio)

    def _results(self, step: Step) -> list[np.ndarray]:
        count = GATE_STEPS if self.case.trains else 1
        return [step(exact=True).float().cpu().numpy() for _ in range(count)]


class Worker:
    """A process that builds ``contender(*args)`` and calls its methods.

    Args:
        deadline: value of ``time.monotonic`` by which each call must return.
    """

    def __init__(self, name: str, contender: Callable[..., Any], *args: Any, deadline: float | None = None) -> None:
        self.name, self.deadline = name, deadline
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, contender, args), daemon=True)
        self.process.start()
        theirs.close()  # so that reading from the pipe of a dead process raises EOFError

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the contender and return its result.

        Raises:
            Unavailable: if the method fails, or does not return in time.
        """
        try:
            self.pipe.send((method, args))
            if not self.pipe.poll(None if self.deadline is None else max(0.0, self.deadline - time.monotonic())):
                raise Unavailable("time limit reached", "left out")
            failure, answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            why = f"the process died (exit status {self.process.exitcode}), probably out of memory"
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
    """Call the methods that the parent process requests, until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory, the kernel kills this process first
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile warns of a missing GPU
    raise_mmap_threshold()  # the same setting for all contenders
    made = contender(*args)
    while True:
        try:
            method, of_method = pipe.recv()
        except EOFError:
            return
        answer: tuple[str | None, Any]
        try:
            answer = None, getattr(made, method)(*of_method)
        except Exception as error:  # report any error of a contender
            missing = isinstance(error, ImportError) and not str(getattr(made, "name", "")).startswith("mae_fast")
            answer = "skipped" if missing else "failed", one_line(error)
        if answer[0]:
            gc.collect()  # free the objects of the traceback
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
    """The seconds per step by worker and round, after ``warmup`` rounds that do not count.

    Args:
        deadline: value of ``time.monotonic`` after which no further round starts.
        drop: called with the name and error of a worker that fails. The worker takes no more turns.
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
    """The type of an error and the first line of its message. For a missing package, how to install it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed: pip install {error.name.partition('.')[0]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
