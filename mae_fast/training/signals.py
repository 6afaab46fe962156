"""Handles the signals that ask a run to end: the run is saved first.

The loop checks ``caught`` between steps. Waits, such as for a batch, are ``interruptible``:

- One process: the signal raises ``Stop`` at once. The run is in the state after its last step, and can be saved.
- Several: all must save the same step, so they go on until they agree (``Processes.any``).
- If the wait still goes on after ``GRACE`` seconds, a thread ends the process: the main thread hangs in a library, or
  one of several processes waits for a batch that never comes. A single process saves even then.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType, TracebackType
from typing import Any

from ..data.workers import END_SIGNALS, kill_all

logger = logging.getLogger(__name__)

# Seconds between a signal and the end of a process that does not answer. Docker sends SIGKILL after 10 s, schedulers
# and torchrun after 30 s. A single process saves, which takes time; several only wait for each other.
GRACE = 3.0
GRACE_OF_SEVERAL = 15.0
# Seconds after Ctrl-C in which another SIGINT is the same one: a wrapper may forward what its process group got, too.
SAME_SIGNAL = 1.0


class Stop(BaseException):
    """A signal has ended a wait. Not an ``Exception``, so that handlers of decoding errors do not catch it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C has ended a run, which has said so."""


class Signals:
    """Notes the first signal in ``caught``; a second Ctrl-C, after ``SAME_SIGNAL``, interrupts at once.

    Python delivers signals to the main thread. In another thread, this class does nothing.

    Attributes:
        alone: whether no other process takes part.
    """

    caught: signal.Signals | None = None
    caught_at = 0.0
    alone = True
    waiting_since: float | None = None  # in ``interruptible`` or ``guarded``
    at_once = False  # whether a signal ends that at once
    rescue: Callable[[], None] | None = None  # its

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a thread ends the process, so that the main one does not go on

    def __enter__(self) -> "Signals":
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            logger.warning("training does not run in the main thread: signals end it without a save")
            return self
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by nohup
        self.before = {name: signal.signal(name, self._note) for name in END_SIGNALS if name not in ignored}
        # Python calls handlers between two lines of the main thread; if that hangs in a library, this thread still
        # learns of the signal.
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.wakeup_before = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="mae_fast.signals", daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.before:
            return
        self.ended.set()
        signal.set_wakeup_fd(self.wakeup_before)
        os.close(self.write_end)
        self.thread.join()
        os.close(self.read_end)
        for name, handler in self.before.items():
            signal.signal(name, handler)

    @contextmanager
    def interruptible(self, rescue: Callable[[], None] | None = None) -> Iterator[None]:
        """Around what may take long and changes nothing of the run.

        Args:
            rescue: saves the run; called by a thread, after ``GRACE``, if no other process takes part. None: that of
                the ``guarded`` block around this, if any.

        Raises:
            Stop: on a signal, also an earlier one, if no other process takes part.
        """
        with self._waiting(rescue):
            self.at_once = self.alone
            if self.caught and self.at_once:
                raise Stop
            yield

    def guarded(self, rescue: Callable[[], None]) -> AbstractContextManager[None]:
        """Around what a signal must not interrupt, but which is left after ``GRACE``, if no other process takes part.

        Args:
            rescue: as in ``interruptible``.
        """
        return self._waiting(rescue) if self.alone else nullcontext()

    @contextmanager
    def _waiting(self, rescue: Callable[[], None] | None) -> Iterator[None]:
        outer = self.rescue, self.waiting_since, self.at_once
        self.rescue, self.waiting_since = rescue or self.rescue, time.monotonic()
        try:
            yield
        finally:
            self.at_once = False  # first: a signal in the next lines must not end them
            with self.lock:
                self.rescue, self.waiting_since, self.at_once = outer

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.caught is None:
            self.caught, self.caught_at = signal.Signals(number), now
            if self.at_once:
                raise Stop
        elif self.caught == number == signal.SIGINT and now - self.caught_at > SAME_SIGNAL:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """After a signal, end the process if one wait lasts for ``GRACE`` seconds."""
        while (number := os.read(self.read_end, 1)) and number[0] not in self.before:
            pass
        start = time.monotonic()
        while number and not self.ended.wait(0.2):
            with self.lock:
                since = self.waiting_since
                if since is not None and time.monotonic() - max(since, start) > self.grace:
                    self._end(signal.Signals(number[0]))

    def _end(self, number: signal.Signals) -> None:
        self.caught, saved = number, False
        if self.rescue and self.alone:
            with suppress(Exception):
                self.rescue()
                saved = True
        end = "saved without its unfinished step: run the same line again to go on"
        if not saved:
            end = "it ends without a save: the last checkpoint is the newest"
        logger.warning(f"{number.name}: the process is busy for more than {self.grace:g} s; {end}")
        sys.stdout.flush()
        kill_all()
        os._exit(self.exit_status())

    @property
    def grace(self) -> float:
        return GRACE if self.alone else GRACE_OF_SEVERAL

    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after the others: to a scheduler, either means that it may start the run again."""
        return 128 + (signal.SIGINT if self.caught == signal.SIGINT else signal.SIGTERM)
