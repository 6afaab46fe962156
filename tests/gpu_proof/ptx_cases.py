"""Run the GPU kernels in the PTX emulator: launchers get CPU tensors and fill them with the values of a GPU.

Triton compiles each launch for the given architecture as it would on a GPU. nvcc compiles the CUDA C++ kernels.
"""

import ctypes
import re
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from gpu_proof.compiled import Driver
from gpu_proof.ptx import Buffer, Machine, Program, Traffic
from op_cases import permutations, randn, raw_pixels, raw_stats
from support import assert_no_worse_than_eager
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mae_fast.ops.adamw import reference as adamw_eager
from mae_fast.ops.adamw import triton_kernels as adamw
from mae_fast.ops.add_layer_norm import reference as add_layer_norm_eager
from mae_fast.ops.add_layer_norm import triton_kernels as add_layer_norm
from mae_fast.ops.bias_gelu import reference as bias_gelu_eager
from mae_fast.ops.bias_gelu import triton_kernels as bias_gelu
from mae_fast.ops.decoder_tokens import reference as decoder_tokens_eager
from mae_fast.ops.decoder_tokens import triton_kernels as decoder_tokens
from mae_fast.ops.embed_visible import reference as embed_visible_eager
from mae_fast.ops.embed_visible import triton_kernels as embed_visible
from mae_fast.ops.masked_loss import reference as masked_loss_eager
from mae_fast.ops.masked_loss import triton_kernels as masked_loss
from mae_fast.ops.random_masking.reference import random_masking_reference

Edit = Callable[[Program], Program]
listed: list[Tensor] = []  # tensors whose addresses kernels read from a table
ROOT = Path(__file__).parents[2]
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64


@dataclass(frozen=True)
class Run:
    """An executed launch."""

    program: Program
    executed: set[int]  # indices of instructions
    steps: int
    traffic: list[Traffic]

    @property
    def kernel(self) -> str:
        return re.search(r"(?:sort|rank)_row|(?<=^_)\w+(?=_kernel)", self.program.name)[0]


Results = tuple[dict[str, Tensor], list[Run]]


