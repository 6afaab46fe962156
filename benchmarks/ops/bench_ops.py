"""pytest-benchmark rows: eager, torch.compile and mae_fast side by side; the correctness gate runs first."""

import pytest

from benchmarks.ops.problems import REPEATS, problems
from mae_fast.bench import machine

CHECKED: set[str] = set()


@pytest.mark.parametrize("contender", ["eager", "compile", "mae_fast"])
@pytest.mark.parametrize("problem", problems(), ids=str)
def test_op(benchmark, problem, contender):
    if str(problem) not in CHECKED:
        problem.gate()
        CHECKED.add(str(problem))
    benchmark.group = str(problem)
    benchmark.pedantic(problem.contenders()[contender], rounds=15, warmup_rounds=3)
    rate = problem.bytes_moved * REPEATS / benchmark.stats["median"] / 1e9
    benchmark.extra_info |= {"bytes": problem.bytes_moved, "GB/s": round(rate, 2), **machine()}
