"""``mae-fast doctor``: it names the kernels that the dispatcher uses, and finds problems of a machine."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mae_fast.doctor import machine as report
from mae_fast.doctor.findings import Finding, tally
from mae_fast.doctor.machine import ON_GPUS, TORCHS, cores, doctor, machine, rows
from mae_fast.ops.attention import op as attention
from mae_fast.ops.native import cpu_isa, has_matrix_unit, has_native
from mae_fast.ops.registry import ops

TRITON = {op.name for op in ops() if op.has_triton_kernels}


def rows_without(*modules):
    """``rows()`` in a process where importing ``modules`` fails."""
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in modules)
    code = f"import json, sys; {hide}from mae_fast.doctor.machine import rows; print(json.dumps(rows()))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {(op, device): (name, why) for op, device, name, why in json.loads(output)}


def test_rows_name_the_dispatched_kernels():
    answers = {(op, device): name for op, device, name, _ in rows() if not op.startswith("attention ")}
    assert {op for op, _ in answers} == {op.name for op in ops()}
    for (op, device), name in answers.items():
        if op == "mlp" and (device == "CUDA" or not has_matrix_unit()):
            assert name == "the kernels of the ops it calls"
        elif device == "CPU":
            assert name == (f"C++ ({cpu_isa()})" if op != "linear" or has_matrix_unit() else "torch's Linear")
        elif op in ON_GPUS:
            assert name == TORCHS[op]
        elif op in TRITON:
            assert name == "Triton"
        else:
            assert name == ("CUDA C++" if has_native(op, "CUDA") else "eager torch")


XFORMERS, SDPA = "xformers", "torch's SDPA"


@pytest.mark.parametrize(
    ("triton", "xformers", "expected"),
    [
        (True, True, {"several": XFORMERS, "up to 320": "Triton", "more than 320": XFORMERS}),
        (True, False, {"up to 320": "Triton", "several": f"Triton or {SDPA}", "more than 320": SDPA}),
        (False, True, {"several": XFORMERS, "one length": XFORMERS}),
        (False, False, {"any length": SDPA}),
    ],
)
def test_gpu_attention_has_a_row_per_kernel(monkeypatch, triton, xformers, expected):
    library = (object(), "xformers 1.0") if xformers else (None, "xformers 1.0 was built for another torch")
    monkeypatch.setattr(attention, "memory_efficient", lambda: library)
    monkeypatch.setattr(attention, "has_kernel", lambda name, device: triton)
    found = [row for row in rows() if row[0].startswith("attention ")]
    assert {device for _, device, _, _ in found} == {"CUDA"}
    for (name, _, answer, why), (sequences, wanted) in zip(found, expected.items(), strict=True):
        assert sequences in name
        assert answer == wanted
        assert ("xformers 1.0" in why) == (answer != "Triton")


def test_rows_without_the_compiled_extension():
    for (op, device), (name, why) in rows_without("mae_fast._C", "xformers").items():
        if op == "mlp" and (device == "CUDA" or not has_matrix_unit()):
            continue
        if device == "CUDA" and op.startswith("attention "):
            assert (name == "Triton") != ("xformers is not installed" in why)
        elif device == "CUDA" and op in ON_GPUS:
            assert (name, why) == (TORCHS[op], ON_GPUS[op])
        elif device == "CUDA" and op in TRITON:
            assert name == "Triton"
        else:
            assert name == TORCHS.get(op, "eager torch")
            assert why == "mae_fast._C is not built: no C++ compiler was found when mae_fast was installed"


def test_rows_without_triton():
    for (op, device), (name, why) in rows_without("triton").items():
        if device == "CUDA" and op in TRITON:
            assert (name, why) == (TORCHS.get(op, "eager torch"), "triton is not installed")
        else:
            assert name != "eager torch" or not has_native(op, device)


def test_doctor_prints_findings_and_kernels(capsys: pytest.CaptureFixture[str]):
    doctor()
    printed = capsys.readouterr().out
    versions = f"torch {torch.__version__.split('+')[0]}"
    for word in ("masked_loss", "C++", versions, "compiled kernels", "optional: dali"):
        assert word in printed
    assert printed.splitlines()[-1] == tally(machine())


def found(findings):
    return {f.what: f for f in findings}


@pytest.fixture
def packages(monkeypatch):
    """Replaces the installed packages: name -> version."""
    installed = {"torch": "2.14.0", "timm": "1.0"}

    def version(name):
        if name not in installed:
            raise report.PackageNotFoundError
        return installed[name]

    about = {
        "Requires-Dist": ["torch>=2.14", "timm>=1.0", 'onnx>=1.23; extra == "onnx"', 'pytest>=9; extra == "test"'],
        "Provides-Extra": ["onnx", "test"],
    }
    monkeypatch.setattr(report, "metadata", lambda _: SimpleNamespace(get_all=about.get))
    monkeypatch.setattr(report, "version", version)
    return installed


def test_packages(packages):
    assert found(report._packages())["packages"] == Finding("packages", "torch 2.14.0, timm 1.0")
    packages |= {"torch": "2.9.1"}
    assert found(report._packages())["packages"] == Finding(
        "packages", "torch 2.9.1, timm 1.0", "pip install 'torch>=2.14'", bad=True
    )
    del packages["timm"]
    assert found(report._packages())["packages"].fix == "pip install 'torch>=2.14' 'timm>=1.0'"


def test_optional_packages(packages):
    missing = found(report._packages())
    assert missing["optional: onnx"] == Finding("optional: onnx", "onnx not installed", "pip install 'mae_fast[onnx]'")
    assert "optional: test" not in missing
    packages["onnx"] = "1.22"
    assert found(report._packages())["optional: onnx"].verdict == "note"
    packages["onnx"] = "1.24.0rc1"
    assert found(report._packages())["optional: onnx"].verdict == "ok"


@pytest.mark.parametrize("library", [object(), None])
def test_unusable_xformers_is_a_note_with_a_fix(packages, monkeypatch, library):
    packages["xformers"] = "0.0.35"
    about = {"Requires-Dist": ['xformers>=0.0.35; extra == "gpu"'], "Provides-Extra": ["gpu"]}
    monkeypatch.setattr(report, "metadata", lambda _: SimpleNamespace(get_all=about.get))
    why = "xformers 0.0.35 was built for another torch"
    monkeypatch.setattr(report, "memory_efficient", lambda: (library, "xformers 0.0.35" if library else why))
    row = found(report._packages())["optional: gpu"]
    assert row.found == ("xformers 0.0.35" if library else why)
    assert row.verdict == ("ok" if library else "note")
    assert ("this torch" in row.fix) == (library is None)


def test_extras_do_not_list_mae_fast(packages, monkeypatch):
    about = {"Requires-Dist": ['mae_fast[train]; extra == "onnx"', 'onnx>=1; extra == "onnx"'],
             "Provides-Extra": ["onnx"]}  # fmt: skip
    monkeypatch.setattr(report, "metadata", lambda _: SimpleNamespace(get_all=about.get))
    packages["onnx"] = "1.23"
    assert found(report._packages())["optional: onnx"] == Finding("optional: onnx", "onnx 1.23")


@pytest.mark.parametrize(
    ("threads", "verdict", "fix"),
    [(4, "ok", ""), (5, "problem", "set OMP_NUM_THREADS=4"), (1, "note", "unset OMP_NUM_THREADS")],
)
def test_threads(monkeypatch, threads, verdict, fix):
    monkeypatch.setattr(report, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    row = found(report._processor())["threads"]
    assert (row.found, row.verdict, row.fix) == (f"{threads} on 4 cores", verdict, fix)


def test_cores_within_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(report.os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert cores(tmp_path) == 8
    for quota, count in (("max 100000", 8), ("250000 100000", 3), ("100000 100000", 1), ("9900000 100000", 8)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert cores(tmp_path) == count


@pytest.mark.parametrize(
    ("features", "unit", "error", "limit", "verdict", "fix"),
    [
        ({"AVX2", "AVX512_BF16"}, True, None, None, "ok", ""),
        ({"AVX2"}, False, None, None, "ok", ""),
        ({"AMX"}, False, None, None, "note", "set torch.backends.mkldnn.enabled = True"),
        ({"AMX"}, False, None, "AVX2", "note", "unset ONEDNN_MAX_CPU_ISA"),
        ({"AMX"}, False, "not built", None, "note", "compile the kernels"),
    ],
)
def test_processor(monkeypatch, features, unit, error, limit, verdict, fix):
    monkeypatch.setattr(report, "FEATURES", {name: lambda n=name: n in features for name in report.FEATURES})
    monkeypatch.setattr(report, "has_matrix_unit", lambda: unit)
    monkeypatch.setattr(report, "native_error", lambda: error)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    rows = found(report._processor())
    assert (rows["bf16 on the CPU"].verdict, rows["bf16 on the CPU"].fix) == (verdict, fix)
    assert rows["compiled kernels"].bad == bool(error)
    assert rows["CPU"].fix == ("unset ONEDNN_MAX_CPU_ISA" if limit else "")
    assert ", ".join(name for name in report.FEATURES if name in features) in rows["CPU"].found


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(report, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    return tmp_path / "version"


def test_driver_and_torch(no_gpu, monkeypatch):
    assert [f.verdict for f in report._gpus()] == ["ok"]
    no_gpu.touch()
    (row,) = report._gpus()
    assert (row.found, row.bad) == ("The NVIDIA driver on your system is too old", True)
    assert "CUDA 13.0" in row.fix
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    (row,) = report._gpus()
    assert ("CUDA_VISIBLE_DEVICES" in row.found, row.bad) == (True, True)
    monkeypatch.setattr(torch.version, "cuda", None)
    (row,) = report._gpus()
    assert ("without CUDA" in row.found, row.bad) == (True, True)


@pytest.mark.parametrize(("capability", "verdict"), [((9, 0), "ok"), ((8, 0), "ok"), ((7, 5), "note")])
def test_gpus(monkeypatch, capability, verdict):
    major, minor = capability
    about = SimpleNamespace(name="A GPU", total_memory=80 << 30, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    monkeypatch.setattr(report, "memory_efficient", lambda: (None, "xformers is not installed"))
    monkeypatch.setattr(report, "HAS_TRITON", False)
    monkeypatch.setattr(report, "cuda_error", lambda: "mae_fast is compiled for CUDA 13, this torch for CUDA 12")
    rows = found(report._gpus())
    assert rows["GPU 1"].verdict == verdict
    assert rows["GPU 0"].found.startswith(f"A GPU, 80 GiB, sm_{major}{minor}, CUDA")
    assert [rows[name].verdict for name in ("Triton", "attention, above 320 tokens", "CUDA C++")] == [
        "problem",
        "note",
        "note",
    ]


@pytest.mark.parametrize(
    ("free", "total", "gpus", "verdict", "fix"),
    [
        (64, 64, 0, "ok", ""),
        (64, 64, 1, "ok", ""),
        (64, 64, 8, "note", "--shm-size=1g"),
        (1000, 1000, 8, "ok", ""),
        (0, 64, 0, "problem", "free some space"),
    ],
)
def test_shared_memory(monkeypatch, tmp_path, free, total, gpus, verdict, fix):
    monkeypatch.setattr(report.shutil, "disk_usage", lambda path: (total << 20, 0, free << 20))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    shared, _ = report._limits(tmp_path)
    assert (shared.what, shared.verdict) == ("shared memory", verdict)
    assert f"{free} of {total} MiB" in shared.found
    assert fix in shared.fix


def test_no_shared_memory(tmp_path):
    shared, _ = report._limits(tmp_path / "none")
    assert shared.verdict == "problem"
    assert "No such file or directory" in shared.found


@pytest.mark.parametrize(
    ("soft", "hard", "verdict", "fix"),
    [
        (1024, 4096, "ok", ""),
        (512, 100_000, "note", "ulimit -n 4096"),
        (512, 700, "note", "ulimit -n 700"),
        (32, -1, "problem", "ulimit -n 4096"),
        (-1, -1, "ok", ""),
    ],
)
def test_open_files(monkeypatch, tmp_path, soft, hard, verdict, fix):
    monkeypatch.setattr(report.resource, "getrlimit", lambda what: (soft, hard))
    _, files = report._limits(tmp_path)
    assert (files.what, files.verdict, files.fix) == ("open files", verdict, fix)


def test_verdicts_and_tally():
    rows = [Finding("a", "b"), Finding("a", "b", "c"), Finding("a", "b", "c", bad=True), Finding("a", "b", bad=True)]
    assert [row.verdict for row in rows] == ["ok", "note", "problem", "problem"]
    assert tally(rows) == "problems: 2, notes: 1"