def _buffer(name: str, x: Tensor) -> Buffer:
    """The memory of a CPU tensor from its first to its last element, without a copy."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    size = (last + 1) * x.element_size()
    data = np.frombuffer((ctypes.c_ubyte * size).from_address(x.data_ptr()), np.uint8)
    return Buffer(name, x.data_ptr(), data)


def _run(
    program: Program, grid: Sequence[int], threads: int, params: list[bytes], tensors: dict[str, Tensor],
    dynamic_shared: int, max_steps: int,
) -> Run:  # fmt: skip
    buffers = [_buffer(name, x) for name, x in tensors.items() if x.numel()]
    machine = Machine(program, grid, threads, params, buffers, dynamic_shared)
    machine.run(max_steps)
    return Run(program, machine.executed, machine.steps, list(machine.traffic.values()))


# --- Triton ---


def _packed(kind: str, value: Any) -> bytes:
    if kind[0] == "*":
        return struct.pack("<Q", value.data_ptr())
    return struct.pack({"i32": "<i", "i64": "<q", "fp32": "<f"}[kind], value)


@cache
def _program(ptx: str, name: str) -> Program:
    return Program(ptx, name)


@contextmanager
def emulated(arch: int, edit: Edit, max_steps: int) -> Iterator[list[Run]]:
    """Context in which the emulator runs Triton launches on CPU tensors. New tensors are filled with NaN."""
    log: list[Run] = []
    stock = JITFunction.run

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        kernel = stock(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | options
        program = edit(_program(kernel.asm["ptx"], self.__name__))
        params = [_packed(kind, given[name]) for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        params += [bytes(8)] * (len(program.params) - len(params))  # added by Triton: pointers to scratch memory
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        tensors |= {f"listed tensor {i}": x for i, x in enumerate(listed)}
        threads, shared = 32 * kernel.metadata.num_warps, kernel.metadata.shared
        log.append(_run(program, grid, threads, params, tensors, shared, max_steps))
        return kernel

    before, deterministic = driver._active, torch.are_deterministic_algorithms_enabled()
    JITFunction.run = run
    driver.set_active(Driver(arch))
    torch.use_deterministic_algorithms(True)
    try:
        yield log
    finally:
        JITFunction.run, driver._active = stock, before  # reset_active() would ask for a GPU
        torch.use_deterministic_algorithms(deterministic)


# --- nvcc ---


@cache
def _module(arch: int) -> str:
    """The PTX of csrc/cuda/random_masking.cu, compiled with the flags of setup.py."""
    include = [f"{Path(torch.__file__).parent}/include", sysconfig.get_path("include")]
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        command = ["nvcc", "-std=c++20", "-O3", "-DUSE_CUDA", "-ptx", f"-arch=compute_{arch}", "-o", file.name]
        command += [flag for path in include for flag in ("-isystem", path)]
        subprocess.run([*command, ROOT / "csrc/cuda/random_masking.cu"], check=True)
        return Path(file.name).read_text()


def random_masking(noise: Tensor, num_keep: int, instance: str, arch: int, edit: Edit, max_steps: int) -> Results:
    """The results of ``sort_row<T, threads, items>`` ("128x2") or ``rank_row<T>`` ("rank")."""
    (n, length), k = noise.shape, num_keep
    letter = {torch.float32: "f", torch.float64: "d"}[noise.dtype]
    shapes = {"ids_keep": (n, k), "ids_removed": (n, length - k), "ids_restore": (n, length)}
    out = {name: torch.full(shape, -1) for name, shape in shapes.items()}
    out["mask"] = torch.full((n, length), float("nan"))
    pointers = [x.data_ptr() for x in out.values()]
    params = [struct.pack("<Qqq", noise.data_ptr(), *noise.stride()), struct.pack("<qqQQQQ", k, length, *pointers)]
    if instance == "rank":
        threads, blocks, name = 256, -(-length // 256), f"rank_rowI{letter}E"
        params.append(struct.pack("<q", blocks))
    else:
        threads, items = map(int, instance.split("x"))
        blocks, name = 1, f"sort_rowI{letter}Li{threads}ELi{items}E"
    program = edit(_program(_module(arch), rf"\w*{name}\w*"))
    run = _run(program, (n * blocks,), threads, params, {"noise": noise, **out}, 0, max_steps)
    return out, [run]


# --- cases ---


@dataclass(frozen=True)
class Case:
    """The arguments of a launcher, and the expected results."""

    name: str
    launch: Callable[[int, Edit, int], Results]  # arch, edit, max_steps
    eager: Callable[[], dict[str, Tensor]]
    truth: Callable[[], dict[str, Tensor]]

    def __str__(self) -> str:
        return self.name

    def check(self, arch: int, edit: Edit = lambda program: program, max_steps: int = 1_000_000) -> list[Run]:
        """Assert that results are as accurate as in eager torch, with NaN at the same places and equal integers."""
        ours, log = self.launch(arch, edit, max_steps)
        eager, truth = self.expected
        for name, exact in truth.items():
            assert ours[name].shape == exact.shape, name
            assert torch.equal(ours[name].isnan(), exact.isnan()), f"{name}: NaN elsewhere"
            assert exact.is_floating_point() or torch.equal(ours[name], exact), name
            if exact.is_floating_point():
                numbers = ({name: x[name].nan_to_num()} for x in (ours, eager))
                assert_no_worse_than_eager(*numbers, {name: exact.nan_to_num().double()}, eager[name].dtype)
        return log

    @cached_property
    def expected(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.eager(), self.truth()


def _named(names: str, results: Any) -> dict[str, Tensor]:
    """Name -> result, without missing and empty results."""
    results = (results,) if isinstance(results, Tensor) else results
    return {name: x for name, x in zip(names.split(), results, strict=True) if x.numel()}


def _triton(name: str, outputs: str, ours: Callable[..., Any], eager: Callable[..., Any], *args: Any) -> Case:
    """The case of a launcher and a reference with the same arguments. The truth is the reference in float64."""

    def launch(arch: int, edit: Edit, max_steps: int) -> Results:
        with emulated(arch, edit, max_steps) as log:
            results = ours(*args)
        return _named(outputs, results), log

    def widened(x: Any) -> Any:
        if isinstance(x, list):
            return [*map(widened, x)]
        if isinstance(x, torch.dtype):
            return torch.float64
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return Case(
        name, launch, lambda: _named(outputs, eager(*args)), lambda: _named(outputs, eager(*map(widened, args)))
    )


def _floats(*shape: int, seed: int, dtype: torch.dtype = FP32, spread: float = 1) -> Tensor:
    return (randn(*shape, seed=seed) * spread).to(dtype)


def _bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def _gather_unknown(images: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    """The reference, with NaN where an index is out of range."""
    known = (ids >= 0) & (ids < (images.shape[2] // rest[0]) * (images.shape[3] // rest[1]))
    rows = embed_visible_eager.gather_patches_reference(images, ids.where(known, 0), *rest)
    return rows.where(known[:, :, None], float("nan"))


def _positions_unknown(x: Tensor, ids: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
    known = (ids >= 0) & (ids < pos.shape[1] - 1)
    out = embed_visible_eager.add_positions_reference(x, ids.where(known, 0), pos, cls)
    return out.where(torch.cat([known.new_ones(len(x), 1), known], 1)[:, :, None], float("nan"))


def _tokens_unknown(x: Tensor, token: Tensor, ids_restore: Tensor, pos: Tensor) -> Tensor:
    known = (ids_restore >= 0) & (ids_restore < ids_restore.shape[1])
    out = decoder_tokens_eager.decoder_tokens_reference(x, token, ids_restore.where(known, 0), pos)
    return out.where(torch.cat([known.new_ones(len(x), 1), known], 1)[:, :, None], float("nan"))


def _layer_norm_backward(*args: Any) -> tuple[Tensor, ...]:
    """The reference. In float64, the gradient of the residual is that of x, so it is returned twice."""
    dx, dlow, *rest = add_layer_norm_eager.add_layer_norm_backward_reference(*args)
    return dx, dlow if dlow.numel() else dx, *rest


def _spoiled(ids: Tensor, *values: int) -> Tensor:
    """``ids`` [2, K] with indices outside the range at the end of its first row.

    Not at the end of the last row, as unwritten rows hold NaN, too.
    """
    ids = ids.clone()
    ids[0, -len(values) :] = torch.tensor(values)
    return ids


def triton_cases() -> list[Case]:
    """Small shapes with all edge cases: partial tiles of rows and columns, indices out of range, all layouts."""
    ids = torch.tensor([[0, 7, 3], [5, 11, 0]])  # 6 rows: one tile and a half; the first patch and the last
    ids_removed = torch.stack([torch.tensor([x for x in range(12) if x not in row]) for row in ids.tolist()])
    restore = permutations(2, 12, 1)
    outside = (2**32 + 3, -1)
    floating, small, bytes_ = _floats(2, 3, 48, 64, seed=1), _floats(2, 3, 42, 56, seed=1), _bytes(2, 48, 64, 3)
    floating[1, :, :16] = 0.25  # constant patches, whose variance is 0
    none, stats = (None, None, None), (MEAN, STD, None)
    pos, cls, tail = _floats(1, 13, 768, seed=2), _floats(1, 1, 768, seed=3), _floats(1, 13, 40, seed=2)
    cases = [
        _triton("gather_patches fp32", "rows", embed_visible.gather_patches_forward, _gather_unknown,
                floating, _spoiled(ids, *outside), 16, 16, *none, FP32),
        _triton("gather_patches fp32 to bf16", "rows", embed_visible.gather_patches_forward,
                embed_visible_eager.gather_patches_reference, floating, ids, 16, 16, *none, BF16),
        _triton("gather_patches bf16", "rows", embed_visible.gather_patches_forward,
                embed_visible_eager.gather_patches_reference, floating.bfloat16(), ids, 16, 16, *none, BF16),
        _triton("gather_patches uint8", "rows", embed_visible.gather_patches_forward,
                embed_visible_eager.gather_patches_reference, bytes_, ids, 16, 16, *stats, BF16),
        _triton("gather_patches patch 14", "rows", embed_visible.gather_patches_forward,
                embed_visible_eager.gather_patches_reference, small, ids, 14, 14, *none, BF16),
        _triton("gather_patches backward", "images", embed_visible.gather_patches_backward,
                embed_visible_eager.gather_patches_backward_reference,
                _floats(2, 3, 768, seed=4), torch.cat([ids[:, :2], ids[:, :1]], 1), [2, 3, 48, 64], 16, 16, FP32),
        _triton("gather_patches backward patch 14", "images", embed_visible.gather_patches_backward,
                embed_visible_eager.gather_patches_backward_reference,
                _floats(2, 3, 588, seed=4, dtype=BF16), ids, [2, 3, 42, 56], 14, 14, BF16),
        _triton("add_positions", "out", embed_visible.add_positions_forward, _positions_unknown,
                _floats(2, 3, 768, seed=5, dtype=BF16), _spoiled(ids, *outside), pos, cls),
        _triton("add_positions width 40", "out", embed_visible.add_positions_forward, _positions_unknown,
                _floats(2, 12, 40, seed=5), restore, tail, cls[:, :, :40]),
        _triton("add_positions backward", "x pos cls", embed_visible.add_positions_backward,
                embed_visible_eager.add_positions_backward_reference,
                _floats(2, 4, 768, seed=6, dtype=BF16), ids, pos, cls, BF16, False),
        _triton("add_positions backward width 40", "x pos cls", embed_visible.add_positions_backward,
                embed_visible_eager.add_positions_backward_reference,
                _floats(2, 13, 40, seed=6), restore, tail, cls, FP32, False),
        _triton("decoder_tokens", "out", decoder_tokens.decoder_tokens_forward, _tokens_unknown,
                _floats(2, 4, 512, seed=7, dtype=BF16), _floats(1, 1, 512, seed=8), _spoiled(restore, *outside),
                _floats(1, 13, 512, seed=9)),
        _triton("decoder_tokens width 40", "out", decoder_tokens.decoder_tokens_forward, _tokens_unknown,
                _floats(2, 4, 40, seed=7), _floats(1, 1, 40, seed=8), restore, _floats(1, 13, 40, seed=9)),
        _triton("decoder_tokens backward", "x token pos", decoder_tokens.decoder_tokens_backward,
                decoder_tokens_eager.decoder_tokens_backward_reference,
                _floats(2, 13, 512, seed=10), restore, 3, BF16, FP32, FP32, False),
        _triton("decoder_tokens backward two chunks", "x token pos", decoder_tokens.decoder_tokens_backward,
                decoder_tokens_eager.decoder_tokens_backward_reference,
                _floats(2, 71, 40, seed=10), permutations(2, 70, 2), 18, FP32, FP32, FP32, False),
        _triton("decoder_tokens mask tokens last", "out", decoder_tokens.decoder_tokens_forward,
                decoder_tokens_eager.decoder_tokens_reference,
                _floats(2, 4, 40, seed=7), _floats(1, 1, 40, seed=8), restore, _floats(1, 13, 40, seed=9), False),
        _triton("decoder_tokens mask tokens last backward", "x token pos", decoder_tokens.decoder_tokens_backward,
                decoder_tokens_eager.decoder_tokens_backward_reference,
                _floats(2, 71, 40, seed=10), permutations(2, 70, 2), 18, FP32, FP32, FP32, False, False),
        _triton("decoder_tokens fewer mask tokens", "out", decoder_tokens.decoder_tokens_forward,
                decoder_tokens_eager.decoder_tokens_reference,
                _floats(2, 4, 40, seed=7), _floats(1, 1, 40, seed=8), restore, _floats(1, 13, 40, seed=9), False, 4),
        _triton("decoder_tokens fewer mask tokens backward", "x token pos", decoder_tokens.decoder_tokens_backward,
                decoder_tokens_eager.decoder_tokens_backward_reference,
                _floats(2, 67, 40, seed=10), permutations(2, 70, 2), 18, FP32, FP32, FP32, True, False),
        *_loss_cases("masked_loss", floating, ids_removed, 16, *none),
        *_loss_cases("masked_loss uint8", bytes_, ids_removed, 16, *stats),
        *_loss_cases("masked_loss patch 14", small, None, 14, *none),
        *_raw_cases(ids, ids_removed),
        _triton("weighted_mean", "loss", _weighted_mean, lambda x: x[0].sum() / x[1].sum(),
                _floats(2, 20000, seed=24).abs() * torch.linspace(1, 4, 20000)),
        *_layer_norm_cases(),
        *_fewer_tokens_cases(),
        *_gelu_cases(),
        *_adamw_cases(),
    ]  # fmt: skip
    return cases


def _loss_apart(launcher: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """Loss, means, scales and losses of patches as separate results, so that each has its own tolerance."""

    def launch(*args: Any) -> tuple[Tensor, ...]:
        loss, stats = launcher(*args)
        return loss, *stats.unbind(-1)

    return launch


def _loss_cases(
    name: str, images: Tensor, ids: Tensor | None, p: int, mean: Tensor | None, std: Tensor | None, nodata: float | None
) -> list[Case]:
    """Forward and backward. The backward gets the statistics of the reference."""
    shape, channels = (2, 12 if ids is None else ids.shape[1]), 3 if mean is None else len(mean)
    pred, weights = _floats(*shape, channels * p * p, seed=11, dtype=BF16), randn(*shape, seed=12, dtype=FP32).abs()
    fixed, rest = (images, pred, weights, ids), (p, p, ids is not None, mean, std, nodata)
    loss, stats = masked_loss_eager.masked_loss_reference(*fixed, *rest)
    parts = "loss means scales losses" + " counts" * (stats.shape[2] == 4)
    return [
        _triton(name, parts, _loss_apart(masked_loss.masked_loss_forward),
                _loss_apart(masked_loss_eager.masked_loss_reference), *fixed, *rest),
        _triton(f"{name} backward", "pred mask images", masked_loss.masked_loss_backward,
                masked_loss_eager.masked_loss_backward_reference,
                torch.tensor(1.5), *fixed, loss, stats, *rest, False),
    ]  # fmt: skip


def _raw_cases(ids: Tensor, ids_removed: Tensor) -> list[Case]:
    """Pixels [N, H, W, C] of more than 8 bits. The left half of an image and a few other pixels are missing."""
    cases, images = [], randn(2, 5, 24, 32, seed=1)
    for dtype, missing in ((torch.uint16, False), (torch.uint16, True), (torch.int16, True), (FP32, True),
                           (torch.float16, True)):  # fmt: skip
        pixels, nodata = raw_pixels(images, dtype, missing)
        mean, std = (x.float() for x in raw_stats(5, dtype))
        name = str(dtype).removeprefix("torch.") + " with missing pixels" * missing
        cases += [
            _triton(f"gather_patches {name}", "rows", embed_visible.gather_patches_forward,
                    embed_visible_eager.gather_patches_reference, pixels, ids, 8, 8, mean, std, nodata, BF16),
            *_loss_cases(f"masked_loss {name}", pixels, ids_removed, 8, mean, std, nodata),
        ]  # fmt: skip
    return cases


def _weighted_mean(partial: Tensor) -> Tensor:
    loss = partial.new_empty(())
    masked_loss._weighted_mean_kernel[(1,)](
        partial, loss, partial.shape[1], ACC_DTYPE=tl.float32, BLOCK=8192, num_warps=16
    )
    return loss


def _few_programs(module: ModuleType, launcher: Callable[..., Any], count: int = 2) -> Callable[..., Any]:
    """The launcher as on a GPU with ``count`` concurrent programs, so that each has several tiles."""

    def launch(*args: Any) -> Any:
        with patch.object(module, "programs", lambda *_: count):
            return launcher(*args)

    return launch


def _layer_norm_cases() -> list[Case]:
    cases = []
    # One warp has a row of 768, two warps share a row of 1280. 18 programs have more than one group of partial sums.
    for width, rows, low, count in ((768, 9, BF16, 2), (1280, 5, BF16, 2), (40, 300, FP32, 18)):
        x, residual = _floats(rows, width, seed=13, spread=3), _floats(rows, width, seed=14, dtype=low)
        weight, bias, residual_bias = (_floats(width, seed=seed) for seed in (15, 16, 17))
        forward = (x, residual, residual_bias, weight, bias, 1e-6, low)
        total, _, stats = add_layer_norm_eager.add_layer_norm_reference(*forward)
        grads = _floats(rows, width, seed=18), _floats(rows, width, seed=19, dtype=low)
        cases += [
            _triton(f"add_layer_norm width {width}", "sum normed stats", add_layer_norm.add_layer_norm_forward,
                    add_layer_norm_eager.add_layer_norm_reference, *forward),
            _triton(f"add_layer_norm backward width {width}", "x residual weight bias residual_bias",
                    _few_programs(add_layer_norm, add_layer_norm.add_layer_norm_backward, count),
                    _layer_norm_backward if low != FP32 else add_layer_norm_eager.add_layer_norm_backward_reference,
                    *grads, total, stats, weight, residual_bias, low),
        ]  # fmt: skip
    return cases


def _fewer_tokens_cases() -> list[Case]:
    """A residual for 3 of 5 tokens of two images: one row more than a tile."""
    x, residual = _floats(2, 5, 40, seed=13, spread=3), _floats(2, 3, 40, seed=14, dtype=BF16)
    weight, bias, residual_bias = (_floats(40, seed=seed) for seed in (15, 16, 17))
    forward = (x, residual, residual_bias, weight, bias, 1e-6, BF16)
    total, _, stats = add_layer_norm_eager.add_layer_norm_reference(*forward)
    grads = _floats(2, 3, 40, seed=18), _floats(2, 3, 40, seed=19, dtype=BF16)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        dx, dlow, *rest = add_layer_norm_eager.add_layer_norm_backward_reference(*args)
        return dx, dlow if dlow.numel() else dx[:, 2:], *rest

    return [
        _triton("add_layer_norm of fewer tokens", "sum normed stats", add_layer_norm.add_layer_norm_forward,
                add_layer_norm_eager.add_layer_norm_reference, *forward),
        _triton("add_layer_norm of fewer tokens backward", "x residual weight bias residual_bias",
                _few_programs(add_layer_norm, add_layer_norm.add_layer_norm_backward), backward,
                *grads, total, stats, weight, residual_bias, BF16, 2),
    ]  # fmt: skip


def _gelu_cases() -> list[Case]:
    cases = []
    for width, rows, dtype in ((768, 5, BF16), (40, 37, FP32)):
        x, bias = _floats(rows, width, seed=20, dtype=dtype, spread=2), _floats(width, seed=21)
        cases += [
            _triton(f"bias_gelu width {width}", "out", bias_gelu.bias_gelu_forward,
                    bias_gelu_eager.bias_gelu_reference, x, bias),
            _triton(f"bias_gelu backward width {width}", "x bias out",
                    _few_programs(bias_gelu, bias_gelu.bias_gelu_backward),
                    bias_gelu_eager.bias_gelu_backward_reference, _floats(rows, width, seed=22, dtype=dtype), x, bias,
                    True),
        ]  # fmt: skip
    return cases


def _cloned(x: Tensor) -> Tensor:
    """A copy of the whole storage, so that the alignment does not change."""
    return (
        torch.empty(0, dtype=x.dtype)
        .set_(x.untyped_storage().clone())
        .as_strided(x.shape, x.stride(), x.storage_offset())
    )


def _of_lists(f: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``f`` with copies of its lists. Returns its result or else the tensors that it has written."""

    def call(*args: Any) -> Any:
        args = tuple(
            [_cloned(x) if isinstance(x, Tensor) else x for x in a] if isinstance(a, list) else a for a in args
        )
        listed.extend(x for a in args if isinstance(a, list) for x in a if isinstance(x, Tensor))
        try:
            result = f(*args)
        finally:
            listed.clear()
        if result is not None:
            return result
        params, _, exp_avgs, exp_avg_sqs, copies, steps, *_ = args
        return [torch.cat([x.flatten() for x in xs]) for xs in (params, exp_avgs, exp_avg_sqs, copies, steps)]

    return call


