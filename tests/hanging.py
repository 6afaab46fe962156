"""``mae-fast`` with a fault when it reads images: ``HANG=HOW:AFTER:FOLDER python hanging.py VERB ...``.

In each process, after AFTER reads, the next read from a path that contains FOLDER does HOW:

- ``sleep`` hangs in Python, ``lock`` in a library that no signal interrupts;
- ``pause`` waits half a second;
- ``kill`` kills the process.

The fork server of loader processes imports this file, too.
"""

import ctypes
import os
import signal
import time

from mae_fast.data.sources import Files
from mae_fast.training import signals

how, after, folder = os.environ.get("HANG", "none:0:").split(":")
signals.GRACE = signals.GRACE_OF_SEVERAL = 2.0
read, count = Files.read, 0


def hang() -> None:
    if how == "sleep":
        time.sleep(1000)
    elif how == "lock":
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    elif how == "pause":
        time.sleep(0.5)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def hanging_read(self: Files, index: int) -> bytes:
    global count
    if folder in str(self.root):
        count += 1
        if count > int(after):
            os.write(1, b"hanging\n")  # a single write: print may mix the lines of two processes
            hang()
    return read(self, index)


if how != "none":
    Files.read = hanging_read

if __name__ == "__main__":
    from mae_fast.cli import main
    from mae_fast.data import workers

    workers.IMPORTS.append("hanging")
    main()
