"""``python -m benchmarks.ops [FILE]``: interleaved medians of every op as a table, and as JSON into FILE."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.ops.problems import REPEATS, problems
from mae_fast.bench import interleave, machine, ratio

ROUNDS = 21


def main() -> None:
    rows = []
    print(f"{'forward + backward':36}{'eager':>10}{'compile':>10}{'mae_fast':>10}{'GB/s':>7}  vs eager  vs compile")
    for problem in problems():
        problem.gate()
        times = interleave(problem.contenders(), ROUNDS, warmup=3)
        ms = {name: statistics.median(t) / REPEATS * 1e3 for name, t in times.items()}
        rate = problem.bytes_moved / ms["mae_fast"] / 1e6
        row = {"problem": str(problem), "ms": ms, "GB/s": rate}
        row |= {f"vs {rival}": ratio(times, rival, "mae_fast") for rival in ("eager", "compile")}
        rows.append(row)
        print(
            f"{problem!s:36}{ms['eager']:8.3f}ms{ms['compile']:8.3f}ms{ms['mae_fast']:8.3f}ms{rate:7.1f}"
            f"{row['vs eager']:9.2f}x{row['vs compile']:11.2f}x",
            flush=True,
        )
    print(machine())
    if len(sys.argv) > 1:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
        content = {"machine": machine(), "commit": commit.strip(), "rounds": ROUNDS, "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(content, indent=1))


main()
