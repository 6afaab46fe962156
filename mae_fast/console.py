"""Shows what the library logs."""

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

CLOSED_PIPE = 141  # exit status; shells give it to programs that SIGPIPE has ended


class ConsoleHandler(logging.Handler):
    """Prints messages as they are to standard output; warnings and errors, with a prefix, to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        prefix = f"mae-fast: {record.levelname.lower()}: " if warning else ""
        try:
            print(prefix + self.format(record), file=sys.stderr if warning else sys.stdout, flush=True)
        except OSError:  # as ``print`` does: a closed pipe ends the verbs that do not train
            raise
        except Exception:
            self.handleError(record)


def show_messages() -> None:
    """Print the messages of the logger ``mae_fast``, unless it has a handler of its own already.

    From INFO on, or from the level in the environment variable ``MAE_FAST_LOG_LEVEL``.
    """
    logger = logging.getLogger("mae_fast")
    if not logger.handlers:
        logger.addHandler(ConsoleHandler())
        level = logging.getLevelName(os.environ.get("MAE_FAST_LOG_LEVEL", "").upper())
        logger.setLevel(level if isinstance(level, int) else logging.INFO)  # a text if the level is unknown


# Read by these libraries when they are imported.
_QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",  # errors alone
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def silence_other_libraries() -> None:
    """Keep warnings and log messages of other libraries off the console of this process and of those that it starts.

    What they raise is not affected, nor are our own warnings. ``python -W default`` or ``PYTHONWARNINGS`` shows
    warnings, and handlers of the root logger get messages.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="mae_fast")
    root = logging.getLogger()
    if not root.handlers:  # without any, Python prints warnings to standard error
        root.addHandler(logging.NullHandler())
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def quieted(name: str) -> Iterator[None]:
    """Within this, warnings of the logger ``name`` are not logged."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def shown_messages() -> Iterator[None]:
    """Within this, print the messages of the logger ``mae_fast``, unless the program has set up ``logging``."""
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
    """A rich table as plain text of at most ``width`` characters a line, to be logged."""
    from rich.console import Console

    console = Console(width=width, color_system=None, force_jupyter=False)  # a notebook would get an empty output
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def discard(stream: Any) -> None:
    """Send all that is written to a standard stream to /dev/null, also what it has not written yet."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def output_is_closed() -> bool:
    """Whether standard output is a pipe whose reader is gone."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


@contextmanager
def checked_output() -> Iterator[None]:
    """Within this, a closed pipe ends the program without a message, as it ends other command line tools.

    Raises:
        SystemExit: with ``CLOSED_PIPE``; or with 2 after a message, if what is left at the end cannot be written.
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
    """A standard stream. When it cannot be written to, a warning says so, and what is written from then on is lost."""

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
    """Within this, a closed pipe, a lost terminal or a full disk for the output is not an error.

    Args:
        reason: why the program goes on, for the warning.
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
