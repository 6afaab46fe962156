"""Launches of the GPU kernels on the PTX emulator: their launchers, given CPU tensors, fill them with what a GPU would.

Triton compiles each launch for the asked architecture as a GPU's run would have; nvcc compiles the CUDA C++.
"""

import ctypes
import re
import shlex
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gpu_proof.ptx import Buffer, Machine, Program, Traffic

Edit = Callable[[str, str], str]  # kernel's name, PTX -> PTX to run in its place
ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """One launch: its PTX and what running it showed."""

    kernel: str
    ptx: str
    executed: set[int] = field(default_factory=set)  # indices of instructions
    traffic: list[Traffic] = field(default_factory=list)

    def sectors(self, kind: str) -> float:
        """32-byte sectors of global loads ("ld") or stores ("st") over the least that their bytes could take."""
        chosen = [t for t in self.traffic if t.kind == kind]
        return sum(t.sectors for t in chosen) / sum(t.ideal for t in chosen)


def buffer(name: str, x: Tensor) -> Buffer:
    """The bytes from the first to the last element of a CPU tensor, shared with it."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    size = (last + 1) * x.element_size()
    return Buffer(name, x.data_ptr(), np.frombuffer((ctypes.c_ubyte * size).from_address(x.data_ptr()), np.uint8))


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept per device: one slot an architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _packed(kind: str, value: Any) -> bytes:
    if kind[0] == "*":
        return struct.pack("<Q", value.data_ptr())
    return struct.pack({"i32": "<i", "i64": "<q", "fp32": "<f"}[kind], value)


@cache
def _program(ptx: str, name: str) -> Program:
    return Program(ptx, re.escape(name))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def emulated(arch: int, edit: Edit = lambda name, ptx: ptx) -> Iterator[list[Run]]:
    """Triton launches inside, on CPU tensors, are run by the emulator."""
    log: list[Run] = []
    stock = JITFunction.run

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        kernel = stock(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | options
        kinds = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
        run = Run(self.__name__, edit(self.__name__, kernel.asm["ptx"]))
        log.append(run)
        program = _program(run.ptx, self.__name__)
        params = [_packed(kind, given[name]) for name, kind in kinds.items()]
        params += [bytes(8)] * (len(program.params) - len(params))  # Triton's two pointers to scratch memory
        buffers = [buffer(name, x) for name, x in given.items() if isinstance(x, Tensor) and x.numel()]
        metadata = kernel.metadata
        machine = Machine(program, grid, 32 * metadata.num_warps, params, buffers, metadata.shared)
        machine.run()
        run.executed, run.traffic = machine.executed, list(machine.traffic.values())
        return kernel

    before, JITFunction.run = driver._active, run
    driver.set_active(_Driver(arch))
    try:
        with poisoned():
            yield log
    finally:
        JITFunction.run, driver._active = stock, before  # reset_active() would ask for a GPU
