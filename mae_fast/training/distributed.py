"""One process or several: this process's rank, the parallel model, and collective decisions."""

import ctypes
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import UserError
from .signals import Signals, Stop

PR_SET_PDEATHSIG = 1  # option of Linux's prctl: the signal to send to this process when its parent ends

Strategy = Literal["ddp", "fsdp"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class DistContext:
    """This process and its collectives, started by ``torchrun`` or as a single process.

    Attributes:
        control: process group for CPU tensors, so that decisions do not wait for a GPU; None with one process.
        signals: the handler of this process's signals.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    control: Any = None
    signals: Signals = field(default_factory=Signals)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that logs and writes files."""
        return self.rank == 0

    def has_lost(self, error: RuntimeError) -> bool:
        """Whether ``error`` means that another process has ended."""
        return self.world > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process. All processes get the same answer."""
        if self.control is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def until_stopped(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Iterate over the batches of an evaluation. All processes must have the same number of batches.

        Raises:
            Stop: in all processes, if one of them has caught a signal or another one has failed.
            UserError: if loading a batch of this process fails.
        """
        while True:
            batch, failure = None, None
            try:
                with self.signals.interruptible():
                    batch = next(batches, None)
            except UserError as error:
                failure = error
            if batch is None and not failure:
                return
            ending = self.any(self.signals.caught is not None or failure is not None)
            if failure:
                raise failure
            if ending or batch is None:
                raise Stop
            yield batch

    def sum(self, number: int) -> int:
        """The sum of ``number`` over the processes."""
        if self.control is None:
            return number
        total = torch.tensor(number)
        torch.distributed.all_reduce(total, group=self.control)
        return int(total)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over the processes."""
        if self.control is not None:
            torch.distributed.all_reduce(values, group=self.control)
        return values

    def agree(self, number: int) -> int:
        """The ``number`` of rank 0."""
        if self.control is None:
            return number
        said = torch.tensor(number)
        torch.distributed.broadcast(said, 0, group=self.control)
        return int(said)

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in the order of ranks."""
        if self.control is None:
            return items
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, items, group=self.control)
        return [item for part in found for item in part]

    def gather_on_first(self, items: list[Item]) -> list[Item]:
        """The items of all processes in rank 0; an empty list in the others."""
        if self.control is None:
            return items
        found: list[Any] | None = [None] * self.world if self.first else None
        torch.distributed.gather_object(items, found, group=self.control)
        return [item for part in found or () for item in part]

    def share(self, buffers: Iterable[Tensor]) -> None:
        """Broadcast buffers from rank 0, as the statistics of batch norms differ between processes."""
        if self.world > 1:
            for buffer in buffers:
                torch.distributed.broadcast(buffer, 0)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over the processes."""
        if self.world == 1:
            return value
        torch.distributed.all_reduce(value)
        return value / self.world


@contextmanager
def init_dist(device: str, signals: Signals | None = None) -> Iterator[DistContext]:
    """Initialize torch.distributed if ``torchrun`` started this process. ``device``: "auto", "cpu" or "cuda".

    Raises:
        UserError: if the device does not exist, or this host has fewer GPUs than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here", "use --device cpu")
    signals = signals or Signals()
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield DistContext(torch.device(kind), signals=signals)
        return
    signals.alone = False
    # If torchrun is killed, this process gets a signal, saves and ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    place = torch.device(kind)
    if kind == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"process {local} has no GPU: there are {count}", f"use torchrun --nproc-per-node {count}")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    store, rank, world = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=_fresh(store, rank, world),
        rank=rank,
        world_size=world,
        device_id=place if kind == "cuda" else None,
    )
    logger = logging.getLogger("mae_fast")
    level = logger.level
    if rank:  # rank 0 logs for all processes
        logger.setLevel(logging.WARNING)
    try:
        yield DistContext(
            place,
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
            torch.distributed.new_group(backend="gloo"),
            signals,
        )
    finally:
        logger.setLevel(level)
        torch.distributed.destroy_process_group()


def _fresh(store: Store, rank: int, world: int) -> Store:
    """A part of torchrun's store under a new prefix.

    After a restart (``--max-restarts``), the store still holds the addresses of ended processes. torch would connect to
    them, and fail or wait forever. torchrun's restart counts cannot be the prefix, as each host has its own. So rank 0
    chooses a random prefix and sends it to each process that asks for it. Each process asks with a random key.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"mae_fast/ask/{rank}", question)
        name = store.get(f"mae_fast/answer/{question}").decode()  # waits for it
        store.set(f"{name}/{rank}", "")
        return PrefixStore(name, store)
    name = f"mae_fast/{uuid.uuid4().hex}"
    left = set(range(1, world))
    while left:
        for other in left:
            if store.check([f"mae_fast/ask/{other}"]):
                store.set(f"mae_fast/answer/{store.get(f'mae_fast/ask/{other}').decode()}", name)
        left = {other for other in left if not store.check([f"{name}/{other}"])}
        time.sleep(0.02)
    return PrefixStore(name, store)


Loss = Callable[..., Tensor]  # (model, *inputs) -> scalar loss


class _Loss(nn.Module):
    """``loss(model, ...)`` as the forward of a module, for DDP."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: Any) -> Tensor:
        return self.loss(self.model, *args)


@dataclass(frozen=True)
class ParallelModel:
    """A model that one or several processes train.

    Attributes:
        loss: the loss of the model. Its backward averages the gradients over the processes.
        compiled: returns ``loss`` compiled by torch.compile.
        without_sync: a context in which gradients are not averaged.
        sharded: whether the weights are sharded over the processes.
    """

    loss: Callable[..., Tensor]
    compiled: Callable[[], Callable[..., Tensor]]
    without_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    sharded: bool = False


def parallelize(model: nn.Module, loss: Loss, strategy: Strategy, dist: DistContext) -> ParallelModel:
    """Prepare ``model`` for training by all processes, each on its own inputs.

    Args:
        loss: called with the model and its inputs; returns a scalar.
        strategy: "ddp": a copy of the weights in each process. "fsdp": weights and optimizer state are sharded, block
            by block.
    """
    own = partial(loss, model)
    if dist.world == 1:
        return ParallelModel(own, lambda: torch.compile(own))
    if strategy == "ddp":
        # On a side stream: a step captured as a CUDA graph cannot wait for the default stream.
        with torch.cuda.stream(torch.cuda.Stream()) if dist.device.type == "cuda" else nullcontext():  # type: ignore[no-untyped-call]
            wrapped = nn.parallel.DistributedDataParallel(_Loss(model, loss))
        return ParallelModel(wrapped, lambda: torch.compile(wrapped), wrapped.no_sync)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(dist.device.type, (dist.world,))
    parts: list[Any] = [getattr(model, name, ()) for name in ("blocks", "decoder_blocks")]
    blocks = [block for part in parts for block in part]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "loss"):
        for name in ("loss", "forward_features"):  # neither calls the other, and forward calls neither
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)

    @contextmanager
    def without_sync() -> Iterator[None]:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def compiled() -> Callable[..., Tensor]:
        for block in blocks:  # each on its own: FSDP gathers the shards between them, outside of the compiled code
            block.compile()
        return own

    return ParallelModel(own, compiled, without_sync, sharded=True)
