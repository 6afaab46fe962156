"""The records of ``gpu_proof.step`` for single ops. Run in a separate process, which the fake device modifies."""

from contextlib import suppress

import pytest
import torch
from gpu_proof.fake_device import fake_device
from gpu_proof.step import accept_fake_tensors, recorded
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import mae_fast.ops.adamw
import mae_fast.ops.embed_visible
import mae_fast.ops.masked_loss
import mae_fast.ops.random_masking  # noqa: F401
from mae_fast.ops.bf16_weight_cache import working_copy
from mae_fast.training.optim import AdamW

ops = torch.ops.mae_fast


@pytest.fixture(scope="module", autouse=True)
def device():
    with fake_device(90):
        yield


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def counted(f):
    """(group, bytes) of each launch of ``f``."""
    with recorded() as recorder:
        f()
    return [(launch.group, launch.bytes) for launch in recorder.launches]


def test_bytes():
    x, low, row = tensor(64, 32), tensor(64, 32, dtype=torch.bfloat16), tensor(32)
    assert counted(lambda: x + low) == [("elementwise", 64 * 32 * (4 + 2 + 4))]
    assert counted(lambda: x + row.expand(64, 32)) == [("elementwise", 64 * 32 * 8 + 32 * 4)]
    assert counted(lambda: x.sum(0)) == [("elementwise", 64 * 32 * 4 + 32 * 4)]
    assert counted(lambda: x.add_(row)) == [("elementwise", 64 * 32 * 8 + 32 * 4)]
    assert counted(lambda: x.copy_(low)) == [("elementwise", 64 * 32 * (2 + 4))]
    assert counted(lambda: low.mm(low.t())) == [("gemm", 64 * 32 * 2 * 2 + 64 * 64 * 2)]
    ids = tensor(4, dtype=torch.int64)
    assert counted(lambda: x[ids]) == [("elementwise", 4 * 8 + 2 * 4 * 32 * 4)]
    assert counted(lambda: torch._foreach_add_([x, row], 1)) == [("elementwise", 2 * (64 * 32 + 32) * 4)]


def test_bytes_of_our_kernels():
    """Kernels read one patch per row and not whole images. A compiled kernel counts as one launch."""
    (n, k, r), rows = (8, 4, 12), 3 * 16 * 16
    images, ids = tensor(n, 3, 64, 64), tensor(n, k, dtype=torch.int64)
    gathered = counted(lambda: ops.gather_patches(images, ids, 16, 16, None, None, None, torch.bfloat16))
    assert gathered == [("elementwise", n * k * (rows * (4 + 2) + 8))]
    pred, mask, removed = tensor(n, r, rows, dtype=torch.bfloat16), tensor(n, r), tensor(n, r, dtype=torch.int64)
    (loss, mean) = counted(lambda: ops.masked_loss(images, pred, mask, removed, 16, 16, True, None, None, None))
    assert (
        loss[1] - n * r * (rows * (4 + 2) + 4 + 8 + 3 * 4) == mean[1] - 4
    )  # the sums of the programs are written and read
    masks = counted(lambda: ops.random_masking(tensor(n, 16), k))
    assert masks == [("elementwise", n * 16 * (4 + 8 + 8 + 4))]


def test_views_launch_nothing():
    x = tensor(64, 32)
    assert counted(lambda: (x.t(), x.view(-1), x[2:], x.expand(2, 64, 32), x.detach(), x.float(), tensor(3))) == []
    assert counted(lambda: x.reshape(32, 64).contiguous()) == []
    assert counted(lambda: x.t().contiguous()) == [("elementwise", 64 * 32 * 8)]


def test_gradients():
    x = tensor(64, 32).requires_grad_()
    loss = (x * 2).sum()
    assert counted(loss.backward) == [("elementwise", 4), ("elementwise", 4 + 64 * 32 * 4)]  # ones, mul


@pytest.mark.parametrize("wait", ["item", "nonzero", "cpu", "bool"])
def test_ops_that_wait_for_the_gpu_are_recorded(wait):
    x = tensor(1) if wait in ("item", "bool") else tensor(8)
    # FakeTensors have no values, so the op raises an error.
    with recorded() as recorder, suppress(DataDependentOutputException, DynamicOutputShapeException):
        bool(x) if wait == "bool" else getattr(x, wait)()
    assert len(recorder.synchronising) == 1


@pytest.mark.parametrize("copy", ["to", "copy_", "tensor"])
def test_copies_from_the_host(copy):
    x, y = torch.empty(8), tensor(8)
    calls = {
        "to": lambda: x.to("cuda"),
        "copy_": lambda: y.copy_(x),
        "tensor": lambda: torch.tensor([1], device="cuda"),
    }
    with recorded() as recorder:
        y + 2  # a number is an argument of the kernel
        assert recorder.from_host == []
        calls[copy]()
    assert len(recorder.from_host) == 1


def test_the_update_of_all_parameters():
    """The norm reads the gradients. The update reads all tensors but the copies, and writes all but the gradients."""
    p, grad, copy, step = tensor(64, 32), tensor(64, 32), tensor(64, 32, dtype=torch.bfloat16), tensor()
    squares, _ = counted(lambda: ops.gradient_norm([grad, grad], 1.0))
    assert 2 * 64 * 32 * 4 <= squares[1] <= 2 * 64 * 32 * 4 + 4300  # the table, and a sum per program
    _, update = counted(lambda: ops.adamw_steps([p], [grad], [p], [p], [copy], [step], *[[0.5]] * 5, None, None))
    assert 64 * 32 * 30 <= update[1] <= 64 * 32 * 30 + 200


@pytest.mark.parametrize("capturing", [False, True])
def test_captured_updates_use_torchs_adamw(monkeypatch, capturing):
    """In a user's capture, our kernel is not used: a graph would read the table of addresses from the host again."""
    p = torch.nn.Parameter(tensor(64, 32))
    p.grad = tensor(64, 32)
    optimizer = AdamW([p], working_dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with recorded() as recorder, accept_fake_tensors():
        optimizer.step()
    names = {launch.name for launch in recorder.launches if launch.bytes > 1000} - {"zeros_like"}
    assert names == ({"_fused_adamw_", "_foreach_copy_"} if capturing else {"_adamw_steps_kernel"})
    assert working_copy(p, torch.bfloat16).dtype == torch.bfloat16


def test_an_op_without_a_cuda_kernel_is_recorded():
    torch.library.define("mae_fast::_nobody", "(Tensor x) -> Tensor")
    torch.library.impl("mae_fast::_nobody", "default", lambda x: x.exp().log())
    with recorded() as recorder:
        torch.ops.mae_fast._nobody(tensor(8))
    assert recorder.answers == {"mae_fast::_nobody": "no CUDA kernel"}
    assert [launch.name for launch in recorder.launches] == ["exp", "log"]  # its eager ops are counted
