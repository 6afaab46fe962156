"""What measures on a GPU runs here too, tiny, on the CPU: rows, gate, skips, failures, budget, where it writes."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, train
from benchmarks.gpu.contender import Plan, count_launches
from benchmarks.gpu.report import RESULTS, Report, slug

# Replaces the contenders in worker processes, which import it as a module.
STAND_INS = """
import os, time
import torch
from mae_fast.bench import contenders

def build(name, model, images, bf16, task, noise, mask_ratio):
    if name == "raises":
        raise RuntimeError("no kernel image\\nand more lines")
    if name == "greedy" and not os.environ.get("GREEDY"):
        os.environ["GREEDY"] = "1"  # of its process
        raise torch.OutOfMemoryError("no room beside the others")
    if name == "dies":
        os._exit(7)
    if name.startswith("sleeps"):
        time.sleep(600)
    if name == "not installed":
        import nowhere
    if name == "slow learner":
        contenders.ADAMW = contenders.ADAMW | {"lr": 0.8e-4}
    real = name if name in ("reference", "transformers") else "mae_fast"
    step = contenders.build(real, model, images, bf16, task, noise, mask_ratio)
    return (lambda: step() * 1.01) if name == "wrong loss" else step
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    monkeypatch.syspath_prepend(tmp_path)
    import stand_ins

    yield stand_ins.build
    del sys.modules["stand_ins"]


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "results.json", {}, 600)


def plan(*contenders):
    return Plan("tiny", 4, contenders, device="cpu", steps=1)


@pytest.mark.slow
def test_who_errs_or_disagrees_has_no_row_and_the_others_have(stand_ins, report):
    names = ("mae_fast", "greedy", "reference", "wrong loss", "slow learner", "raises", "dies", "not installed")
    settled = []
    rows = train.measure(
        plan(*names), report, report.deadline, rounds=3, settle=lambda: settled.append(1), build=stand_ins
    )
    assert list(rows) == ["mae_fast", "greedy", "reference"]
    assert len(rows["mae_fast"]["rounds ms"]) == 3
    assert rows["mae_fast"]["vs reference"] > 0
    assert rows["mae_fast"]["MFU"] is None
    assert settled == [1]
    prefix = "train tiny batch 4 bf16: "
    assert set(report.missing["refused"]) == {f"{prefix}wrong loss: gate", f"{prefix}slow learner: gate"}
    assert "at step 0," in report.missing["refused"][f"{prefix}wrong loss: gate"]
    assert "at step 0," not in report.missing["refused"][f"{prefix}slow learner: gate"]
    assert report.missing["failed"] == {
        f"{prefix}raises: losses": "RuntimeError: no kernel image",
        f"{prefix}dies: losses": "its process died (exit status 7), perhaps out of memory",
    }
    # An import error of our own would be a failure.
    assert report.missing["skipped"] == {
        f"{prefix}not installed: losses": "nowhere is not installed: pip install nowhere"
    }
    assert not report.missing["left out"]


def test_contenders_that_are_not_ready_in_time_are_left_out(stand_ins, report):
    start = time.monotonic()
    names = [f"sleeps {i}" for i in range(train.PREPARED_AT_ONCE + 1)]  # one more than are prepared at once
    workers = train.Workers(plan(*names), names, report, start + 2, stand_ins)
    processes = [worker.process for worker in workers.running.values()]
    assert workers.losses() == {}
    assert time.monotonic() - start < 60
    assert list(report.missing["left out"]) == [f"train tiny batch 4 bf16: {name}: losses" for name in names]
    assert not any(process.is_alive() for process in processes)


def test_gate():
    truth, eager = [2.0, 1.5, 1.2], [2.001, 1.503, 1.21]
    losses = {"truth": truth, "reference": eager}
    ours = [2.0, 1.5, 1.2 + 2 * 0.01 + 1.2 * train.ROUNDING]
    assert train.gate(losses | {"ours": [*ours[:2], ours[2] - 1e-9]}) == {}
    assert list(train.gate(losses | {"ours": [*ours[:2], ours[2] + 1e-6]})) == ["ours"]
    assert list(train.gate(losses | {"ours": [2.0, math.nan, 1.2]})) == ["ours"]
    assert "no losses of truth" in train.gate({"reference": eager, "ours": truth})["ours"]
    assert set(train.gate({"truth": truth, "ours": truth})) == {"truth", "ours"}


