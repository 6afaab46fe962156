"""A training step: eager, compiled, or with its forward and backward captured as CUDA graphs.

A step is ``accum_iter`` micro-batches, forward and backward each, then the optimizer's update. The update has few
launches, so it is never captured: the host can then change learning rates, and send addresses.
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
# Eager steps before a capture: DDP settles its buckets, kernels are compiled, and the weights have their bf16 copies.
GRAPH_WARMUP_STEPS = 11


class TrainStep:
    """``backward`` for each micro-batch, then ``update``.

    Args:
        model: the trained model.
        parallel_model: the model's loss, shared by the processes.
        update: takes the optimizer's step; returns whether the gradients were not finite, scalar.
        optimizer: the one that ``update`` steps.
        accum_iter: micro-batches in a step.
        bf16: whether to autocast.
        execution: "compile": the loss through torch.compile. "cuda-graph": after ``GRAPH_WARMUP_STEPS`` eager steps,
            CUDA graphs of forward and backward are captured and replayed from then on. Inputs are copied into buffers
            as they are: uint8 images stay uint8. Gradients stay allocated between steps.
        fallback: where either cannot be done, take eager steps and log why; else raise ``RuntimeError``.
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
        # By whether the micro-batch is the first and the last. All share one memory pool.
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
        self.graphs.clear()  # they hold memory

    def backward(self, images: Tensor, other: Tensor, micro: int = 0) -> Tensor:
        """Add micro-batch ``micro``'s share to the gradients; its detached loss. ``other``: noise, or targets."""
        first, last = micro == 0, micro == self.accum_iter - 1
        if self.execution == "cuda-graph" and self.steps >= GRAPH_WARMUP_STEPS:
            return self._replay(images, other, first, last)
        try:
            with self.side_stream():
                return self._backward(images, other, first, last)
        except Exception as error:  # a compiler's own, of many kinds, at its first call
            if self.execution != "compile" or self.steps or not first:
                raise
            self._go_eager(_first_line(error))
            return self._backward(images, other, first, last)

    def update(self) -> Tensor:
        """Take the optimizer's step; whether the gradients were not finite, scalar."""
        self.steps += 1
        bad = self.take_update()
        if not self.graphs:  # which write to these gradients
            self.optimizer.zero_grad()
        return bad

    def recapture(self) -> None:
        """Discard captured graphs after loading weights, whose bf16 copies are old until the next update.

        New ones are captured after eager steps.
        """
        self.graphs.clear()
        self.steps = 0

    def change_shapes(self) -> None:
        """Prepare for inputs of other shapes: discard captured graphs, and compiled code for the shapes so far.

        Without that, torch.compile would compile the second shape for any size, and give up after some more.
        """
        self.recapture()
        if self.execution == "compile":
            torch.compiler.reset()

    def _backward(self, images: Tensor, other: Tensor, first: bool, last: bool) -> Tensor:
        if first:
            self.optimizer.zero_grad()
        # A graph would replay autocast's cached casts, which are of the weights at the capture.
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
    """Why a step cannot be captured as a CUDA graph; None if it can."""
    if device.type != "cuda":
        return "there are CUDA graphs on a GPU only"
    return "FSDP gathers its shards outside of a graph" if parallel_model.sharded else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


class SideStream:
    """A context in which work goes to a stream of its own, as captures need it for their autograd nodes."""

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
    """``call(*inputs)`` as a CUDA graph: to call it copies the inputs into buffers and replays.

    Args:
        earlier: an earlier graph, whose memory this one uses too. Both are then replayed one after the other, on one
            stream. A replay overwrites what no tensor referred to at its capture. Gradients were referred to; of the
            loss a clone is returned.
    """

    def __init__(
        self, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], earlier: "CapturedGraph | None" = None
    ) -> None:
        self.inputs = [torch.empty_like(x) for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        pool = earlier.graph.pool() if earlier else None
        # "global" would break the capture, or the loader, when the loader's thread allocates pinned memory meanwhile.
        capture = torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local")
        # A capture that fails leaves its own stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            self.output = call(*self.inputs)

    def mismatch(self, *inputs: Tensor) -> str | None:
        """Why the graph cannot take these inputs; None if it can."""
        for buffer, x in zip(self.inputs, inputs, strict=True):
            if (x.shape, x.dtype) != (buffer.shape, buffer.dtype):
                known, found = (f"{y.dtype} {list(y.shape)}".removeprefix("torch.") for y in (buffer, x))
                return f"an input was {known} at the capture, and is {found} now"
        return None

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, x in zip(self.inputs, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.output.clone()
