"""The three parts of ``make gpu`` at tiny sizes on the CPU: rows, checks, skips, failures, limits, files."""

import json
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import baselines, kernels, parity
from benchmarks.gpu.contender import Plan, count_launches
from benchmarks.gpu.report import RESULTS, Report, slug

# A module that replaces the contenders in worker processes.
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
    return Plan("tiny", 4, contenders, 60, device="cpu", steps=1)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_only_contenders_that_succeed_and_agree_have_rows(stand_ins, report):
    names = ("mae_fast", "greedy", "reference", "wrong loss", "slow learner", "raises", "dies", "not installed")
    rows = baselines.measure(plan(*names), report, report.deadline, rounds=3, build=stand_ins)
    assert list(rows) == ["mae_fast", "greedy", "reference"]
    assert len(rows["mae_fast"]["rounds ms"]) == 3
    assert rows["mae_fast"]["vs reference"] > 0
    assert rows["mae_fast"]["MFU"] is None
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
    names = [f"sleeps {i}" for i in range(baselines.PREPARED_AT_ONCE + 1)]  # one more than PREPARED_AT_ONCE
    workers = baselines.Workers(plan(*names), names, report, start + 2, stand_ins)
    processes = [worker.process for worker in workers.running.values()]
    assert workers.losses() == {}
    assert time.monotonic() - start < 60
    assert list(report.missing["left out"]) == [f"train tiny batch 4 bf16: {name}: losses" for name in names]
    assert not any(process.is_alive() for process in processes)


def test_gate():
    truth, eager = [2.0, 1.5, 1.2], [2.001, 1.503, 1.21]
    losses = {"truth": truth, "reference": eager}
    ours = [2.0, 1.5, 1.2 + 2 * 0.01 + 1.2 * baselines.ROUNDING]
    assert baselines.gate(losses | {"ours": [*ours[:2], ours[2] - 1e-9]}) == {}
    assert list(baselines.gate(losses | {"ours": [*ours[:2], ours[2] + 1e-6]})) == ["ours"]
    assert list(baselines.gate(losses | {"ours": [2.0, math.nan, 1.2]})) == ["ours"]
    assert "no losses of truth" in baselines.gate({"reference": eager, "ours": truth})["ours"]
    assert set(baselines.gate({"truth": truth, "ours": truth})) == {"truth", "ours"}


def test_rows(monkeypatch):
    times = {"mae_fast": [0.1, 0.1], "reference": [0.3, 0.2], "reference compiled": [0.2, 0.2]}
    base = Plan("base", 256, (), 60)
    assert baselines.row("mae_fast", times, base, [])["MFU"] is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    row = baselines.row("mae_fast", times, base, [1.0])
    assert (row["images/s"], row["losses"]) == (2560, [1.0])
    assert row["MFU"] == pytest.approx(2560 * 58.7e9 / 989.4e12, rel=1e-3)
    assert (row["vs reference"], row["vs reference compiled"]) == (2.5, 2.0)
    assert "vs reference" not in baselines.row("reference", times, base, [])


def test_eager_contenders_start_first_and_every_plan_has_the_reference():
    for one in baselines.PLANS:
        assert "reference" in one.contenders
        assert any(name.startswith("mae_fast") for name in one.contenders)
    names = sorted(baselines.PLANS[0].contenders, key=baselines.needs_compiler)
    assert names == ["mae_fast", "mae_fast CUDA graph", "reference", *baselines.COMPILED]
    assert len({*map(str, baselines.PLANS)}) == len(baselines.PLANS)  # names of results


@pytest.mark.slow
@pytest.mark.exhaustive
def test_slow_contenders_do_not_block_the_others(stand_ins, report, monkeypatch):
    """The file contains the results after each round."""
    monkeypatch.setattr(baselines, "PREPARED_AT_ONCE", 1)  # a sleeping contender would block the others
    monkeypatch.setattr(baselines, "PREPARING", 0.4)
    kept = []

    def keep(name, rows):
        kept.append({who: len(row["rounds ms"]) for who, row in rows.items()})

    monkeypatch.setattr(report, "keep", keep)
    names = ("sleeps compiled", "mae_fast", "reference")
    rows = baselines.measure(plan(*names), report, time.monotonic() + 120, rounds=2, build=stand_ins)
    assert list(rows) == ["mae_fast", "reference"]
    assert report.missing["left out"] == {"train tiny batch 4 bf16: sleeps compiled: losses": "not done in time"}
    assert kept[:2] == [{"mae_fast": 1, "reference": 1}, {"mae_fast": 2, "reference": 2}]


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


