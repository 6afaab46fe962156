"""``python -m benchmarks.ops [FILE]``: prints median times of every op, and writes them as JSON to FILE."""

import json
import sys
from pathlib import Path

from benchmarks.ops.problems import problems
from mae_fast.bench.timing import commit, interleave, machine

ROUNDS = 21


def main() -> None:
    rows = []
    print(f"{'forward + backward':36}{'eager':>10}{'compile':>10}{'mae_fast':>10}{'GB/s':>7}  vs eager  vs compile")
    for problem in problems():
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
    if len(sys.argv) > 1:
        content = {"machine": machine(), "commit": commit(), "rounds": ROUNDS, "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(content, indent=1))


main()
