"""What only the interpreter can show of the Triton kernels. Run by tests/ops/test_triton.py in a process of its own."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_proof.interpreted import OPS


@triton.jit
def _shift_kernel(x_ptr, y_ptr, by, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(y_ptr + i, tl.load(x_ptr + i + by))


def test_the_guard_sees_an_access_outside():
    x, y = torch.arange(8.0), torch.empty(6)
    with pytest.raises(Exception, match=r"load of 4 bytes .* outside every tensor"):
        _shift_kernel[(1,)](x, y, 1, COUNT=8)
    with pytest.raises(Exception, match=r"store of 4 bytes .* outside every tensor"):
        _shift_kernel[(1,)](x, y, 0, COUNT=8)
    _shift_kernel[(1,)](x, y, 4, COUNT=4)
    assert torch.equal(y[:4], x[4:])


@triton.jit
def _sum_kernel(x_ptr, y_ptr, z_ptr, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(z_ptr + i, tl.load(x_ptr + i).to(tl.float32) + tl.load(y_ptr + i).to(tl.float32))


def test_bf16_rounds_as_torch_does():
    every = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)
    other = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    ours = torch.empty_like(every)
    _sum_kernel[(64,)](every, other, ours, COUNT=1024)
    assert torch.equal(ours.nan_to_num(nan=7), (every + other).nan_to_num(nan=7))


def test_the_kernels_answer():
    """Not the references: their registration for the CPU is what the other tests of this process rest on."""
    for ops in OPS.values():
        for op in (*ops, *(f"{op}_backward" for op in ops)):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mae_fast::{op}", "CPU"), op
