"""The engine: groups of contenders, the correctness check, stored results, and cases that are not repeated."""

import json
import logging
import math
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import command, one_thread  # noqa: F401

from mae_fast.bench import engine
from mae_fast.bench import worker as workers
from mae_fast.bench.case import Case, Grid
from mae_fast.bench.contenders import BASELINES, IMAGE_SIZE, MODELS, PATCH, TASKS, build, images, predict_ratio
from mae_fast.bench.flops import flops
from mae_fast.bench.worker import GEMM_LOWER_BOUND, Contender, Prepared, Unavailable, Worker
from mae_fast.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = Case("train", "tiny", 4, "fp32", 32)
ALL = ("eager", "compile", "transformers", "timm")


class InProcess:
    """A ``Worker`` that runs in this process."""

    def __init__(self, name, contender, *args, deadline):
        self.name, self.made = name, contender(*args)

    def ask(self, method):
        return getattr(self.made, method)()

    def close(self):
        del self.made


@pytest.mark.parametrize("case", ["train fp32", "train bf16", "finetune bf16", "infer bf16", "reconstruct fp32"])
def test_contenders_agree_and_are_timed(monkeypatch, case):
    """All contenders without torch.compile, which would take half a minute."""
    monkeypatch.setattr(engine, "Worker", InProcess)
    monkeypatch.setattr(workers, "LEAST_SECONDS", 1e-9)
    baselines = ("eager", "transformers", "timm")
    task, dtype = case.split()
    case = Case(task, "tiny", 4, dtype, 16, 0.5)
    found = engine.measure(case, baselines, 1, 5)
    assert found["missing"] == {}
    assert list(found["rows"]) == case.contenders(baselines)
    ours = found["rows"]["mae_fast"]
    assert ours["vs best baseline"] == ours[f"vs {ours['best baseline']}"]
    for row in found["rows"].values():
        assert 0 < row["above"] < row["peak"]
        assert row["images/s"] == pytest.approx(4e3 / row["ms"])
        assert row["products / step"] == pytest.approx(found["products ms"] / row["ms"])
        assert "MFU" not in row


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_with_predict_ratios_are_timed_with_the_full_step(monkeypatch, dtype):
    """Each step is compared with the reference of the same predict ratio, and has its own FLOPs."""
    monkeypatch.setattr(engine, "Worker", InProcess)
    monkeypatch.setattr(workers, "LEAST_SECONDS", 1e-9)
    case = Case("train", "tiny", 4, dtype, 16, 0.5, predict_ratios=(0.5, 0.25))
    found = engine.measure(case, ("eager",), 1, 5)
    assert found["missing"] == {}
    names = ["mae_fast", "mae_fast drop-in", "mae_fast predict 0.5", "mae_fast predict 0.25", "reference"]
    assert list(found["rows"]) == names
    assert {"vs mae_fast predict 0.5", "vs mae_fast predict 0.25"} < found["rows"]["mae_fast"].keys()
    assert [name for name in names if "products / step" not in found["rows"][name]] == names[2:4]
    assert found["rows"]["mae_fast"]["best baseline"] == "reference"
    full, half = (Contender(name, case).gate() for name in ("gate", "gate predict 0.5"))
    assert engine.disagreement(full[0], *half, engine.ROUNDING[dtype]) is not None
    assert flops(case, 0.25) < flops(case, 0.5) < flops(case) == found["flops per image"]


