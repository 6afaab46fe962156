"""What users are told: the one exception for mistakes that they can fix, and warnings."""

import sys


class UserError(Exception):
    """A bad input, told in one line: what was given, what was expected, how to fix it.

    The command line prints the line and exits with status 2; no traceback.
    """


def warn(message: str) -> None:
    """One line to standard error."""
    print(f"mae-fast: warning: {message}", file=sys.stderr)
