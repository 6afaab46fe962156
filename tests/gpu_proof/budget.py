"""The resources that the kernels of a training step use on an SM: registers, shared memory, occupancy, access widths.

    python -m gpu_proof.budget    # writes budget.json beside this file; `make budget`

The steps are those of ViT-B, L and H with batch size 256, 224 pixels and mask ratio 0.75. The tests compile the kernels
again and compare them with budget.json, so that changes are visible in a review.

Shapes: N images, L patches, K kept, P values per patch, D encoder width, E decoder width, T tokens.
"""

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gpu_proof.compiled import TOOLS, Launch, accesses, launches, resources

import mae_fast
from mae_fast.ops.adamw.triton_kernels import adamw_steps_forward, gradient_norm_forward
from mae_fast.ops.add_layer_norm.triton_kernels import add_layer_norm_backward, add_layer_norm_forward
from mae_fast.ops.attention.triton_kernels import attention_backward, attention_forward, fits, needs_lse
from mae_fast.ops.bias_gelu.triton_kernels import bias_gelu_backward, bias_gelu_forward
from mae_fast.ops.decoder_tokens.triton_kernels import decoder_tokens_backward, decoder_tokens_forward
from mae_fast.ops.embed_visible.triton_kernels import (
    add_positions_backward,
    add_positions_forward,
    gather_patches_backward,
    gather_patches_forward,
)
from mae_fast.ops.masked_loss.triton_kernels import masked_loss_backward, masked_loss_forward

FILE = Path(__file__).with_suffix(".json")
LIBRARY = next(Path(mae_fast.__file__).parent.glob("_cuda*.abi3.so"), None)
ARCHS = (80, 90)
MODELS = {"B": (16, 768), "L": (16, 1024), "H": (14, 1280)}  # patch side, D
HEADS = {"B": 12, "L": 16, "H": 16}  # of the encoder
N, E = 256, 512
FP32, BF16, FP16, INT64 = torch.float32, torch.bfloat16, torch.float16, torch.int64
UINT8, UINT16 = torch.uint8, torch.uint16


class Case(NamedTuple):
    arch: int
    model: str
    dtype: torch.dtype  # dtype of activations; parameters are fp32
    images: torch.dtype | None  # fp32 [N, C, H, W] or raw [N, H, W, C]; None: the kernels that do not read images

    def __str__(self) -> str:
        dtypes = (str(d).removeprefix("torch.") for d in (self.dtype, self.images) if d)
        return " ".join((f"sm_{self.arch}", self.model, *dtypes))


CASES = [Case(*c) for c in product(ARCHS, MODELS, (BF16, FP32), (None, FP32, UINT8))]
CASES += [Case(*c) for c in product(ARCHS, MODELS, (BF16,), (UINT16, FP16))]


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(case: Case) -> dict[str, Launch]:
    """The kernels of one training step by name, and by position if a step has several with the same name."""
    kernels = {}
    with launches(case.arch) as log:
        for place, launch_all in _parts(case).items():
            log.clear()
            launch_all()
            names = [f"{launch.kernel} {place}".strip() for launch in log]
            kernels |= dict(zip(names, log, strict=True))
    return kernels


def _parts(case: Case) -> dict[str, Callable[[], None]]:
    if case.images:
        return {"": partial(_see_images, case)}
    _, length, k, _, d = _sizes(case)
    parts = {"": partial(_see_none, case)}
    for side, tokens, width, heads in (("encoder", 1 + k, d, HEADS[case.model]), ("decoder", 1 + length, E, 16)):
        parts[f"{side} norm"] = partial(_norm, tokens, width, case.dtype)
        parts[f"{side} attention"] = partial(_attention, tokens, width, heads, case.dtype)
        parts[f"{side} mlp"] = partial(_mlp, tokens, 4 * width, case.dtype)
    if case.model == "B":  # the shapes of parameters do not change the code
        parts["update"] = partial(_update, case.dtype)
    parts["last block norm"] = partial(_norm, 1 + length, E, case.dtype, 1 + k)
    parts["last block attention"] = partial(_attention, 1 + length, E, 16, case.dtype, 1 + k)
    return parts


