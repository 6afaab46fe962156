"""Processes and threads that load data start without forking this process, and always end."""

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import evaluation_batches, training_batches
from PIL import Image
from torch.utils.data import Dataset

from mae_fast.data import workers
from mae_fast.data.cache import Cached
from mae_fast.data.sources import Source, open_source
from mae_fast.data.workers import END_SIGNALS, LoaderProcess, by_processes, by_threads, watched
from mae_fast.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")


class Numbers(Dataset[list[int]]):
    """Returns the process id for each key. Key -n sends signal n to the process."""

    def __getitems__(self, keys: list[int]) -> list[int]:
        for key in keys:
            if key < 0:
                os.kill(os.getpid(), -key)
        return [os.getpid()] * len(keys)


class Sleepers(Dataset[list[int]]):
    """Hangs."""

    def __getitems__(self, keys: list[int]) -> list[int]:
        time.sleep(1000)
        return keys


def broken_connection(pid: int) -> None:
    """Kill a process and fail like the unpickling of a tensor whose process has ended."""
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    raise ConnectionResetError(104, "Connection reset by peer")


class HalfSent:
    """Unpickles as a message of a worker that ended while it sent it."""

    def __reduce__(self) -> Any:
        return broken_connection, (os.getpid(),)


class HalfSenders(Dataset[list[HalfSent]]):
    def __getitems__(self, keys: list[int]) -> list[HalfSent]:
        return [HalfSent()]


class Large(Dataset[Any]):
    """Returns tensors of a million numbers and of one number. Key -1 returns text, -2 and -3 fail."""

    def __getitems__(self, keys: list[int]) -> Any:
        if keys == [-1]:
            return "x" * 4_000_000
        if keys == [-2]:
            raise OSError(24, "Too many open files")
        if keys == [-3]:
            raise MemoryError
        return torch.full((1000, 1000), keys[0], dtype=torch.uint8), torch.tensor(keys)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i:02}.jpg")
    return open_source(folder)


def loaders() -> list[LoaderProcess]:
    return [process for process in multiprocessing.active_children() if isinstance(process, LoaderProcess)]


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_are_not_forked_from_this_process() -> None:
    pids = {pid for made in by_processes(Numbers(), [[0], [1], [2], [3]], 2) for pid in made}
    assert len(pids) == 2
    assert os.getpid() not in pids
    made = by_processes(Numbers(), [[0], [1], [2]], 1)
    (pid,) = next(made)
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != os.getpid()
    assert b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()
    made.close()


def test_no_worker_starts_for_less_than_a_batch() -> None:
    assert {pid for made in by_processes(Numbers(), [[0]], 4) for pid in made} != {os.getpid()}
    assert not loaders()
    assert list(by_processes(Numbers(), [], 4)) == []


