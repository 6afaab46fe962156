"""Load the compiled kernels of csrc, and query which kernels exist."""

import ctypes
import importlib
import os
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch  # the extension links against the libraries that this loads

from .autograd import needs_torch_ops

_error: str | None = None
_module: Any = None
try:
    _module = importlib.import_module("mae_fast._C")
except ModuleNotFoundError:
    _error = "mae_fast._C is not built: no C++ compiler was found when mae_fast was installed"
except ImportError as exc:
    _error = f"mae_fast._C does not load, perhaps built for another torch version: reinstall mae_fast ({exc})"
    warnings.warn(f"{_error}; eager kernels are used instead", stacklevel=2)


def _load_cuda() -> str | None:
    """Load the CUDA kernels for torch's CUDA. Returns the reason if they are missing, ``None`` if they are loaded."""
    major = (torch.version.cuda or "").partition(".")[0]
    found = {path.name.split(".")[0]: path for path in Path(__file__).parents[1].glob("_cuda*.abi3.so")}
    if not found or not major:
        return "nvcc or a CUDA build of torch was missing when mae_fast was installed"
    if f"_cuda{major}" not in found:
        made_for = ", ".join(sorted(name.removeprefix("_cuda") for name in found))
        return f"mae_fast is compiled for CUDA {made_for}, this torch for CUDA {major}"
    try:
        ctypes.CDLL(str(found[f"_cuda{major}"]))
    except OSError as exc:
        return f"mae_fast._cuda{major} does not load ({exc})"
    return None


_cuda_error = _error or _load_cuda()

HAS_TRITON = find_spec("triton") is not None  # comes with torch's CUDA builds

# Read before any Python kernel is registered: these are the C++ and CUDA kernels only.
_kernels = {key: frozenset(torch._C._dispatch_get_registrations_for_dispatch_key(key)) for key in ("CPU", "CUDA")}


def has_native(op: str, key: str) -> bool:
    """Whether csrc registered a kernel of ``mae_fast::<op>`` under the dispatch key "CPU" or "CUDA"."""
    return f"mae_fast::{op}" in _kernels[key]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_kernel(op: str, device: str) -> bool:
    """Whether ``mae_fast::<op>`` has a kernel for the device type, besides the eager reference.

    False if ``needs_torch_ops()``.
    """
    return not needs_torch_ops() and _is_registered(op, device)


@cache  # the dispatcher takes 10 us to answer
def _is_registered(op: str, device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"mae_fast::{op}", key)


def cpu_isa() -> str | None:
    """Instruction set of the C++ kernels: "baseline", "avx2" or "avx512", limited by ``ONEDNN_MAX_CPU_ISA``."""
    return str(_module.cpu_isa()) if _module else None


def has_matrix_unit() -> bool:
    """Whether the C++ kernels can multiply bf16 matrices in hardware (AMX, AVX512_BF16) through oneDNN."""
    return bool(_module and _module.has_matrix_unit())


@cache
def has_amx() -> bool:
    """Whether oneDNN uses AMX. Its own products of bf16 matrices are then faster than those of the C++ kernels."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return torch.cpu._is_amx_tile_supported() and (limit in ("", "DEFAULT", "ALL") or "AMX" in limit)


def native_error() -> str | None:
    """Why the compiled kernels are missing, in one line; ``None`` if they are loaded."""
    return _error


def cuda_error() -> str | None:
    """Why the CUDA C++ kernels are missing, in one line; ``None`` if they are loaded."""
    return _cuda_error