def test_training_compares_two_losses_without_drop_path():
    """Exact steps give the same losses twice; ordinary steps do not, because of drop path."""
    for task, count in (("train", 2), ("finetune", 2), ("infer", 1), ("reconstruct", 1)):
        contender = Contender("mae_fast", replace(CASE, task=task))
        once, twice = (contender._results(contender.build("mae_fast", bf16=False)) for _ in range(2))
        assert len(once) == count
        for a, b in zip(once, twice, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        if count == 2:
            assert not np.allclose(once[0], once[1], rtol=1e-4)
    for name in ("mae_fast", "timm vit"):
        contender = Contender(name, replace(CASE, task="finetune"))
        exact = contender.build(name, bf16=False)(exact=True)
        np.testing.assert_allclose(contender._results(contender.build(name, bf16=False))[0], exact.numpy(), rtol=1e-5)
        shares = torch.rand(4, 1000, generator=torch.Generator().manual_seed(1)).softmax(1)
        assert abs(contender.build(name, bf16=False)() - torch.nn.functional.cross_entropy(exact, shares)) > 1e-4


def test_results_of_the_classifier_depend_on_its_encoder():
    contender = Contender("mae_fast", replace(CASE, task="finetune"))
    truth = contender._results(contender.build("mae_fast", bf16=False))
    other = contender._results(build("mae_fast", "tiny", images("tiny", 4).flip(3), False, "finetune"))
    assert engine.disagreement(other, truth, truth, engine.ROUNDING["bf16"]) is not None


def test_short_steps_are_repeated_in_a_turn(monkeypatch):
    contender = Contender(GEMM_LOWER_BOUND, CASE)
    taken = []

    def seconds(steps):
        taken.append(steps)
        return 0.06 * steps

    monkeypatch.setattr(contender, "_seconds", seconds)
    monkeypatch.setattr(contender, "build", lambda name, bf16: lambda: None)
    assert contender.prepare() == Prepared([], {})
    assert contender.turn() == pytest.approx(0.06)
    assert taken == [1, 4]


def test_gate_has_the_correct_and_the_eager_results():
    fp32 = Contender("gate", CASE).gate()
    assert fp32[0] is fp32[1]
    truth, eager = Contender("gate", replace(CASE, dtype="bf16")).gate()
    assert truth == fp32[0]
    assert truth[0].dtype == np.float32
    assert 0 < abs(eager[0] - truth[0]) < 0.02 * truth[0]


def test_gate():
    truth, eager = [np.array([3.0, 4.0]), np.array(2.0)], [np.array([3.0, 4.1]), np.array(2.0)]

    def refused(first, second):
        return engine.disagreement([np.array(first), np.array(second)], truth, eager, 0.01)

    assert refused([3.0, 4.0], 2.0) is None
    assert refused([3.0, 4.0 + 0.2 + 0.05 - 1e-6], 2.0) is None  # twice the error of eager torch, plus 0.01 * 5
    assert "result 0 has a relative error of 0.05" in refused([3.0, 4.0 + 0.2 + 0.05 + 1e-3], 2.0)
    assert refused([3.0, 4.0], 2.02 - 1e-6) is None
    assert "result 1 has a relative error of 0.0105, the limit is 0.01" in refused([3.0, 4.0], 2.021)
    assert refused([3.0, 4.0], math.nan) is not None
    assert engine.disagreement([], truth, eager, 0.01) is None  # the lower bound has no results


class Scripted:
    """A ``Worker`` with losses, memory and seconds per turn that a test sets by name."""

    results, turns, peak, made, alive, together = {}, {}, {}, [], [], []

    def __init__(self, name, contender, *args, deadline):
        self.name = name
        self.taken = iter(self.turns.get(name, [1.0] * 99))
        self.made.append(name)
        self.alive.append(name)
        self.together.append(tuple(self.alive))

    def ask(self, request):
        answer = {"gate": self._gate, "prepare": self._prepare, "turn": lambda: next(self.taken)}[request]()
        if isinstance(answer, str):
            raise Unavailable(answer)
        return answer

    def _gate(self):
        return self.results.get("gate", ([np.array(1.0)], [np.array(1.0)]))

    def _prepare(self):
        answer = self.results.get(self.name, 1.0)
        memory = {} if self.name == GEMM_LOWER_BOUND else {"peak": self.peak.get(self.name, 10), "above": 5}
        return (
            answer
            if isinstance(answer, str)
            else Prepared([] if self.name == GEMM_LOWER_BOUND else [np.array(answer)], memory)
        )

    def close(self):
        if self.name in self.alive:
            self.alive.remove(self.name)


@pytest.fixture
def scripted(monkeypatch):
    for name in ("results", "turns", "peak"):
        monkeypatch.setattr(Scripted, name, {})
    for name in ("made", "alive", "together"):
        monkeypatch.setattr(Scripted, name, [])
    monkeypatch.setattr(engine, "Worker", Scripted)
    monkeypatch.setattr(engine, "flops", lambda *_: 7e9)
    monkeypatch.setattr(engine, "free_memory", lambda device: 1000)
    return Scripted


def test_ratios_are_medians_over_rounds_without_the_first_round(scripted):
    scripted.turns |= {
        "mae_fast": [9.0, 1.0, 2.0, 4.0, 2.0, 2.0],
        "mae_fast drop-in": [0.0, 0.25, 0.5, 1.0, 0.5, 0.5],
        "reference": [9.0, 3.0, 2.0, 6.0, 4.0, 2.0],  # ratios to ours: 3, 1, 1.5, 2, 1
        "timm blocks": [0.0, 1.0, 1.0, 8.0, 1.0, 1.0],  # 1, .5, 2, .5, .5
        GEMM_LOWER_BOUND: [0.0, 0.5, 0.5, 0.5, 1.0, 1.0],
    }
    found = engine.measure(CASE, ("eager", "timm"), 5, 5)
    assert list(found["rows"]) == ["mae_fast", "mae_fast drop-in", "reference", "timm blocks"]
    ours, reference = found["rows"]["mae_fast"], found["rows"]["reference"]
    assert ours["rounds ms"] == [1e3, 2e3, 4e3, 2e3, 2e3]
    assert (ours["ms"], ours["images/s"], reference["ms"]) == (2000, 2.0, 3000)
    assert (ours["vs reference"], ours["vs timm blocks"], ours["vs mae_fast drop-in"]) == (1.5, 0.5, 0.25)
    assert ours["spread vs reference"] == pytest.approx([1.0, 2.2])
    assert (ours["best baseline"], ours["vs best baseline"]) == (
        "timm blocks",
        0.5,
    )  # our other contenders do not count
    assert (found["products ms"], ours["products / step"], reference["products / step"]) == (500, 0.5, 0.5 / 1.5)
    assert found["flops per image"] == 7e9
    assert (ours["peak"], ours["above"]) == (10, 5)
    assert "vs mae_fast" not in ours
    assert scripted.alive == []


def test_only_contenders_that_succeed_and_agree_have_rows(scripted, caplog):
    scripted.results |= {"reference": 1.0002, "reference compiled": "no compiler", "mae_fast drop-in": math.nan}
    scripted.turns["timm blocks"] = [1.0, 1.0, "out of memory"]
    caplog.set_level(logging.INFO, "mae_fast")
    found = engine.measure(CASE, ALL, 3, 5)
    assert list(found["rows"]) == ["mae_fast", "transformers"]
    assert found["missing"].keys() == {"reference", "reference compiled", "mae_fast drop-in", "timm blocks"}
    assert found["missing"]["reference compiled"] == "no compiler"
    assert found["missing"]["timm blocks"] == "out of memory"
    assert found["missing"]["reference"].startswith("refused: ")
    assert len(found["rows"]["mae_fast"]["rounds ms"]) == 3
    assert caplog.messages == [f"  {name}: {why}" for name, why in found["missing"].items()]
    assert scripted.alive == []


@pytest.mark.parametrize("what", ["gate", "mae_fast", "disagrees", "dies"])
def test_no_rows_if_our_contender_fails(scripted, monkeypatch, what):
    if what == "dies":
        scripted.turns["mae_fast"] = [1.0, "it died"]
    else:
        scripted.results |= {"mae_fast": 2.0} if what == "disagrees" else {what: "it died"}
    if what == "gate":
        monkeypatch.setattr(scripted, "_gate", lambda self: "it died")
    found = engine.measure(CASE, ALL, 3, 5)
    assert found["rows"] == {}
    assert ("refused" if what == "disagrees" else "it died") in found["missing"]["mae_fast"]
    assert scripted.alive == []


def test_little_memory_gives_small_groups_that_include_ours(scripted, monkeypatch):
    monkeypatch.setattr(engine, "free_memory", lambda device: 12)  # 1.2 times the peak of 10 needs more than this
    scripted.turns["mae_fast"] = [1.0] * 3 + [2.0] * 3 + [4.0] * 99
    scripted.turns |= {name: [8.0] * 99 for name in ("mae_fast drop-in", "reference", "timm blocks")}
    found = engine.measure(CASE, ("eager", "timm"), 2, 5)
    assert max(map(len, scripted.together)) == 2
    assert scripted.made == ["gate", "mae_fast", "mae_fast drop-in", "reference", "timm blocks", GEMM_LOWER_BOUND]
    ours = found["rows"]["mae_fast"]
    assert ours["ms"] == 1000  # of the first group
    assert [ours[f"vs {name}"] for name in ("mae_fast drop-in", "reference", "timm blocks")] == [8.0, 4.0, 2.0]


@pytest.mark.parametrize(("free", "most"), [(13, 6), (12, 2)])
def test_next_contender_needs_memory_for_the_largest_peak_so_far(scripted, monkeypatch, free, most):
    """The process of the gate has ended before ours starts."""
    monkeypatch.setattr(engine, "free_memory", lambda device: free)
    engine.measure(CASE, ("eager", "transformers", "timm"), 1, 5)
    assert max(map(len, scripted.together)) == most
    assert all("gate" not in names[1:] for names in scripted.together)


def test_rounds_before_the_deadline_count(scripted, monkeypatch):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(clock))
    found = engine.measure(CASE, ("eager",), 50, 1)
    assert 1 <= len(found["rows"]["mae_fast"]["rounds ms"]) < 5
    assert found["missing"] == {}


