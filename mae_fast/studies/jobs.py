"""Runs jobs in processes of one thread each, and keeps their results in files."""

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
    """``function(*args)``, whose result is JSON and goes to ``path``; it needs the results in ``after``."""

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
    """Run the jobs that have no result yet, ``processes`` at a time; the names of those that failed or cannot start.

    A process has one thread: a second thread gains little with a small model, a second process does.

    Args:
        processes: 0: run the jobs in this process.
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
                logger.info("started %s, %d more to go", ready.path.stem, len(pending))
            elif running:
                for sentinel in wait(list(running)):
                    running.pop(sentinel)[1].join()
            else:
                break  # what is left needs the result of a job that failed
    finally:  # after a signal: runs save themselves and can be resumed
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
    """End this process, as by a signal that lets a run save itself, when the one that started it is gone."""
    parent = parent_process()
    assert parent
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(job: Job) -> None:
    """Run a job. A failure is logged and not raised: the other jobs still count."""
    try:
        job.run()
    except Exception:
        logger.exception("%s failed", job.path.stem)
    else:
        logger.info("%s is finished", job.path.stem)