@pytest.mark.parametrize("number", END_SIGNALS)
def test_workers_ignore_signals_to_the_process_group(number: signal.Signals) -> None:
    made = by_processes(Numbers(), [[0]] * 6, 2)
    pids = set(next(made) + next(made))
    for pid in pids:
        os.kill(pid, number)
    server = int(Path(f"/proc/{min(pids)}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(server, number)
    time.sleep(0.1)
    assert running(server)
    assert {pid for batch in made for pid in batch} == pids


def test_the_fork_server_of_multiprocessing_is_not_used() -> None:
    list(by_processes(Numbers(), [[0]], 1))
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(60,))
    process.start()
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def test_a_loader_that_is_abandoned_leaves_no_process() -> None:
    made = by_processes(Numbers(), [[0]] * 1000, 2)
    next(made)
    assert len(loaders()) == 2
    made.close()
    assert wait_until(lambda: not loaders(), 2)


def test_a_loader_that_hangs_ends_without_delay() -> None:
    made = by_processes(Sleepers(), [[0], [1]], 2)
    threading.Timer(4, lambda: signal.raise_signal(signal.SIGUSR2)).start()

    class Leave(BaseException):
        """Raised by the handler of a signal."""

    def leave(*_: object) -> None:
        raise Leave

    before = signal.signal(signal.SIGUSR2, leave)
    try:
        with pytest.raises(Leave):
            next(made)
        start = time.monotonic()
        made.close()
        assert time.monotonic() - start < 2
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert wait_until(lambda: not loaders(), 2)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, ["SIGKILL", "memory has probably run out", "--num-workers"]),
        (signal.SIGBUS, ["SIGBUS", "/dev/shm", "--batch-size"]),
        (signal.SIGSEGV, ["SIGSEGV", "--num-workers 0"]),
    ],
)
def test_a_worker_that_dies_is_named(number: signal.Signals, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        list(by_processes(Numbers(), [[0], [-number], [0]], 2, of="images/train"))
    assert all(word in str(caught.value) for word in [*words, "images/train"])
    assert wait_until(lambda: not loaders(), 2)


def test_a_worker_that_dies_while_it_sends_a_batch_is_named() -> None:
    with pytest.raises(UserError, match="SIGKILL"):
        list(by_processes(HalfSenders(), [[0]], 1))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_batches_use_anonymous_memory_and_small_tensors_keep_no_file_open() -> None:
    list(by_processes(Large(), [[0]], 1))
    before, labels = open_files(), []
    made = by_processes(Large(), [[i] for i in range(20)], 2)
    for number, (pixels, label) in enumerate(made):
        assert (pixels == number).all()
        if number == 0:
            assert "memfd:mae_fast.batch" in Path("/proc/self/maps").read_text()
            pixels.add_(1)  # it is writable
        labels.append(label)
    del pixels
    assert torch.cat(labels).tolist() == [*range(20)]
    assert wait_until(lambda: open_files() <= before)


def test_a_worker_that_dies_with_a_large_unread_batch_is_named() -> None:
    """Other workers also have the pipe open, so reading a half-written value from it would block."""
    made = by_processes(Large(), [[-1]] * 20, 2, of="images/train")
    next(made)
    time.sleep(0.5)
    for process in loaders():
        process.kill()
    with pytest.raises(UserError, match="images/train ended by SIGKILL"):
        list(made)


@pytest.mark.parametrize(("key", "words"), [(-2, ["Too many open files", "ulimit -n"]), (-3, ["MemoryError", "lower"])])
def test_a_worker_without_memory_or_files_gives_a_message(key: int, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        list(by_processes(Large(), [[0], [key], [0]], 2, of="images/train"))
    assert all(word in str(caught.value) for word in [*words, "images/train"])
    assert "\n" not in str(caught.value)


def test_workers_that_cannot_start_give_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if one has started. Deleting the incomplete loader prints nothing."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    start, started = workers.LoaderProcess.start, []

    def start_one(process: LoaderProcess) -> None:
        started.append(process)
        if len(started) == 2:
            raise OSError(28, "No space left on device")
        start(process)

    monkeypatch.setattr(workers.LoaderProcess, "start", start_one)
    with pytest.raises(UserError, match=r"No space left on device.*/dev/shm"):
        list(by_processes(Large(), [[0]] * 4, 2))
    assert wait_until(lambda: not loaders(), 2)
    assert not unraisable


def test_the_end_of_the_fork_server_is_named() -> None:
    made = by_processes(Sleepers(), [[0]] * 4, 2, of="images/train")

    def kill_server() -> None:
        wait_until(lambda: len(loaders()) == 2)
        workers._kill_server()

    threading.Thread(target=kill_server).start()
    with pytest.raises(UserError, match="the process that starts the worker processes for images/train has ended"):
        next(made)
    assert wait_until(lambda: not loaders(), 2)


def test_a_late_first_batch_is_logged_with_the_state_of_the_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "STALLED_AFTER", 0.5)
    made = by_processes(Sleepers(), [[0], [1]], 2, of="images/train")

    def kill_workers() -> None:
        wait_until(lambda: "2 worker processes" in caplog.text and "sleeps" in caplog.text, 120)
        for process in loaders():
            process.kill()

    threading.Thread(target=kill_workers).start()
    with pytest.raises(UserError, match="SIGKILL"):
        next(made)
    assert re.search(r"waiting for 2 worker processes \(\d+ \w+, .*\) that read images/train", caplog.text)
    assert workers._state(os.getpid()) == "computes"
    assert workers._state(2**22) == "has ended"


def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "from mae_fast.data.workers import by_processes\n"
        "from data.test_workers import Numbers\n"
        "import time\n"
        "made = by_processes(Numbers(), [[0]] * 100, 2)\n"
        "print(*next(made), *next(made), flush=True)\n"
        "time.sleep(100)\n"
    )
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(set(pids)) == 2
        assert all(map(running, pids))
        process.kill()
    assert wait_until(lambda: not any(map(running, pids)))


