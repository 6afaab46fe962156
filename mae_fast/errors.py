"""Errors that users can fix."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Import names of the packages that ``pip install 'mae_fast[train]'`` adds.
TRAIN_PACKAGES = ("torchvision", "timm", "pydantic", "tyro", "rich", "PIL", "filelock", "torchmetrics")


class UserError(Exception):
    """A mistake that the user can fix. The command line prints it without a traceback and exits with status 2.

    Attributes:
        message: what was given and what was expected.
        hint: what to do about it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class LostProcess(UserError):
    """Another process of the run has ended."""

    def __init__(self) -> None:
        super().__init__(
            "lost the connection to another process: the process or its host has ended",
            "read the last output of that process; run the same command again to resume",
        )


def block(error: UserError, verb: str) -> str:
    """The two lines that the command line prints for an error. The default hint is the help of ``verb``."""
    message, hint = (re.sub(r"\s*\n\s*", " ", text.strip()) for text in (error.message, error.hint or ""))
    return f"error: {message}\nhint: {hint or f'see {verb} --help'}"


@contextmanager
def train_packages() -> Iterator[None]:
    """Context manager: turn the ``ImportError`` of a package of ``mae_fast[train]`` into a ``UserError``."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in TRAIN_PACKAGES:
            raise
        raise UserError(f"{name} is required but not installed", "pip install 'mae_fast[train]'") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)
