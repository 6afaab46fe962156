"""Processes and threads that load data: how they start, and how they end.

**Loader processes come from a fork server, never from a fork of the training process.** A forked child has one thread
and every lock as it was, so it hangs as soon as it needs a lock that another thread held, or a thread that is gone.
The training process has such threads: DALI's, OpenMP's, CUDA's, trackers'. A fork server is a fresh process that has
only imported modules. Starting a worker from it takes milliseconds, as the modules are already loaded; ``spawn`` would
import logging
import torch in each worker, at each evaluation.

**Loader processes block the signals that end a run** (SIGINT, SIGTERM, SIGHUP, SIGUSR1). Schedulers and terminals send
these to the whole process group. The training process handles them: it saves, then stops its workers by SIGKILL.
Workers also end when the training process dies.

The server is not the one that ``multiprocessing`` shares: other users of that one would inherit the blocked signals.
"""

import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import cache
from multiprocessing import forkserver, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Made = TypeVar("Made")

# Signals that ask a run to end. SIGHUP: the terminal is closed. SIGUSR1: SLURM can send it before the end.
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
IMPORTS = ["mae_fast.data.loader"]  # the fork server imports these
LAZY_IMPORTS = ("datasets", "tifffile", "timm.data")  # and these, if this process has imported them
STALLED_AFTER = 60.0  # seconds without a batch, before a warning
JOIN_TIMEOUT = 5.0  # seconds for threads to finish their current item
WORKER_END_TIMEOUT = 1.0  # seconds between a worker's closed connection and its end


server = forkserver.ForkServer()


class _Popen(popen_forkserver.Popen):
    """A process that ``server`` starts.

    DataLoader and multiprocessing call ``terminate`` at the end. It sends SIGKILL, as workers block SIGTERM.
    """

    def _launch(self, process_obj: Any) -> None:
        """As the base class does, with ``server`` instead of the server that multiprocessing shares."""
        buffer = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj._name), buffer)
            reduction.dump(process_obj, buffer)
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
    """The multiprocessing context of one loader; ``processes`` are those it has started."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[LoaderProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> LoaderProcess:  # type: ignore[override]
        process = LoaderProcess(*args, **kwargs)
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """Kill them all."""
        if any(process.pid is None for process in self.processes):  # it would start after this process has ended
            pid = server._forkserver_pid  # type: ignore[attr-defined]
            if pid is not None:
                os.kill(pid, signal.SIGKILL)  # the next loader starts another one
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                process.kill()


def kill_all() -> None:
    """Kill the worker processes of all loaders."""
    for process in multiprocessing.active_children():
        if isinstance(process, LoaderProcess):
            process.kill()


@cache
def _forget_server_in_forks() -> None:
    """A forked child starts a server of its own."""
    os.register_at_fork(after_in_child=server.__init__)  # type: ignore[misc]


def _start_server() -> None:
    """Start the fork server, unless it runs; with blocked signals, which its workers inherit."""
    _forget_server_in_forks()
    server.set_forkserver_preload([*IMPORTS, *(name for name in LAZY_IMPORTS if name in sys.modules)])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)  # again, as that has unblocked SIGINT and SIGTERM
        server.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the process that started this one does. DataLoader's own check looks at the fork server instead."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _as_it_is(batch: Any) -> Any:
    """``DataLoader``'s collate function: ``__getitems__`` has already made the batch."""
    return batch


def by_processes(
    dataset: Dataset[Any], keys: Any, num_workers: int, pin_memory: bool = False, of: object = "the dataset"
) -> Iterator[Any]:
    """``dataset.__getitems__(key)`` for each of ``keys``, in order, by worker processes; with 0 workers, by this one.

    Torch's global generator is left as it is.

    Args:
        dataset: can be pickled.
        keys: sized; each is what ``__getitems__`` takes.
        of: what is loaded, for messages.

    Raises:
        UserError: if a worker process dies.
    """
    num_workers = min(num_workers, len(keys))
    context = LoaderContext() if num_workers else None
    if context:
        _start_server()
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        multiprocessing_context=context,
        worker_init_fn=_start_worker if context else None,
    )
    if context is None:
        yield from watched(iter(loader), lambda: f"the main thread, which reads {of}")
        return

    def where() -> str:
        numbers = ", ".join(str(process.pid) for process in context.processes if process.is_alive())
        return f"{num_workers} worker processes ({numbers or 'none is alive'}) that read {of}"

    ended = False
    try:
        yield from watched(iter(loader), where)
        ended = True
    except (RuntimeError, OSError, EOFError) as error:  # the last two: a worker ended while it sent a batch
        wait([process.sentinel for process in context.processes if process.pid is not None], WORKER_END_TIMEOUT)
        if not any(process.exitcode for process in context.processes):
            raise
        raise _death(context.processes, of) from error
    finally:
        if not ended:  # DataLoader would wait up to 5 seconds for each
            context.kill()


def _death(processes: list[LoaderProcess], of: object) -> UserError:
    code = next(process.exitcode for process in processes if process.exitcode)
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    hints = {
        -signal.SIGBUS: "the shared memory in /dev/shm is probably full: make it larger, or lower --num-workers or "
        "--batch-size",
        -signal.SIGKILL: "memory has probably run out: lower --num-workers or --batch-size",
    }
    return UserError(f"a worker process that reads {of} ended by {how}", hints.get(code, "try --num-workers 0"))


def by_threads(
    items: Iterable[Item], make: Callable[[Item], Made], num_threads: int, of: object = "the dataset"
) -> Iterator[Made]:
    """``make(item)`` for each of ``items``, in order. Threads work ahead; with 0 threads the caller does the work.

    The threads are daemons, unlike those of ``ThreadPoolExecutor``: one that hangs does not keep the process alive.
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
            logger.warning(f"{len(stuck)} threads that read {of} do not end ({_places(stuck)})")


def _places(threads: list[threading.Thread]) -> str:
    """Where in the code each thread is."""
    frames = sys._current_frames()
    found = [frames[thread.ident] for thread in threads if thread.ident in frames]
    return ", ".join(f"at {os.path.basename(f.f_code.co_filename)}:{f.f_lineno}" for f in found) or "none is alive"


def watched(batches: Iterator[Made], where: Callable[[], str]) -> Iterator[Made]:
    """Yield the batches. Warn after a minute without one, then after two minutes, four, and so on.

    Args:
        where: names the processes or threads that make the batches, for the warning.
    """
    ended = threading.Event()
    since: float | None = None  # when the caller began to wait for a batch

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
