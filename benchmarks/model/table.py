"""``python -m benchmarks.model.table [FILE]``: every case that the README tells of, each added to the JSON FILE.

Half an hour on two slow cores, which is why the long cases have few rounds and leave contenders out.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """Flags of ``python -m benchmarks.model``; ``left_out`` says what is missing and why."""

    flags: str
    left_out: str = ""
    contenders: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


UNCOMPILED = ("mae_fast", "mae_fast drop-in", "reference", "transformers")
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
CASES = (
    Case("--batch 16 --rounds 5"),
    Case(
        "--batch 64 --rounds 3",
        "reference compiled and timm blocks (time: a step takes four times that of batch 16)",
        UNCOMPILED,
    ),
    Case(
        "--batch 16 --rounds 3",
        "reference compiled and timm blocks (time: this repeats the first case within AVX-512)",
        UNCOMPILED,
        WITHOUT_AMX,
    ),
    Case("--batch 16 --dtype fp32 --rounds 3"),
    Case(
        "--model large --batch 8 --rounds 3",
        "mae_fast drop-in, reference compiled, timm blocks (memory: each holds 4 GB of state while others run)",
        ("mae_fast", "reference", "transformers"),
    ),
    Case("--task finetune --batch 16 --rounds 5"),
    Case("--task features --batch 16 --rounds 5"),
    Case("--task reconstruct --batch 16 --rounds 5"),
)


def main() -> None:
    start = time.monotonic()
    for case in CASES:
        prefix = "".join(f"{name}={value} " for name, value in case.environment.items())
        print(f"\n{prefix}python -m benchmarks.model {case.flags}", flush=True)
        if case.environment == WITHOUT_AMX and "amx_bf16" not in Path("/proc/cpuinfo").read_text():
            print("skipped: this processor has no AMX, the limit would change nothing", flush=True)
            continue
        if case.left_out:
            print(f"left out: {case.left_out}", flush=True)
        command = [sys.executable, "-m", "benchmarks.model", *case.flags.split()]
        command += ["--contenders", *case.contenders] if case.contenders else []
        command += ["--output", sys.argv[1]] if len(sys.argv) > 1 else []
        subprocess.run(command, check=True, env=os.environ | case.environment)
    print(f"\n{(time.monotonic() - start) / 60:.0f} minutes in all")


if __name__ == "__main__":
    main()
