"""Check the memory accesses of Triton kernels byte by byte, in Triton's interpreter.

- Every access must be inside one of the tensors of the launch.
- If a program writes a byte, no other program of the launch may read or write it, unless atomics order the accesses:
  the writer adds to an integer after its store, and the other program adds to the same integer later, before its
  access. Nothing else orders programs on a GPU.
- No two lanes of a store may write the same address.
- When a launcher returns, its kernels must have written every byte of all tensors that it allocated.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton.ir import ATOMIC_OP as RMW
from triton._C.libtriton.ir import MEM_SEMANTIC as SEMANTIC
from triton._C.libtriton.ir import MEM_SYNC_SCOPE as SCOPE
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NOBODY = -1
aten = torch.ops.aten
EMPTY = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided)


class Buffer:
    """The bytes of a storage in a launch, with the programs that accessed them."""

    def __init__(self, name: str, storage: torch.UntypedStorage) -> None:
        self.name, self.storage = name, storage  # a reference, so that no later tensor gets the same addresses
        self.first, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.writer, self.reader, self.last_reader = (np.full(storage.nbytes(), NOBODY, np.int32) for _ in range(3))
        self.atomic = np.zeros(storage.nbytes(), bool)  # whether an atomic wrote last
        self.times = {
            id(who): np.zeros(storage.nbytes(), np.int32) for who in (self.writer, self.reader, self.last_reader)
        }
        self.reads = 0  # bytes; a byte counts once for each program that reads it

    def _alone(self, who: np.ndarray, here: np.ndarray, program: int, order: "Order", what: str) -> None:
        other = (who[here] != NOBODY) & (who[here] != program)
        other &= ~order.visible(who[here], self.times[id(who)][here], program)
        if other.any():
            i = here[other.argmax()]
            raise RuntimeError(f"a race: program {program} {what} program {who[i]} at byte {i} of {self.name}")

    def _note(self, who: np.ndarray, here: np.ndarray, program: int, order: "Order") -> None:
        who[here], self.times[id(who)][here] = program, order.time[program]

    def read(self, here: np.ndarray, program: int, order: "Order") -> None:
        self._alone(self.writer, here, program, order, "reads what is written by")
        # Programs run one after another, so another last reader means that this program has not read the byte yet.
        self.reads += np.count_nonzero(self.last_reader[here] != program)
        self._note(self.reader, here[self.reader[here] == NOBODY], program, order)
        self._note(self.last_reader, here, program, order)

    def write(self, here: np.ndarray, program: int, order: "Order") -> None:
        self._alone(self.writer, here, program, order, "writes what is written by")
        self._alone(self.reader, here, program, order, "writes what is read by")
        self._alone(self.last_reader, here, program, order, "writes what is read by")
        self._note(self.writer, here, program, order)
        self.atomic[here] = False

    def add(self, here: np.ndarray, program: int, order: "Order") -> None:
        self._alone(self.writer, here[~self.atomic[here]], program, order, "adds to what is written by")
        self._alone(self.last_reader, here, program, order, "adds to what is read by")
        self._note(self.writer, here, program, order)
        self.atomic[here] = True


class Order:
    """Which accesses of other programs each program of a launch sees. The time of a program counts its atomics."""

    def __init__(self) -> None:
        self.time: Counter[int] = Counter()
        self.seen: dict[int, Counter[int]] = {}  # of a program or of an address: before when, by program

    def visible(self, who: np.ndarray, when: np.ndarray, program: int) -> np.ndarray:
        seen = self.seen.get(program, {})
        return np.array([t < seen.get(w, 0) for w, t in zip(who.tolist(), when.tolist(), strict=True)], bool)

    def atomic(self, address: int, program: int) -> None:
        """An atomic of ``program`` releases its accesses, and acquires those that others released at ``address``."""
        self.time[program] += 1
        found = self.seen.get(-address, Counter()) | self.seen.get(program, Counter())
        found[program] = self.time[program]
        self.seen[-address] = self.seen[program] = found


@dataclass
class Launch:
    kernel: str
    spans: list[tuple[str, int, int]] = field(default_factory=list)  # name, first byte, byte past the last
    buffers: dict[int, Buffer] = field(default_factory=dict)
    order: Order = field(default_factory=Order)

    def add(self, name: str, x: torch.Tensor) -> None:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        self.spans.append((name, x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.buffers:
            self.buffers[storage.data_ptr()] = Buffer(name, storage)

    def touch(self, kind: str, pointers: TensorHandle, mask: TensorHandle, program: int) -> None:
        wanted_addresses, wanted = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        asked = wanted_addresses[wanted].astype(np.int64)
        addresses = np.unique(asked)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for _, first, end in self.spans:
            inside |= (addresses >= first) & (addresses + size <= end)
        if not inside.all():
            tensors = ", ".join(f"{name} [{first:#x}, {end:#x})" for name, first, end in self.spans)
            outside = int(addresses[~inside][0])
            raise IndexError(f"{kind} of {size} bytes at {outside:#x}, outside every tensor of the launch: {tensors}")
        if kind != "load" and addresses.size < asked.size:
            raise RuntimeError(f"a race: two lanes of program {program} write one address")
        for buffer in self.buffers.values():
            starts = addresses[(addresses >= buffer.first) & (addresses < buffer.end)] - buffer.first
            if starts.size:
                here = (starts[:, None] + np.arange(size)).ravel()
                {"load": buffer.read, "store": buffer.write, "add": buffer.add}[kind](here, program, self.order)
        if kind == "add":
            for address in addresses.tolist():
                self.order.atomic(address, program)

    def moved(self, cached: tuple[str, ...] = ()) -> int:
        """Bytes read and written. A byte counts once per program that reads it, or once in ``cached`` tensors."""
        reads = [int((b.reader != NOBODY).sum()) if b.name in cached else b.reads for b in self.buffers.values()]
        return sum(reads) + sum(int((b.writer != NOBODY).sum()) for b in self.buffers.values())


launches: list[Launch] = []  # launches of the last launcher, and all launches since
# Name -> tensor, for the lists that the running launcher got. Its kernels read their addresses from a table.
listed: list[tuple[str, torch.Tensor]] = []


class _Allocations(TorchDispatchMode):
    """Collects uninitialised tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in EMPTY and result.numel():
            self.tensors.append(result)
        return result


def _check_written(x: torch.Tensor) -> None:
    """Raise an error unless ``launches`` have written every byte of the dense tensor ``x``."""
    storage = x.untyped_storage()
    written, names = np.zeros(storage.nbytes(), bool), set()
    for launch in launches:
        if buffer := launch.buffers.get(storage.data_ptr()):
            written |= buffer.writer != NOBODY
            names.add(f"{buffer.name} of {launch.kernel}")
    if not written.all():
        who = " and ".join(sorted(names)) or "given to no kernel"
        raise RuntimeError(
            f"{int((~written).sum())} of {written.size} bytes are left unwritten, the first at {written.argmin()}, "
            f"in {list(x.shape)} {x.dtype}: {who}"
        )


def traced(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``launcher`` to check afterwards that its allocations are written, unless it used only eager torch."""

    names = inspect.signature(launcher).parameters

    @wraps(launcher)
    def run(*args: Any, **kwargs: Any) -> Any:
        launches.clear()
        for name, value in zip(names, args, strict=False):
            if isinstance(value, list):
                listed.extend((name, x) for x in value if isinstance(x, torch.Tensor) and x.numel())
        try:
            with _Allocations() as allocated:
                result = launcher(*args, **kwargs)
        finally:
            listed.clear()
        for x in allocated.tensors if launches else ():
            _check_written(x)
        return result

    return run


def watch() -> None:
    """Patch the interpreter to record all launches and accesses."""
    stock_init, stock_load = GridExecutor._init_args_hst, InterpreterBuilder.create_masked_load
    stock_store, stock_add = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_atomic_rmw

    def program(builder: Any) -> int:
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        return int((x * height + y) * depth + z)

    def init(self: Any, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = stock_init(self, args, kwargs)
        launches.append(Launch(self.fn.__name__))
        for name, x in [*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()]:
            if isinstance(x, torch.Tensor) and x.numel():
                launches[-1].add(name, x)
        for name, x in listed:
            launches[-1].add(name, x)
        return host_args, host_kwargs

    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        launches[-1].touch("load", pointers, mask, program(self))
        return stock_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        launches[-1].touch("store", pointers, mask, program(self))
        return stock_store(self, pointers, value, mask, *rest)

    def add(
        self: Any, operation: Any, pointers: TensorHandle, value: Any, mask: TensorHandle, sem: Any, scope: Any
    ) -> Any:
        if operation != RMW.ADD or sem != SEMANTIC.ACQUIRE_RELEASE or scope != SCOPE.GPU:
            raise NotImplementedError("the only atomic that is traced is an integer addition, acq_rel, gpu")
        launches[-1].touch("add", pointers, mask, program(self))
        return stock_add(self, operation, pointers, value, mask, sem, scope)

    def other(self: Any, *operands: Any) -> Any:
        raise NotImplementedError("the only atomic that is traced is an integer addition, acq_rel, gpu")

    GridExecutor._init_args_hst = init
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas = add, other
