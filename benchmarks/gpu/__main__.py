"""``python -m benchmarks.gpu``: parity, speed and sanitizer of the GPU path, within a budget of seconds, into one file.

The stages, in this order: compile csrc if needed; the tests that need a GPU; training steps of ViT-B beside their
baselines; the ops; training steps of ViT-L and ViT-H; each op under compute-sanitizer. Tests and sanitizer run while
contenders are compiled, never while something is timed. A failure is recorded and the next stage runs. Stages that do
not fit into the budget are named.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checks import Job, build, ops, parity, sanitizer, show_ops
from benchmarks.gpu.contender import Plan
from benchmarks.gpu.report import RESULTS, Report, slug
from benchmarks.gpu.train import DRY_RUN, PLANS, measure, show
from mae_fast.bench.timing import commit, machine
from mae_fast.bench.worker import one_line
from mae_fast.ops.native import native_error

BUDGET = 560  # seconds, of ten minutes
STAGES = ("build", "parity", "train", "ops", "sanitizer")
PACKAGES = ("triton", "numpy", "transformers", "xformers", "pytest-benchmark")


def parse(flags: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds it may take (default {BUDGET})")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    models = [plan.model for plan in PLANS]
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="of the training steps")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>.json")
    parser.add_argument("--dry-run", action="store_true", help="all of it on a CPU, tiny: its figures mean nothing")
    args = parser.parse_args(flags)
    if args.dry_run:
        args.output = args.output or Path(tempfile.mkdtemp(), "dry-run.json")
        if RESULTS in args.output.resolve().parents:
            parser.error("--dry-run: its figures mean nothing and do not belong into benchmarks/results")
    elif not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --dry-run tries everything on a CPU")
    else:
        args.output = args.output or RESULTS / f"{slug(torch.cuda.get_device_name())}.json"
    return args


def main() -> None:
    args = parse()
    report = Report(args.output, head(args.dry_run), args.budget)
    for package, use in (("xformers", "attention is torch's SDPA"), ("transformers", "it is not a baseline here")):
        if not installed(package):
            report.lack("skipped", package, f"not installed: {use}")
    if (missing := native_error()) and (args.dry_run or "build" not in args.only or not build(report, 150)):
        report.lack("skipped", "compiled kernels", missing)
    run(args, report)
    report.keep("stages", args.only)
    for stage, found in report.found.items():
        if stage.startswith("train "):
            show(stage, found)
        elif stage == "ops":
            show_ops(found)
    if args.dry_run:
        print("\nA dry run on a CPU: nothing above is a measurement of a GPU.")
    print(f"\n{args.output}")
    sys.exit(bool(report.missing["failed"] or report.missing["refused"]))


def run(args: argparse.Namespace, report: Report) -> None:
    """Every stage, as far as the budget goes."""
    beside: deque[tuple[str, Callable[[], Job | None]]] = deque()
    if "parity" in args.only:
        beside.append(("parity", lambda: parity(report, 180)))
    if "sanitizer" in args.only:
        for tool in ("memcheck", "racecheck"):
            beside.append((tool, lambda tool=tool: sanitizer(report, tool, 120)))  # type: ignore[misc]
    plans = [DRY_RUN] if args.dry_run else [plan for plan in PLANS if plan.model in args.models]
    for number, plan in enumerate(plans if "train" in args.only else ()):
        if time.monotonic() > report.deadline:
            report.lack("left out", str(plan), "the budget is spent")
        else:
            train(plan, report, start(*beside.popleft(), report) if beside else None)
        if number == 0 and "ops" in args.only:
            run_ops(args, report)
    if "train" not in args.only and "ops" in args.only:
        run_ops(args, report)
    while beside:
        if job := start(*beside.popleft(), report):
            job.finish(report)


def start(name: str, begin: Callable[[], Job | None], report: Report) -> Job | None:
    if time.monotonic() > report.deadline:
        report.lack("left out", name, "the budget is spent")
        return None
    return begin()


def train(plan: Plan, report: Report, job: Job | None) -> None:
    """One model's rows, ``job`` running while its contenders are prepared."""
    report.tell(str(plan))
    waits = [job] if job else []

    def settle() -> None:
        while waits:
            waits.pop().finish(report)

    try:
        report.keep(str(plan), measure(plan, report, report.within(240), settle=settle))
    except Exception as error:  # the other stages go on
        report.lack("failed", str(plan), one_line(error))
    settle()


def run_ops(args: argparse.Namespace, report: Report) -> None:
    left = report.deadline - time.monotonic()
    if left < 40:
        report.lack("left out", "ops", "the budget is spent")
    else:
        ops(report, min(left, 150), *(["-k", "random_masking"] if args.dry_run else []))


def head(dry_run: bool) -> dict[str, Any]:
    """The machine, versions and settings of the run."""
    found = {"dry run": dry_run, "date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine()}
    found |= {"versions": {name: installed(name) for name in PACKAGES} | {"cuda": torch.version.cuda}}
    return found | {"settings": nvidia_smi(), "platform": platform.platform()}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_smi() -> str | None:
    """Driver, power limit and clocks, which figures depend on."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{fields}: {said}"


if __name__ == "__main__":
    main()
