"""Runs jobs in parallel processes of one thread each, and stores their results in files."""

import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

from ..files import atomic_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A call ``function(*args)``.

    Attributes:
        path: file for the result, as JSON.
        after: results of other jobs that must exist first.
    """

    path: Path
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    after: tuple[Path, ...] = ()

    def run(self) -> None:
        """Call the function and write its result."""
        found = self.function(*self.args)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as part:
            part.write_text(json.dumps(found, indent=1) + "\n")


def run_jobs(jobs: Sequence[Job], processes: int) -> list[str]:
    """Run the jobs without a result. Returns the names of the jobs that failed or could not start.

    Each process has one thread: for small models, more processes are faster than more threads.

    Args:
        processes: number of jobs that run at the same time; 0: run them one by one in this process.
    """
    pending = [job for job in jobs if not job.path.exists()]
    context = get_context("forkserver")  # the server imports torch once
    context.set_forkserver_preload([__name__, *sorted({job.function.__module__ for job in pending})])
    running: dict[Any, tuple[Job, Any]] = {}
    try:
        while pending or running:
            ready = next((job for job in pending if all(path.exists() for path in job.after)), None)
            if ready and len(running) < max(1, processes):
                pending.remove(ready)
                if not processes:
                    _run(ready)
                    continue
                process = context.Process(target=_serve, args=(ready, logger.getEffectiveLevel()))
                process.start()
                running[process.sentinel] = ready, process
                logger.info("started %s, %d jobs left", ready.path.stem, len(pending))
            elif running:
                for sentinel in wait(list(running)):
                    running.pop(sentinel)[1].join()
            else:
                break  # the remaining jobs need the result of a failed job
    finally:  # after a signal, the runs save a checkpoint and can be resumed
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
    return [job.path.stem for job in jobs if not job.path.exists()]


def _serve(job: Job, level: int) -> None:
    import torch

    from ..console import show_messages

    show_messages()
    logging.getLogger("mae_fast").setLevel(max(level, logging.WARNING))
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()
    _run(job)


def _end_with_parent() -> None:
    """Wait for the parent process to end, then send SIGTERM to this process, so that its run is saved."""
    parent = parent_process()
    assert parent
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(job: Job) -> None:
    """Run a job. An error is logged, not raised, so that the other jobs still run."""
    try:
        job.run()
    except Exception:
        logger.exception("%s failed", job.path.stem)
    else:
        logger.info("%s is finished", job.path.stem)
