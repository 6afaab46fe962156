"""Checks this machine and its packages, and lists the kernel that runs each op."""

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
from ..ops.native import HAS_TRITON, cpu_isa, cuda_error, has_kernel, has_matrix_unit, has_native, native_error
from ..ops.registry import Op, ops
from .findings import Finding, show, show_findings, tally

# Implementations of torch that run ops without a kernel of ours. All other ops then run their eager reference.
TORCHS = {
    "attention": "torch's SDPA",
    "add_layer_norm": "torch's LayerNorm",
    "bias_gelu": "torch's GELU",
    "linear": "torch's Linear",
    "adamw": "torch's AdamW",
}
ON_GPUS = {"linear": "with weight gradients in fp32"}
MATRIX_UNIT = "matrix unit (AMX or AVX512_BF16, enabled in oneDNN)"
FOR_DEVELOPERS = {"test", "check", "docs", "release", "dev"}  # extras that users do not need
REINSTALL = "pip install --no-build-isolation --no-deps --force-reinstall"
# The last release of xformers has kernels for torch 2.10 only.
REBUILD = (
    "pip install 'torch==2.10.*' 'torchvision==0.25.*' xformers==0.0.35, "
    f"or build xformers for this torch: {REINSTALL} --no-binary xformers xformers"
)
OLDEST = (8, 0)  # smallest compute capability that the GPU kernels support
DRIVER = Path("/proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 1 << 20  # bytes, for the semaphores of worker processes
SHARED_FOR_GPUS = 512 << 20  # bytes; 64 MiB, the default of a container, are too few for NCCL
LEAST_FILES, FEW_FILES, FILES = 64, 1024, 4096  # limits on open files: below, training fails; worth a note; suggested
OF_OTHERS = "the kernels of the ops it calls"
FEATURES = {
    "AVX2": torch.cpu._is_avx2_supported,
    "AVX512": torch.cpu._is_avx512_supported,
    "AVX512_BF16": torch.cpu._is_avx512_bf16_supported,
    "AMX": torch.cpu._is_amx_tile_supported,
}


def kernel(op: Op, key: str) -> tuple[str, str]:
    """The kernel that runs ``op`` for the dispatch key "CPU" or "CUDA", and the reason."""
    name, schema = op.name, op.schemas[0]
    if has_native(schema, key):
        if key == "CPU":
            if name in ("linear", "mlp") and not has_matrix_unit():
                return TORCHS.get(name, OF_OTHERS), f"no {MATRIX_UNIT}"
            uses_unit = name in ("attention", "linear", "mlp") and has_matrix_unit()
            unit = f"; bf16 on the {MATRIX_UNIT}" if uses_unit else ""
            return f"C++ ({cpu_isa()})", f"compiled; chosen by processor and ONEDNN_MAX_CPU_ISA{unit}"
        return "CUDA C++", "compiled for sm_80, sm_90 and newer"
    if any(has_kernel(each, key.lower()) for each in op.schemas):
        return "Triton", f"triton {_version('triton')} compiles it on first use"
    if key == "CUDA" and name in ON_GPUS:
        return TORCHS[name], ON_GPUS[name]
    if key == "CUDA" and op.has_triton_kernels:
        return TORCHS.get(name, "eager torch"), "triton is not installed"
    missing = cuda_error() if name == "random_masking" and key == "CUDA" else native_error()
    return TORCHS.get(name, "eager torch"), missing or f"there is no kernel for {key}"


def rows() -> list[tuple[str, str, str, str]]:
    """Rows of op, device, kernel and reason: one per op and device, or several if the kernel depends on the sizes."""
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
    """The findings about packages, processor, limits and GPUs."""
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
        of_it = [one for one in of_it if one.name != "mae_fast"]  # included extras have their own rows
        if extra not in FOR_DEVELOPERS:
            found = ", ".join(f"{one.name} {_version(one.name)}" for one in of_it)
            fix = "" if all(map(_satisfied, of_it)) else _pip(f"mae_fast[{extra}]")
            if not fix and any(one.name == "xformers" for one in of_it):
                library, why = memory_efficient()
                found, fix = (found, "") if library else (why, REBUILD)
            yield Finding(f"optional: {extra}", found, fix)
    decoder, why = choose_decoder()
    yield Finding("image decoder", f"{decoder} ({why})" if why else decoder)


def _satisfied(one: Requirement) -> bool:
    try:
        return one.specifier.contains(version(one.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _pip(*names: str) -> str:
    return " ".join(("pip install", *(f"'{name}'" for name in names))) if names else ""


def cores(cgroup: Path = CGROUP) -> int:
    """The number of cores that this process may use, within the CPU quota of its container."""
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
        yield Finding("compiled kernels", missing, "install g++, then reinstall mae_fast from source", bad=True)
    else:
        yield Finding("compiled kernels", f"for {cpu_isa()}")
    if has_matrix_unit():
        yield Finding("bf16 on the CPU", f"runs on the {MATRIX_UNIT}")
    elif not {"AVX512_BF16", "AMX"} & {*has}:
        yield Finding("bf16 on the CPU", "no bf16 instructions; training uses fp32")
    else:
        why = missing or "bf16 instructions are disabled in oneDNN"
        fix = "compile the kernels" if missing else unset or "set torch.backends.mkldnn.enabled = True"
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
        found = f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB free in {shared}; batches are not stored there"
    if free < LEAST_SHARED or not os.access(shared, os.W_OK):
        fix = f"make {shared} writable and free some space: worker processes store their locks there"
        yield Finding("shared memory", found, fix, bad=True)
    else:
        small = torch.cuda.device_count() > 1 and total < SHARED_FOR_GPUS
        yield Finding("shared memory", found, "docker run --shm-size=1g, for communication of GPUs" if small else "")
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
            yield Finding("GPUs", "there is an NVIDIA driver, but torch is built without CUDA", fix, bad=True)
        else:
            try:
                torch.cuda.init()  # type: ignore[no-untyped-call]
                why = "no visible GPU; CUDA_VISIBLE_DEVICES may hide it"
            except RuntimeError as error:
                why = first_line(error)
            fix = f"install a driver that supports CUDA {cuda}, or a torch for the CUDA version of the driver"
            yield Finding("GPUs", why, fix, bad=True)
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}, CUDA {cuda}"
        old = (about.major, about.minor) < OLDEST
        yield Finding(f"GPU {i}", found, f"our kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer" if old else "")
    yield Finding("Triton", _version("triton"), "" if HAS_TRITON else "pip install triton", bad=not HAS_TRITON)
    library, why = memory_efficient()
    yield Finding(
        f"attention, above {MAX_TOKENS} tokens", why if library else f"{TORCHS['attention']}: {why}",
        "" if library else REBUILD,
    )  # fmt: skip
    if missing := cuda_error():
        fix = f"put the nvcc of CUDA {cuda} on the PATH, then reinstall mae_fast from source"
        yield Finding("CUDA C++", f"random_masking runs in eager torch: {missing}", fix)


def doctor() -> None:
    """Print ``machine`` and ``rows``, and the number of problems."""
    findings = machine()
    show_findings("This machine", findings)
    show("Active kernels", ("op", "device", "kernel", "reason"), rows())
    print(tally(findings))
