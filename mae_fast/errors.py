"""Errors that users can fix."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# What ``pip install 'mae_fast[train]'`` adds, as it is imported.
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
            "the connection to another process is lost: that one, or its host, has ended",
            "see its last lines; run the same line again to go on",
        )


def block(error: UserError, verb: str) -> str:
    """The error as the command line prints it: two lines. Without a hint, the second one names the help of ``verb``."""
    message, hint = (re.sub(r"\s*\n\s*", " ", text.strip()) for text in (error.message, error.hint or ""))
    return f"error: {message}\nhint: {hint or f'see {verb} --help'}"


@contextmanager
def train_packages() -> Iterator[None]:
    """Within this, a missing package of ``mae_fast[train]`` is a ``UserError``."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in TRAIN_PACKAGES:
            raise
        raise UserError(f"this needs {name}, which is not installed", "pip install 'mae_fast[train]'") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
