"""Signals that ask a run to end: it saves first."""

import signal
from types import FrameType, TracebackType
from typing import Any

CATCHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1: what SLURM is told to send before the end


class Signals:
    """Notes the first signal in ``caught``; a second Ctrl-C interrupts at once."""

    caught: signal.Signals | None = None

    def __enter__(self) -> "Signals":
        self.before: dict[signal.Signals, Any] = {name: signal.signal(name, self._note) for name in CATCHES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = self.caught or signal.Signals(number)

    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after the others: to a scheduler, either means that it may start the run again."""
        return 128 + (signal.SIGINT if self.caught == signal.SIGINT else signal.SIGTERM)
