"""``python -m benchmarks.model``: one case, ours and the rivals interleaved, their memory, every ratio."""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.model.child import Child
from benchmarks.model.contenders import MODELS, OURS, RIVALS, TASKS
from mae_fast.bench import interleave, machine, ratio


def parse(flags: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--task", choices=TASKS, default="train")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="*", help="default: all of the task")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--output", type=Path, help="add the result to this JSON file")
    args = parser.parse_args(flags)
    if unknown := set(args.contenders or ()) - set(TASKS[args.task]):
        parser.error(f"--contenders {' '.join(unknown)}: of {args.task} there are {', '.join(TASKS[args.task])}")
    return args


def main() -> None:
    args = parse()
    children = {name: Child(name, args) for name in args.contenders or TASKS[args.task]}
    gate({name: child.result for name, child in children.items()})
    times = interleave(children, args.rounds, warmup=1)
    for child in children.values():
        child.close()
    rows = {name: row(name, times, args.batch) | child.memory for name, child in children.items()}

    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    case = f"{args.task} {args.model} batch {args.batch} {args.dtype}" + (f" within {isa}" if isa else "")
    show(case, rows)
    print(machine(), flush=True)
    if args.output:
        before = json.loads(args.output.read_text()) if args.output.exists() else {}
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
        entry = {"machine": machine(), "commit": commit.strip(), "rounds": args.rounds, "rows": rows}
        args.output.write_text(json.dumps(before | {case: entry}, indent=1) + "\n")


def gate(results: dict[str, Any]) -> None:
    """The contenders agree, or nothing is timed. Compiled code draws masks of its own, which move the loss a little."""
    expected = results.get("reference", results.get("timm vit", next(iter(results.values()))))
    for name, result in results.items():
        assert np.linalg.norm(result - expected) <= 0.02 * np.linalg.norm(expected), (name, result, expected)


def row(name: str, times: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Median time, rate, and the ratio against every rival: above 1, ``name`` is faster."""
    ms = statistics.median(times[name]) * 1e3
    found: dict[str, Any] = {"ms": ms, "images/s": batch / ms * 1e3}
    rivals = [rival for rival in times if rival in RIVALS and rival != name]
    found |= {f"vs {rival}": ratio(times, rival, name) for rival in rivals}
    if rivals:
        best = min(rivals, key=lambda rival: statistics.median(times[rival]))
        found |= {"best rival": best, "vs best rival": found[f"vs {best}"]}
    return found


def show(case: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"{case}\n{'':20}{'step':>12}{'images/s':>10}{'above':>12}{'peak':>12}   times faster than")
    for name, found in rows.items():
        memory = "".join(
            f"{found[key] / 2**20:8.0f} MiB" if key in found else f"{'-':>12}" for key in ("above", "peak")
        )
        rivals = [rival for rival in rows if f"vs {rival}" in found]
        versus = ", ".join(f"{rival} {found[f'vs {rival}']:.2f}" for rival in rivals)
        best = f"; the best rival {found['vs best rival']:.2f}" if rivals else ""
        print(
            f"{name:20}{found['ms']:9.0f} ms{found['images/s']:10.2f}{memory}   {versus + best if name in OURS else ''}"
        )


if __name__ == "__main__":
    main()