def finished(job, report, seconds=60.0):
    job.start()
    end = time.monotonic() + seconds
    while not job.ended() and time.monotonic() < end:
        time.sleep(0.02)
    job.finish(report)


def test_failed_and_late_commands_are_reported(report):
    program = "print('before'); print('the reason'); raise SystemExit(3)"
    finished(parity.Job("fails", [sys.executable, "-c", program]), report)
    assert report.missing["failed"] == {"fails": "status 3: the reason"}
    assert report.found["fails"]["output"] == ["before", "the reason"]
    start = time.monotonic()
    late = parity.Job("late", [sys.executable, "-c", "import time; time.sleep(60)"])
    finished(late, report, 0.5)
    assert "late" in report.missing["left out"]
    assert late.process.poll() is not None
    assert time.monotonic() - start < 30
    finished(parity.Job("passes", [sys.executable, "-c", "print('fine')"]), report)
    assert json.loads(report.output.read_text())["passes"]["last line"] == "fine"
    assert list(report.missing["failed"]) == ["fails"]
    parity.Job("never started", []).finish(report)
    assert report.missing["left out"]["never started"] == "time limit reached"


def test_results_before_a_kill_are_kept(report):
    lines = ["tests/a.py::test_b[x y] PASSED", "tests/a.py::test_c FAILED", "tests/a.py::test_d SKIPPED (no)"]
    program = f"print({chr(10).join(lines)!r}, flush=True); import time; time.sleep(60)"
    finished(parity.Tests("tests", [sys.executable, "-c", program]), report, 3)
    found = report.found["tests"]
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == ["tests/a.py::test_c"]
    assert "tests" in report.missing["left out"]


def test_a_tool_is_skipped_if_it_cannot_run_and_fails_if_it_finds_errors(report):
    for name, status in (("cannot", 1), ("errors", 99)):
        program = f"print('Device not supported'); raise SystemExit({status})"
        finished(parity.Tool(name, [sys.executable, "-c", program]), report)
    assert report.missing["skipped"] == {"cannot": "status 1: Device not supported"}
    assert report.missing["failed"] == {"errors": "status 99: Device not supported"}


def test_parity_runs_model_and_training_tests_before_ops(report, monkeypatch):
    monkeypatch.setattr(parity.shutil, "which", lambda tool, path: f"/bin/{tool}")
    monkeypatch.setattr(parity, "find_spec", lambda name: None if name == "PIL" else object())
    jobs = list(parity.jobs(report, dry_run=False))
    names = [job.name for job in jobs]
    assert names[0] == "tests/models"
    assert names[1:] == [*(f"tests/ops {i} of 12" for i in range(1, 13)), "memcheck", "racecheck", "ncu"]
    assert report.missing["skipped"] == {"tests/training": "not installed: PIL"}
    assert sum("--shard=11/12" in job.command for job in jobs) == 1
    assert {"tests/ops/test_attention.py", "tests/ops/test_random_masking.py"} <= {*jobs[5].command}
    assert 13 <= parity.AT_ONCE <= 14


