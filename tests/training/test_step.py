"""Eager, compiled and captured training steps: equal results, and one message if an execution is not available.

Mock graphs call the captured function again. They show without a GPU which calls are captured and replayed, on which
buffers, and with which arguments of torch.cuda.graph. test_cuda.py captures real graphs.
"""

import copy
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import tie_free, tiny
from torch import nn

from mae_fast.models import MaskedAutoencoderViT
from mae_fast.training import step as module
from mae_fast.training.distributed import DistContext, ParallelModel, parallelize
from mae_fast.training.step import CapturedGraph, TrainStep
from mae_fast.training.tasks.pretrain import Pretraining

STEPS = 6


class Rerun(CapturedGraph):
    """A mock that calls the captured function again, on its buffers."""

    made: list["Rerun"]

    def __init__(self, call, inputs, earlier=None):
        self.call, self.inputs, self.earlier = call, [torch.full_like(x, 7) for x in inputs], earlier
        Rerun.made.append(self)

    def __call__(self, *inputs):
        for buffer, x in zip(self.inputs, inputs, strict=True):
            buffer.copy_(x)
        return self.call(*self.inputs).clone()


@pytest.fixture
def rerun(monkeypatch):
    Rerun.made = []
    monkeypatch.setattr(module, "GRAPH_WARMUP_STEPS", 2)
    monkeypatch.setattr(module, "refusal", lambda device, parallel_model: None)
    monkeypatch.setattr(module, "SideStream", lambda device: nullcontext)
    monkeypatch.setattr(module, "CapturedGraph", Rerun)
    return Rerun.made


def masked(model, images, noise):
    return model.loss(images, 0.75, noise)


