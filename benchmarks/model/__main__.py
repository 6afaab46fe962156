"""``python -m benchmarks.model``: train steps of ours and of the rivals, interleaved, and their memory."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.model.contenders import MODELS, OURS, RIVALS, build
from mae_fast.bench import interleave, machine, peak_memory, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="*", default=[*OURS, *RIVALS])
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # this very process measures one contender
    parser.add_argument("--output", type=Path, help="add the result to this JSON file")
    args = parser.parse_args()
    images = torch.randn(args.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    if args.memory_of:
        step = build(args.memory_of, args.model, images, args.dtype == "bf16")
        print(json.dumps(peak_memory(step)))
        return

    names = args.contenders
    steps = {name: build(name, args.model, images, args.dtype == "bf16") for name in names}
    losses = {name: step().item() for name, step in steps.items()}
    same = [losses[name] for name in names if name != "transformers"]  # which starts from weights of its own
    assert max(same) - min(same) < 0.02 * max(same), losses  # the masks differ, nothing else
    times = interleave(steps, args.rounds, warmup=1)
    del steps
    rows = {}
    for name in names:
        row = {"ms": statistics.median(times[name]) * 1e3}
        row |= {f"vs {rival}": ratio(times, rival, name) for rival in names if rival in RIVALS and rival != name}
        if not args.no_memory:
            flags = ["--model", args.model, "--batch", str(args.batch), "--dtype", args.dtype, "--memory-of", name]
            command = [sys.executable, "-m", "benchmarks.model", *flags]
            row |= json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
        rows[name] = row
    case = f"{args.model} batch {args.batch} {args.dtype}"
    print(f"{case:24}{'step':>12}{'images/s':>10}{'activations':>13}{'peak':>10}   times faster than")
    for name, row in rows.items():
        memory = "".join(
            f"{row.get(key, float('nan')) / 2**20:{width - 4}.0f} MiB" for key, width in (("above", 13), ("peak", 10))
        )
        versus = (
            ", ".join(f"{key[3:]} {value:.2f}" for key, value in row.items() if key.startswith("vs "))
            if name in OURS
            else ""
        )
        print(f"{name:24}{row['ms']:9.0f} ms{args.batch / row['ms'] * 1e3:10.2f}{memory}   {versus}")
    print(machine())
    if args.output:
        before = json.loads(args.output.read_text()) if args.output.exists() else {}
        entry = {"machine": machine(), "rounds": args.rounds, "rows": rows}
        args.output.write_text(json.dumps(before | {case: entry}, indent=1) + "\n")


main()
