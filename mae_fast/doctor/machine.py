"""What this machine has, what is amiss with it, and which kernel answers each op here."""

import math
import os
import platform
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from .. import __version__
from ..data.loader import choose_decoder
from ..ops.attention.op import memory_efficient
from ..ops.native import HAS_TRITON, cpu_isa, has_matrix_unit, has_native, native_error
from .findings import Finding, show, show_findings, tally

# Public op -> the dispatcher's ops that it is made of; "_backward" follows from them.
OPS = {
    "random_masking": ("random_masking",),
    "embed_visible": ("gather_patches", "add_positions"),
    "decoder_tokens": ("decoder_tokens",),
    "masked_loss": ("masked_loss",),
    "attention": ("attention",),
    "add_layer_norm": ("add_layer_norm",),
    "bias_gelu": ("bias_gelu",),
    "linear": ("linear_gradients",),
    "adamw": ("adamw_step",),
}
# What answers where no kernel of ours is made; the other ops then run their eager reference.
TORCHS = {
    "attention": "torch's SDPA",
    "add_layer_norm": "torch's LayerNorm",
    "bias_gelu": "torch's GELU",
    "linear": "torch's Linear",
    "adamw": "torch's AdamW",
}
ON_GPUS = {"linear": "its weight gradients left in fp32", "adamw": "fused; bf16 copies of the weights by one launch"}
MATRIX_UNIT = "matrix unit (AMX or AVX512_BF16, allowed to oneDNN)"
FOR_DEVELOPERS = {"test", "check", "dev"}  # extras that users do not miss
OLDEST = (8, 0)  # compute capability that the GPU kernels are made for
DRIVER = Path("/proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup")
FEATURES = {
    "AVX2": torch.cpu._is_avx2_supported,
    "AVX512": torch.cpu._is_avx512_supported,
    "AVX512_BF16": torch.cpu._is_avx512_bf16_supported,
    "AMX": torch.cpu._is_amx_tile_supported,
}


def kernel(public: str, op: str, key: str) -> tuple[str, str]:
    """The kernel that answers ``<op>``, of the function ``public``, under the dispatch key "CPU" or "CUDA", and why."""
    if has_native(op, key):
        if key == "CPU":
            if public == "linear" and not has_matrix_unit():
                return TORCHS[public], f"no {MATRIX_UNIT}"
            unit = f"; bf16 by {MATRIX_UNIT}" if public in ("attention", "linear") and has_matrix_unit() else ""
            return f"C++ ({cpu_isa()})", f"compiled; level by processor and ONEDNN_MAX_CPU_ISA{unit}"
        return "CUDA C++", "compiled for sm_80, sm_90 and newer"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mae_fast::{op}", key):
        return "Triton", f"triton {_version('triton')} compiles it on first use"
    if key == "CUDA" and public in ON_GPUS:
        return TORCHS[public], ON_GPUS[public]
    if public == "attention" and key == "CUDA":
        found, why = memory_efficient()
        return ("xformers", f"{why}; {TORCHS[public]} where it has no kernel") if found else (TORCHS[public], why)
    if public in TORCHS:
        return TORCHS[public], "triton is not installed" if key == "CUDA" else native_error() or ""
    if key == "CUDA" and op != "random_masking":  # the others' GPU kernels are in Triton
        return "eager torch", "it has no kernel for GPUs" if HAS_TRITON else "triton is not installed"
    return "eager torch", native_error() or "nvcc or a CUDA build of torch was missing when mae_fast was installed"


def rows() -> list[tuple[str, str, str, str]]:
    """Op, device, kernel, reason: one row each, as the dispatcher has it."""
    found = []
    for public, ops in OPS.items():
        import_module(f"mae_fast.ops.{public}")
        for key in ("CPU", "CUDA"):
            answers = {kernel(public, op, key) for op in ops}
            found += [(public, key, name, reason) for name, reason in sorted(answers)]
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> list[Finding]:
    """Packages, processor and GPUs, each with what to do about it."""
    return [*_packages(), *_processor(), *_gpus()]


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
        if extra not in FOR_DEVELOPERS:
            found = ", ".join(f"{one.name} {_version(one.name)}" for one in of_it)
            missing = not all(map(_satisfied, of_it))
            yield Finding(f"optional: {extra}", found, _pip(f"mae_fast[{extra}]") if missing else "")
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
                why = str(error).splitlines()[0]
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
    yield Finding("attention on GPUs", why, "" if library else "pip install an xformers that was built for this torch")
    if not has_native("random_masking", "CUDA"):
        fix = f"put the nvcc of CUDA {cuda} on the PATH, then install mae_fast again, from its sources"
        yield Finding("CUDA C++", "random_masking is eager torch: it was not compiled", fix)


def doctor() -> None:
    """Print ``machine`` and ``rows``, and how many problems there are."""
    findings = machine()
    show_findings("This machine", findings)
    show("Which kernel answers", ("op", "device", "kernel", "why"), rows())
    print(tally(findings))