def train(execution, accum_iter=1, parallel_model=None, model=None, recapture=None):
    """Losses and weights of a few steps with a changing learning rate."""
    model = model or tiny(norm_pix_loss=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    losses = []

    def update():
        bad = torch.tensor(False)
        optimizer.step()
        return bad

    synced = []
    loss = partial(masked, model)
    parallel_model = parallel_model or ParallelModel(
        loss, lambda: torch.compile(loss), lambda: nullcontext(synced.append(1))
    )
    train_step = TrainStep(model, parallel_model, update, optimizer, accum_iter=accum_iter, execution=execution)
    for step in range(STEPS):
        if step == recapture:  # as after a rollback
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            train_step.recapture()
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        for micro in range(accum_iter):
            generator = torch.Generator().manual_seed(100 * step + micro)
            images = torch.randn(2, 3, 24, 24, generator=generator)
            losses.append(train_step.backward(images, tie_free(2, 36, seed=step), micro))
        assert not train_step.update()
        assert isinstance(optimizer.param_groups[0]["lr"], float)
    return losses, dict(model.named_parameters())


def messages(caplog):
    """The messages of the package, without those of torch."""
    return [record.message for record in caplog.records if record.name.startswith("mae_fast")]


def same(ours, theirs):
    assert all(a.equal(b) for a, b in zip(ours[0], theirs[0], strict=True))
    assert all(p.equal(theirs[1][name]) for name, p in ours[1].items())


@pytest.mark.parametrize("accum_iter", [1, 3])
def test_replayed_steps_equal_eager_steps(rerun, accum_iter, caplog):
    theirs = train("eager", accum_iter)
    ours = train("cuda-graph", accum_iter)
    same(ours, theirs)
    assert messages(caplog) == []
    # One graph each for the first, middle and last micro-batch. They share the memory of the first.
    assert len(rerun) == accum_iter
    assert [graph.earlier for graph in rerun] == [None] + rerun[:1] * (accum_iter - 1)


def test_graphs_are_captured_again_after_weights_are_loaded(rerun):
    same(train("cuda-graph", recapture=3), train("eager"))
    assert [graph.earlier for graph in rerun] == [None, None]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failed_capture_falls_back_to_eager_steps(rerun, monkeypatch, broken, caplog):
    """The capture of the first or the last micro-batch fails. In the latter case, a graph owns the gradients."""

    def fail(call, inputs, earlier):
        if len(rerun) == broken:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return Rerun(call, inputs, earlier)

    monkeypatch.setattr(module, "CapturedGraph", fail)
    ours = train("cuda-graph", 2)
    same(ours, train("eager", 2))
    assert messages(caplog) == [
        "steps are eager, not --execution cuda-graph: RuntimeError: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("micro", [0, 1])
def test_inputs_of_another_shape_fall_back_to_eager_steps(rerun, micro, caplog):
    """Copying to the buffer would broadcast a single image to the whole batch, or cast another dtype."""
    model = tiny(norm_pix_loss=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = partial(masked, model)
    parallel_model = ParallelModel(loss, lambda: loss)
    train_step = TrainStep(
        model, parallel_model, lambda: torch.tensor(False), optimizer, accum_iter=2, execution="cuda-graph"
    )
    images, noise = torch.randn(2, 3, 24, 24), tie_free(2, 36)
    for _ in range(3):
        for i in range(2):
            train_step.backward(images, noise, i)
        train_step.update()
    for i in range(2):
        n = 1 if i == micro else 2
        train_step.backward(images[:n], noise[:n], i)
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for n in ((1, 2), (2, 1))[micro]:
        (loss(images[:n], noise[:n]) / 2).backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters() if p.requires_grad])
    assert messages(caplog) == [
        "steps are eager, not --execution cuda-graph: an input was float32 [2, 3, 24, 24] at the capture and is "
        "float32 [1, 3, 24, 24] now"
    ]
    assert not train_step.graphs


def test_uint8_images_stay_uint8_in_the_graphs_buffer(rerun):
    model = tiny(norm_pix_loss=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = partial(masked, model)
    parallel_model = ParallelModel(loss, lambda: loss)
    train_step = TrainStep(model, parallel_model, lambda: torch.tensor(False), optimizer, execution="cuda-graph")
    for _ in range(4):
        train_step.backward(torch.zeros(2, 24, 24, 3, dtype=torch.uint8), tie_free(2, 36))
        train_step.update()
    assert [buffer.dtype for buffer in rerun[0].inputs] == [torch.uint8, torch.float32]
    # The graph writes to these tensors again.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class FakeGraphs:
    """Mocks of torch.cuda's graphs and streams that record their arguments. A capture may fail at its end."""

    def __init__(self, monkeypatch):
        self.captures, self.fails, self.current = [], False, "main"
        fakes = {"CUDAGraph": self.CUDAGraph, "graph": self.graph, "stream": self.stream}
        for name, fake in (fakes | {"current_stream": lambda: self.current}).items():
            monkeypatch.setattr(torch.cuda, name, fake)

    class CUDAGraph:
        def pool(self):
            return f"pool of {id(self)}"

        def replay(self):
            pass

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool=None, capture_error_mode="global"):
        self.captures.append((graph, pool, capture_error_mode, self.current))
        self.current = "capture"  # torch.cuda.graph does not reset it if the capture fails
        yield
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = self.captures[-1][3]


def test_captures_let_other_threads_allocate_and_share_one_pool(monkeypatch):
    fake = FakeGraphs(monkeypatch)
    first = CapturedGraph(lambda x: x + 1, (torch.zeros(3, dtype=torch.uint8),))
    second = CapturedGraph(lambda x: x * 2, (torch.zeros(3),), first)
    assert [(pool, mode) for _, pool, mode, _ in fake.captures] == [
        (None, "thread_local"),
        (first.graph.pool(), "thread_local"),
    ]
    assert fake.current == "main"
    assert first.inputs[0].dtype == torch.uint8
    assert first.mismatch(torch.zeros(3, dtype=torch.uint8)) is None
    assert first.mismatch(torch.zeros(3)) == "an input was uint8 [3] at the capture and is float32 [3] now"
    result = second(torch.ones(3))
    assert torch.equal(second.inputs[0], torch.ones(3))
    assert result.data_ptr() != second.output.data_ptr()  # the next replay overwrites the output


def test_a_failed_capture_restores_the_stream(monkeypatch):
    fake = FakeGraphs(monkeypatch)
    fake.fails = True
    with pytest.raises(RuntimeError, match="during capture"):
        CapturedGraph(lambda x: x, (torch.zeros(3),))
    assert fake.current == "main"


def test_without_a_gpu_graphs_fall_back_to_eager_steps(caplog):
    ours = train("cuda-graph")
    same(ours, train("eager"))
    assert messages(caplog) == ["steps are eager, not --execution cuda-graph: CUDA graphs need a GPU"]
    assert "FSDP" in module.refusal(torch.device("cuda"), ParallelModel(masked, lambda: masked, sharded=True))
    assert module.refusal(torch.device("cuda"), ParallelModel(masked, lambda: masked)) is None


def test_a_failing_compiler_falls_back_to_eager_steps(caplog):
    def compiled():
        def fail(*_):
            raise NotImplementedError("no compiler\nhere")

        return fail

    model = tiny(norm_pix_loss=True)
    ours = train("compile", 2, ParallelModel(partial(masked, model), compiled), model)
    same(ours, train("eager", 2))
    assert messages(caplog) == ["steps are eager, not --execution compile: NotImplementedError: no compiler"]


def test_other_errors_are_raised():
    """Errors of an eager step, and of a compiled step after the first."""
    model, calls = tiny(norm_pix_loss=True), []

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return masked(model, *arguments)

    for execution in ("eager", "compile"):
        calls.clear()
        with pytest.raises(ZeroDivisionError):
            train(execution, 1, ParallelModel(loss, lambda: loss), model)
        assert len(calls) == 3


def test_compiled_steps_equal_eager_steps_up_to_rounding(caplog):
    theirs, ours = train("eager"), train("compile")
    assert messages(caplog) == []
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for name, p in ours[1].items():
        torch.testing.assert_close(p, theirs[1][name], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    same(train("compile"), ours)  # compiled steps are deterministic


def test_gradients_are_free_between_steps():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = partial(masked, model)
    train_step = TrainStep(model, ParallelModel(loss, lambda: loss), lambda: torch.tensor(True), optimizer)
    train_step.backward(torch.randn(2, 3, 24, 24), tie_free(2, 36))
    assert any(isinstance(p.grad, torch.Tensor) for p in nn.ModuleList([model]).parameters())
    assert train_step.update()
    assert all(p.grad is None for p in model.parameters())


def test_without_a_fallback_other_execution_is_an_error():
    model = tiny()
    loss = partial(masked, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="CUDA graphs need a GPU"):
        TrainStep(
            model,
            ParallelModel(loss, lambda: loss),
            lambda: torch.tensor(True),
            optimizer,
            execution="cuda-graph",
            fallback=False,
        )


def test_the_step_uses_an_overridden_loss():
    """The override has the published arguments. It gets batches of raw pixels from the loader."""

    class Brightness(MaskedAutoencoderViT):
        def forward_loss(self, imgs, pred, mask):
            assert imgs.shape == (2, 3, 24, 24)
            assert imgs.is_floating_point()
            return (pred.mean() - 5).square()

    model = tiny()
    model.__class__ = Brightness
    task = SimpleNamespace(mask_ratio=0.75, loss_options={})
    parallel_model = parallelize(model, partial(Pretraining.loss, task), "ddp", DistContext(torch.device("cpu")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, parallel_model, lambda: (optimizer.step(), torch.tensor(False))[1], optimizer)
    images, losses = torch.randint(256, (2, 24, 24, 3), dtype=torch.uint8), []
    for _ in range(5):
        losses.append(step.backward(images, tie_free(2, 36)))
        step.update()
    assert losses[0] > 10
    assert losses[-1] < losses[0] / 2


def test_changed_shapes_are_captured_again(rerun, caplog):
    """They are captured after warm-up steps, and the earlier graphs are discarded."""
    model = tiny(norm_pix_loss=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = partial(masked_of_any_size, model)
    train_step = TrainStep(
        model, ParallelModel(loss, lambda: loss), lambda: torch.tensor(False), optimizer, execution="cuda-graph"
    )
    for n, side in ((4, 16), (2, 24)):
        images, noise = torch.randn(n, 3, side, side), tie_free(n, side * side // 16)
        for _ in range(4):
            found = train_step.backward(images, noise)
            train_step.update()
        assert found == loss(images, noise)
        train_step.change_shapes()
        assert not train_step.graphs
    assert messages(caplog) == []
    assert [list(graph.inputs[0].shape) for graph in rerun] == [[4, 3, 16, 16], [2, 3, 24, 24]]
    assert [graph.earlier for graph in rerun] == [None, None]


def masked_of_any_size(model, images, noise):
    return model.loss(images, 0.75, noise, any_size=True)


def test_changed_shapes_are_compiled_with_static_sizes(caplog):
    """No size is dynamic, as it would be by default from the second shape on."""
    torch._dynamo.reset()  # discard the code of other tests
    model, compiled = tiny(norm_pix_loss=True), []

    def record(graph, example_inputs):
        compiled.append([x.shape for x in example_inputs if isinstance(x, torch.Tensor) and x.ndim == 4])
        assert not any(isinstance(x, torch.SymInt) for x in example_inputs)
        return graph.forward

    loss = partial(masked_of_any_size, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parallel_model = ParallelModel(loss, lambda: torch.compile(loss, backend=record))
    train_step = TrainStep(model, parallel_model, lambda: torch.tensor(False), optimizer, execution="compile")
    for side in (16, 20, 24):
        for _ in range(2):
            images, noise = torch.randn(2, 3, side, side), tie_free(2, side * side // 16)
            found = train_step.backward(images, noise)
            train_step.update()
        torch.testing.assert_close(found, loss(images, noise).detach())
        train_step.change_shapes()
    assert messages(caplog) == []
    shapes = [shape for shapes in compiled for shape in shapes if shape[:2] == (2, 3)]
    assert shapes == [(2, 3, 16, 16), (2, 3, 20, 20), (2, 3, 24, 24)]
