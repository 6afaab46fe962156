"""pytest-benchmark tests, one per op: each checks the results, then times our op interleaved with the baselines."""

import time

import pytest

from benchmarks.ops.problems import problems
from mae_fast.bench.timing import machine

ROUNDS, WARMUP = 15, 3


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_op(benchmark, problem):
    problem.gate()
    baselines = problem.contenders()
    ours = baselines.pop("mae_fast")
    times = {name: [] for name in baselines}

    def others():
        for name, call in baselines.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)

    benchmark.group = str(problem)
    benchmark.pedantic(ours, setup=others, rounds=ROUNDS, warmup_rounds=WARMUP)
    times = {name: found[-ROUNDS:] for name, found in times.items()}
    benchmark.extra_info |= problem.row(times | {"mae_fast": benchmark.stats.stats.data}) | {"machine": machine()}
