"""``python -m mae_fast``, and the script ``mae-fast``."""

import os
import signal
import sys
from types import FrameType

from .console import checked_output
from .errors import UserError, block, train_packages
from .files import remove_parts


def main() -> None:
    """Run the command line. Without its packages, print how to install them."""
    _open_standard_streams()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    try:
        with train_packages():
            from .cli import main as command_line
    except UserError as error:
        print(block(error, "mae-fast"), file=sys.stderr)
        sys.exit(2)
    if signal.getsignal(signal.SIGINT) == _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with checked_output():
        command_line()


def _open_standard_streams() -> None:
    """Open /dev/null for each standard stream that is closed.

    Otherwise the next file that is opened, such as a checkpoint, would get its descriptor, and libraries would print
    into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _end(number: int, frame: FrameType | None) -> None:
    """Remove unfinished files and exit immediately, with the exit status of an interrupted training run.

    This does not raise an exception, because a library that tries several imports could swallow it.
    """
    if os.environ.get("RANK", "0") == "0":  # under torchrun, only one process prints the message
        os.write(2, f"mae-fast: ended by {signal.Signals(number).name}\n".encode())
    remove_parts()
    os._exit(130 if number == signal.SIGINT else 143)


if __name__ == "__main__":
    main()
