"""Runs pre-training in processes that start fast: each is forked from a server that has imported everything.

A fault ``(n, how)`` makes the n-th file operation of the run fail, counted from 1. ``how`` is an errno, or 0 for
SIGKILL. Operations are Python's audit events (open, mkdir, rename, remove), each fsync, and for each safetensors file
three points: before it is written, half written, and after.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import timm.optim
import timm.scheduler  # noqa: F401

import mae_fast.cli  # noqa: F401
from mae_fast.__main__ import main
from mae_fast.training import checkpoint
from mae_fast.training.tasks import pretrain  # noqa: F401  # slow imports, done once in the server

AUDITED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
Fault = tuple[int, int]
# Starting a process also reads the exit status of all finished children, each from a pipe that can be read once. If two
# threads do this at the same time, one finds the pipe empty and reports status 255.
LOCK = threading.Lock()


class Operations:
    """Counts operations on files in ``root``, and makes one of them fail."""

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.root, self.fault = str(root), fault
        self.names: list[str] = []
        self.on = False
        sys.addaudithook(self._audit)

    def __enter__(self) -> "Operations":
        self.fsync, self.save_file = os.fsync, checkpoint.save_file
        os.fsync, checkpoint.save_file = self._fsync, self._save_file
        self.on = True
        return self

    def __exit__(self, *_: object) -> None:
        self.on = False
        os.fsync, checkpoint.save_file = self.fsync, self.save_file

    def _happens(self, name: str, path: str = "") -> None:
        self.names.append(name)
        if self.fault and len(self.names) == self.fault[0]:
            if not self.fault[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.fault[1], os.strerror(self.fault[1]), path or self.root)

    def _audit(self, event: str, arguments: tuple) -> None:
        if self.on and event in AUDITED:
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
            if path.startswith(self.root) or event in (
                "os.remove",
                "os.rmdir",
            ):  # these events may have a directory descriptor instead of a path
                self._happens(f"{event} {path.removeprefix(self.root)}", path if path.startswith(self.root) else "")

    def _fsync(self, descriptor: int) -> None:
        self._happens("fsync")
        self.fsync(descriptor)

    def _save_file(self, tensors: dict, path: Path, header: dict) -> None:
        name = f"safetensors {path.name}"
        self._happens(f"{name}, before")
        self.save_file(tensors, path, header)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        self._happens(f"{name}, half")
        path.write_bytes(whole)
        self._happens(f"{name}, after")


def words(images: Path, run: Path, **changes: object) -> list[str]:
    """A run of ten steps, five per epoch."""
    flags = {"data-path": images, "output-dir": run, "batch-size": 8, "epochs": 2, "warmup-epochs": 1} | {
        "log-every": 1, "save-every": 2, "num-workers": 0, "dtype": "fp32", "image-decoder": "pil", "ema-decay": 0.9,
    }  # fmt: skip
    return ["pretrain", "--preset", "tiny", *(f"--{name}={value}" for name, value in (flags | changes).items())]


def _run(words: list[str], output: Path, root: Path | None, fault: Fault | None) -> None:
    os.setsid()  # a process group of its own
    with output.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = ["mae-fast", *words]
    if root is None:
        main()
        return
    with Operations(root, fault) as operations:
        main()
    Path(f"{output}.operations").write_text("\n".join(operations.names))


def start(
    words: list[str], output: Path, root: Path | None = None, fault: Fault | None = None
) -> multiprocessing.process.BaseProcess:
    """Start ``mae-fast WORDS`` with one thread, and append its output to ``output``.

    With ``root``, the number of file operations in ``root`` is written to ``output.operations``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # The server, which the first call starts, takes its path and its threads from here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process = context.Process(target=_run, args=(words, output, root, fault))
        with LOCK:
            process.start()
    return process


def join(process: multiprocessing.process.BaseProcess, timeout: float | None = None) -> int | None:
    """Wait at most ``timeout`` seconds for the process. Returns the exit status, or None if it still runs."""
    wait([process.sentinel], timeout)
    with LOCK:
        return process.exitcode


def finish(words: list[str], output: Path, **options: object) -> str:
    """Run ``start`` until it exits, which must be with status 0. Returns the output."""
    begun = output.stat().st_size if output.exists() else 0
    process = start(words, output, **options)
    status = join(process)
    text = output.read_text()[begun:]
    assert status == 0, text
    return text


def until(output: Path, condition: Callable[[str], bool], process: multiprocessing.process.BaseProcess) -> str:
    """Wait until ``condition`` holds for the output."""
    while True:
        text = output.read_text() if output.exists() else ""
        if condition(text):
            return text
        assert join(process, 0) is None, text
        time.sleep(0.01)
