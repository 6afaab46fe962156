"""Shows what the library logs."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


class ConsoleHandler(logging.Handler):
    """Prints messages as they are to standard output; warnings and errors, with a prefix, to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        prefix = f"mae-fast: {record.levelname.lower()}: " if warning else ""
        try:
            print(prefix + self.format(record), file=sys.stderr if warning else sys.stdout, flush=True)
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

    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
