"""What this machine has and which kernel answers each op here."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..data.loader import choose_decoder
from ..ops._native import cpu_isa, has_matrix_unit, has_native, native_error
from ..ops.attention.op import memory_efficient

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
PACKAGES = ("torch", "torchvision", "triton", "timm", "transformers", "xformers", "nvidia-dali-cuda130")


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
        return "eager torch", "triton is not installed"
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


def facts() -> list[tuple[str, str]]:
    """Versions, processor and GPUs, as (name, value)."""
    decoder, why = choose_decoder()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("mae_fast", __version__),
        ("python", platform.python_version()),
        *((package, _version(package)) for package in PACKAGES),
        ("images decoded by", f"{decoder} ({why})" if why else decoder),
        ("torch's CUDA", str(torch.version.cuda)),
        ("GPUs", ", ".join(gpus) or "none"),
        ("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
    ]


def doctor() -> None:
    """Print ``facts`` and ``rows`` as tables."""
    console = Console()
    for title, columns, content in (
        ("This machine", ("", ""), facts()),
        ("Which kernel answers", ("op", "device", "kernel", "why"), rows()),
    ):
        table = Table(*columns, title=title, show_header=any(columns), title_justify="left")
        for row in content:
            table.add_row(*row)
        console.print(table)
