"""What this machine has, what is wrong with it, and which kernel runs each op here."""

import math
import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from .. import __version__
from ..data.loader import choose_decoder
from ..errors import first_line
from ..ops.attention.op import MAX_TOKENS, memory_efficient, on_gpus
from ..ops.native import HAS_TRITON, cpu_isa, has_kernel, has_matrix_unit, has_native, native_error
from ..ops.registry import Op, ops
from .findings import Finding, show, show_findings, tally

# What runs where we have no kernel; other ops then run their eager reference.
TORCHS = {
    "attention": "torch's SDPA",
    "add_layer_norm": "torch's LayerNorm",
    "bias_gelu": "torch's GELU",
    "linear": "torch's Linear",
    "adamw": "torch's AdamW",
}
ON_GPUS = {"linear": "its weight gradients left in fp32"}
MATRIX_UNIT = "matrix unit (AMX or AVX512_BF16, allowed to oneDNN)"
FOR_DEVELOPERS = {"test", "check", "dev"}  # extras that users do not miss
REINSTALL = "pip install --no-build-isolation --no-deps --force-reinstall"
REBUILD = f"build it for this torch: {REINSTALL} --no-binary xformers xformers"
OLDEST = (8, 0)  # compute capability that the GPU kernels are made for
DRIVER = Path("/proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 1 << 20  # bytes, for the semaphores of worker processes
SHARED_FOR_GPUS = 512 << 20  # bytes; a container's default of 64 MiB is too little for NCCL
LEAST_FILES, FEW_FILES, FILES = 64, 1024, 4096  # open files: too few for a run, few, plenty
OF_OTHERS = "those of the ops it calls"
FEATURES = {
    "AVX2": torch.cpu._is_avx2_supported,
    "AVX512": torch.cpu._is_avx512_supported,
    "AVX512_BF16": torch.cpu._is_avx512_bf16_supported,
    "AMX": torch.cpu._is_amx_tile_supported,
}


def kernel(op: Op, key: str) -> tuple[str, str]:
    """The kernel that runs ``op`` under the dispatch key "CPU" or "CUDA", and why."""
    name, schema = op.name, op.schemas[0]
    if has_native(schema, key):
        if key == "CPU":
            if name in ("linear", "mlp") and not has_matrix_unit():
                return TORCHS.get(name, OF_OTHERS), f"no {MATRIX_UNIT}"
            unit = f"; bf16 by {MATRIX_UNIT}" if name in ("attention", "linear", "mlp") and has_matrix_unit() else ""
            return f"C++ ({cpu_isa()})", f"compiled; level by processor and ONEDNN_MAX_CPU_ISA{unit}"
        return "CUDA C++", "compiled for sm_80, sm_90 and newer"
    if any(has_kernel(each, key.lower()) for each in op.schemas):
        return "Triton", f"triton {_version('triton')} compiles it on first use"
    if key == "CUDA" and name in ON_GPUS:
        return TORCHS[name], ON_GPUS[name]
    if key == "CUDA" and op.has_triton_kernels:
        return TORCHS.get(name, "eager torch"), "triton is not installed"
    if name == "random_masking" and key == "CUDA":
        missing = "nvcc or a CUDA build of torch was missing when mae_fast was installed"
    else:
        missing = f"it has no kernel for {key}"
    return TORCHS.get(name, "eager torch"), native_error() or missing


def rows() -> list[tuple[str, str, str, str]]:
    """Op, device, kernel, reason: a row per op and device, and more where the answer depends on the sizes."""
    found: list[tuple[str, str, str, str]] = []
    for op in ops():
        for key in ("CPU", "CUDA"):
            if op.name == "attention" and key == "CUDA":
                found += [(f"attention {sequences}", key, answer, why) for sequences, answer, why in on_gpus()]
            elif op.name == "mlp" and key == "CUDA":
                found.append((op.name, key, OF_OTHERS, op.equals))
            else:
                found.append((op.name, key, *kernel(op, key)))
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> list[Finding]:
    """Packages, processor and GPUs, each with what to do about it."""
    return [*_packages(), *_processor(), *_limits(), *_gpus()]


def _packages() -> Iterator[Finding]:
    yield Finding("mae_fast", f"{__version__}, Python {platform.python_version()}")
    about = metadata("mae_fast")
    needed = [Requirement(line) for line in about.get_all("Requires-Dist") or ()]
    always = [one for one in needed if one.marker is None]
    wrong = [one for one in always if not _satisfied(one)]
    found = ", ".join(f"{one.name} {_version(one.name)}" for one in always)
    yield Finding("packages", found, _pip(*(f"{one.name}{one.specifier}" for one in wrong)), bool(wrong))
    for extra in about.get_all("Provides-Extra") or ():
        of_it = [one for one in needed if one.marker and one.marker.evaluate({"extra": extra})]
        of_it = [one for one in of_it if one.name != "mae_fast"]  # an extra that this one includes has its own row
        if extra not in FOR_DEVELOPERS:
            found = ", ".join(f"{one.name} {_version(one.name)}" for one in of_it)
            fix = "" if all(map(_satisfied, of_it)) else _pip(f"mae_fast[{extra}]")
            if not fix and any(one.name == "xformers" for one in of_it):
                library, why = memory_efficient()
                found, fix = (found, "") if library else (why, REBUILD)
            yield Finding(f"optional: {extra}", found, fix)
    decoder, why = choose_decoder()
    yield Finding("images decoded by", f"{decoder} ({why})" if why else decoder)


def _satisfied(one: Requirement) -> bool:
    try:
        return one.specifier.contains(version(one.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _pip(*names: str) -> str:
    return " ".join(("pip install", *(f"'{name}'" for name in names))) if names else ""


def cores(cgroup: Path = CGROUP) -> int:
    """That this process may keep busy: those it may run on, within its container's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except OSError:
        return allowed
    return allowed if quota == "max" else min(allowed, math.ceil(int(quota) / int(period)))


def _processor() -> Iterator[Finding]:
    has = [name for name, supported in FEATURES.items() if supported()]
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    unset = "unset ONEDNN_MAX_CPU_ISA" if limit else ""
    found = f"{model[1] if model else platform.machine()}: {', '.join(has) or 'none of ' + ', '.join(FEATURES)}"
    yield Finding("CPU", found + (f"; ONEDNN_MAX_CPU_ISA={limit}" if limit else ""), unset)
    missing = native_error()
    if missing:
        yield Finding("compiled kernels", missing, "install g++, then mae_fast again, from its sources", bad=True)
    else:
        yield Finding("compiled kernels", f"for {cpu_isa()}")
    if has_matrix_unit():
        yield Finding("bf16 on the CPU", f"by the {MATRIX_UNIT}")
    elif not {"AVX512_BF16", "AMX"} & {*has}:
        yield Finding("bf16 on the CPU", "no instructions for it: training takes fp32")
    else:
        why = missing or "oneDNN may not use the instructions that are there"
        fix = "have the kernels compiled" if missing else unset or "set torch.backends.mkldnn.enabled = True"
        yield Finding("bf16 on the CPU", why, fix)
    threads, most = torch.get_num_threads(), cores()
    fix = f"set OMP_NUM_THREADS={most}" if threads > most else "unset OMP_NUM_THREADS" if threads < most else ""
    yield Finding("threads", f"{threads} on {most} cores", fix, threads > most)


def _limits(shared: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """The limits of a container or a login: shared memory and open files."""
    try:
        total, _, free = shutil.disk_usage(shared)
    except OSError as error:
        total = free = 0
        found = f"{shared}: {error.strerror}"
    else:
        found = f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB in {shared} are free; batches do not need them"
    if free < LEAST_SHARED or not os.access(shared, os.W_OK):
        fix = f"make {shared} writable, with some room: worker processes keep their locks there"
        yield Finding("shared memory", found, fix, bad=True)
    else:
        small = torch.cuda.device_count() > 1 and total < SHARED_FOR_GPUS
        yield Finding("shared memory", found, "docker run --shm-size=1g: GPUs exchange data there" if small else "")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {FILES if hard < 0 else min(FILES, hard)}" if 0 <= soft < FEW_FILES else ""
    yield Finding(
        "open files", f"at most {soft}" if soft >= 0 else "no limit", fix, bad=bool(fix) and soft < LEAST_FILES
    )


def _gpus() -> Iterator[Finding]:
    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        if not DRIVER.exists():
            yield Finding("GPUs", f"no NVIDIA driver; torch is built for CUDA {cuda}" if cuda else "no NVIDIA driver")
        elif not cuda:
            fix = "install a torch that is built with CUDA: https://pytorch.org/get-started"
            yield Finding("GPUs", "there is an NVIDIA driver, but this torch knows no GPUs", fix, bad=True)
        else:
            try:
                torch.cuda.init()  # type: ignore[no-untyped-call]
                why = "no GPU can be seen; CUDA_VISIBLE_DEVICES hides it, perhaps"
            except RuntimeError as error:
                why = first_line(error)
            fix = f"install a driver that knows CUDA {cuda}, or a torch for the driver's CUDA"
            yield Finding("GPUs", why, fix, bad=True)
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}, CUDA {cuda}"
        old = (about.major, about.minor) < OLDEST
        yield Finding(f"GPU {i}", found, f"our kernels are for sm_{OLDEST[0]}{OLDEST[1]} and newer" if old else "")
    yield Finding("Triton", _version("triton"), "" if HAS_TRITON else "pip install triton", bad=not HAS_TRITON)
    library, why = memory_efficient()
    yield Finding(
        f"attention, over {MAX_TOKENS} tokens", why if library else f"{TORCHS['attention']}: {why}",
        "" if library else REBUILD,
    )  # fmt: skip
    if not has_native("random_masking", "CUDA"):
        fix = f"put the nvcc of CUDA {cuda} on the PATH, then install mae_fast again, from its sources"
        yield Finding("CUDA C++", "random_masking is eager torch: it was not compiled", fix)


def doctor() -> None:
    """Print ``machine`` and ``rows``, and how many problems there are."""
    findings = machine()
    show_findings("This machine", findings)
    show("Which kernel answers", ("op", "device", "kernel", "why"), rows())
    print(tally(findings))
