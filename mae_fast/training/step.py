"""A training step: eager, compiled, or with forward and backward captured as CUDA graphs.

A step runs forward and backward for each of ``accum_iter`` micro-batches, then the optimizer's update. The update has
few kernel launches and is never captured, so that the host can change learning rates and send addresses.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn

from ..errors import first_line
from .distributed import ParallelModel

logger = logging.getLogger(__name__)

Execution = Literal["eager", "compile", "cuda-graph"]
# Eager steps before a capture. They let DDP build its buckets, compile the kernels, and create bf16 copies of weights.
GRAPH_WARMUP_STEPS = 11


class TrainStep:
    """Call ``backward`` for each micro-batch, then ``update``.

    Args:
        model: the trained model.
        parallel_model: the model, prepared by ``parallelize``.
        update: takes the optimizer's step and returns whether the gradients were non-finite, as a scalar tensor.
        optimizer: the optimizer that ``update`` steps.
        accum_iter: micro-batches per step.
        bf16: whether to autocast to bf16.
        execution: "compile": run the loss through torch.compile. "cuda-graph": after ``GRAPH_WARMUP_STEPS`` eager
            steps, capture CUDA graphs of forward and backward, and replay them from then on. Inputs are copied to
            buffers of the same dtype, such as uint8. Gradients stay allocated between steps.
        fallback: if ``execution`` is not possible, run eager steps and log the reason; else raise ``RuntimeError``.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel_model: ParallelModel,
        update: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        accum_iter: int = 1,
        bf16: bool = False,
        execution: Execution = "eager",
        fallback: bool = True,
    ) -> None:
        self.parallel_model, self.take_update, self.optimizer = parallel_model, update, optimizer
        self.accum_iter, self.bf16, self.execution, self.fallback = accum_iter, bf16, execution, fallback
        self.loss = parallel_model.loss
        self.steps = 0
        self.side_stream: Callable[..., Any] = nullcontext
        # (is the first micro-batch, is the last micro-batch) -> graph. All share one memory pool.
        self.graphs: dict[tuple[bool, bool], CapturedGraph] = {}
        device = next(model.parameters()).device
        if execution == "cuda-graph" and (why := refusal(device, parallel_model)):
            self._go_eager(why)
        elif execution == "cuda-graph":
            self.side_stream = SideStream(device)
        elif execution == "compile":
            self.loss = parallel_model.compiled()

    def _go_eager(self, why: str) -> None:
        if not self.fallback:
            raise RuntimeError(why)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            logger.warning(f"steps are eager, not --execution {self.execution}: {why}")
        self.execution, self.loss = "eager", self.parallel_model.loss
        self.graphs.clear()  # frees their memory

    def backward(self, images: Tensor, other: Tensor, micro: int = 0) -> Tensor:
        """Accumulate the gradients of micro-batch ``micro``. Returns its detached loss. ``other``: noise or targets."""
        first, last = micro == 0, micro == self.accum_iter - 1
        if self.execution == "cuda-graph" and self.steps >= GRAPH_WARMUP_STEPS:
            return self._replay(images, other, first, last)
        try:
            with self.side_stream():
                return self._backward(images, other, first, last)
        except Exception as error:  # compilers raise errors of many types at the first call
            if self.execution != "compile" or self.steps or not first:
                raise
            self._go_eager(_first_line(error))
            return self._backward(images, other, first, last)

    def update(self) -> Tensor:
        """Take the optimizer's step. Returns whether the gradients were non-finite, as a scalar tensor."""
        self.steps += 1
        bad = self.take_update()
        if not self.graphs:  # graphs write to the same gradients in the next step
            self.optimizer.zero_grad()
        return bad

    def recapture(self) -> None:
        """Discard captured graphs after loading weights, as the bf16 copies are outdated until the next update.

        New graphs are captured after ``GRAPH_WARMUP_STEPS`` eager steps.
        """
        self.graphs.clear()
        self.steps = 0

    def change_shapes(self) -> None:
        """Discard captured graphs and compiled code before inputs of another shape.

        Otherwise torch.compile would compile the second shape with dynamic sizes, and fall back after some more shapes.
        """
        self.recapture()
        if self.execution == "compile":
            torch.compiler.reset()

    def _backward(self, images: Tensor, other: Tensor, first: bool, last: bool) -> Tensor:
        if first:
            self.optimizer.zero_grad()
        # Autocast's cache would make graphs replay casts of the weights from the capture.
        cached = self.execution != "cuda-graph"
        with nullcontext() if last else self.parallel_model.without_sync():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=cached):
                loss = self.loss(images, other)
            (loss / self.accum_iter).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _replay(self, images: Tensor, other: Tensor, first: bool, last: bool) -> Tensor:
        graph, why = self.graphs.get((first, last)), None
        if graph:
            why = graph.mismatch(images, other)
        else:
            earlier = next(iter(self.graphs.values()), None)
            try:
                graph = CapturedGraph(lambda x, z: self._backward(x, z, first, last), (images, other), earlier)
                self.graphs[first, last] = graph
            except Exception as error:
                why = _first_line(error)
        if graph and not why:
            return graph(images, other)
        self._go_eager(why or "")
        return self._backward(images, other, first, last)


def refusal(device: torch.device, parallel_model: ParallelModel) -> str | None:
    """The reason why a step cannot be captured as a CUDA graph; None if it can."""
    if device.type != "cuda":
        return "CUDA graphs need a GPU"
    return "FSDP gathers shards outside of CUDA graphs" if parallel_model.sharded else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


class SideStream:
    """A context that runs work on a side stream. Captures need autograd nodes that were created on such a stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self) -> "SideStream":
        return self

    def __enter__(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        self.inside = torch.cuda.stream(self.stream)
        self.inside.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self.stream)


class CapturedGraph:
    """``call(*inputs)`` captured as a CUDA graph. A call copies the inputs to buffers and replays the graph.

    Args:
        earlier: an earlier graph whose memory pool this one shares. Replay both one after the other on one stream. A
            replay overwrites all memory of the pool that was free at its capture. Gradients were not free, but the loss
            was, so a call returns a clone of the loss.
    """

    def __init__(
        self, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], earlier: "CapturedGraph | None" = None
    ) -> None:
        self.inputs = [torch.empty_like(x) for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        pool = earlier.graph.pool() if earlier else None
        # With "global", pinned memory that the loader's thread allocates would break the capture or the loader.
        capture = torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local")
        # A failed capture does not restore the current stream.
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            self.output = call(*self.inputs)

    def mismatch(self, *inputs: Tensor) -> str | None:
        """The reason why the graph does not fit these inputs; None if it does."""
        for buffer, x in zip(self.inputs, inputs, strict=True):
            if (x.shape, x.dtype) != (buffer.shape, buffer.dtype):
                known, found = (f"{y.dtype} {list(y.shape)}".removeprefix("torch.") for y in (buffer, x))
                return f"an input was {known} at the capture and is {found} now"
        return None

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, x in zip(self.inputs, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.output.clone()