def test_mfu_needs_a_known_gpu(monkeypatch):
    case = replace(CASE, dtype="bf16", device="cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert engine.row(case, [0.5], 989.4e9)["MFU"] == pytest.approx(8 * 1e-3)
    assert "MFU" not in engine.row(replace(case, dtype="fp32"), [0.5], 1e9)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "another")
    assert "MFU" not in engine.row(case, [0.5], 1e9)


def test_gpu_results_without_baselines(scripted):
    found = engine.measure(Case("infer", "tiny", 4, "fp32", 32, device="cuda"), (), 2, 5)
    assert list(found["rows"]) == ["mae_fast"]
    assert scripted.made == ["gate", "mae_fast"]
    assert "best baseline" not in found["rows"]["mae_fast"]


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """``run`` without measurements: a list of the measured cases, and a function that calls it."""
    measured = []

    def measure(case, baselines, rounds, minutes):
        measured.append(str(case))
        return {"rows": {} if case.batch == 666 else {"mae_fast": {}}, "missing": {}}

    monkeypatch.setattr(engine, "measure", measure)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

    def run(*cases, baselines=("eager",), rounds=3):
        measured.clear()
        found = engine.run(list(cases), baselines, rounds, 5, tmp_path / "a" / "b")
        return list(measured), found

    return run


