"""The parts of ``make gpu`` that are commands of their own: parity, sanitizer, the ops' benchmark."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Report

ROOT = Path(__file__).parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
# Of the folders of tests that want more than torch, numpy and pytest; pytest runs none where a conftest fails.
NEEDS = {"data": ("nvidia.dali", "PIL", "sklearn"), "training": ("PIL", "safetensors")}
CUDA_BIN = "/usr/local/cuda/bin"


class Job:
    """A command that runs in the background; its output goes to a file."""

    def __init__(self, name: str, command: list[str], limit: float, **environment: str) -> None:
        self.name, self.command, self.start = name, command, time.monotonic()
        self.end = self.start + limit
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the command runs
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=self.said,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,  # so that its own children can be ended with it
        )

    def finish(self, report: Report) -> list[str]:
        """Wait for its end and report it; a status other than 0 is a failure. Returns the printed lines."""
        try:
            self.process.wait(max(0.0, min(self.end, report.deadline) - time.monotonic()))
            late = False
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            late = True
        self.said.seek(0)
        lines = [line.rstrip() for line in self.said if line.strip()]
        last = lines[-1] if lines else "no output"
        status = self.process.returncode
        entry: dict[str, Any] = {"command": " ".join(self.command), "status": status, "last line": last}
        if late:
            report.lack("left out", self.name, f"not done after {time.monotonic() - self.start:.0f} s")
        elif status:
            report.lack("failed", self.name, f"status {status}: {last}")
        if status:
            entry["output"] = lines[-60:]
        report.keep(self.name, entry)
        report.tell(f"{self.name}: {last}")
        return lines


def parity(report: Report, limit: float) -> Job:
    """Every test that needs a GPU, in the files that have some: the others may want packages that are not here."""
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text()]
    for folder, modules in NEEDS.items():
        if absent := [name for name in modules if not has(name)]:
            report.lack("skipped", f"parity: tests/{folder}", f"not installed: {', '.join(absent)}")
            files = [file for file in files if file.parent.name != folder]
    command = [*PYTEST, "-m", "gpu", "-rfE", "--tb=short", "--continue-on-collection-errors"]
    return Job("parity", command + [str(file.relative_to(ROOT)) for file in sorted(files)], limit)


def has(module: str) -> bool:
    """Whether there is such a module, or in such a package."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package is not there
        return False


def build(report: Report, limit: float) -> bool:
    """Compile csrc for the torch that is here; whether it worked."""
    job = Job("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], limit)
    job.finish(report)
    return job.process.returncode == 0


def sanitizer(report: Report, tool: str, limit: float) -> Job | None:
    """Each op once, forward and backward, under a tool of compute-sanitizer; None where there is none."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:{CUDA_BIN}")
    if not program:
        report.lack("skipped", tool, "compute-sanitizer is not installed")
        return None
    # Failed driver calls at the start of torch are not errors of a kernel.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [program, "--tool", tool, *quiet, "--error-exitcode", "99", sys.executable, "-m", "benchmarks.ops.once"]
    # Without torch's cache each tensor is an allocation, and what lies beyond it is out of bounds.
    return Job(tool, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def ops(report: Report, limit: float, *options: str) -> None:
    """pytest-benchmark's rows, one an op."""
    if not has("pytest_benchmark"):
        report.lack("skipped", "ops", "pytest-benchmark is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ops.json")
        command = [*PYTEST, "-rfEs", "benchmarks/ops/bench_ops.py", f"--benchmark-json={file}"]
        # It ends itself before it is ended, which would take all rows with it.
        lines = Job("ops benchmark", [*command, f"--seconds={limit - 30:.0f}", *options], limit).finish(report)
        for lacking in without_rows(lines):
            report.lack(*lacking)
        text = file.read_text() if file.exists() else ""
    if text:
        report.keep("ops", [row["extra_info"] for row in json.loads(text)["benchmarks"]])


def without_rows(lines: list[str]) -> list[tuple[str, str, str]]:
    """(kind, op, why) of each benchmark that pytest's summary calls failed, or skipped for want of time."""
    found = []
    for line in lines:
        if line.startswith(("FAILED", "ERROR ")):
            what, _, why = line.partition("::")[2].partition(" - ")
            found.append(("failed", what or line, why or "see the output"))
        elif line.startswith("SKIPPED"):
            _, what, why = line.rsplit(": ", 2)
            found.append(("left out", what, why))
    return found


def show_ops(rows: list[dict[str, Any]]) -> None:
    """The ops' rows as a table."""
    print(f"\n{'op, forward + backward':36}{'eager':>11}{'compile':>11}{'mae_fast':>11}{'GB/s':>8}   times faster")
    for row in rows:
        ms = row["ms"]
        print(
            f"{row['problem']:36}{ms['eager']:8.3f} ms{ms['compile']:8.3f} ms{ms['mae_fast']:8.3f} ms{row['GB/s']:8.0f}"
            f"   {row['vs eager']:.2f}, {row['vs compile']:.2f}"
        )
