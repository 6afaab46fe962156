"""One contender, in a process of its own, which does one thing per message.

No contender then runs on the heap, the settings or the pages of another, memory is what it alone takes, and one that
runs out of it takes no other with it.
"""

import logging
import math
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..memory import raise_mmap_threshold
from .case import Case
from .contenders import EAGER, Step, build, images, noise
from .gemm_lower_bound import gemm_lower_bound
from .timing import peak_memory

GATE_STEPS = 2  # of training: the second loss depends on every gradient and on the update
LEAST_SECONDS = 0.2  # of a turn
GEMM_LOWER_BOUND = "products"  # the name of what is no contender: the step's matrix products alone
GRAPH_STEPS = 13  # after which a graph is captured


class Unavailable(Exception):
    """There is no figure, in a line why."""


class Prepared(NamedTuple):
    """What a contender says before it is timed: what it must agree on, and ``peak_memory``."""

    results: list[np.ndarray]
    memory: dict[str, int]


@dataclass
class Worker:
    """The child's side: what it answers to each request."""

    name: str
    case: Case

    def gate(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What is right, in fp32, and what eager torch makes of it in the case's dtype."""
        eager = EAGER.get(self.case.task, "reference")
        truth = self._results(self._build(eager, bf16=False))
        if self.case.dtype == "fp32":
            return truth, truth
        return truth, self._results(self._build(eager, bf16=True))

    def prepare(self) -> Prepared:
        """Build and compile; the first results, and the memory of a step."""
        if self.name == GEMM_LOWER_BOUND:
            self.take: Any = gemm_lower_bound(self._build("mae_fast", self.case.bf16), self.case.dtype)
            results, memory = [], {}
        else:
            step = self._build(self.name, self.case.bf16)
            self.take = step
            results = self._results(step)
            for _ in range(GRAPH_STEPS if "graph" in self.name else 0):
                step()
            memory = peak_memory(step, lambda: step(keep_gradients=True))
        self.steps = math.ceil(LEAST_SECONDS / self._seconds(1))
        return Prepared(results, memory)

    def turn(self) -> float:
        """Seconds of a step, of as many in a row as take a while."""
        if self.case.device == "cuda":
            self._seconds(2)  # memory was given back
        seconds = self._seconds(self.steps) / self.steps
        if self.case.device == "cuda":
            torch.cuda.empty_cache()  # the next contender may need it
        return seconds

    def _seconds(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.take()
        if self.case.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _build(self, name: str, bf16: bool) -> Step:
        case = self.case
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 for everyone; torch's matrix products have it so anyway
        x = images(case.model, case.batch, case.image_size).to(case.device)
        masks = noise(case.model, case.batch, case.image_size).to(case.device)
        return build(name, case.model, x, bf16, case.task, masks, case.mask_ratio)

    def _results(self, step: Step) -> list[np.ndarray]:
        count = GATE_STEPS if self.case.trains else 1
        return [step(exact=True).float().cpu().numpy() for _ in range(count)]


class Child:
    """A process with a ``Worker``.

    Args:
        deadline: on ``time.monotonic``, of each of its answers.
    """

    def __init__(self, name: str, case: Case, deadline: float) -> None:
        self.name, self.deadline = name, deadline
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, case), daemon=True)
        self.process.start()
        theirs.close()  # so that a child that dies is an EOFError here

    def ask(self, request: str) -> Any:
        """Its answer.

        Raises:
            Unavailable: if it cannot give one, or not in time.
        """
        try:
            self.pipe.send(request)
            if not self.pipe.poll(max(0.0, self.deadline - time.monotonic())):
                raise Unavailable("not done in time; give more --minutes")
            done, answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            why = f"its process died (exit status {self.process.exitcode}), of lack of memory perhaps"
            raise Unavailable(why) from error
        if not done:
            raise Unavailable(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        if time.monotonic() < self.deadline:
            self.process.join(10)
        self.process.kill()
        self.process.join()


def serve(pipe: Connection, name: str, case: Case) -> None:
    """Answer requests until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and the parent ends its children
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, this process does, not its parent
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile's word on a missing GPU
    raise_mmap_threshold()  # for every contender
    worker = Worker(name, case)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(worker, request)()
        except Exception as error:  # whatever a contender may raise is a result
            answer = False, one_line(error)
        pipe.send(answer)


def one_line(error: Exception) -> str:
    """An error's type and the first line of what it says; of a package that is missing, how to get it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed: pip install {error.name.partition('.')[0]}"
    said = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0].strip() if said else 'no message'}"[:300]
