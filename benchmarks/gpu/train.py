"""Training steps of mae_fast and of its baselines: check the losses, time in turns, measure memory, launches and MFU.

Contenders are prepared three at a time, because compiling takes longer than everything else. Timing begins when all of
them are ready and nothing else runs.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu.contender import GpuContender, Plan
from benchmarks.gpu.report import Report
from mae_fast.bench.contenders import MODELS, Step
from mae_fast.bench.contenders import build as build_contender
from mae_fast.bench.predict import GPUS
from mae_fast.bench.timing import ratio
from mae_fast.bench.worker import Unavailable, Worker, take_turns
from mae_fast.models.flops import Sizes, train_flops
from mae_fast.models.sizes import MAE_ALIASES, MAE_CONFIGS

ROUNDS = 5
PREPARED_AT_ONCE = 3
PREPARING = 0.75  # share of a plan's time; contenders that are not ready then are left out
ROUNDING = 2e-3  # relative error of a loss that is always allowed, as in the tests in bf16

OURS = ("mae_fast", "mae_fast compiled", "mae_fast CUDA graph")
BASELINES = ("reference", "reference compiled", "transformers", "transformers compiled")
PLANS = (
    Plan("base", 256, OURS + BASELINES),
    Plan("large", 128, OURS + BASELINES, steps=6),
    Plan(
        "huge",
        64,
        ("mae_fast", "mae_fast CUDA graph", "reference", "reference compiled", "transformers compiled"),
        "mae_fast compiled, transformers (memory: each holds 8 GB of state while others run)",
        steps=4,
    ),
)
DRY_RUN = Plan(
    "tiny",
    4,
    ("mae_fast", "mae_fast CUDA graph", "reference", "reference compiled", "transformers"),
    "mae_fast compiled, transformers compiled (one contender that compiles is enough to try all of this)",
    device="cpu",
    steps=2,
)
SIZES = {name: Sizes.of_config(MAE_CONFIGS[MAE_ALIASES[model]]) for name, model in MODELS.items()}
PEAKS = {gpu.name: gpu.peak for gpu in GPUS.values()}  # dense bf16 FLOP/s


class Workers:
    """The contenders of a plan, each in a worker process. One that fails is reported, ended and removed."""

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
        """The losses of all, prepared several at a time; one that runs out of memory is prepared again alone."""
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
        """The answers of the contenders called ``names``, or of all, one after the other."""
        found = {}
        for name in names or list(self.running):
            try:
                found[name] = self.running[name].ask(method)
            except Unavailable as error:
                self.drop(name, method, error)
        return found

    def drop(self, name: str, method: str, error: Unavailable) -> None:
        """Report the error of a contender, and end its process."""
        self.report.lack(error.kind, f"{self.plan}: {name}: {method}", str(error))
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
    settle: Callable[[], object] = lambda: None,
    build: Callable[..., Step] = build_contender,
) -> dict[str, dict[str, Any]]:
    """A row for each contender that agrees with eager torch and was timed; the others are reported.

    Args:
        settle: called before anything is timed: waits for other work on the machine.
    """
    if plan.left_out:
        report.lack("left out", str(plan), plan.left_out)
    names = [name for name in plan.contenders if plan.device == "cuda" or not name.endswith("CUDA graph")]
    for name in set(plan.contenders) - set(names):
        report.lack("skipped", f"{plan}: {name}", "a CPU has no CUDA graphs")
    names.sort(key=lambda name: "compiled" not in name)  # compiling takes longest
    start = time.monotonic()
    workers = Workers(plan, ["truth", *names], report, start + PREPARING * (deadline - start), build)
    try:
        losses = workers.losses()
        settle()
        for name, why in gate(losses).items():
            workers.drop(name, "gate", Unavailable(why, "refused"))
        if "truth" in workers.running:
            workers.running.pop("truth").close()
        for worker in workers.running.values():
            worker.deadline = deadline
        times = take_turns(
            workers.running.copy(), rounds, deadline, lambda name, error: workers.drop(name, "turn", error), warmup=0
        )
        counted = len(next(iter(times.values()), ()))
        if 0 < counted < rounds:
            report.lack("left out", f"{plan}: rounds after the first {counted}", "the budget is spent")
        memory = workers.ask("memory")
        launches = workers.ask("launches")
    finally:
        workers.close()
    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else ""
    return {
        name: row(name, times, plan, PEAKS.get(gpu))
        | {"memory": memory.get(name), "losses": losses[name]}
        | (launches.get(name) or {})
        for name in plan.contenders
        if name in times
    }


def gate(losses: dict[str, list[float]]) -> dict[str, str]:
    """By contender, the reason not to time it. A contender passes if at each of the first steps

        |loss - truth| <= 2 |eager - truth| + 0.002 |truth|

    where truth is eager torch in fp32, and eager in bf16. Later losses depend on all gradients and updates.
    """
    if missing := {"truth", "reference"} - losses.keys():
        return {name: f"nothing to hold it to: no losses of {' and '.join(sorted(missing))}" for name in losses}
    refused = {}
    for name, found in losses.items():
        pairs = zip(found, losses["reference"], losses["truth"], strict=True)
        for step, (loss, eager, truth) in enumerate(pairs):
            allowed = 2 * abs(eager - truth) + ROUNDING * abs(truth)
            if not abs(loss - truth) <= allowed:  # NaN is refused, too
                refused[name] = f"loss {loss:.6f} at step {step}, fp32 has {truth:.6f}, eager bf16 {eager:.6f}"
                break
    return refused


def row(name: str, times: dict[str, list[float]], plan: Plan, peak: float | None) -> dict[str, Any]:
    """Median time, rate, MFU where the GPU's peak is known, and the ratio against every baseline: above 1 is faster."""
    ms = statistics.median(times[name]) * 1e3
    rate = plan.batch / ms * 1e3
    flops = train_flops(SIZES[plan.model]).total
    found = {"ms": ms, "rounds ms": [t * 1e3 for t in times[name]], "images/s": rate}
    found["MFU"] = rate * flops / peak if peak else None
    others = [other for other in times if other in BASELINES and other != name]
    return found | {f"vs {other}": ratio(times, other, name) for other in others}


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """The rows as a table."""
    baselines = [name for name in rows if name in BASELINES]
    print(
        f"\n{title}\n{'':22}{'step':>10}{'images/s':>10}{'MFU':>7}{'memory':>11}{'launches':>9}{'kernels':>8}"
        f"   times faster than {', '.join(baselines)}"
    )
    for name, found in rows.items():
        mfu, memory = found["MFU"], found["memory"]
        print(
            f"{name:22}{found['ms']:7.1f} ms{found['images/s']:10.1f}"
            + (f"{mfu:7.1%}" if mfu else f"{'-':>7}")
            + (f"{memory / 2**30:7.2f} GiB" if memory else f"{'-':>11}")
            + f"{found.get('launches', '-'):>9}{found.get('kernels', '-'):>8}   "
            + ", ".join(f"{found[f'vs {baseline}']:.2f}" if baseline != name else "-" for baseline in baselines),
            flush=True,
        )