def test_rows():
    times = {"mae_fast": [0.1, 0.1], "reference": [0.3, 0.2], "reference compiled": [0.2, 0.2]}
    row = train.row("mae_fast", times, Plan("base", 256, ()), 989.4e12)
    assert row["images/s"] == 2560
    assert row["MFU"] == pytest.approx(2560 * 58.7e9 / 989.4e12, rel=1e-3)
    assert (row["vs reference"], row["vs reference compiled"]) == (2.5, 2.0)
    assert train.row("mae_fast", times, Plan("base", 256, ()), None)["MFU"] is None
    assert "vs reference" not in train.row("reference", times, Plan("base", 256, ()), None)


def test_cases_build_and_name_every_model():
    for one in train.PLANS:
        assert {"mae_fast", "reference", "reference compiled"} < set(one.contenders)
        assert set(one.contenders) <= set(train.OURS + train.BASELINES)
        assert bool(one.left_out) == (set(one.contenders) != set(train.OURS + train.BASELINES))
    assert [one.model for one in train.PLANS] == ["base", "large", "huge"]


def test_launches_are_counted_from_a_trace():
    events = [
        {"cat": "kernel", "name": "gemm", "dur": 5.0},
        {"cat": "kernel", "name": "gemm", "dur": 7.0},
        {"cat": "kernel", "name": "norm", "dur": 1.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "dur": 9.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 2.0},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "dur": 2.0},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "dur": 2.0},
        {"ph": "M", "name": "process_name"},
    ]
    found = count_launches(events)
    assert (found["launches"], found["kernels"], found["kernel ms"]) == (2, 3, 0.013)
    assert found["longest"][0] == {"kernel": "gemm", "count": 2, "ms": 0.012}
    with pytest.raises(RuntimeError, match="no kernels"):
        count_launches(events[3:])


