"""A training step in three forms: eager, compiled, or captured as CUDA graphs.

A step is ``accum_iter`` micro-batches, forward and backward each, then the optimiser's update.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .distributed import Spread

Form = Literal["eager", "compile", "cuda-graph"]
WARM_UP = 11  # eager steps before a capture: in them DDP settles its buckets, kernels are compiled, state is made


class TrainStep:
    """``backward`` for each micro-batch, then ``update``.

    Args:
        model: whose gradients these are.
        spread: its loss, as its processes share it.
        update: the optimiser's step on the gradients as they are; returns whether they were not finite, bool scalar.
        optimizer: whose learning rate ``update`` reads.
        accum_iter: micro-batches in a step.
        bf16: whether to autocast.
        form: "compile": the loss through torch.compile. "cuda-graph": after ``WARM_UP`` eager steps, forward and
            backward, and the update, are captured as CUDA graphs, and replayed from then on: inputs of a fixed shape
            are copied into buffers, the learning rate is a tensor. Where either cannot be done, steps are eager.
        tell: called with a line that says why.
    """

    def __init__(
        self,
        model: nn.Module,
        spread: Spread,
        update: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        accum_iter: int = 1,
        bf16: bool = False,
        form: Form = "eager",
        tell: Callable[[str], None] = print,
    ) -> None:
        self.spread, self.eager_update, self.optimizer = spread, update, optimizer
        self.accum_iter, self.bf16, self.form, self.tell = accum_iter, bf16, form, tell
        self.loss = spread.loss
        device = next(model.parameters()).device
        if form == "cuda-graph" and (why := refusal(device, spread)):
            self._go_eager(why)
        elif form == "compile":
            self.loss = spread.compiled()
        self.steps = 0
        self.beside: Callable[..., Any] = nullcontext
        self.rates: list[Tensor] = []
        self.captured: dict[object, Captured] = {}
        if self.form == "cuda-graph":
            self.beside = Beside(device)
            self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["capturable"] = True

    def _go_eager(self, why: str) -> None:
        self.tell(f"steps are eager, not --execution {self.form}: {why}")
        self.form, self.loss = "eager", self.spread.loss

    def backward(self, images: Tensor, other: Tensor, micro: int = 0) -> Tensor:
        """Add micro-batch ``micro``'s share to the gradients; its detached loss. ``other``: noise, or targets."""
        first, last = micro == 0, micro == self.accum_iter - 1
        if self.form == "cuda-graph" and self.steps >= WARM_UP:
            return self._replay((first, last), lambda x, z: self._backward(x, z, first, last), images, other)
        try:
            with self.beside():
                return self._backward(images, other, first, last)
        except Exception as error:  # a compiler's own, of many kinds, at its first call
            if self.form != "compile" or self.steps or not first:
                raise
            self._go_eager(_first_line(error))
            return self._backward(images, other, first, last)

    def update(self) -> Tensor:
        """Take the optimiser's step; whether the gradients were not finite, bool scalar."""
        self.steps += 1
        if self.form == "cuda-graph" and self.steps > WARM_UP:
            for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
            return self._replay("update", self._update_at_rates)
        with self.beside():
            bad = self.eager_update()
            self.optimizer.zero_grad()
        return bad

    def recapture(self) -> None:
        """Graphs no more know the optimiser's state, which was replaced: capture anew, after eager steps again."""
        self.captured.clear()
        self.steps = 0

    def _backward(self, images: Tensor, other: Tensor, first: bool, last: bool) -> Tensor:
        if first:
            self.optimizer.zero_grad()
        # What autocast keeps of a cast would, in a graph, be of the weights at the capture.
        cached = self.form != "cuda-graph"
        with nullcontext() if last else self.spread.without_sync():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=cached):
                loss = self.loss(images, other)
            (loss / self.accum_iter).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _update_at_rates(self) -> Tensor:
        """The update, reading the learning rates from their tensors."""
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            return self.eager_update()
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate

    def _replay(self, what: object, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if what not in self.captured:
            try:
                self.captured[what] = Captured(call, *inputs)
            except Exception as error:
                self._go_eager(_first_line(error))
                return call(*inputs)
        return self.captured[what](*inputs)


def refusal(device: torch.device, spread: Spread) -> str | None:
    """Why a step cannot be captured as a CUDA graph; None if it can."""
    if device.type != "cuda":
        return "there are CUDA graphs on a GPU only"
    return "FSDP gathers its shards outside of a graph" if spread.sharded else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


class Beside:
    """``with beside():`` work goes to a stream of its own, as the autograd nodes of a capture must have been made."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self) -> "Beside":
        return self

    def __enter__(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        self.inside = torch.cuda.stream(self.stream)
        self.inside.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self.stream)


class Captured:
    """``call(*inputs)`` as a CUDA graph: to call it copies the inputs into buffers and replays."""

    def __init__(self, call: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.inputs = [torch.empty_like(x) for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.output = call(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, x in zip(self.inputs, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.output.clone()
