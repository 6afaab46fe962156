"""Compile Triton kernels to machine code without a GPU.

``launches`` runs launchers on meta tensors. Triton specialises and compiles each kernel for the given architecture as
it would on a GPU (argument types, divisibility, constants), and nothing is launched.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"  # cuobjdump and nvdisasm come with Triton
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)


RESULT = re.compile(r"\s*(%\w+) = (tt\.get_program_id|tt\.splat|tt\.broadcast|tt\.expand_dims|arith\.\w+)")
LINE = re.compile(r"^\s*\.(L_x_\d+):|^\s*/\*[0-9a-f]{4,}\*/\s+([^;]*);", re.M)


class Code(NamedTuple):
    """The instructions of a kernel, and of each of its loops, ordered by the ends of the loops."""

    whole: list[str]
    loops: list[list[str]]


@dataclass(frozen=True)
class Launch:
    """A compiled launch. ``accesses`` counts memory instructions by kind and bits, such as "LDG.128"."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared_bytes: int
    registers: int
    local_bytes: int  # spills and stack, per thread
    accesses: Counter[str]
    code: Code = field(default_factory=lambda: Code([], []))
    values: float = 0  # values per thread and tile
    narrow: frozenset[str] = frozenset()  # see narrow_products

    @property
    def tile(self) -> list[str]:
        """The instructions for one tile of values: those of the longest loop, or all of them without a loop."""
        return max(self.code.loops, key=len, default=self.code.whole)

    def widest(self, kind: str) -> int:
        """Bits of the widest access of ``kind``, "LDG" (global load) or "STG" (global store)."""
        return max((int(name.split(".")[1]) for name in self.accesses if name.startswith(kind)), default=0)


class Driver:
    """A mock of Triton's driver with the methods that compilation needs."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are cached per device, so each architecture is a device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def accesses(sass: str) -> Counter[str]:
    """Memory instructions of a kernel's machine code, by kind and bits; "MMA": products on the tensor cores."""
    found: Counter[str] = Counter()
    for instruction in INSTRUCTION.findall(sass):
        kind, *modifiers = instruction.split(".")
        if kind in ("LDG", "STG", "LDS", "STS", "LDL", "STL", "RED", "ATOM", "ATOMG"):
            bits = next((m.lstrip("US") for m in modifiers if m.lstrip("US") in ("8", "16", "64", "128")), "32")
            found[f"{kind}.{bits}"] += 1
        elif kind in ("HMMA", "HGMMA"):
            found["MMA"] += 1
    return found


def code(sass: str) -> Code:
    """The code without the loops of ``column_sums``, which few programs run. Only they have loads that bypass L1."""
    labels: dict[str, int] = {}
    whole: list[str] = []
    loops: list[range] = []
    for label, instruction in LINE.findall(sass):
        if label:
            labels[label] = len(whole)
        elif not instruction.startswith("NOP"):
            whole.append(instruction)
            back = re.search(r"\bBRA\b.*`\(\.(L_x_\d+)\)", instruction)
            if back and labels.get(back[1], len(whole)) < len(whole) - 1:
                loops.append(range(labels[back[1]], len(whole)))
    rare: set[int] = set()
    for loop in loops:
        if any("LDG" in whole[i] and "STRONG" in whole[i] for i in loop):
            rare.update(loop)
    kept = [[whole[i] for i in loop] for loop in loops if loop.start not in rare]
    return Code([instruction for i, instruction in enumerate(whole) if i not in rare], kept)


def narrow_products(ttir: str) -> frozenset[str]:
    """Variables of a kernel that are a row times its length in 32 bits, which overflow in tensors of 2^31 values.

    A row comes from the number of the program, and is a multiple of its rows if a program has several. Its length is an
    argument, or a constant in a second product. A remainder is not a row. Products without a name have a number.
    """
    rows: dict[str, int] = {}  # values from the number of the program: products in them
    sizes: set[str] = set()  # values from integer arguments
    found = set()
    for line in ttir.splitlines():
        if "tt.func" in line:
            sizes.update(re.findall(r"(%\w+): i32", line))
        elif loop := re.search(r"scf\.for (%\w+) = (%\w+)(.*)", line):
            for name, start in [(loop[1], loop[2]), *re.findall(r"(%\w+) = (%\w+)", loop[3])]:
                if start in rows:
                    rows[name] = rows[start]
                elif start in sizes:
                    sizes.add(name)
        elif made := RESULT.match(line):
            name, operation = made.groups()
            operands = re.findall(r"%\w+", line.partition("=")[2].partition(" loc(")[0])
            depth = max((rows[x] for x in operands if x in rows), default=None)
            if operation == "tt.get_program_id":
                rows[name] = 0
            elif operation in ("arith.remsi", "arith.cmpi"):
                continue
            elif depth is None:
                sizes.update([name] if sizes & {*operands} else [])
            else:
                product, wide = operation == "arith.muli", re.search(r": (i64|tensor<\w*i64>)", line)
                if product and not wide and (depth > 0 or sizes & {*operands}):
                    found.add(re.sub(r"(?<=[a-z])_\d+$", "", name[1:]))
                rows[name] = depth + product
    return frozenset(found)


def resources(usage: str) -> tuple[int, int, int]:
    """Registers per thread, static shared memory in bytes, and spills and stack in bytes, from cuobjdump."""
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return used["REG"], used["SHARED"], used["STACK"] + used["LOCAL"]


@cache
def _machine_code(cubin: bytes) -> tuple[str, str]:
    """The disassembly and the resource usage of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    return sass, usage


def _inspect(name: str, grid: tuple[int, ...], kernel: Any, constants: dict[str, Any]) -> Launch:
    sass, usage = _machine_code(kernel.asm["cubin"])
    registers, _, local = resources(usage)
    metadata = kernel.metadata  # Triton sets the size of dynamic shared memory at the launch
    tile = constants.get("BLOCK_R", 0) * constants.get("BLOCK_C", 0) * constants.get("PIECES", 1)
    return Launch(
        name, grid, metadata.num_warps, metadata.shared, registers, local, accesses(sass),
        code(sass), tile / (32 * metadata.num_warps), narrow_products(kernel.asm["ttir"]),
    )  # fmt: skip


@contextmanager
def launches(arch: int) -> Iterator[list[Launch]]:
    """Context that compiles all Triton launches for sm_``arch`` and yields the list of them."""
    log: list[Launch] = []
    stock = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = stock(self, *args, grid=grid, warmup=True, **options)
        log.append(_inspect(self.__name__, tuple(grid), kernel, options))
        return kernel

    before, JITFunction.run = driver._active, run
    driver.set_active(Driver(arch))
    try:
        yield log
    finally:
        JITFunction.run, driver._active = stock, before  # reset_active() would ask for a GPU
