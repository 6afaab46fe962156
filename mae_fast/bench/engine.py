"""Cases measured and kept: agreement first, then turns; each case of a folder once."""

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .case import Case
from .contenders import RIVALS
from .flops import flops
from .timing import code, commit, machine, versions
from .worker import GEMM_LOWER_BOUND, Child, Prepared, Unavailable

BASE = "mae_fast"
ROOM = 1.2  # times the largest peak so far must be free for another contender to join
# Of the gate, relative, on top of twice eager's own error: the rounding of a loss or of features
ROUNDING = {"bf16": 2e-3, "fp32": 1e-4}
KEPT = {"cell", "machine", "versions", "rounds", "commit", "missing", "rows"}
MEMORY, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
Tell = Callable[[str], object]


def run(
    cases: list[Case], rivals: tuple[str, ...], rounds: int, minutes: float, folder: Path, tell: Tell = print
) -> dict[str, dict[str, Any]]:
    """Measure the cases that ``folder``'s results.json does not have yet, of this machine and code; all of theirs.

    A case that could not be measured is kept with the reason, and tried again by the next call.

    Args:
        rivals: keys of ``contenders.TASKS``' entries.
        minutes: for a case, after which what is not ready is left out.
    """
    file = folder / "results.json"
    kept = read(file) if file.exists() else {}
    here = {"machine": machine(), "versions": versions(), "code": code(), "rounds": rounds}
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        here["within"] = limit
    found = {}
    for number, case in enumerate(cases, 1):
        title = f"{case} within {limit}" if limit else str(case)
        key = here | {"cell": asdict(case), "contenders": case.contenders(rivals)}
        before = kept.get(title, {})
        if before.get("rows") and all(before.get(name) == value for name, value in key.items()):
            tell(f"{title}: measured before")
        else:
            tell(f"{title} ({number} of {len(cases)})")
            start = time.monotonic()
            entry = {**key, "commit": commit(), **measure(case, rivals, rounds, minutes, tell)}
            kept[title] = entry | {"seconds": round(time.monotonic() - start)}
            folder.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(".new")
            new.write_text(json.dumps(kept, indent=1) + "\n")
            new.replace(file)
        found[title] = kept[title]
    return found


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Cases by title, as ``run`` keeps them.

    Raises:
        UserError: if that is not what the file holds.
    """
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(one, dict) and one.keys() >= KEPT for one in found.values()):
        raise UserError(f"{file} holds no results of mae-fast bench", "move it, or choose another --output-dir")
    return found


def measure(case: Case, rivals: tuple[str, ...], rounds: int, minutes: float, tell: Tell = print) -> dict[str, Any]:
    """The rows of a case by contender; ``missing``: why others, or all, have none.

    Contenders take turns in as few groups as memory allows, ours in each: a ratio is of one group's rounds.
    """
    missing: dict[str, str] = {}
    deadline = time.monotonic() + 60 * minutes

    def lack(name: str, why: str) -> None:
        missing[name] = why
        tell(f"  {name}: {why}")

    with ExitStack() as stack:
        try:
            gate = truth(case, deadline)
            base = stack.enter_context(closing(Child(BASE, case, deadline)))
            ready = prepared(base, case, gate)
        except Unavailable as error:
            lack(BASE, str(error))
            return {"missing": missing, "rows": {}}
        memory = {BASE: ready.memory}
        waiting = [name for name in case.contenders(rivals) if name != BASE]
        waiting += [GEMM_LOWER_BOUND] if case.device == "cpu" else []
        seconds: dict[str, list[float]] = {}
        against: dict[str, list[float]] = {}
        while waiting or not seconds:
            with ExitStack() as group:
                members = {BASE: base}
                while waiting and (len(members) == 1 or fits(memory, case.device)):
                    child = group.enter_context(closing(Child(waiting.pop(0), case, deadline)))
                    try:
                        memory[child.name] = prepared(child, case, gate).memory
                        members[child.name] = child
                    except Unavailable as error:
                        lack(child.name, str(error))
                        child.close()
                times = turns(members, rounds, deadline, lack)
            if BASE not in times:
                return {"missing": missing, "rows": {}}
            seconds |= {name: found for name, found in times.items() if name not in seconds}  # ours: the first group's
            against |= {name: [a / b for a, b in zip(t, times[BASE], strict=True)] for name, t in times.items()}
    return told(case, seconds, against, memory) | {"missing": missing}


def told(
    case: Case,
    seconds: dict[str, list[float]],
    against: dict[str, list[float]],
    memory: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Rows of all that were timed. ``against``: the times over ours of the same rounds."""
    counted = flops(case)
    rows = {
        name: row(case, times, counted) | memory[name] for name, times in seconds.items() if name != GEMM_LOWER_BOUND
    }
    result: dict[str, Any] = {"flops per image": counted, "rows": rows}
    if GEMM_LOWER_BOUND in seconds:
        result["products ms"] = statistics.median(seconds[GEMM_LOWER_BOUND]) * 1e3
        for name in rows:
            share = statistics.median(against[GEMM_LOWER_BOUND]) / statistics.median(against[name])
            rows[name]["products / step"] = share
    rows[BASE] |= compared({name: ratios for name, ratios in against.items() if name in rows and name != BASE})
    return result


