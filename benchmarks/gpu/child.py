"""One contender, in a process of its own, which does one thing per message.

A contender that runs out of memory, crashes or breaks the CUDA context then takes no other with it, and memory is what
it alone takes. Between its turns it holds weights and the optimiser's state only, but for a graph's own memory.
"""

import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.report import Report
from mae_fast.bench.contenders import Step, images

GATE_STEPS = 14  # the last of them are replays: a graph is captured after 11
TOP_KERNELS = 15

Build = Callable[..., Step]
Request = Literal["prepare", "turn", "memory", "launches"]


@dataclass(frozen=True)
class Case:
    """One model at one batch size, and who takes part; ``left_out`` says who does not, and why."""

    model: str
    batch: int
    contenders: tuple[str, ...]
    left_out: str = ""
    device: str = "cuda"
    steps: int = 10  # in a turn

    def __str__(self) -> str:
        return f"train {self.model} batch {self.batch} bf16"


class Worker:
    """The child's side: what it answers to each request."""

    def __init__(self, name: str, case: Case, build: Build) -> None:
        self.name, self.case, self.build = name, case, build

    def prepare(self) -> list[float]:
        """Build, compile, capture; the losses of the first steps, from the same weights, images and masks for all."""
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32; bf16 products do not heed it
        x = images(self.case.model, self.case.batch).to(self.case.device)
        patches = 64 if self.case.model == "tiny" else 256 if self.case.model == "huge" else 196
        noise = torch.rand(len(x), patches, generator=torch.Generator().manual_seed(1)).to(x.device)
        contender, bf16 = ("reference", False) if self.name == "truth" else (self.name, True)
        self.step = self.build(contender, self.case.model, x, bf16, noise=noise)
        losses = [self.step() for _ in range(GATE_STEPS)]
        self.settle()
        return [float(loss) for loss in losses]

    def turn(self) -> float:
        """Seconds per step, in a row as training takes them, after two that are not timed."""
        for _ in range(2):
            self.step()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(self.case.steps):
            self.step()
        self.synchronize()
        seconds = (time.perf_counter() - start) / self.case.steps
        self.settle()
        return seconds

    def memory(self) -> int | None:
        """Bytes that a step takes from the GPU at its peak, caches and graphs included; of this process."""
        if self.case.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self.step()
        self.synchronize()
        peak = torch.cuda.max_memory_reserved()
        self.settle()
        return peak

    def launches(self) -> dict[str, Any] | None:
        """Of one step: what the host launched, kernels that ran, milliseconds in them, and the longest of them."""
        if self.case.device != "cuda":
            return None
        self.step()  # not the first after memory was given back
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self.step()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        return count_launches(events)

    def synchronize(self) -> None:
        if self.case.device == "cuda":
            torch.cuda.synchronize()

    def settle(self) -> None:
        """Give the memory back that the next contender's turn may need."""
        if self.case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def count_launches(events: list[dict[str, Any]]) -> dict[str, Any]:
    """From the events of a trace of one step."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        raise RuntimeError("the profiler saw no kernels")
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "Launch" in e["name"]]
    us: Counter[str] = Counter()
    for kernel in kernels:
        us[kernel["name"]] += kernel["dur"]
    times = Counter(kernel["name"] for kernel in kernels)
    longest = [{"kernel": name[:100], "count": times[name], "ms": t / 1e3} for name, t in us.most_common(TOP_KERNELS)]
    return {"launches": len(calls), "kernels": len(kernels), "kernel ms": us.total() / 1e3, "longest": longest}


def serve(pipe: Connection, name: str, case: Case, build: Build) -> None:
    """Answer requests until the parent is gone."""
    if case.device == "cpu":
        torch.set_num_threads(1)  # a dry run's models are so small that threads mostly wait for each other
    worker = Worker(name, case, build)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            answer = "done", getattr(worker, request)()
        except Exception as error:  # whatever a contender may raise is a result
            missing = isinstance(error, ImportError) and not name.startswith("mae_fast")
            answer = "skipped" if missing else "failed", one_line(error)
        if answer[0] != "done":  # what the traceback held can go now
            gc.collect()
            with suppress(Exception):
                worker.settle()
        pipe.send(answer)


def one_line(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    said = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0].strip() if said else 'no message'}"[:300]


class Children:
    """The contenders of a case that are still in it, each a process."""

    def __init__(self, case: Case, names: list[str], report: Report, build: Build) -> None:
        self.case, self.report = case, report
        context = get_context("spawn")
        self.pipes: dict[str, Connection] = {}
        self.processes = {}
        for name in names:
            self.pipes[name], theirs = context.Pipe()
            self.processes[name] = context.Process(target=serve, args=(theirs, name, case, build), daemon=True)
            self.processes[name].start()
            theirs.close()  # so that a child that dies is an EOFError here

    def ask(self, request: Request, deadline: float, at_once: int = 1) -> dict[str, Any]:
        """The answers by contender, ``at_once`` of them at work at a time; those who give none are out, told of.

        Who runs out of memory beside others is asked again alone.
        """
        answers, again = self._ask(list(self.pipes), request, deadline, at_once)
        if again:
            answers |= self._ask(again, request, deadline, 1)[0]
        return answers

    def _ask(
        self, waiting: list[str], request: Request, deadline: float, at_once: int
    ) -> tuple[dict[str, Any], list[str]]:
        asked: dict[Any, str] = {}
        answers: dict[str, Any] = {}
        again: list[str] = []
        while waiting or asked:
            while waiting and len(asked) < at_once:
                name = waiting.pop(0)
                asked[self.pipes[name]] = name
                with suppress(OSError):  # a dead one shows below
                    self.pipes[name].send(request)
            ready = wait(asked, max(0.0, deadline - time.monotonic()))
            if not ready:
                for name in (*asked.values(), *waiting):
                    self.drop(name, request, "left out", "not done within the budget")
                break
            for pipe in ready:
                name = asked.pop(pipe)
                try:
                    kind, answer = pipe.recv()
                except (EOFError, OSError):
                    self.processes[name].join()
                    kind, answer = "failed", f"its process ended with exit code {self.processes[name].exitcode}"
                if kind == "done":
                    answers[name] = answer
                elif at_once > 1 and answer.startswith("OutOfMemoryError"):
                    again.append(name)
                else:
                    self.drop(name, request, kind, answer)
        return answers, again

    def drop(self, name: str, doing: str, kind: str, why: str) -> None:
        """End a contender's process, and report why."""
        self.report.lack(kind, f"{self.case}: {name}: {doing}", why)
        self.end(name, patience=0 if kind == "left out" else 10)

    def end(self, *names: str, patience: float = 10) -> None:
        """End contenders' processes, which are not needed any more: by themselves if they do so soon."""
        for name in names:
            self.pipes.pop(name).close()
        for name in names:
            self.processes[name].join(patience)
            self.processes[name].kill()
            self.processes[name].join()

    def close(self) -> None:
        """End all that are left."""
        self.end(*self.pipes)