def test_a_case_is_measured_once(kept, tmp_path, monkeypatch):
    other = replace(CASE, batch=8)
    first, found = kept(CASE)
    assert (first, list(found)) == (["train tiny batch 4 fp32"], ["train tiny batch 4 fp32"])
    entry = found["train tiny batch 4 fp32"]
    assert entry.keys() >= engine.KEPT
    assert entry["contenders"] == ["mae_fast", "mae_fast drop-in", "reference"]
    assert entry["cell"]["image_size"] == 32
    assert kept(CASE) == ([], found)
    assert kept(other, CASE)[0] == ["train tiny batch 8 fp32"]
    assert list(json.loads((tmp_path / "a/b/results.json").read_text())) == [str(CASE), str(other)]
    assert kept(CASE, rounds=4)[0] == [str(CASE)]
    assert kept(CASE, rounds=4, baselines=("timm",))[0] == [str(CASE)]
    for what, value in (("code", "0" * 12), ("versions", {}), ("machine", {})):
        monkeypatch.setattr(engine, what, lambda value=value: value)
        assert kept(CASE)[0] == [str(CASE)], what
        assert kept(CASE)[0] == [], what
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    measured, found = kept(CASE)
    assert (measured, list(found)) == ([str(CASE)], [f"{CASE} within AVX2"])
    assert found[f"{CASE} within AVX2"]["within"] == "AVX2"


def test_missing_measurements_are_tried_again(kept):
    case = replace(CASE, batch=666)
    assert kept(case)[0] == kept(case)[0] == [str(case)]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"train": {"rows": {}}}'])
def test_other_results_json_is_not_overwritten(kept, tmp_path, text):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/results.json").write_text(text)
    with pytest.raises(UserError, match="another --output-dir"):
        kept(CASE)
    assert (tmp_path / "a/b/results.json").read_text() == text