def _adamw_cases() -> list[Case]:
    """Whole and partial chunks, an unaligned tensor, a single value; normal, clipped and skipped steps."""
    shapes = (8192,), (8192 + 5,), ()
    params, grads, exp_avgs, exp_avg_sqs = (
        [_floats(*shape, seed=32 + 4 * i + j) for i, shape in enumerate(shapes)] for j in range(4)
    )
    grads[1] = torch.cat([grads[1], grads[1][:1]])[1:]
    exp_avg_sqs = [x.square() for x in exp_avg_sqs]
    copies, steps = [x.bfloat16() * 0 for x in params], [torch.tensor(float(i)) for i in range(3)]
    options = [1e-2] * 3, [0.9, 0.3, 0.9], [0.95, 0.999, 0.95], [1e-8] * 3, [0.05, 0.0, 0.1]
    lists = (params, grads, exp_avgs, exp_avg_sqs, copies, steps)
    names, (one, scale) = "params exp_avgs exp_avg_sqs copies steps", (torch.ones(()), torch.full((), 3.0))
    launcher, eager = map(_of_lists, (adamw.adamw_steps_forward, adamw_eager.adamw_steps_reference))
    norm, eager_norm = map(_of_lists, (adamw.gradient_norm_forward, adamw_eager.gradient_norm_reference))
    norm = _few_programs(adamw, norm)
    return [
        _triton("gradient_norm", "norm found_inf grad_scale", norm, eager_norm, grads, 1.0),
        _triton("adamw_steps", names, launcher, eager, *lists, *options, one * 0, scale),
        _triton("adamw_steps left out", names, launcher, eager, *lists, *options, one, None),
    ]


