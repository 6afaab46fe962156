"""Handle the signals that end a run, so that the run is saved first.

The training loop checks ``caught`` between steps. Waits, such as for a batch, are ``interruptible``:

- In a single process, the signal raises ``Stop`` immediately. The run is in the state after its last step and can be
  saved.
- Several processes must save the same step, so they continue until they agree (``DistContext.any``).
- If the wait does not end within ``GRACE`` seconds, a thread ends the process, because the main thread hangs in a
  library, or because a batch never arrives. A single process saves the run even then.
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

# Seconds between a signal and the end of a process that does not react. Docker sends SIGKILL after 10 s, schedulers and
# torchrun after 30 s. A single process needs some of this time to save. Several processes only wait for each other.
GRACE = 3.0
GRACE_OF_SEVERAL = 15.0
# Seconds after Ctrl-C in which a second SIGINT is ignored: a wrapper may forward the one that the process already got.
SAME_SIGNAL = 1.0


class Stop(BaseException):
    """A signal has ended a wait. It is not an ``Exception``, so that handlers of decoding errors do not catch it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C has ended a run, and the run has logged it."""


class Signals:
    """Stores the first signal in ``caught``. A second Ctrl-C, after ``SAME_SIGNAL``, interrupts immediately.

    Python delivers signals to the main thread. In other threads, this class does nothing.

    Attributes:
        alone: whether the run has a single process.
    """

    caught: signal.Signals | None = None
    caught_at = 0.0
    alone = True
    waiting_since: float | None = None  # start of the current ``interruptible`` or ``guarded`` block
    immediate = False  # whether a signal ends this block immediately
    rescue: Callable[[], None] | None = None  # the ``rescue`` of this block

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a thread ends the process, to stop the main thread

    def __enter__(self) -> "Signals":
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            logger.warning("training is not in the main thread, so signals end it without saving")
            return self
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # set by nohup
        self.before = {name: signal.signal(name, self._note) for name in END_SIGNALS if name not in ignored}
        # Python calls handlers between two lines of the main thread. If the main thread hangs in a library, this thread
        # still gets the signal.
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
        """Context for code that may take long and does not change the run.

        Args:
            rescue: saves the run. In a single process, a thread calls it after ``GRACE``. None: the ``rescue`` of the
                surrounding ``guarded`` block, if any.

        Raises:
            Stop: in a single process, on a signal or if one has been caught before.
        """
        with self._waiting(rescue):
            self.immediate = self.alone
            if self.caught and self.immediate:
                raise Stop
            yield

    def guarded(self, rescue: Callable[[], None]) -> AbstractContextManager[None]:
        """Context for code that a signal must not interrupt. A single process abandons it after ``GRACE``.

        Args:
            rescue: as in ``interruptible``.
        """
        return self._waiting(rescue) if self.alone else nullcontext()

    @contextmanager
    def _waiting(self, rescue: Callable[[], None] | None) -> Iterator[None]:
        outer = self.rescue, self.waiting_since, self.immediate
        self.rescue, self.waiting_since = rescue or self.rescue, time.monotonic()
        try:
            yield
        finally:
            self.immediate = False  # first, so that a signal does not interrupt the next lines
            with self.lock:
                self.rescue, self.waiting_since, self.immediate = outer

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.caught is None:
            self.caught, self.caught_at = signal.Signals(number), now
            if self.immediate:
                raise Stop
        elif self.caught == number == signal.SIGINT and now - self.caught_at > SAME_SIGNAL:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """After a signal, end the process if a wait lasts for ``GRACE`` seconds."""
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
        end = "saved without the unfinished step: run the same command again to resume"
        if not saved:
            end = "it ends without saving, so the run resumes from its last checkpoint"
        logger.warning(f"{number.name}: the process did not react for {self.grace:g} s; {end}")
        sys.stdout.flush()
        kill_all()
        os._exit(self.exit_status())

    @property
    def grace(self) -> float:
        return GRACE if self.alone else GRACE_OF_SEVERAL

    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after other signals. Both tell a scheduler that it may restart the run."""
        return 128 + (signal.SIGINT if self.caught == signal.SIGINT else signal.SIGTERM)