def test_grid():
    cases = Grid(("train", "infer"), ("tiny", "huge"), ("fp32",), (2, 4), (), (0.5, 0.75), "cpu").cases()
    assert len(cases) == 2 * 2 * 2 + 2 * 2  # tasks without masks ignore the ratio
    assert len({str(case) for case in cases}) == len(cases)
    assert {case.image_size for case in cases} == {32, 224}
    assert {case.mask_ratio for case in cases if case.task == "infer"} == {0.75}
    assert Grid(("infer",), ("tiny",), ("fp32",), (2, 2), (), (0.5,), "cpu").cases() == [
        Case("infer", "tiny", 2, "fp32", 32, 0.75, "cpu")
    ]
    assert str(Case("train", "base", 4, "bf16", 448, 0.5)) == "train base batch 4 bf16 448 px mask 0.5"
    grid = Grid(("train", "infer"), ("tiny",), ("fp32",), (2,), (), (0.75,), "cpu", (1.0, 0.5, 0.5))
    assert [case.predict_ratios for case in grid.cases()] == [(0.5,), ()]
    train = Case("train", "tiny", 2, "fp32", 32, 0.75, "cpu", (0.5, 0.5000001, 0.25))
    assert [predict_ratio(name) for name in train.contenders(())] == [1, 1, 0.5, 0.5000001, 0.25]
    with pytest.raises(UserError, match="--predict-ratios 0 is out of range"):
        replace(grid, predict_ratios=(0.0,)).cases()
    for size, ratio, what in (
        (30, 0.75, "sizes 30"),
        (0, 0.75, "sizes 0"),
        (32, 0.99, "ratios 0.99"),
        (32, 1e-18, "e-18 "),
    ):
        with pytest.raises(UserError, match=what):
            Grid(("train",), ("tiny",), ("fp32",), (1,), (size,), (ratio,), "cpu").cases()
    with pytest.raises(UserError, match="nan"):
        Grid(("reconstruct",), ("tiny",), ("fp32",), (1,), (), (math.nan,), "cpu").cases()


def test_contenders_of_a_case():
    assert CASE.contenders(ALL) == [
        "mae_fast", "mae_fast drop-in", "reference", "reference compiled", "transformers", "timm blocks",
    ]  # fmt: skip
    assert "mae_fast CUDA graph" in replace(CASE, device="cuda").contenders(())
    tuning = replace(CASE, task="finetune", device="cuda")
    assert tuning.contenders(("timm", "eager")) == ["mae_fast", "timm vit"]
    assert {name for baselines in TASKS.values() for name in baselines.values()} == set(BASELINES)
    for baselines in TASKS.values():
        assert [baseline for baseline, name in baselines.items() if name.endswith("compiled")] == ["compile"]
        for family in ("transformers", "timm"):
            assert baselines.get(family, family).startswith(family)
    assert MODELS.keys() == PATCH.keys() == IMAGE_SIZE.keys()


def test_worker_errors_are_one_line():
    worker = Worker("nobody", Contender, "nobody", CASE, deadline=time.monotonic() + 120)
    with pytest.raises(Unavailable, match="KeyError: 'nobody'") as failed:
        worker.ask("prepare")
    assert failed.value.kind == "failed"
    os.kill(worker.process.pid, 9)
    worker.process.join()
    with pytest.raises(Unavailable, match="exit status -9"):
        worker.ask("prepare")
    worker.close()


def test_a_late_worker_is_killed():
    worker = Worker("mae_fast", Contender, "mae_fast", CASE, deadline=time.monotonic())
    with pytest.raises(Unavailable, match="time limit") as late:
        worker.ask("prepare")
    assert late.value.kind == "left out"
    start = time.monotonic()
    worker.close()
    assert not worker.process.is_alive()
    assert time.monotonic() - start < 5


def test_a_closed_worker_exits():
    worker = Worker("mae_fast", Contender, "mae_fast", CASE, deadline=time.monotonic() + 120)
    worker.ask("prepare")
    worker.close()
    assert worker.process.exitcode == 0


def test_one_line_error_messages():
    with pytest.raises(ModuleNotFoundError) as missing:
        import nowhere.at_all  # noqa: F401
    assert workers.one_line(missing.value) == "nowhere is not installed: pip install nowhere"
    assert workers.one_line(RuntimeError("\nno room\nand more")) == "RuntimeError: no room"
    assert workers.one_line(ValueError()) == "ValueError: no message"


@pytest.mark.slow
def test_bench_command(monkeypatch, capsys, tmp_path):
    """In worker processes, as users run it: results are printed, stored and plotted, and not measured again."""
    monkeypatch.setattr(engine, "code", lambda: "the same")
    words = ("bench", "--tasks", "infer", "--models", "tiny", "--batches", 2, "--dtypes", "fp32", "--rounds", 2)
    words = (*words, "--baselines", "eager", "--device", "cpu", "--output-dir", tmp_path)
    answer = command(monkeypatch, capsys, *words)
    assert answer.returncode == 0
    assert "| reference |" in answer.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "table.md", "speedup.png"}
    entry = json.loads((tmp_path / "results.json").read_text())["infer tiny batch 2 fp32"]
    assert list(entry["rows"]) == ["mae_fast", "reference"]
    assert (tmp_path / "table.md").read_text() in answer.stdout
    assert "already measured" in command(monkeypatch, capsys, *words).stdout
