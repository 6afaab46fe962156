"""A pytest plugin (``-p gpu_proof.interpreted``) that runs the Triton kernels on CPU tensors, by Triton's interpreter.

The ops' tests then test the Triton kernels instead of the C++ kernels. memory.py checks every access: accesses outside
the tensors of a launch, races between programs, and unwritten bytes are errors. The C++ kernels are not loaded, so that
no test can use them.
"""

import os
import sys
from importlib import import_module
from typing import Any

assert "torch" not in sys.modules, "load this plugin first: Triton reads TRITON_INTERPRET as it is imported"
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["mae_fast._C"] = None  # type: ignore[assignment]  # the import fails as if it were not built

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from gpu_proof import memory  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle  # noqa: E402

from mae_fast.ops.native import has_kernel  # noqa: E402
from mae_fast.ops.registry import ops  # noqa: E402

# The interpreter stores bf16 values as 16-bit integers, computes with these integers, and rounds by truncation.


def _is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: TensorHandle) -> TensorHandle:
    """Convert bf16 bits to fp32 values. Other types are returned unchanged."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: Any) -> TensorHandle:
    """Convert fp32 values to bf16 bits, rounded to nearest even. NaN stays NaN."""
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

    stock_dot = InterpreterBuilder.create_dot

    def dot(self: Any, a: TensorHandle, b: TensorHandle, *more: Any) -> TensorHandle:
        return stock_dot(self, _widened(a), _widened(b), *more)  # products of bf16 values are exact in fp32

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = lambda self, source, target, mode: cast(self, source, target)
    for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt"):
        no_bf16(name)
    ReduceScanOpInterface.apply = reduce


def _register() -> None:
    for op in ops():
        for schema in op.schemas:
            if has_kernel(schema, "cuda"):
                kernels = import_module(f"mae_fast.ops.{op.name}.triton_kernels")
                launcher = getattr(kernels, schema if schema.endswith("_backward") else f"{schema}_forward")
                torch.library.impl(f"mae_fast::{schema}", "CPU", memory.traced(launcher))


assert interpreter.interpreter_builder.__class__ is InterpreterBuilder
_fix_bf16()
memory.watch()
_register()
torch.set_num_threads(1)
