"""Training steps of mae_fast and its baselines: checks losses, times steps in turns, measures memory, launches and MFU.

Three contenders are prepared at a time, because compiling takes longer than all other work. Contenders that need no
compiler come first. Timing starts when all contenders are ready; those that are not ready in time are left out.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu.contender import GpuContender, Plan, model_flops
from benchmarks.gpu.report import Report
from mae_fast.bench.contenders import Step
from mae_fast.bench.contenders import build as build_contender
from mae_fast.bench.predict import GPUS
from mae_fast.bench.timing import ratio
from mae_fast.bench.worker import Unavailable, Worker, one_line, take_turns

ROUNDS = 5
PREPARED_AT_ONCE = 3
PREPARING = 0.8  # share of a plan's time limit in which contenders must be ready
ROUNDING = 2e-3  # relative error of a loss that is always allowed, as in the tests in bf16

OURS = ("mae_fast", "mae_fast CUDA graph")
COMPILED = ("reference compiled", "transformers compiled", "timm blocks compiled")
PLANS = (
    Plan("base", 256, (*OURS, "reference", *COMPILED), 210),
    Plan("base", 512, (*OURS, "reference", *COMPILED[:2]), 120),
    Plan("base", 256, ("mae_fast CUDA graph", "reference", "reference max-autotune", "mae_fast compiled"), 150),
    Plan("large", 128, (*OURS, "reference", "reference compiled"), 110, steps=6),
)
DRY_RUN = Plan("tiny", 4, (*OURS, "reference", "transformers"), 360, device="cpu", steps=2)
PEAKS = {gpu.name: gpu.peak for gpu in GPUS.values()}  # dense bf16 FLOP/s


def run(report: Report, dry_run: bool) -> None:
    """Measure the plans in order, until the time limit."""
    for plan in (DRY_RUN,) if dry_run else PLANS:
        if report.left < 0.2 * plan.seconds:
            report.note_missing("left out", str(plan), "time limit reached")
            continue
        report.log(str(plan))
        try:
            show(str(plan), measure(plan, report, report.within(plan.seconds)))
        except Exception as error:  # of any type, so that the other plans still run
            report.note_missing("failed", str(plan), one_line(error))


class Workers:
    """The contenders of a plan, each in a worker process. A failed contender is reported, ended and removed."""

    def __init__(
        self,
        plan: Plan,
        names: list[str],
        report: Report,
        deadline: float,
        build: Callable[..., Step],
    ) -> None:
        self.plan, self.report = plan, report
        self.running = {
            name: Worker(name, GpuContender, name, plan.case, build, plan.steps, deadline=deadline) for name in names
        }

    def losses(self) -> dict[str, list[float]]:
        """The losses of all contenders. Several are prepared at once; one that runs out of memory is retried alone."""
        with ThreadPoolExecutor(PREPARED_AT_ONCE) as pool:
            asked = {name: pool.submit(worker.ask, "losses") for name, worker in self.running.items()}
        found = {}
        for name, future in asked.items():
            try:
                found[name] = future.result()
            except Unavailable as error:
                if str(error).startswith("OutOfMemoryError"):
                    found |= self.ask("losses", name)
                else:
                    self.drop(name, "losses", error)
        return found

    def ask(self, method: str, *names: str) -> dict[str, Any]:
        """Call a method of the contenders called ``names``, or of all contenders, one after the other."""
        found = {}
        for name in names or list(self.running):
            try:
                found[name] = self.running[name].ask(method)
            except Unavailable as error:
                self.drop(name, method, error)
        return found

    def drop(self, name: str, method: str, error: Unavailable) -> None:
        """Report the error of a contender, and end its process."""
        self.report.note_missing(error.kind, f"{self.plan}: {name}: {method}", str(error))
        self.running.pop(name).close()

    def close(self) -> None:
        """End all processes."""
        for worker in self.running.values():
            worker.pipe.close()  # they end at the same time
        for worker in self.running.values():
            worker.close()


def measure(
    plan: Plan,
    report: Report,
    deadline: float,
    rounds: int = ROUNDS,
    build: Callable[..., Step] = build_contender,
) -> dict[str, dict[str, Any]]:
    """Measure a plan. Contenders that fail, or do not agree with eager torch, are reported.

    The results are stored after each round.

    Returns:
        The results by contender.
    """
    names = [name for name in plan.contenders if plan.device == "cuda" or not name.endswith("CUDA graph")]
    for name in set(plan.contenders) - set(names):
        report.note_missing("skipped", f"{plan}: {name}", "there are no CUDA graphs on a CPU")
    names.sort(key=needs_compiler)
    start = time.monotonic()
    workers = Workers(plan, ["truth", *names], report, start + PREPARING * (deadline - start), build)
    times: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    try:
        losses = workers.losses()
        for name, why in gate(losses).items():
            workers.drop(name, "gate", Unavailable(why, "refused"))
        if "truth" in workers.running:
            workers.running.pop("truth").close()
        for worker in workers.running.values():
            worker.deadline = deadline
        for number in range(rounds):
            if number and time.monotonic() > deadline:
                report.note_missing("left out", f"{plan}: rounds after the first {number}", "time limit reached")
                break
            turn = take_turns(workers.running.copy(), 1, deadline, dropping(workers), warmup=0)
            times = {name: times.get(name, []) + found for name, found in turn.items()}
            rows = {name: row(name, times, plan, losses[name]) for name in plan.contenders if name in times}
            report.keep(str(plan), rows)
        for method in ("memory", "launches"):
            for name, found in workers.ask(method).items():
                rows[name] |= found if isinstance(found, dict) else {method: found}
            report.keep(str(plan), rows)
    finally:
        workers.close()
    return rows


def needs_compiler(name: str) -> bool:
    return name.endswith(("compiled", "max-autotune"))


def dropping(workers: Workers) -> Callable[[str, Unavailable], None]:
    return lambda name, error: workers.drop(name, "turn", error)


def gate(losses: dict[str, list[float]]) -> dict[str, str]:
    """The contenders with wrong losses, and the reasons. A contender passes if at each of the first steps

        |loss - truth| <= 2 |eager - truth| + 0.002 |truth|

    where truth is the loss of eager torch in fp32, and eager that in bf16. Later losses depend on all gradients and
    updates.
    """
    if missing := {"truth", "reference"} - losses.keys():
        return {name: f"cannot be checked: no losses of {' and '.join(sorted(missing))}" for name in losses}
    refused = {}
    for name, found in losses.items():
        pairs = zip(found, losses["reference"], losses["truth"], strict=True)
        for step, (loss, eager, truth) in enumerate(pairs):
            allowed = 2 * abs(eager - truth) + ROUNDING * abs(truth)
            if not abs(loss - truth) <= allowed:  # also if it is NaN
                refused[name] = f"loss {loss:.6f} at step {step}; eager fp32 {truth:.6f}, eager bf16 {eager:.6f}"
                break
    return refused


def row(name: str, times: dict[str, list[float]], plan: Plan, losses: list[float]) -> dict[str, Any]:
    """The median time, rate, MFU if the peak of the GPU is known, and speedup over each baseline."""
    ms = statistics.median(times[name]) * 1e3
    rate = plan.batch / ms * 1e3
    peak = PEAKS.get(torch.cuda.get_device_name()) if plan.device == "cuda" and torch.cuda.is_available() else None
    found = {"ms": ms, "rounds ms": [t * 1e3 for t in times[name]], "images/s": rate, "losses": losses}
    found["MFU"] = rate * model_flops(plan.model) / peak if peak else None
    others = [other for other in times if not other.startswith("mae_fast") and other != name]
    return found | {f"vs {other}": ratio(times, other, name) for other in others}


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print the results as a table."""
    baselines = [name for name in rows if not name.startswith("mae_fast")]
    print(f"\n{title}\n{'':24}{'step':>10}{'images/s':>10}{'MFU':>7}   speedup over {', '.join(baselines)}")
    for name, found in rows.items():
        mfu = f"{found['MFU']:.1%}" if found["MFU"] else "-"
        faster = ", ".join(f"{found[f'vs {other}']:.2f}" if other != name else "-" for other in baselines)
        print(f"{name:24}{found['ms']:7.1f} ms{found['images/s']:10.1f}{mfu:>7}   {faster}", flush=True)
