"""Training steps of mae_fast and of its rivals: prepared, gated, timed in turn; memory, launches, MFU.

Contenders are prepared three at a time, because compiling takes longer than everything else; nothing is timed until
all of them are ready and nothing else runs.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.child import Build, Case, Children
from benchmarks.gpu.report import Report
from mae_fast.bench.contenders import MODELS
from mae_fast.bench.contenders import build as build_contender
from mae_fast.bench.predict import GPUS
from mae_fast.bench.timing import ratio
from mae_fast.models.flops import Sizes, train_flops
from mae_fast.models.sizes import MAE_ALIASES, MAE_CONFIGS

ROUNDS = 5
PREPARED_AT_ONCE = 3
PREPARING = 0.75  # of a case's time, at most: who is ready then is timed
FLOOR = 2e-3  # of the gate, relative: that of the tests in bf16

OURS = ("mae_fast", "mae_fast compiled", "mae_fast CUDA graph")
RIVALS = ("reference", "reference compiled", "transformers", "transformers compiled")
CASES = (
    Case("base", 256, OURS + RIVALS),
    Case("large", 128, OURS + RIVALS, steps=6),
    Case(
        "huge",
        64,
        ("mae_fast", "mae_fast CUDA graph", "reference", "reference compiled", "transformers compiled"),
        "mae_fast compiled, transformers (memory: each holds 8 GB of state while others run)",
        steps=4,
    ),
)
DRY_RUN = Case(
    "tiny",
    4,
    ("mae_fast", "mae_fast CUDA graph", "reference", "reference compiled", "transformers"),
    "mae_fast compiled, transformers compiled (one contender that compiles is enough to try all of this)",
    device="cpu",
    steps=2,
)
SIZES = {name: Sizes.of_config(MAE_CONFIGS[MAE_ALIASES[model]]) for name, model in MODELS.items()}
PEAKS = {gpu.name: gpu.peak for gpu in GPUS.values()}  # dense bf16 FLOP/s


def measure(
    case: Case,
    report: Report,
    deadline: float,
    rounds: int = ROUNDS,
    settle: Callable[[], object] = lambda: None,
    build: Build = build_contender,
) -> dict[str, dict[str, Any]]:
    """A row for each contender that agrees with eager torch and was timed; the others are told of.

    Args:
        settle: called when everyone is prepared, before anything is timed: waits for what ran beside.
    """
    if case.left_out:
        report.lack("left out", str(case), case.left_out)
    names = [name for name in case.contenders if case.device == "cuda" or not name.endswith("CUDA graph")]
    for name in set(case.contenders) - set(names):
        report.lack("skipped", f"{case}: {name}", "a CPU has no CUDA graphs")
    names.sort(key=lambda name: "compiled" not in name)  # those who compile come first, as they take longest
    start = time.monotonic()
    children = Children(case, ["truth", *names], report, build)
    try:
        losses = children.ask("prepare", start + PREPARING * (deadline - start), PREPARED_AT_ONCE)
        settle()
        for name, why in gate(losses).items():
            if name in children.pipes:
                children.drop(name, "gate", "refused", why)
        if "truth" in children.pipes:
            children.end("truth")
        times = take_turns(children, rounds, deadline)
        memory = children.ask("memory", deadline)
        launches = children.ask("launches", deadline)
    finally:
        children.close()
    gpu = torch.cuda.get_device_name() if case.device == "cuda" else ""
    return {
        name: row(name, times, case, PEAKS.get(gpu))
        | {"memory": memory.get(name), "losses": losses[name]}
        | (launches.get(name) or {})
        for name in case.contenders
        if name in times
    }


def gate(losses: dict[str, list[float]]) -> dict[str, str]:
    """Who may not be timed, and why: the losses of the first steps are further from fp32's than eager bf16's allow.

    |loss - truth| <= 2 |eager - truth| + 0.002 |truth| at each step; later steps depend on all gradients and updates.
    """
    if missing := {"truth", "reference"} - losses.keys():
        return {name: f"nothing to hold it to: no losses of {' and '.join(sorted(missing))}" for name in losses}
    refused = {}
    for name, found in losses.items():
        pairs = zip(found, losses["reference"], losses["truth"], strict=True)
        for step, (loss, eager, truth) in enumerate(pairs):
            allowed = 2 * abs(eager - truth) + FLOOR * abs(truth)
            if not abs(loss - truth) <= allowed:  # NaN is refused, too
                refused[name] = f"loss {loss:.6f} at step {step}, fp32 has {truth:.6f}, eager bf16 {eager:.6f}"
                break
    return refused


def take_turns(children: Children, rounds: int, deadline: float) -> dict[str, list[float]]:
    """Seconds per step by contender and round, of those who took part in every round that there was time for."""
    times: dict[str, list[float]] = {name: [] for name in children.pipes}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            children.report.lack("left out", f"{children.case}: rounds after the first {number}", "the budget is spent")
            break
        for name, seconds in children.ask("turn", deadline).items():
            times[name].append(seconds)
    most = max(map(len, times.values()), default=0)
    return {name: found for name, found in times.items() if found and len(found) == most}


def row(name: str, times: dict[str, list[float]], case: Case, peak: float | None) -> dict[str, Any]:
    """Median time, rate, MFU where the GPU's peak is known, and the ratio against every rival: above 1, faster."""
    ms = statistics.median(times[name]) * 1e3
    rate = case.batch / ms * 1e3
    flops = train_flops(SIZES[case.model]).total
    found = {"ms": ms, "rounds ms": [t * 1e3 for t in times[name]], "images/s": rate}
    found["MFU"] = rate * flops / peak if peak else None
    rivals = [rival for rival in times if rival in RIVALS and rival != name]
    return found | {f"vs {rival}": ratio(times, rival, name) for rival in rivals}


def show(case: str, rows: dict[str, dict[str, Any]]) -> None:
    """The rows as a table."""
    rivals = [name for name in rows if name in RIVALS]
    print(
        f"\n{case}\n{'':22}{'step':>10}{'images/s':>10}{'MFU':>7}{'memory':>11}{'launches':>9}{'kernels':>8}"
        f"   times faster than {', '.join(rivals)}"
    )
    for name, found in rows.items():
        mfu, memory = found["MFU"], found["memory"]
        print(
            f"{name:22}{found['ms']:7.1f} ms{found['images/s']:10.1f}"
            + (f"{mfu:7.1%}" if mfu else f"{'-':>7}")
            + (f"{memory / 2**30:7.2f} GiB" if memory else f"{'-':>11}")
            + f"{found.get('launches', '-'):>9}{found.get('kernels', '-'):>8}   "
            + ", ".join(f"{found[f'vs {rival}']:.2f}" if rival != name else "-" for rival in rivals),
            flush=True,
        )
