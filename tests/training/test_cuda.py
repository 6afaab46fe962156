"""Training steps on a GPU: captured steps equal eager steps, nothing waits for the GPU, bf16 copies are current."""

import threading
from contextlib import contextmanager

import pytest
import torch
from support import tie_free, tiny

from mae_fast.ops.bf16_weight_cache import working_copy
from mae_fast.training.distributed import DistContext, parallelize
from mae_fast.training.nonfinite import NonFiniteGuard
from mae_fast.training.optim import AdamW
from mae_fast.training.step import GRAPH_WARMUP_STEPS, TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
STEPS = GRAPH_WARMUP_STEPS + 5


def alone(model):
    def loss(model, images, noise):
        return model.loss(images, 0.75, noise)

    return parallelize(model, loss, "ddp", DistContext(torch.device("cuda")))


@contextmanager
def loader_that_pins():
    """Run a thread that constantly allocates new pinned and device memory, like the thread of a starting loader."""
    ended, failures, rounds = threading.Event(), [], 0

    def pin():
        nonlocal rounds
        stream = torch.cuda.Stream()
        try:
            while not ended.is_set():
                torch._C._host_emptyCache()  # so that the driver makes each allocation
                x = torch.zeros(2**20 + 4096 * (rounds % 64), dtype=torch.uint8).pin_memory()
                with torch.cuda.stream(stream):
                    x.cuda(non_blocking=True)
                rounds += 1
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not failures
    assert rounds


def train(execution, folder, accum_iter=1, bad=()):
    """Losses and weights of steps in bf16. Steps in ``bad`` get a non-finite pixel."""
    model = tiny(norm_pix_loss=True).cuda()
    optimizer = AdamW(model.parameters(), lr=1e-2, working_dtype=torch.bfloat16)
    losses = []
    guard = NonFiniteGuard(
        model, optimizer, folder / execution, 0, DistContext(torch.device("cuda")), lambda: None, clip=1.0
    )
    train_step = TrainStep(
        model,
        alone(model),
        guard.update,
        optimizer,
        accum_iter=accum_iter,
        bf16=True,
        execution=execution,
        fallback=False,
    )
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        for micro in range(accum_iter):
            images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(10 * step + micro))
            if step in bad:
                images[0, 0, 0, 0] = float("nan")
            noise = tie_free(4, 36, seed=step).pin_memory().cuda(non_blocking=True)
            losses.append(train_step.backward(images.pin_memory().cuda(non_blocking=True), noise, micro))
        guard.resolve()
        guard.record(train_step.update(), step, [])
    guard.resolve()
    assert guard.bad_steps == set(bad)
    for p in model.parameters():
        if p.ndim > 1 and p.requires_grad:
            assert working_copy(p, torch.bfloat16).equal(p.detach().bfloat16())
    return torch.stack(losses), {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("accum_iter", [1, 3])
def test_captured_steps_equal_eager_steps(tmp_path, accum_iter):
    (tmp_path / "eager").mkdir()
    (tmp_path / "cuda-graph").mkdir()
    bad = (2, GRAPH_WARMUP_STEPS + 2)
    ours, theirs = (train(execution, tmp_path, accum_iter, bad) for execution in ("cuda-graph", "eager"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-2, atol=1e-3, equal_nan=True)
    for name, p in theirs[1].items():
        assert p.isfinite().all()
        torch.testing.assert_close(ours[1][name], p, rtol=1e-2, atol=1e-3, msg=name)


def test_steps_are_captured_while_a_loader_pins_memory(tmp_path):
    """With ``fallback=False``, a broken capture raises an error. The loader's thread would raise one, too."""
    (tmp_path / "cuda-graph").mkdir()
    with loader_that_pins():
        losses, _ = train("cuda-graph", tmp_path, accum_iter=3)
    assert losses.isfinite().all()


def test_graphs_of_micro_batches_share_their_memory(tmp_path):
    """Three graphs reserve as much memory as the first one alone, except for their losses."""
    model = tiny(norm_pix_loss=True, embed_dim=256, decoder_embed_dim=256).cuda()
    optimizer = AdamW(model.parameters(), working_dtype=torch.bfloat16)
    guard = NonFiniteGuard(model, optimizer, tmp_path, 0, DistContext(torch.device("cuda")), lambda: None)
    train_step = TrainStep(
        model, alone(model), guard.update, optimizer, accum_iter=3, bf16=True, execution="cuda-graph", fallback=False
    )
    images, noise = torch.zeros(64, 24, 24, 3, dtype=torch.uint8, device="cuda"), torch.rand(64, 36, device="cuda")
    reserved = []
    for step in range(GRAPH_WARMUP_STEPS + 1):
        for micro in range(3):
            train_step.backward(images, noise, micro)
            if step == GRAPH_WARMUP_STEPS:
                reserved.append(torch.cuda.memory_reserved())
        train_step.update()
    assert reserved[-1] - reserved[0] <= 4 << 20, reserved


def test_a_step_does_not_synchronise(tmp_path):
    """Forward, backward and update run under the sync detector, after the kernels are compiled."""
    model = tiny(norm_pix_loss=True).cuda()
    optimizer = AdamW(model.parameters(), working_dtype=torch.bfloat16)
    guard = NonFiniteGuard(model, optimizer, tmp_path, 0, DistContext(torch.device("cuda")), lambda: None, clip=1.0)
    train_step = TrainStep(model, alone(model), guard.update, optimizer, bf16=True)
    images, noise = torch.randn(4, 3, 24, 24, device="cuda"), torch.rand(4, 36, device="cuda")
    for _ in range(3):
        train_step.backward(images, noise)
        guard.record(train_step.update(), 1, [])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step.backward(images, noise)
        guard.record(train_step.update(), 2, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    guard.resolve()
    assert not guard.bad_steps
