"""Atomic writes: a file is complete, or it does not exist."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_parts: set[Path] = set()  # unfinished files


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager: yield a temporary path, which replaces ``path`` at the end.

    After an error or a kill, ``path`` is unchanged. An error about a full disk names ``path``.
    """
    part = part_of(path)
    _parts.add(part)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = error.filename or str(path)
        raise
    finally:
        _parts.discard(part)


def part_of(path: Path) -> Path:
    """The temporary path that ``atomic_write`` uses for ``path``."""
    return path.with_name(path.name + ".part")


def remove_parts() -> None:
    """Remove the unfinished files of this process, before it exits without unwinding its stack."""
    for part in tuple(_parts):
        with suppress(OSError):
            part.unlink()