def test_a_command_that_fails_or_is_late_is_reported(report):
    program = "print('before'); print('the reason'); raise SystemExit(3)"
    checks.Job("fails", [sys.executable, "-c", program], 60).finish(report)
    assert report.missing["failed"] == {"fails": "status 3: the reason"}
    assert report.found["fails"]["output"] == ["before", "the reason"]
    start = time.monotonic()
    late = checks.Job("late", [sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    late.finish(report)
    assert "late" in report.missing["left out"]
    assert late.process.poll() is not None
    assert time.monotonic() - start < 30
    checks.Job("passes", [sys.executable, "-c", "print('fine')"], 60).finish(report)
    assert json.loads(report.output.read_text())["passes"]["last line"] == "fine"
    assert list(report.missing["failed"]) == ["fails"]


def test_has():
    assert checks.has("json.decoder")
    assert not checks.has("json.nowhere")
    assert not checks.has("nowhere.at_all")


def test_parity_leaves_out_what_cannot_be_imported(report, monkeypatch):
    """And names it; the rest is run."""
    monkeypatch.setattr(checks, "has", lambda module: module not in ("nvidia.dali", "PIL"))
    monkeypatch.setattr(checks, "Job", lambda name, command, limit: command)
    files = {part for part in checks.parity(report, 1) if part.startswith("tests/")}
    assert {"tests/ops/test_cuda.py", "tests/models/test_cuda.py"} <= files
    assert not any(part.startswith(("tests/data", "tests/training")) for part in files)
    assert report.missing["skipped"] == {
        "parity: tests/data": "not installed: nvidia.dali, PIL",
        "parity: tests/training": "not installed: PIL",
    }
    monkeypatch.setattr(checks, "has", lambda module: True)
    assert "tests/data/test_decoders.py" in checks.parity(report, 1)


def test_ops_without_a_row_are_told_of():
    lines = [
        "FAILED benchmarks/ops/bench_ops.py::test_op[mlp decoder bf16] - AssertionError: off",
        "SKIPPED [1] benchmarks/ops/conftest.py:18: test_op[linear decoder bf16]: the budget is spent",
        "1 failed, 1 skipped",
    ]
    assert checks.without_rows(lines) == [
        ("failed", "test_op[mlp decoder bf16]", "AssertionError: off"),
        ("left out", "test_op[linear decoder bf16]", "the budget is spent"),
    ]


def test_dry_runs_are_never_results(tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(RESULTS)
    for output in (RESULTS / "a.json", RESULTS / "b" / "a.json", RESULTS / "../results/a.json", link / "a.json"):
        with pytest.raises(SystemExit):
            gpu.parse(["--dry-run", "--output", str(output)])
        assert "do not belong" in capsys.readouterr().err
    assert RESULTS not in gpu.parse(["--dry-run"]).output.resolve().parents


def test_without_a_gpu_there_is_no_measurement(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "--dry-run" in capsys.readouterr().err


def test_results_are_named_by_the_gpu(monkeypatch):
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("NVIDIA A100-SXM4-40GB") == "nvidia-a100-sxm4-40gb"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpu.parse([]).output == RESULTS / "nvidia-h100-80gb-hbm3.json"


def dry_run(monkeypatch, output, *flags):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # within pytest-xdist, pytest-benchmark would time nothing
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--output", str(output), *flags])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return json.loads(output.read_text()), end.value.code


@pytest.mark.slow
def test_dry_run(monkeypatch, tmp_path, capsys):
    """All stages, without a contender that compiles for a minute, and with a baseline that cannot be imported."""
    (tmp_path / "transformers.py").write_text("raise ImportError('hidden')")
    monkeypatch.syspath_prepend(tmp_path)
    contenders = [name for name in train.DRY_RUN.contenders if "compiled" not in name]
    monkeypatch.setattr(gpu, "DRY_RUN", replace(train.DRY_RUN, contenders=tuple(contenders)))
    found, status = dry_run(monkeypatch, tmp_path / "out.json")
    said = capsys.readouterr().out
    assert (status, found["failed"], found["refused"], found["dry run"]) == (0, {}, {}, True)
    assert set(found["train tiny batch 4 bf16"]) == {"mae_fast", "reference"}
    assert "skipped" in found["parity"]["last line"]
    [op] = found["ops"]
    assert op["vs eager"] > 0
    assert op["ms"].keys() == {"eager", "compile", "mae_fast"}
    assert "train tiny batch 4 bf16: mae_fast CUDA graph" in found["skipped"]
    assert "hidden" in found["skipped"]["train tiny batch 4 bf16: transformers: losses"]
    for line in ("reference", "random_masking", "times faster", "nothing above is a measurement"):
        assert line in said
    for what in (*found["skipped"], *found["left out"]):
        assert what in said


def test_a_spent_budget_is_told_of(monkeypatch, tmp_path, capsys):
    found, _ = dry_run(monkeypatch, tmp_path / "out.json", "--budget", "0")
    assert set(found["left out"]) == {"train tiny batch 4 bf16", "ops", "parity", "memcheck", "racecheck"}
    assert capsys.readouterr().out.count("the budget is spent") == 5


def test_needs_no_package_but_torch_numpy_and_pytest():
    """Nor does a training step of ours, or the ops' benchmark."""
    hidden = "timm tyro pydantic rich safetensors transformers xformers torchvision PIL filelock huggingface_hub nvidia"
    program = f"""
import sys
sys.modules |= dict.fromkeys({hidden.split()!r})
import benchmarks.gpu.__main__, benchmarks.ops.problems
import torch
from mae_fast.bench.contenders import build, images
step = build("mae_fast", "tiny", images("tiny", 2), True, noise=torch.rand(2, 64))
print(float(step()) > 0)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr
