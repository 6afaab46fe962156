"""Starts and ends the processes and threads that load data.

**Loader processes are started by a fork server, not by a fork of the training process.** A forked child has only one
thread, but copies of all locks. It hangs when it needs a lock that another thread held, or a thread that no longer
exists. DALI, OpenMP, CUDA and trackers have such threads. A fork server is a new process that has only imported
modules. Starting a worker from it takes milliseconds, whereas ``spawn`` would import torch in each worker at each
evaluation.

**Loader processes block the signals that end a run** (SIGINT, SIGTERM, SIGHUP, SIGUSR1). Schedulers and terminals send
these to the whole process group. The training process saves, then ends its workers with SIGKILL.
Workers also end when the training process dies.

**Batches are sent through anonymous memory** (``Message``), not through /dev/shm, which has 64 MB in many containers.

The fork server is not that of ``multiprocessing``, because other users of that server would inherit blocked signals.
"""

import io
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import forkserver, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, dataloader

from ..console import silence_other_libraries
from ..errors import UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Made = TypeVar("Made")

# Signals that end a run. SIGHUP: the terminal was closed. SIGUSR1: SLURM can send it before the time limit.
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
IMPORTS = ["mae_fast.data.loader"]  # the fork server imports these
LAZY_IMPORTS = ("datasets", "tifffile", "timm.data")  # also imported, if this process has imported them
STALLED_AFTER = 60.0  # seconds without a batch, before a warning
JOIN_TIMEOUT = 5.0  # seconds for threads to finish their current item
WORKER_END_TIMEOUT = 1.0  # seconds between a worker's closed connection and its end
SERVER_LOST = 255  # exit code that multiprocessing gives workers whose fork server has ended
OUT_OF_BAND = 1 << 16  # bytes. Smaller arrays are copied, so that keeping one does not keep the whole batch.
ALIGNMENT = 64  # bytes


server = forkserver.ForkServer()


class _Popen(popen_forkserver.Popen):
    """A process that ``server`` starts.

    DataLoader and multiprocessing call ``terminate`` at the end. It sends SIGKILL, as workers block SIGTERM.
    """

    def _launch(self, process_obj: Any) -> None:
        """As the base class, but with our ``server`` instead of the shared one of multiprocessing.

        The user's script is imported in the process only if it defines an object that the process needs. So a script
        needs no ``if __name__ == "__main__"``.
        """
        process, buffer = io.BytesIO(), io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(process_obj, process)
            preparation = spawn.get_preparation_data(process_obj._name)
            if b"__main__" not in process.getvalue():
                for key in ("init_main_from_path", "init_main_from_name"):
                    preparation.pop(key, None)
            reduction.dump(preparation, buffer)
            buffer.write(process.getbuffer())
        finally:
            set_spawning_popen(None)
        self.sentinel, write_end = server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        descriptors = os.dup(write_end), self.sentinel
        self.finalizer = util.Finalize(self, util.close_fds, descriptors)  # type: ignore[attr-defined]
        with open(write_end, "wb") as file:
            file.write(buffer.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)

    def terminate(self) -> None:
        self.kill()


class LoaderProcess(ForkServerProcess):
    """A loader's worker process."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)


class LoaderContext(ForkServerContext):
    """The multiprocessing context of one loader. ``processes``: the processes that it started."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[LoaderProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> LoaderProcess:  # type: ignore[override]
        process = LoaderProcess(*args, **kwargs)
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """Kill all worker processes of this loader."""
        if any(process.pid is None for process in self.processes):  # still starting: it could outlive this process
            _kill_server()
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                process.kill()


def _kill_server() -> None:
    """Kill the fork server. The next loader starts a new one."""
    pid = server._forkserver_pid  # type: ignore[attr-defined]
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_all() -> None:
    """Kill the worker processes of all loaders, and the fork server."""
    for process in multiprocessing.active_children():
        if isinstance(process, LoaderProcess):
            process.kill()
    _kill_server()


@cache
def _set_up() -> None:
    """Run once: kill the server when this process ends, and give forked children a server of their own."""
    util.Finalize(None, _kill_server, exitpriority=-50)  # after the loaders' processes
    os.register_at_fork(after_in_child=server.__init__)  # type: ignore[misc]


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Context that appends ``value`` to an environment variable for new processes."""
    before = os.environ.get(name)
    os.environ[name] = f"{before},{value}" if before else value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_server() -> None:
    """Start the fork server if it is not running. Its workers inherit the blocked signals."""
    _set_up()
    server.set_forkserver_preload([*IMPORTS, *(name for name in LAZY_IMPORTS if name in sys.modules)])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        with _environment("PYTHONWARNINGS", "ignore:resource_tracker"):  # warns about semaphores of killed processes
            resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)  # starting the server has unblocked SIGINT and SIGTERM
        server.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    silence_other_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the training process ends. DataLoader's own check would watch the fork server instead."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Pickler(pickle.Pickler):
    """Pickles CPU tensors as numpy arrays, whose memory can be sent outside of the pickle."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