def test_each_test_is_in_one_shard():
    program = """
from types import SimpleNamespace
from gpu_proof.on_device import pytest_collection_modifyitems

for shard in ("0/3", "1/3", "2/3"):
    items = list(range(10))
    pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: shard), items)
    print(*items)
"""
    command = [sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": "tests"}
    done = subprocess.run(command, cwd=RESULTS.parents[1], env=env, capture_output=True, text=True)
    shards = [[*map(int, line.split())] for line in done.stdout.splitlines()]
    assert [len(shard) for shard in shards] == [4, 3, 3]
    assert sorted(i for shard in shards for i in shard) == list(range(10))
    assert shards[0] != sorted(shards[0])  # from all files, not only the first


class Fake:
    """A replacement of ``Worker`` that records its calls and raises errors in some of them."""

    made = 0

    def __init__(self, name, measurer, dry_run, deadline=None):
        Fake.made += 1
        self.process = SimpleNamespace(is_alive=lambda: True)

    def ask(self, method, *args):
        if method == "ops":
            return ["bias_gelu encoder bf16"]
        if args == ("base", 256, "CUDA graph"):
            raise baselines.Unavailable("AcceleratorError: CUDA error: misaligned address")
        if args[-1] == "xformers":
            raise baselines.Unavailable("xformers is not installed", "skipped")
        return {"ms": 1.0, "args": list(args)}

    def close(self):
        pass


def test_a_gpu_error_affects_one_row(report, monkeypatch):
    """A new worker process measures the other rows."""
    monkeypatch.setattr(kernels, "Worker", Fake)
    monkeypatch.setattr(Fake, "made", 0)
    kernels.run(report, dry_run=False)
    found = json.loads(report.output.read_text())
    assert Fake.made == 2
    assert list(found["failed"]) == ["step base 256 CUDA graph"]
    assert len(found["skipped"]) == 2
    assert len(found["attention"]) == 10
    assert len(found["linear"]) == 11
    assert {tuple(row["args"][:2]) for row in found["step"]} >= {("base", 1024), ("large", 128), ("huge", 64)}


def test_the_most_informative_rows_come_first():
    sections = [row.section for row in kernels.rows(["a", "b"], dry_run=False)]
    assert list(dict.fromkeys(sections)) == ["step", "attention", "op", "ceiling", "linear"]
    assert sections[:2] == ["step", "step"]


def test_ops_that_were_never_measured_come_first():
    measurer = kernels.Measurer.__new__(kernels.Measurer)
    ops = ("random_masking", "fp32"), ("masked_loss", "bf16"), ("bias_gelu", "bf16"), ("mlp", "fp32")
    measurer.problems = {op: Named(op, dtype) for op, dtype in ops}
    assert measurer.ops() == ["bias_gelu", "random_masking", "masked_loss"]


class Named(SimpleNamespace):
    def __init__(self, op, dtype):
        super().__init__(op=op, dtype=dtype)

    def __str__(self):
        return self.op


def test_measured_kernels_are_reported_with_the_prediction(monkeypatch):
    events = [{"cat": "kernel", "name": name, "dur": 1e3 * (i + 1)} for i, name in enumerate((
        "_bias_gelu_fwd_kernel", "_add_layer_norm_bwd_kernel", "_attention_fwd_kernel", "nvjet_hsh_128x256",
        "multi_tensor_apply_kernel", "_weighted_mean_kernel", "void cutlass::Kernel2",
    ))]  # fmt: skip
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = kernels.beside_prediction("base", 512, 50.0, events)
    expected = {"GELU": 1, "layer norm": 2, "attention": 3, "products": 4 + 7, "AdamW": 5, "other": 6}
    assert found["ms by part"] == expected
    assert expected.keys() < found["predicted ms by part"].keys()
    whole = sum(kernels.predicted_seconds("ViT-B/16", kernels.GPUS["H100 SXM"]).values())
    assert found["predicted ms"] == pytest.approx(2e3 * whole)
    assert found["MFU"] == pytest.approx(512 * 58.7e9 / 0.05 / 989.4e12, rel=1e-3)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "another")
    assert kernels.beside_prediction("base", 512, 50.0, events).keys() == {"ms by part"}


def test_our_kernels_are_assigned_to_the_right_part():
    parts = {"adamw": "AdamW", "add_layer_norm": "layer norm", "attention": "attention", "bias_gelu": "GELU"}
    found = set()
    for file in sorted((RESULTS.parents[1] / "mae_fast" / "ops").glob("*/triton_kernels.py")):
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M):
            assert kernels.part_of(name) == parts.get(file.parent.name, "other"), name
            found.add(file.parent.name)
    assert found > parts.keys()


