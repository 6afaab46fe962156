"""``python -m benchmarks.ops [--op NAME] [FILE]``: prints median times of the ops, and writes them as JSON to FILE."""

import argparse
import json
from pathlib import Path

from benchmarks.ops.problems import problems
from mae_fast.bench.timing import commit, interleave, machine

ROUNDS = 21


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description="Time each op against its baselines.")
    parser.add_argument("--op", metavar="NAME", help="time only this op; the default is all ops")
    parser.add_argument("file", nargs="?", type=Path, help="write the results as JSON to this file")
    args = parser.parse_args()
    every = problems()
    timed = [problem for problem in every if args.op in (None, problem.op)]
    if not timed:
        names = ", ".join(sorted({problem.op for problem in every}))
        parser.error(f"--op {args.op}: choose one of {names}")
    rows = []
    print(f"{'forward + backward':36}{'eager':>10}{'compile':>10}{'mae_fast':>10}{'GB/s':>7}  vs eager  vs compile")
    for problem in timed:
        problem.gate()
        row = problem.row(interleave(problem.contenders(), ROUNDS, warmup=3))
        rows.append(row)
        ms = row["ms"]
        print(
            f"{problem!s:36}{ms['eager']:8.3f}ms{ms['compile']:8.3f}ms{ms['mae_fast']:8.3f}ms{row['GB/s']:7.1f}"
            f"{row['vs eager']:9.2f}x{row['vs compile']:11.2f}x",
            flush=True,
        )
    print(machine())
    if args.file:
        content = {"machine": machine(), "commit": commit(), "rounds": ROUNDS, "rows": rows}
        args.file.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