class Message:
    """A batch sent from a worker process to the main process, in anonymous memory (memfd).

    Only the descriptor is sent through the pipe. With a large message in the pipe, the main process would hang if the
    worker was killed while writing. torch's method of sending tensors fails if /dev/shm is full.
    """

    def __init__(self, batch: Any) -> None:
        buffers: list[memoryview] = []

        def in_band(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if view.nbytes >= OUT_OF_BAND:
                buffers.append(view)
            return view.nbytes < OUT_OF_BAND

        pickled = io.BytesIO()
        _Pickler(pickled, 5, buffer_callback=in_band).dump(batch)
        self.spans: list[tuple[int, int]] = []
        with os.fdopen(os.memfd_create("mae_fast.batch"), "wb") as file:
            for part in (pickled.getbuffer(), *buffers):
                start = file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                file.write(part)
                self.spans.append((start, file.tell()))
            file.flush()
            self.descriptor = reduction.DupFd(file.fileno())

    def load(self) -> Any:
        """The batch."""
        return _load(self.descriptor, self.spans)

    def pin_memory(self) -> Any:
        """The batch in page-locked memory. ``DataLoader`` calls this method by its name."""
        batch = self.load()
        return batch.pin_memory() if hasattr(batch, "pin_memory") else batch


class MessageLoadedOnArrival(Message):
    """A message that is unpickled as the batch.

    It is not used with pinned memory, because an error of ``load`` would end the pinning thread of ``DataLoader``.
    """

    def __reduce__(self) -> Any:
        return _load, (self.descriptor, self.spans)


def _load(descriptor: Any, spans: list[tuple[int, int]]) -> Any:
    """The batch of a message. Its tensors use the memory that the worker has filled, without a copy."""
    number = descriptor.detach()
    try:
        memory = memoryview(mmap.mmap(number, spans[-1][1]))
    finally:
        os.close(number)
    pickled, *buffers = (memory[start:end] for start, end in spans)
    return pickle.loads(pickled, buffers=buffers)


class _Iterator(dataloader._MultiProcessingDataLoaderIter):
    """An iterator whose ``__del__`` does not fail if an error or signal has interrupted ``__init__``."""

    def __del__(self) -> None:
        if hasattr(self, "_workers_status"):  # set after the workers have started
            super().__del__()


class _Loader(DataLoader[Any]):
    def _get_iterator(self) -> Any:
        return _Iterator(self) if self.num_workers else super()._get_iterator()


def _as_it_is(batch: Any) -> Any:
    """The collate function: ``__getitems__`` has already built the batch."""
    return batch


def by_processes(
    dataset: Dataset[Any], keys: Any, num_workers: int, pin_memory: bool = False, of: object = "the dataset"
) -> Iterator[Any]:
    """Yield ``dataset.__getitems__(key)`` for each of ``keys``, in order, computed by worker processes.

    With 0 workers, this process computes it. Torch's global generator does not change.

    Args:
        dataset: it must be picklable.
        keys: a sized iterable of arguments of ``__getitems__``.
        of: name of the data, for messages.

    Raises:
        UserError: if worker processes cannot start, die, or run out of memory or file descriptors.
    """
    num_workers = min(num_workers, len(keys))
    context = LoaderContext() if num_workers else None
    with warnings.catch_warnings():  # more workers than cores: 'mae-fast doctor' reports this
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = _Loader(
            dataset,
            batch_sampler=keys,
            collate_fn=_as_it_is if context is None else Message if pin_memory else MessageLoadedOnArrival,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
            multiprocessing_context=context,
            worker_init_fn=_start_worker if context else None,
        )
    if context is None:
        yield from watched(iter(loader), lambda: f"the main thread, which reads {of}")
        return

    received: Iterator[Any] = iter(())  # its processes end when it is garbage collected

    def batches() -> Iterator[Any]:
        nonlocal received
        _start_server()
        received = iter(loader)
        for batch in received:
            yield batch.load() if isinstance(batch, Message) else batch

    def where() -> str:
        states = ", ".join(f"{process.pid} {_state(process.pid)}" for process in context.processes if process.pid)
        return f"{num_workers} worker processes ({states or 'which are starting'}) that read {of}"

    ended = False
    try:
        yield from watched(batches(), where)
        ended = True
    except (RuntimeError, OSError, EOFError, MemoryError) as error:  # a worker's end may break the connection
        wait([process.sentinel for process in context.processes if process.pid is not None], WORKER_END_TIMEOUT)
        if isinstance(error, EOFError) and any(process.pid is None for process in context.processes):
            raise _server_lost(of) from error  # while starting a worker
        if any(process.exitcode for process in context.processes):
            raise _death(context.processes, of) from error
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise
        raise _failure(error, of) from error
    finally:
        if not ended:  # DataLoader would wait for each worker up to 5 seconds
            context.kill()


def _state(pid: int) -> str:
    """The state of a process, from the kernel."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        state = "Z"
    names = {"R": "computes", "S": "sleeps", "D": "waits for a disk", "T": "is stopped", "Z": "has ended"}
    return names.get(state, f"is in state {state}")


def _death(processes: list[LoaderProcess], of: object) -> UserError:
    code = next(process.exitcode for process in processes if process.exitcode)
    if code == SERVER_LOST:
        return _server_lost(of)
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
    hints = {
        -signal.SIGBUS: "the shared memory in /dev/shm is probably full: make it larger, or lower --num-workers or "
        "--batch-size",
        -signal.SIGKILL: "memory has probably run out: lower --num-workers or --batch-size",
    }
    return UserError(f"a worker process that reads {of} ended {how}", hints.get(code, "try --num-workers 0"))


def _server_lost(of: object) -> UserError:
    return UserError(
        f"the process that starts the worker processes for {of} has ended",
        "memory has probably run out: run the same command again, with a lower --num-workers",
    )


def _failure(error: BaseException, of: object) -> UserError:
    reason = next(iter(reversed(str(error).strip().splitlines())), type(error).__name__)  # a worker's last line
    hints = {
        "Too many open files": "raise the limit with 'ulimit -n', or lower --num-workers",
        "No space left": f"free space in /dev/shm and {tempfile.gettempdir()}, or use --num-workers 0",
        "Read-only file system": f"make /dev/shm and {tempfile.gettempdir()} writable, or use --num-workers 0",
        "memory": "lower --num-workers or --batch-size",
    }
    hint = next((hint for words, hint in hints.items() if words.lower() in reason.lower()), "try --num-workers 0")
    return UserError(f"the worker processes that read {of} failed ({reason})", hint)


def by_threads(
    items: Iterable[Item], make: Callable[[Item], Made], num_threads: int, of: object = "the dataset"
) -> Iterator[Made]:
    """Yield ``make(item)`` for each of ``items``, in order. Threads prefetch the results.

    With 0 threads, the caller computes them. The threads are daemons, unlike those of ``ThreadPoolExecutor``, so that a
    thread that hangs does not keep the process alive.
    """
    if not num_threads:
        yield from watched(map(make, items), lambda: f"the main thread, which reads {of}")
        return
    tasks: SimpleQueue[tuple[Future[Made], Item] | None] = SimpleQueue()

    def work() -> None:
        while task := tasks.get():
            future, item = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(make(item))
                except BaseException as error:
                    future.set_exception(error)

    threads = [threading.Thread(target=work, name=f"mae_fast.data_{i}", daemon=True) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    pending: deque[Future[Made]] = deque()

    def results() -> Iterator[Made]:
        for item in items:
            pending.append(Future())
            tasks.put((pending[-1], item))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield from watched(results(), lambda: f"{num_threads} threads ({_places(threads)}) that read {of}")
    finally:
        for future in pending:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        end = time.monotonic() + JOIN_TIMEOUT
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if stuck := [thread for thread in threads if thread.is_alive()]:
            logger.warning(f"{len(stuck)} threads that read {of} did not end ({_places(stuck)})")


def _places(threads: list[threading.Thread]) -> str:
    """The current code position of each thread."""
    frames = sys._current_frames()
    found = [frames[thread.ident] for thread in threads if thread.ident in frames]
    return ", ".join(f"at {os.path.basename(f.f_code.co_filename)}:{f.f_lineno}" for f in found) or "none is alive"


def watched(batches: Iterator[Made], where: Callable[[], str]) -> Iterator[Made]:
    """Yield the batches. Warn after a minute without one, then after two minutes, four, and so on.

    Args:
        where: returns a description of the processes or threads that load the batches, for the warning.
    """
    ended = threading.Event()
    since: float | None = None  # time at which the caller began to wait for a batch

    def watch() -> None:
        limit = STALLED_AFTER
        seen = since
        while not ended.wait(min(1.0, STALLED_AFTER / 4)):
            if since != seen:
                limit, seen = STALLED_AFTER, since
            if since is not None and time.monotonic() - since > limit:
                logger.warning(f"no batch has come for {time.monotonic() - since:.0f} s: waiting for {where()}")
                limit *= 2

    threading.Thread(target=watch, name="mae_fast.watchdog", daemon=True).start()
    try:
        while True:
            since = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            since = None
            yield batch
    finally:
        ended.set()
