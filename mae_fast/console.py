"""Console output: shows the log messages of this package, and handles closed pipes and full disks."""

import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

CLOSED_PIPE = 141  # the exit status that shells report for a program that SIGPIPE has ended


class ConsoleHandler(logging.Handler):
    """Prints messages to standard output, and warnings and errors, with a prefix, to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        prefix = f"mae-fast: {record.levelname.lower()}: " if warning else ""
        try:
            print(prefix + self.format(record), file=sys.stderr if warning else sys.stdout, flush=True)
        except OSError:  # ``checked_output`` handles a closed pipe
            raise
        except Exception:
            self.handleError(record)


def show_messages() -> None:
    """Print the messages of the logger ``mae_fast``, unless it already has a handler.

    The level is INFO, or the one in the environment variable ``MAE_FAST_LOG_LEVEL``.
    """
    logger = logging.getLogger("mae_fast")
    if not logger.handlers:
        logger.addHandler(ConsoleHandler())
        level = logging.getLevelName(os.environ.get("MAE_FAST_LOG_LEVEL", "").upper())
        logger.setLevel(level if isinstance(level, int) else logging.INFO)  # a string if the level is unknown


# Environment variables that these libraries read when they are imported.
_QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",  # errors only
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def silence_other_libraries() -> None:
    """Hide warnings and log messages of other libraries, in this process and in its child processes.

    Exceptions and our own warnings are not affected. ``python -W default`` or ``PYTHONWARNINGS`` shows all warnings. A
    handler of the root logger still receives all messages.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="mae_fast")
    root = logging.getLogger()
    if not root.handlers:  # without a handler, Python prints logged warnings to standard error
        root.addHandler(logging.NullHandler())
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def quieted(name: str) -> Iterator[None]:
    """Context manager: ignore the warnings of the logger ``name``."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def shown_messages() -> Iterator[None]:
    """Context manager: print the messages of the logger ``mae_fast``, unless the program has set up ``logging``."""
    logger = logging.getLogger("mae_fast")
    if logger.hasHandlers():
        yield
        return
    level = logger.level
    show_messages()
    try:
        yield
    finally:
        logger.handlers.clear()
        logger.setLevel(level)


def table_text(table: "Table", width: int = 100) -> str:
    """Render a rich table as plain text, with lines of at most ``width`` characters, for logging."""
    from rich.console import Console

    # In a notebook, the default console would display an empty output.
    console = Console(width=width, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def discard(stream: Any) -> None:
    """Redirect a standard stream to /dev/null, including the part of its buffer that is not written yet."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def output_is_closed() -> bool:
    """Whether standard output is a pipe that its reader has closed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


@contextmanager
def checked_output() -> Iterator[None]:
    """Context manager: if standard output is a closed pipe, exit without a message, like other command line tools.

    Raises:
        SystemExit: with ``CLOSED_PIPE``. With 2, after a message, if the last output cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        if not output_is_closed():
            raise
        discard(sys.stdout)
        sys.exit(CLOSED_PIPE)
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            discard(sys.stdout)
            if isinstance(error, BrokenPipeError):
                sys.exit(CLOSED_PIPE)
            print(f"mae-fast: error: standard output cannot be written to ({error.strerror})", file=sys.stderr)
            sys.exit(2)


class _Dispensable:
    """A standard stream. After the first failed write it logs a warning and discards all further output."""

    def __init__(self, stream: Any, name: str, reason: str) -> None:
        self.stream, self.name, self.reason = stream, name, reason

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except OSError as error:
            discard(self.stream)
            logger.warning(f"{self.name} cannot be written to ({error.strerror}): {self.reason}")


@contextmanager
def dispensable_output(reason: str) -> Iterator[None]:
    """Context manager: continue when output fails because of a closed pipe, a lost terminal or a full disk.

    Args:
        reason: the last part of the warning: why the program continues.
    """
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = _Dispensable(sys.stdout, "standard output", reason)
    if sys.stderr is not None:
        sys.stderr = _Dispensable(sys.stderr, "standard error", reason)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
