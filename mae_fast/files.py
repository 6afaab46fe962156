"""Files that are whole or not there."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_parts: set[Path] = set()  # the unfinished files


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces ``path`` at the end. After an error or a kill, ``path`` is as it was.

    An error about a full disk names ``path``.
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
    """The unfinished file that ``atomic_write`` makes for ``path``."""
    return path.with_name(path.name + ".part")


def remove_parts() -> None:
    """Remove the unfinished files of this process. For a process that ends without unwinding its stack."""
    for part in tuple(_parts):
        with suppress(OSError):
            part.unlink()