def test_prefetching_threads_keep_the_order_and_end() -> None:
    started: list[int] = []

    def make(i: int) -> int:
        started.append(i)
        return i * i

    made = by_threads(range(1000), make, 3)
    assert [next(made) for _ in range(5)] == [0, 1, 4, 9, 16]
    made.close()
    assert len(started) < 12
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mae_fast.data")]

    def fail(i: int) -> int:
        raise UserError("one line")

    for threads in (0, 1):
        with pytest.raises(UserError, match="one line"):
            next(by_threads(range(3), fail, threads))


def test_a_thread_that_hangs_does_not_keep_the_process_alive() -> None:
    code = (
        "import time\n"
        "from mae_fast.data import workers\n"
        "workers.JOIN_TIMEOUT = 0.2\n"
        "made = workers.by_threads(range(9), lambda i: time.sleep(1000 * i), 2, 'images/train')\n"
        "next(made)\n"
        "time.sleep(0.5)\n"
        "made.close()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "2 threads that read images/train did not end (at <string>:4" in ended.stderr


def test_a_long_wait_for_a_batch_is_logged_with_its_cause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "STALLED_AFTER", 0.2)

    def slow() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.7 if i == 1 else 0)
            yield i

    assert list(watched(slow(), lambda: "somebody")) == [0, 1, 2]
    told = list(caplog.messages)
    caplog.clear()
    assert 1 <= len(told) <= 2  # after 0.2 s, and after 0.4 s
    assert all("no batch has come for" in line and "waiting for somebody" in line for line in told)
    for batch in watched(iter(range(3)), lambda: "somebody"):
        time.sleep(0.4 if batch == 1 else 0)  # the caller is slow, not the loader
    assert not caplog.messages
    monkeypatch.setattr(workers, "STALLED_AFTER", 0.4)
    made = by_threads([0.0, 1.5], time.sleep, 1, "images/train")
    assert list(made) == [None, None]
    assert "1 threads (at " in caplog.text


def test_evaluation_starts_workers_while_dali_pipelines_live(jpegs: Source) -> None:
    options = {"size": (32, 32), "channels": 3, "batch_size": 4}
    training = training_batches(jpegs, num_patches=4, epochs=9, seed=0, decoder="dali", num_workers=2, **options)
    for _ in range(3):
        next(training)
        images = sum(len(batch.images) for batch in evaluation_batches(jpegs, num_workers=2, **options))
        assert images == len(jpegs)
    training.close()


def test_a_fork_by_other_code_does_not_destroy_dali_pipelines(jpegs: Source) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mae_fast.data.loader import LoaderConfig, training_batches\n"
        "from mae_fast.data.sources import open_source\n"
        "def batches(threads):\n"
        "    config = LoaderConfig(size=(32, 32), batch_size=4, epochs=9, decoder='dali', num_workers=threads)\n"
        "    return training_batches(open_source(Path(sys.argv[1])), config, num_patches=4)\n"
        "made = [batches(2), batches(0)]\n"
        "for each in made: next(each), next(each)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    del made\n"
        "    os._exit(7)\n"  # as in a child of multiprocessing
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        "for each in made: next(each)\n"
    )
    line = [sys.executable, "-c", code, str(jpegs.root)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "7\n"), ended.stderr


def test_cached_pixels_are_mapped_by_workers_not_copied(jpegs: Source) -> None:
    cached = Cached(jpegs)
    options = {"size": (32, 32), "channels": 3, "num_patches": 4, "batch_size": 4, "epochs": 1, "seed": 0}
    own, theirs = (list(training_batches(cached, num_workers=n, **options)) for n in (0, 2))
    for a, b in zip(own, theirs, strict=True):
        assert torch.equal(a.images, b.images)
    sent = {name: value for name, value in cached.__getstate__().items() if name != "descriptor"}
    assert len(pickle.dumps(sent)) < 10_000 < cached.ends[-1]