def truth(case: Case, deadline: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What ``Worker.gate`` says; its process is gone before anything is timed."""
    with closing(Child("gate", case, deadline)) as child:
        found: tuple[list[np.ndarray], list[np.ndarray]] = child.ask("gate")
    return found


def prepared(child: Child, case: Case, gate: tuple[list[np.ndarray], list[np.ndarray]]) -> Prepared:
    """Its answer, after it has agreed.

    Raises:
        Unavailable: if it has not.
    """
    ready: Prepared = child.ask("prepare")
    if why := disagreement(ready.results, *gate, ROUNDING[case.dtype]):
        raise Unavailable(why)
    return ready


def disagreement(
    results: list[np.ndarray], truth: list[np.ndarray], eager: list[np.ndarray], rounding: float
) -> str | None:
    """Why a contender may not be timed, if so: |result - truth| <= 2 |eager - truth| + rounding |truth| must hold."""
    for number, (x, t, e) in enumerate(zip(results, truth, eager, strict=False)):
        error, allowed = np.linalg.norm(x - t), 2 * np.linalg.norm(e - t) + rounding * np.linalg.norm(t)
        if not error <= allowed:  # NaN, too
            off, most = error / np.linalg.norm(t), allowed / np.linalg.norm(t)
            return f"refused: result {number} is off by {off:.3g}, eager torch's own error allows {most:.3g}"
    return None


def turns(
    members: dict[str, Child], rounds: int, deadline: float, lack: Callable[[str, str], None]
) -> dict[str, list[float]]:
    """Seconds of a step by contender and round, after a round that is not counted; fewer rounds if the time is up."""
    times: dict[str, list[float]] = {name: [] for name in members}
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > deadline:
            break
        for name in list(times):
            try:
                taken = members[name].ask("turn")
            except Unavailable as error:
                lack(name, str(error))
                del times[name]
                continue
            if number:
                times[name].append(taken)
    least = min(map(len, times.values()), default=0)
    return {name: found[:least] for name, found in times.items() if least}


def row(case: Case, times: list[float], counted: float) -> dict[str, Any]:
    """Latency and rate; MFU where the GPU's peak is known."""
    seconds = statistics.median(times)
    rate = case.batch / seconds
    found = {"ms": seconds * 1e3, "images/s": rate, "rounds ms": [t * 1e3 for t in times]}
    if case.device == "cuda" and case.bf16 and (peak := known_peak()):
        found["MFU"] = rate * counted / peak
    return found


def known_peak() -> float | None:
    """Dense bf16 FLOP/s of the GPU that is here, if ``predict`` has its data sheet."""
    from .predict import GPUS

    return {gpu.name: gpu.peak for gpu in GPUS.values()}.get(torch.cuda.get_device_name())


def compared(against: dict[str, list[float]]) -> dict[str, Any]:
    """Of every other contender's time over ours, round by round: median, and the 20th and 80th percentile."""
    found: dict[str, Any] = {}
    for name, ratios in against.items():
        found[f"vs {name}"] = statistics.median(ratios)
        found[f"spread vs {name}"] = np.quantile(ratios, [0.2, 0.8]).tolist()
    rivals = [name for name in against if name in RIVALS]
    if rivals:
        best = min(rivals, key=lambda name: float(found[f"vs {name}"]))
        found |= {"best rival": best, "vs best rival": found[f"vs {best}"]}
    return found


def fits(memory: dict[str, dict[str, int]], device: str) -> bool:
    """Whether another contender has room beside those that are there."""
    peak = max((one["peak"] for one in memory.values() if one), default=0)
    return free_memory(device) > ROOM * peak


def free_memory(device: str) -> int:
    """Bytes that are free on the GPU; or in this machine, and within this container's limit."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = int((GROUP / "memory.stat").read_text().split("inactive_file ")[1].split()[0])
    except (OSError, ValueError):  # no limit, or "max"
        return free
    return min(free, limit - used + cached)