def _norm(tokens: int, width: int, dtype: torch.dtype, skipped: int = 0) -> None:
    """The norm between two halves of blocks. The residual has ``dtype``, the sum is fp32."""
    x, parameter = tensor(N, tokens, width, dtype=FP32), tensor(width, dtype=FP32)
    low = tensor(N, tokens - skipped, width, dtype=dtype)
    total, normed, stats = add_layer_norm_forward(x, low, parameter, parameter, parameter, 1e-6, dtype)
    add_layer_norm_backward(total, normed, total, stats, parameter, parameter, dtype, skipped)


def _attention(tokens: int, width: int, heads: int, dtype: torch.dtype, first_query: int = 0) -> None:
    qkv, bias = tensor(N, tokens, 3 * width, dtype=dtype), tensor(3 * width, dtype=FP32)
    if not fits(qkv, heads, tokens):  # computed by a library
        return
    out, lse = attention_forward(qkv, bias, heads, needs_lse(qkv, heads), first_query)
    attention_backward(out, qkv, out, lse, bias, heads, first_query)


def _mlp(tokens: int, width: int, dtype: torch.dtype) -> None:
    x, bias = tensor(N, tokens, width, dtype=dtype), tensor(width, dtype=FP32)
    bias_gelu_backward(bias_gelu_forward(x, bias), x, bias, False)


def _update(dtype: torch.dtype) -> None:
    """The optimizer's update with clipping, and with bf16 copies if activations are bf16."""
    params, step = [tensor(768, 768, dtype=FP32)] * 3, tensor(dtype=FP32)
    copies = [tensor(768, 768, dtype=BF16)] * 3 if dtype == BF16 else []
    _, found_inf, grad_scale = gradient_norm_forward(params, 1.0)
    lists = params, params, params, params, copies, [step] * 3
    adamw_steps_forward(*lists, *[[0.5] * 3] * 5, found_inf, grad_scale)


def _see_images(case: Case) -> None:
    p, length, k, values, _ = _sizes(case)
    ids_keep, ids_removed = tensor(N, k, dtype=INT64), tensor(N, length - k, dtype=INT64)
    raw = case.images != FP32
    shape = (N, 224, 224, 3) if raw else (N, 3, 224, 224)
    pixels = tensor(*shape, dtype=case.images)
    nodata = 0.0 if case.images in (UINT16, FP16) else None
    stats = (*((tensor(3, dtype=FP32),) * 2 if raw else (None, None)), nodata)
    gather_patches_forward(pixels, ids_keep, p, p, *stats, case.dtype)
    pred, mask = tensor(N, length - k, values, dtype=case.dtype), tensor(N, length - k, dtype=FP32)
    loss, saved = masked_loss_forward(pixels, pred, mask, ids_removed, p, p, True, *stats)
    scalar = tensor(dtype=FP32)
    masked_loss_backward(scalar, pixels, pred, mask, ids_removed, loss, saved, p, p, True, *stats, False)


def _see_none(case: Case) -> None:
    p, length, k, values, d = _sizes(case)
    ids_keep, ids_restore = tensor(N, k, dtype=INT64), tensor(N, length, dtype=INT64)
    gather_patches_backward(tensor(N, k, values, dtype=case.dtype), ids_keep, [N, 3, 224, 224], p, p, case.dtype)
    tables = tensor(1, 1 + length, d, dtype=FP32), tensor(1, 1, d, dtype=FP32)
    add_positions_forward(tensor(N, k, d, dtype=case.dtype), ids_keep, *tables)
    add_positions_backward(tensor(N, 1 + k, d, dtype=FP32), ids_keep, *tables, case.dtype, False)
    token, pos = tensor(1, 1, E, dtype=FP32), tensor(1, 1 + length, E, dtype=FP32)
    decoder_tokens_forward(tensor(N, 1 + k, E, dtype=case.dtype), token, ids_restore, pos, False)
    decoder_tokens_backward(tensor(N, 1 + length, E, dtype=FP32), ids_restore, k, case.dtype, FP32, FP32, False, False)


