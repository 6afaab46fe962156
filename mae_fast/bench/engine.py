"""Measures benchmark cases: checks that contenders agree, times them in turns, and stores the results in a folder."""

import json
import logging
import os
import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import memory as host_memory
from ..errors import UserError
from ..files import atomic_write
from .case import Case
from .contenders import BASELINES, predict_ratio, predicting
from .flops import flops
from .timing import code, commit, machine, versions
from .worker import GEMM_LOWER_BOUND, Contender, Gate, Prepared, Unavailable, Worker, take_turns

BASE = "mae_fast"
ROOM = 1.2  # another contender starts if the free memory is above ROOM times the largest peak so far
# Allowed relative error of a loss or of features, in addition to twice the error of eager torch.
ROUNDING = {"bf16": 2e-3, "fp32": 1e-4}
KEPT = {"cell", "machine", "versions", "rounds", "commit", "missing", "rows"}

logger = logging.getLogger(__name__)


def run(
    cases: list[Case], baselines: tuple[str, ...], rounds: int, minutes: float, folder: Path
) -> dict[str, dict[str, Any]]:
    """Measure cases. Those that results.json in ``folder`` has for this machine and code are not repeated.

    If a case cannot be measured, its reason is stored, and the next call tries it again.

    Args:
        baselines: names of baselines, as in ``contenders.TASKS``.
        minutes: time limit per case. Contenders that are not ready by then are left out.

    Returns:
        The results by case.
    """
    file = folder / "results.json"
    kept = read(file) if file.exists() else {}
    here = {"machine": machine(), "versions": versions(), "code": code(), "rounds": rounds}
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        here["within"] = limit
    found = {}
    for number, case in enumerate(cases, 1):
        title = f"{case} within {limit}" if limit else str(case)
        cell = asdict(case) | {"predict_ratios": list(case.predict_ratios)}  # as JSON types
        key = here | {"cell": cell, "contenders": case.contenders(baselines)}
        before = kept.get(title, {})
        if before.get("rows") and all(before.get(name) == value for name, value in key.items()):
            logger.info("%s: already measured", title)
        else:
            logger.info("%s (%d of %d)", title, number, len(cases))
            start = time.monotonic()
            entry = {**key, "commit": commit(), **measure(case, baselines, rounds, minutes)}
            kept[title] = entry | {"seconds": round(time.monotonic() - start)}
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as part:
                part.write_text(json.dumps(kept, indent=1) + "\n")
        found[title] = kept[title]
    return found


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The results by case in a file of ``run``.

    Raises:
        UserError: if the file contains something else.
    """
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(one, dict) and one.keys() >= KEPT for one in found.values()):
        raise UserError(f"{file} was not written by mae-fast bench", "move it, or choose another --output-dir")
    return found


def measure(case: Case, baselines: tuple[str, ...], rounds: int, minutes: float) -> dict[str, Any]:
    """Measure a case.

    Contenders take turns in groups, as few as memory allows. Ours is in every group, because a ratio compares times of
    the same round.

    Returns:
        ``rows``: results by contender. ``missing``: the reason for each contender without results.
    """
    missing: dict[str, str] = {}
    deadline = time.monotonic() + 60 * minutes
    gates: dict[float, Gate] = {}

    def mark_missing(name: str, error: Unavailable) -> None:
        missing[name] = f"{error}; raise --minutes" if error.kind == "left out" else str(error)
        logger.info("  %s: %s", name, missing[name])

    def started(name: str) -> Worker:
        return Worker(name, Contender, name, case, deadline=deadline)

    with ExitStack() as stack:
        try:
            for end in ("", *(f" {predicting(ratio)}" for ratio in case.predict_ratios)):
                with closing(started(f"gate{end}")) as worker:  # the process ends before anything is timed
                    gates[predict_ratio(end)] = worker.ask("gate")
            base = stack.enter_context(closing(started(BASE)))
            memory = {BASE: prepared(base, case, gates).memory}
        except Unavailable as error:
            mark_missing(BASE, error)
            return {"missing": missing, "rows": {}}
        waiting = [name for name in case.contenders(baselines) if name != BASE]
        waiting += [GEMM_LOWER_BOUND] if case.device == "cpu" else []
        seconds: dict[str, list[float]] = {}
        against: dict[str, list[float]] = {}
        while waiting or not seconds:
            with ExitStack() as group:
                members = {BASE: base}
                while waiting and (len(members) == 1 or fits(memory, case.device)):
                    worker = group.enter_context(closing(started(waiting.pop(0))))
                    try:
                        memory[worker.name] = prepared(worker, case, gates).memory
                        members[worker.name] = worker
                    except Unavailable as error:
                        mark_missing(worker.name, error)
                        worker.close()
                times = take_turns(members, rounds, deadline, mark_missing)
            if BASE not in times:
                return {"missing": missing, "rows": {}}
            for name, found in times.items():
                seconds.setdefault(name, found)  # for ours, the times of the first group
            against |= {name: [a / b for a, b in zip(t, times[BASE], strict=True)] for name, t in times.items()}
    return rows_of(case, seconds, against, memory) | {"missing": missing}


def rows_of(
    case: Case,
    seconds: dict[str, list[float]],
    against: dict[str, list[float]],
    memory: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """The results of all timed contenders.

    Args:
        against: for each contender, its times divided by ours in the same rounds.
    """
    rows = {
        name: row(case, times, flops(case, predict_ratio(name))) | memory[name]
        for name, times in seconds.items()
        if name != GEMM_LOWER_BOUND
    }
    result: dict[str, Any] = {"flops per image": flops(case), "rows": rows}
    if GEMM_LOWER_BOUND in seconds:
        result["products ms"] = statistics.median(seconds[GEMM_LOWER_BOUND]) * 1e3
        for name in rows:
            if predict_ratio(name) < 1:
                continue  # the measured products are those of the full step
            share = statistics.median(against[GEMM_LOWER_BOUND]) / statistics.median(against[name])
            rows[name]["products / step"] = share
    rows[BASE] |= compared({name: ratios for name, ratios in against.items() if name in rows and name != BASE})
    return result


def prepared(worker: Worker, case: Case, gates: dict[float, Gate]) -> Prepared:
    """Prepare a contender and compare its results with the correct ones.

    Args:
        gates: correct results by predict ratio.

    Raises:
        Unavailable: if the contender fails or its results are wrong.
    """
    ready: Prepared = worker.ask("prepare")
    if why := disagreement(ready.results, *gates[predict_ratio(worker.name)], ROUNDING[case.dtype]):
        raise Unavailable(why)
    return ready


def disagreement(
    results: list[np.ndarray], truth: list[np.ndarray], eager: list[np.ndarray], rounding: float
) -> str | None:
    """None if |result - truth| <= 2 |eager - truth| + rounding |truth|; else the reason not to time the contender."""
    for number, (x, t, e) in enumerate(zip(results, truth, eager, strict=False)):
        error, allowed = np.linalg.norm(x - t), 2 * np.linalg.norm(e - t) + rounding * np.linalg.norm(t)
        if not error <= allowed:  # also if it is NaN
            relative, limit = error / np.linalg.norm(t), allowed / np.linalg.norm(t)
            return f"refused: result {number} has a relative error of {relative:.3g}, the limit is {limit:.3g}"
    return None


def row(case: Case, times: list[float], counted: float) -> dict[str, Any]:
    """The latency, rate and, if the peak of the GPU is known, MFU of a contender."""
    seconds = statistics.median(times)
    rate = case.batch / seconds
    found = {"ms": seconds * 1e3, "images/s": rate, "rounds ms": [t * 1e3 for t in times]}
    if case.device == "cuda" and case.bf16 and (peak := known_peak()):
        found["MFU"] = rate * counted / peak
    return found


def known_peak() -> float | None:
    """Dense bf16 FLOP/s of this GPU; None if ``predict`` does not have its data sheet."""
    from .predict import GPUS

    return {gpu.name: gpu.peak for gpu in GPUS.values()}.get(torch.cuda.get_device_name())


def compared(against: dict[str, list[float]]) -> dict[str, Any]:
    """The speedup of ours over each contender: median, 20th and 80th percentile of the ratios of each round."""
    found: dict[str, Any] = {}
    for name, ratios in against.items():
        found[f"vs {name}"] = statistics.median(ratios)
        found[f"spread vs {name}"] = np.quantile(ratios, [0.2, 0.8]).tolist()
    baselines = [name for name in against if name in BASELINES]
    if baselines:
        best = min(baselines, key=lambda name: float(found[f"vs {name}"]))
        found |= {"best baseline": best, "vs best baseline": found[f"vs {best}"]}
    return found


def fits(memory: dict[str, dict[str, int]], device: str) -> bool:
    """Whether there is enough free memory for another contender."""
    peak = max((one["peak"] for one in memory.values() if one), default=0)
    return free_memory(device) > ROOM * peak


def free_memory(device: str) -> int:
    """Free bytes of the GPU, or bytes that this process can still allocate."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else host_memory.free_memory()