def test_dry_runs_do_not_write_to_results(tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(RESULTS)
    for folder in (RESULTS, RESULTS / "b", RESULTS / "../results", link):
        with pytest.raises(SystemExit):
            gpu.parse(["kernels", "--dry-run", "--results", str(folder)])
        assert "--dry-run does not write" in capsys.readouterr().err
    assert RESULTS not in gpu.parse(["parity", "--dry-run"]).results.resolve().parents


def test_invalid_results_folder_is_refused_at_the_start(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu.parse(["kernels", "--dry-run", "--results", str(tmp_path / "file" / "results")])
    assert "error: --results: [Errno 20] Not a directory" in capsys.readouterr().err


def test_measuring_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.parse(["baselines"])
    assert "--dry-run" in capsys.readouterr().err


def test_results_are_named_by_the_gpu_and_the_part(monkeypatch, tmp_path, capsys):
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setitem(gpu.PARTS, "kernels", (lambda report, dry_run: report.note_missing("failed", "x", "y"), 1))
    monkeypatch.setattr(sys, "argv", ["gpu", "kernels", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    found = json.loads((tmp_path / "gpu-nvidia-a100-sxm4-40gb-kernels.json").read_text())
    assert (end.value.code, found["dry run"], found["device"]) == (1, False, "NVIDIA A100-SXM4-40GB")


def dry_run(monkeypatch, folder, part, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu", part, "--dry-run", "--results", str(folder), *flags])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    found = json.loads((folder / f"dry-run-{part}.json").read_text())
    assert (found["dry run"], found["device"]) == (True, "CPU, tiny sizes")
    return found, end.value.code


def test_dry_run_of_the_kernels(monkeypatch, tmp_path, capsys):
    found, status = dry_run(monkeypatch, tmp_path, "kernels")
    assert (status, found["failed"], found["left out"]) == (0, {}, {})
    assert [row["execution"] for row in found["step"]] == ["eager"]
    assert {row["op"].split()[0] for row in found["op"]} >= {"bias_gelu", "add_layer_norm", "attention", "masked_loss"}
    assert all(row["ms"] > 0 and row["vs eager"] > 0 for row in found["op"])
    assert [row["backend"] for row in found["attention"]] == ["sdpa"]
    assert found["attention"][0]["error"] < 0.01
    assert found["linear"][0]["weight gradient TFLOP/s"] > 0
    assert "no measurements of a GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_dry_run_of_the_baselines(monkeypatch, tmp_path, capsys):
    """With a baseline that cannot be imported."""
    (tmp_path / "transformers.py").write_text("raise ImportError('hidden')")
    monkeypatch.syspath_prepend(tmp_path)
    found, status = dry_run(monkeypatch, tmp_path, "baselines")
    printed = capsys.readouterr().out
    assert (status, found["failed"], found["refused"]) == (0, {}, {})
    assert set(found["train tiny batch 4 bf16"]) == {"mae_fast", "reference"}
    assert "train tiny batch 4 bf16: mae_fast CUDA graph" in found["skipped"]
    assert "hidden" in found["skipped"]["train tiny batch 4 bf16: transformers: losses"]
    for word in ("reference", "speedup over", *found["skipped"]):
        assert word in printed


@pytest.mark.slow
def test_dry_run_of_the_tests(monkeypatch, tmp_path):
    """The tests are collected. Those of the model are skipped, because there is no GPU."""
    found, status = dry_run(monkeypatch, tmp_path, "parity")
    assert (status, found["failed"]) == (0, {})
    assert (found["tests/models"]["passed"], found["tests/models"]["failed"]) == (0, 0)
    assert found["tests/models"]["skipped"] >= 15
    assert "tests collected" in found["tests/ops 1 of 1"]["last line"]


@pytest.mark.parametrize("part", ["kernels", "baselines", "parity"])
def test_measurements_after_the_time_limit_are_left_out(monkeypatch, tmp_path, part):
    monkeypatch.setattr(kernels, "Worker", Fake)
    found, _ = dry_run(monkeypatch, tmp_path, part, "--limit", "0")
    assert found["left out"]
    assert {*found["left out"].values()} == {"time limit reached"}


def test_make_runs_each_part():
    for part in gpu.PARTS:
        words = ["make", "-n", f"gpu-{part}", "RESULTS=out", "DRY_RUN=1"]
        printed = subprocess.run(words, cwd=RESULTS.parents[1], capture_output=True, text=True, check=True).stdout
        assert printed.strip().endswith(f"-m benchmarks.gpu {part} --results out --dry-run") or (
            f"-m benchmarks.gpu --results out --dry-run {part}" in printed
        )


def test_only_torch_numpy_and_pytest_are_needed():
    """This also holds for our training step and for the benchmark of the ops."""
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
