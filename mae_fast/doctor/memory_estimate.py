"""Estimates the memory of training: runs a step on tensors that have sizes but no values.

These are FakeTensors on the device of training, so ops, dtypes and saved tensors are those of training. The estimate
does not include memory that torch does not allocate, such as buffers of libraries, or fragmentation.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..ops.bf16_weight_cache import keep_copy
from ..ops.native import has_native
from ..training.task import Task


@dataclass(frozen=True)
class PersistentMemory:
    """Bytes that stay allocated between steps.

    Attributes:
        state: optimizer state, with its bf16 copies of weights.
        averages: averaged weights.
        saved: a checkpoint, which is copied in memory while it is written.
    """

    weights: int
    gradients: int
    state: int
    averages: int
    saved: int


@dataclass(frozen=True)
class Activations:
    """Bytes that a step needs in addition, without the gradients of weights: a fixed part and a part per image."""

    fixed: float
    per_image: float

    def of(self, batch_size: int) -> int:
        """The bytes for a micro-batch of ``batch_size`` images."""
        return round(self.fixed + self.per_image * batch_size)


def make_fake(model: nn.Module) -> FakeTensorMode:
    """Replace all weights and buffers by fake tensors. Returns the mode in which the model must run."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    return mode


def persistent_memory(task: Task, mode: FakeTensorMode, *, bf16: bool, averages: bool) -> PersistentMemory:
    """The memory that a task keeps between steps. Its model must be fake.

    Args:
        bf16: whether steps use autocast.
        averages: whether the run keeps averaged weights.
    """
    trained = [p for p in task.model.parameters() if p.requires_grad]
    with mode:
        optimizer = task.optimizer(1.0, torch.bfloat16 if bf16 else None)
        for p in trained:
            p.grad = torch.empty_like(p)
        with _Live() as live:
            optimizer.step()
            _copy(optimizer, trained)
        optimizer.zero_grad()
    state = (x for of_one in optimizer.state.values() for x in of_one.values())
    average = size(trained) if averages else 0
    saved = size(task.model.state_dict().values()) + size(state) + average
    return PersistentMemory(size(task.model.parameters()), size(trained), live.now, average, saved)


def _copy(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    """Allocate the bf16 copies of weights. Our CPU kernel does this in training, but does not accept fake tensors."""
    dtype = getattr(optimizer, "working_dtype", None)
    for p in trained:
        if dtype and p.ndim > 1 and p.device.type == "cpu" and has_native("adamw_step", "CPU"):
            keep_copy(p, torch.empty_like(p, dtype=dtype))


def activations(task: Task, mode: FakeTensorMode, batches: dict[int, Any], *, bf16: bool) -> Activations:
    """The activations of a step of a task. Its model must be fake.

    Args:
        batches: the outputs of ``task.inputs`` for two batches, by number of images.

    Raises:
        Exception: of any type, if a step reads values of tensors.
    """
    trained = [p for p in task.model.parameters() if p.requires_grad]
    task.model.train()
    most = []
    for count in sorted(batches):
        images, other = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, batches[count])
        with mode, _Live() as live, _left_out(trained, live):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                loss = task.loss(task.model, images, other)
            loss.backward()  # type: ignore[no-untyped-call]
        most.append(live.most + size(tree_leaves((images, other))))
        task.model.zero_grad()
    few, many = sorted(batches)
    per_image = (most[1] - most[0]) / (many - few)
    return Activations(most[0] - per_image * few, per_image)


def size(tensors: Iterable[Any]) -> int:
    """Total bytes of ``tensors``. Other objects count as 0."""
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that ops allocate in this mode: currently ``now``, at the peak ``most``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}  # by the storage's address
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in old:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, address: int) -> None:
        self.now -= self.sizes.pop(address)

    def leave_out(self, x: Tensor) -> None:
        """Stop counting ``x``."""
        address = x.untyped_storage()._cdata
        if address in self.sizes:
            self.now -= self.sizes[address]
            self.sizes[address] = 0


@contextmanager
def _left_out(trained: list[nn.Parameter], live: _Live) -> Iterator[None]:
    """Context manager: ``live`` stops counting a gradient of ``trained`` when it is accumulated."""

    def leave_out(p: Tensor) -> None:
        assert p.grad is not None
        live.leave_out(p.grad)

    hooks = [p.register_post_accumulate_grad_hook(leave_out) for p in trained]  # type: ignore[no-untyped-call]
    yield
    for hook in hooks:
        hook.remove()
