"""``python -m benchmarks.gpu PART``: measures and tests the GPU kernels. Each of the three parts writes a JSON file.

- ``kernels``: our training step and its kernels, attention by each library, matrix products and copies, without
  torch.compile.
- ``baselines``: training steps compared with torch.compile, transformers and timm.
- ``parity``: tests that need a GPU, in parallel processes; compute-sanitizer and ncu if they are installed.

A part ends at its time limit. Its file contains all results so far, and the reason for each missing result.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import baselines, kernels, parity
from benchmarks.gpu.report import RESULTS, Report, slug
from mae_fast.bench.timing import code, commit, machine, versions
from mae_fast.ops.native import native_error

# The function and the time limit in seconds of each part.
PARTS: dict[str, tuple[Callable[[Report, bool], None], int]] = {
    "kernels": (kernels.run, 150),
    "baselines": (baselines.run, 400),
    "parity": (parity.run, 120),
}


def parse(flags: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--limit", type=float, help="time limit in seconds")
    parser.add_argument("--results", type=Path, help="folder for the JSON file; default: benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU at tiny sizes; measures nothing useful")
    args = parser.parse_args(flags)
    args.limit = PARTS[args.part][1] if args.limit is None else args.limit
    if args.dry_run:
        args.results = args.results or Path(tempfile.mkdtemp())
        if (args.results.resolve() / "x").is_relative_to(RESULTS):
            parser.error("--dry-run does not write to benchmarks/results, because it measures no GPU")
    elif not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; use --dry-run to test everything on a CPU")
    try:
        (args.results or RESULTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results: {error}")
    return args


def main() -> None:
    args = parse()
    name = "dry-run" if args.dry_run else f"gpu-{slug(torch.cuda.get_device_name())}"
    file = (args.results or RESULTS) / f"{name}-{args.part}.json"
    report = Report(file, head(args.part, args.dry_run), args.limit)
    if missing := native_error():
        report.note_missing("skipped", "compiled kernels", missing)
    PARTS[args.part][0](report, args.dry_run)
    report.write()
    if args.dry_run:
        print("Dry run on a CPU: the results above are no measurements of a GPU.")
    print(file)
    sys.exit(bool(report.missing["failed"] or report.missing["refused"]))


def head(part: str, dry_run: bool) -> dict[str, Any]:
    """The machine, versions and settings of the run."""
    device = "CPU, tiny sizes" if dry_run else torch.cuda.get_device_name()
    found = {"part": part, "dry run": dry_run, "device": device, "date": time.strftime("%Y-%m-%d")}
    found |= {"commit": commit(), "code": code(), "machine": machine(), "platform": platform.platform()}
    return found | {"versions": versions() | {"cuda": torch.version.cuda}, "settings": nvidia_smi()}


def nvidia_smi() -> str | None:
    """Driver version, power limit and clocks, which affect the results."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    main()