def model_cases(dtype: torch.dtype) -> list[Case]:
    """An image of 224 pixels with the shapes of ViT-B/16 and its decoder, all in ``dtype``."""
    images, order = _floats(1, 3, 224, 224, seed=26, dtype=dtype), permutations(1, 196, 3)
    ids_keep, ids_removed, ids_restore = order[:, :49].contiguous(), order[:, 49:].contiguous(), order.argsort(1)
    visible, tokens = _floats(1, 50, 768, seed=27, dtype=dtype), _floats(1, 197, 512, seed=28, dtype=dtype)
    pos, decoder_pos = _floats(1, 197, 768, seed=29, dtype=dtype), _floats(1, 197, 512, seed=30, dtype=dtype)
    rows, weight, bias = visible[0, 1:], pos[0, 0], pos[0, 1]
    none, kind = (None, None, None), str(dtype).removeprefix("torch.")
    wide = torch.promote_types(dtype, FP32)
    pred, weights = _floats(1, 147, 768, seed=31, dtype=dtype), torch.ones(1, 147, dtype=wide)
    target = (images, pred, weights, ids_removed)
    loss, stats = masked_loss_eager.masked_loss_reference(*target, 16, 16, True, *none)
    *_, moments = add_layer_norm_eager.add_layer_norm_reference(rows, None, None, weight, bias, 1e-6, dtype)
    gathered, added, token = embed_visible, embed_visible_eager, decoder_pos[:, :1]
    return [
        _triton(f"gather_patches {kind}", "rows", gathered.gather_patches_forward, added.gather_patches_reference,
                images, ids_keep, 16, 16, *none, dtype),
        _triton(f"gather_patches backward {kind}", "images", gathered.gather_patches_backward,
                added.gather_patches_backward_reference, rows[None], ids_keep, [1, 3, 224, 224], 16, 16, dtype),
        _triton(f"add_positions {kind}", "out", gathered.add_positions_forward, added.add_positions_reference,
                rows[None], ids_keep, pos, pos[:, :1]),
        _triton(f"add_positions backward {kind}", "x pos cls", gathered.add_positions_backward,
                added.add_positions_backward_reference, visible, ids_keep, pos, pos[:, :1], dtype, False),
        _triton(f"decoder_tokens {kind}", "out", decoder_tokens.decoder_tokens_forward,
                decoder_tokens_eager.decoder_tokens_reference, tokens[:, :50], token, ids_restore, decoder_pos),
        _triton(f"decoder_tokens backward {kind}", "x token pos", decoder_tokens.decoder_tokens_backward,
                decoder_tokens_eager.decoder_tokens_backward_reference,
                tokens, ids_restore, 49, dtype, dtype, dtype, False),
        _triton(f"masked_loss {kind}", "loss means scales losses", _loss_apart(masked_loss.masked_loss_forward),
                _loss_apart(masked_loss_eager.masked_loss_reference), *target, 16, 16, True, *none),
        _triton(f"masked_loss backward {kind}", "pred mask images", masked_loss.masked_loss_backward,
                masked_loss_eager.masked_loss_backward_reference,
                loss.new_ones(()), *target, loss, stats, 16, 16, True, *none, False),
        _triton(f"add_layer_norm {kind}", "sum normed stats", add_layer_norm.add_layer_norm_forward,
                add_layer_norm_eager.add_layer_norm_reference, rows, None, None, weight, bias, 1e-6, dtype),
        _triton(f"add_layer_norm backward {kind}", "x residual weight bias residual_bias",
                add_layer_norm.add_layer_norm_backward, add_layer_norm_eager.add_layer_norm_backward_reference,
                None, visible[0, :49], rows, moments, weight, None, dtype),
        _triton(f"bias_gelu {kind}", "out", bias_gelu.bias_gelu_forward, bias_gelu_eager.bias_gelu_reference,
                rows, bias),
        _triton(f"bias_gelu backward {kind}", "x bias out", bias_gelu.bias_gelu_backward,
                bias_gelu_eager.bias_gelu_backward_reference, visible[0, :49], rows, bias, False),
    ]  # fmt: skip


def masking_case(instance: str, n: int, length: int, num_keep: int, dtype: torch.dtype = FP32) -> Case:
    """Noise with ties, both zeros, infinities and NaNs. It is every second column of a wider tensor."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 0.25], dtype=dtype)
    noise = randn(n, 2 * length, seed=23, dtype=dtype)
    noise[:, ::7] = special[torch.arange(noise[:, ::7].numel()).reshape(n, -1) % len(special)]
    noise[:, length * 3 // 2 :] = 0.5  # neighbours tie
    noise = noise[:, ::2]
    names = "ids_keep ids_removed ids_restore mask"

    def eager() -> dict[str, Tensor]:
        return _named(names, random_masking_reference(noise, num_keep))

    def launch(arch: int, edit: Edit, max_steps: int) -> Results:
        return random_masking(noise, num_keep, instance, arch, edit, max_steps)

    return Case(f"{instance} N{n} L{length} K{num_keep} {dtype}", launch, eager, eager)