def _sizes(case: Case) -> tuple[int, int, int, int, int]:
    """Patch side, L, K, P, D."""
    p, d = MODELS[case.model]
    length = (224 // p) ** 2
    return p, length, length // 4, 3 * p * p, d


def extension(arch: int) -> dict[str, Launch]:
    """The CUDA C++ kernels of the compiled extension, by a readable name with template arguments."""
    command = [TOOLS / "cuobjdump", "-arch", f"sm_{arch}"]
    usage, code = (
        subprocess.run([*command, option, LIBRARY], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    bodies = re.split(r"^\s*Function : (\w+)\n", code, flags=re.M)
    sass = dict(zip(bodies[1::2], bodies[2::2], strict=True))
    kernels = {}
    for symbol, line in re.findall(r"Function (\w+):\n\s*(REG:.*)", usage):
        kind, dtype, sizes = re.search(r"\d+(sort_row|rank_row)I([fd])((?:Li\d+E)*)E", symbol).groups()
        threads, *rest = [int(n) for n in re.findall(r"\d+", sizes)] or [256]
        name = f"{kind}<{', '.join(({'f': 'float', 'd': 'double'}[dtype], *map(str, (threads, *rest))))}>"
        registers, shared, local = resources(line)
        shared -= 1024 * (arch >= 90)  # without the share of the system, which the number for sm_80 does not include
        kernels[name] = Launch(name, (), threads // 32, shared, registers, local, accesses(sass[symbol]))
    return kernels


def toolkit() -> str:
    """The CUDA release that compiled the extension."""
    return re.search(rb"Cuda compilation tools, release ([\d.]+)", LIBRARY.read_bytes())[1].decode()


SHARED_KIB = {80: 164, 90: 228}  # of an SM; either has 65536 registers and room for 64 warps and 32 blocks


def occupancy(arch: int, launch: Launch) -> float:
    """Resident warps of an SM, limited by registers, shared memory and blocks, as a share of the maximum of 64."""
    registers = 256 * ceil(32 * launch.registers / 256)  # per warp, in units of 256
    warps = 65536 // registers // 4 * 4  # four schedulers share them evenly
    shared = 128 * ceil((launch.shared_bytes + 1024) / 128)  # per block; the system uses 1 KiB
    blocks = min(warps // launch.warps, SHARED_KIB[arch] * 1024 // shared, 64 // launch.warps, 32)
    return blocks * launch.warps / 64


def widths(found: Counter[str], kind: str) -> str:
    """Global loads ("LDG") or stores ("STG") by bits, widest first: "128x2 32x1"."""
    by_bits = {int(name.split(".")[1]): count for name, count in found.items() if name.startswith(kind)}
    return " ".join(f"{bits}x{count}" for bits, count in sorted(by_bits.items(), reverse=True))


def of_loop(launch: Launch) -> dict[str, float]:
    """Instructions per value and barriers per tile, for kernels that these may limit instead of memory."""
    if not launch.kernel.startswith(("_bias_gelu", "_add_layer_norm")):
        return {}
    barriers = sum("BAR.SYNC" in instruction for instruction in launch.tile)
    return {"instructions": round(len(launch.tile) / launch.values, 1), "barriers": barriers}


def row(arch: int, launch: Launch) -> dict[str, Any]:
    return {
        "registers": launch.registers,
        "shared": launch.shared_bytes,
        "occupancy": round(occupancy(arch, launch), 4),
        "loads": widths(launch.accesses, "LDG"),
        "stores": widths(launch.accesses, "STG"),
        **({"products": launch.accesses["MMA"]} if launch.accesses["MMA"] else {}),
        **of_loop(launch),
    }


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    for case in CASES:
        for name, launch in compiled(case).items():
            yield f"{name} {case}", row(case.arch, launch)
    for arch in ARCHS:
        for name, launch in extension(arch).items():
            yield f"{name} sm_{arch}", row(arch, launch)


def committed() -> dict[str, Any]:
    """The contents of budget.json: ``made_by``, the versions of the compilers, and ``rows``."""
    return json.loads(FILE.read_text())


def changes(found: dict[str, dict[str, Any]], case: object) -> list[str]:
    """The differences between ``found`` and the rows of ``case`` in budget.json."""
    known = {name: figures for name, figures in committed()["rows"].items() if name.endswith(f" {case}")}
    names = sorted(found.keys() | known.keys())
    return [f"{name}: {known.get(name)} -> {found.get(name)}" for name in names if known.get(name) != found.get(name)]


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(rows())]
    made_by = json.dumps({"triton": triton.__version__, "cuda": toolkit()})
    FILE.write_text(f'{{"made_by": {made_by},\n"rows": {{\n' + ",\n".join(lines) + "\n}}\n")
