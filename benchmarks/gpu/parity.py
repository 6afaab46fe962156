"""Runs the tests that need a GPU in parallel processes, and compute-sanitizer and ncu on some ops."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Report
from mae_fast.ops.registry import ops

ROOT = Path(__file__).parents[2]
AT_ONCE = 14
SHARDS = 12  # processes for the tests of the ops
PYTEST = (
    sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short",
    "-o", "addopts=--import-mode=importlib",  # not strict, because pytest 8 does not know all options in pyproject.toml
)  # fmt: skip
# Packages that the tests of a folder import. Without them, pytest cannot collect the folder.
NEEDS = {"models": ("hypothesis",), "ops": ("hypothesis",), "training": ("hypothesis", "PIL", "safetensors")}
CUDA_BIN = "/usr/local/cuda/bin"
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
PROFILED = ("add_layer_norm", "bias_gelu", "attention")


class Job:
    """A command that runs in the background; its output goes to a file."""

    def __init__(self, name: str, command: list[str], **environment: str) -> None:
        self.name, self.command, self.environment = name, command, environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.began = time.monotonic()
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115  # stays open while the command runs
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdout=self.printed, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | self.environment, start_new_session=True,  # to kill it together with its children
        )  # fmt: skip

    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def finish(self, report: Report) -> None:
        """Kill the command if it is still running, and store its outcome."""
        if self.process is None:
            return report.note_missing("left out", self.name, "time limit reached")
        late = not self.ended()
        if late:
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.printed.seek(0)
        lines = [line.rstrip() for line in self.printed if line.strip()]
        found = self.outcome(lines, status) | {"seconds": time.monotonic() - self.began}
        report.keep(self.name, found | ({"output": lines[-40:]} if status else {}))
        last = lines[-1] if lines else "no output"
        if late:
            report.note_missing("left out", self.name, f"killed after {found['seconds']:.0f} s: {last}")
        elif status:
            report.note_missing("failed" if self.failed(status) else "skipped", self.name, f"status {status}: {last}")
        report.log(f"{self.name}: {last}")

    def outcome(self, lines: list[str], status: int) -> dict[str, Any]:
        return {"command": " ".join(self.command), "status": status, "last line": lines[-1] if lines else ""}

    def failed(self, status: int) -> bool:
        return True


class Tests(Job):
    """pytest on some files. If it is killed, the results of finished tests are kept."""

    def outcome(self, lines: list[str], status: int) -> dict[str, Any]:
        results = [match for line in lines if (match := re.match(r"(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", line))]
        counts = {kind.lower(): sum(match[2] == kind for match in results) for kind in ("PASSED", "FAILED", "SKIPPED")}
        failures = [match[1] for match in results if match[2] in ("FAILED", "ERROR")]
        return super().outcome(lines, status) | counts | {"failures": failures}


class Tool(Job):
    """compute-sanitizer or ncu. A tool that cannot run is skipped. Status 99 means that it found errors."""

    def outcome(self, lines: list[str], status: int) -> dict[str, Any]:
        return super().outcome(lines, status) | {"rows": [line for line in lines if line.startswith('"')][:400]}

    def failed(self, status: int) -> bool:
        return status == 99


def run(report: Report, dry_run: bool) -> None:
    """Run all jobs, several at a time, until the time limit."""
    waiting, running = list(jobs(report, dry_run)), []
    while (waiting or running) and report.left > 0:
        while waiting and len(running) < AT_ONCE:
            running.append(waiting.pop(0))
            running[-1].start()
        for job in [job for job in running if job.ended()]:
            running.remove(job)
            job.finish(report)
        time.sleep(0.05)
    for job in running + waiting:
        job.finish(report)


def jobs(report: Report, dry_run: bool) -> Iterator[Job]:
    """The tests of models and training, then those of the ops, then the tools."""
    files = {
        "models": ["tests/models/test_cuda.py", "tests/models/test_dense.py"],
        "training": ["tests/training/test_cuda.py"],
        "ops": ["tests/gpu_proof/kernel_cases.py", *op_tests()],
    }
    for folder, modules in NEEDS.items():
        if absent := [name for name in modules if find_spec(name) is None]:
            report.note_missing("skipped", f"tests/{folder}", f"not installed: {', '.join(absent)}")
            del files[folder]
    for folder in ("models", "training"):
        if folder in files:
            yield Tests(f"tests/{folder}", [*PYTEST, "-m", "gpu", *files[folder]])
    if "ops" in files:
        # Leave out tests of errors for invalid indices: only CPU kernels report these.
        options = ["-m", "not native", "-k", "not out_of_range and not checks_its_own and not compiles"]
        command = [*PYTEST, "-p", "gpu_proof.on_device", *options, *files["ops"]]
        shards = 1 if dry_run else SHARDS
        for shard in range(shards):
            flags = ["--collect-only", "-qq"] if dry_run else [f"--shard={shard}/{shards}"]
            yield Tests(f"tests/ops {shard + 1} of {shards}", [*command, *flags], PYTHONPATH="tests")
    yield from tools(report)


def op_tests() -> list[str]:
    """The test files of the ops that have a GPU kernel."""
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    return [f"tests/ops/test_{op.name}.py" for op in ops() if op.has_triton_kernels or op.name in sources]


def tools(report: Report) -> Iterator[Job]:
    """Each op once under memcheck and racecheck, and some ops at full size under ncu."""
    once = [sys.executable, "-m", "benchmarks.ops.once"]
    quiet = {"memcheck": ["--report-api-errors", "no"]}  # ignore failed driver calls of torch
    commands = {tool: ("compute-sanitizer", ["--tool", tool, *quiet.get(tool, []), "--error-exitcode", "99", *once])
                for tool in ("memcheck", "racecheck")}  # fmt: skip
    profile = ["--clock-control", "none", "--csv", "--metrics", ",".join(METRICS), "-k", "regex:^_"]
    commands["ncu"] = ("ncu", [*profile, *once, "--full", *PROFILED])
    for name, (tool, arguments) in commands.items():
        program = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{CUDA_BIN}")
        if program:
            # Without torch's cache, each tensor is a separate allocation, so memcheck detects out-of-bounds accesses.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name != "ncu" else {}
            yield Tool(name, [program, *arguments], **alone)
        else:
            report.note_missing("skipped", name, f"{tool} is not installed")
