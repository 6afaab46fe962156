"""A pytest plugin (``-p gpu_proof.interpreted``): Triton kernels, run by Triton's interpreter, answer for CPU tensors.

The ops' tests then hold the GPU kernels to what they hold the C++ kernels to. Every access of a kernel must lie inside
one of the tensors that it was given; one outside is an error, whether or not it would have crashed. The process's C++
kernels are hidden, so that nothing else can answer.
"""

import os
import sys
from typing import Any

assert "torch" not in sys.modules, "load this plugin first: Triton reads TRITON_INTERPRET as it is imported"
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["mae_fast._C"] = None  # type: ignore[assignment]  # importing it fails as if it were not built

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle  # noqa: E402

OPS = {
    "embed_visible": ("gather_patches", "add_positions"),
    "decoder_tokens": ("decoder_tokens",),
    "masked_loss": ("masked_loss",),
}


# --- bf16: the interpreter keeps its values as 16-bit integers, computes with those and truncates what it rounds ---


def _is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: TensorHandle) -> TensorHandle:
    """bf16 bits as fp32 values; everything else as it is."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: Any) -> TensorHandle:
    """fp32 values as bf16 bits, to nearest even, NaN kept."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), nearest), tl.bfloat16)


def _fix_bf16() -> None:
    stock_cast, stock_reduce = InterpreterBuilder.cast_impl, ReduceScanOpInterface.apply

    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16:
            return source if _is_bf16(source) else _rounded(source.data)
        return stock_cast(self, _widened(source), target) if target.scalar != source.dtype.scalar else source

    def no_bf16(name: str) -> None:
        stock = getattr(InterpreterBuilder, name)

        def checked(self: Any, *operands: Any) -> TensorHandle:
            if any(_is_bf16(x) for x in operands if isinstance(x, TensorHandle)):
                raise NotImplementedError(f"{name} on bf16 in the interpreter: widen to fp32 first")
            return stock(self, *operands)

        setattr(InterpreterBuilder, name, checked)

    def reduce(self: Any, x: Any) -> Any:
        if any(y.dtype.scalar == tl.bfloat16 for y in (x if isinstance(x, tuple) else (x,))):
            raise NotImplementedError("a reduction of bf16 in the interpreter: widen to fp32 first")
        return stock_reduce(self, x)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = lambda self, source, target, mode: cast(self, source, target)
    for name in ("binary_op", "unary_op", "create_fma", "create_dot", "create_rsqrt"):
        no_bf16(name)
    ReduceScanOpInterface.apply = reduce


# --- bounds: every address lies inside a tensor argument of the launch ---

_spans: list[tuple[str, int, int]] = []  # name, first byte, byte past the last, of the running launch's tensors


def _check_addresses(kind: str, pointers: TensorHandle, mask: TensorHandle) -> None:
    addresses, wanted = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
    addresses = addresses[wanted]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, bool)
    for _, first, end in _spans:
        inside |= (addresses >= first) & (addresses + size <= end)
    if not inside.all():
        tensors = ", ".join(f"{name} [{first:#x}, {end:#x})" for name, first, end in _spans)
        outside = int(addresses[~inside][0])
        raise IndexError(f"{kind} of {size} bytes at {outside:#x}, outside every tensor of the launch: {tensors}")


def _watch_memory() -> None:
    stock_init, stock_load = GridExecutor._init_args_hst, InterpreterBuilder.create_masked_load
    stock_store = InterpreterBuilder.create_masked_store

    def init(self: Any, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = stock_init(self, args, kwargs)
        _spans.clear()
        for name, x in [*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()]:
            if isinstance(x, torch.Tensor) and x.numel():
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                _spans.append((name, x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
        return host_args, host_kwargs

    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        _check_addresses("load", pointers, mask)
        return stock_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        _check_addresses("store", pointers, mask)
        return stock_store(self, pointers, value, mask, *rest)

    GridExecutor._init_args_hst = init
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def _register() -> None:
    from importlib import import_module

    for folder, ops in OPS.items():
        import_module(f"mae_fast.ops.{folder}")
        kernels = import_module(f"mae_fast.ops.{folder}.triton_kernels")
        for op in ops:
            torch.library.impl(f"mae_fast::{op}", "CPU", getattr(kernels, f"{op}_forward"))
            torch.library.impl(f"mae_fast::{op}_backward", "CPU", getattr(kernels, f"{op}_backward"))


assert interpreter.interpreter_builder.__class__ is InterpreterBuilder
_fix_bf16()
_watch_memory()
_register()
torch.set_num_threads(1)
