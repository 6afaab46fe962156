"""The arithmetic of measurements, on known times."""

import statistics

import pytest

from benchmarks.gpu import baselines
from benchmarks.gpu.contender import Plan
from benchmarks.ops.problems import REPEATS, Problem
from mae_fast.bench import timing, worker
from mae_fast.bench.timing import interleave, ratio
from mae_fast.bench.worker import StepTimer, Unavailable, take_turns

OURS, OTHER = [1.0, 1.0, 10.0], [2.0, 9.0, 20.0]  # ratios 2, 9 and 2


class Clock:
    """``perf_counter`` and ``monotonic`` that advance only when ``spend`` is called."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def spend(self, seconds):
        self.now += seconds


def test_ratio_is_the_median_of_ratios_per_round():
    """It is not the ratio of the medians."""
    assert ratio({"ours": OURS, "other": OTHER}, "other", "ours") == 2.0
    assert statistics.median(OTHER) / statistics.median(OURS) == 9.0


def test_other_benchmarks_use_the_same_ratio():
    times = {"mae_fast": OURS, "reference": OTHER, "eager": OTHER, "compile": OURS}
    row = baselines.row(
        "mae_fast", {name: times[name] for name in ("mae_fast", "reference")}, Plan("base", 2, (), 1), []
    )
    assert (row["vs reference"], row["ms"], row["images/s"]) == (2.0, 1000.0, 2.0)
    row = Problem("op", "model", "fp32", (), None, None, 5_000_000).row(times)
    assert (row["vs eager"], row["vs compile"]) == (2.0, 1.0)
    assert row["ms"]["eager"] == 9000.0 / REPEATS
    assert row["GB/s"] == pytest.approx(0.005 * REPEATS)


def test_interleaved_calls_take_turns_after_warm_up(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(timing, "time", clock)

    def call(name, seconds):
        taken = iter(seconds)

        def spend():
            calls.append(name)
            clock.spend(next(taken))

        return spend

    times = interleave({"a": call("a", [9, 9, 1, 2]), "b": call("b", [8, 8, 3, 4])}, rounds=2)
    assert times == {"a": [1, 2], "b": [3, 4]}
    assert calls == ["a", "b"] * 4
    assert interleave({"a": call("a", [7, 5])}, rounds=1, warmup=1) == {"a": [5]}


class Turns:
    """A worker with known seconds per step. An exception among them is raised."""

    def __init__(self, *turns):
        self.turns = iter(turns)

    def ask(self, method):
        assert method == "turn"
        found = next(self.turns)
        if isinstance(found, Exception):
            raise found
        return found


def test_a_failed_worker_is_dropped_and_the_others_continue():
    dropped = []
    workers = {"a": Turns(9, 1, 2, 3), "b": Turns(9, 4, Unavailable("no room")), "c": Turns(Unavailable("at once"))}
    times = take_turns(workers, 3, float("inf"), lambda name, error: dropped.append((name, str(error))))
    assert times == {"a": [1, 2, 3]}
    assert dropped == [("c", "at once"), ("b", "no room")]
    assert take_turns({"a": Turns(1, 2)}, 2, float("inf"), dropped.append, warmup=0) == {"a": [1, 2]}
    assert take_turns({"a": Turns(Unavailable("x"))}, 2, float("inf"), lambda name, error: None) == {}


@pytest.mark.parametrize(("warmup", "counted"), [(0, [1]), (1, [2])])
def test_only_the_first_counted_round_starts_after_the_deadline(monkeypatch, warmup, counted):
    monkeypatch.setattr(worker, "time", Clock())
    assert take_turns({"a": Turns(1, 2, 3)}, 5, deadline=0, drop=None, warmup=warmup) == {"a": counted}


def test_a_turn_repeats_short_steps_and_returns_the_mean(monkeypatch):
    clock, steps = Clock(), []
    monkeypatch.setattr(worker, "time", clock)
    timer = StepTimer()

    def step():
        steps.append(1)
        clock.spend(0.03)

    timer.step = step
    timer.fill_turn()
    assert timer.steps == 7  # of 0.2 s
    steps.clear()
    assert timer.turn() == pytest.approx(0.03)
    assert len(steps) == 7
    timer.steps = 2
    assert timer._seconds(2) == pytest.approx(0.06)
