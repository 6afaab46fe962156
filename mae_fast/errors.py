"""What users are told: the one exception for mistakes that they can fix, how it is shown, and warnings."""

import re
import sys

# Where a message turns to what is to be done.
_TURN = re.compile(r"; |: (?=(?:add|choose|give|known|leave|lower|pip|remove|run|use) )")


class UserError(Exception):
    """A bad input, told in one sentence: what was given, what was expected; how to fix it.

    The command line prints it as ``block`` does and exits with status 2; no traceback.
    """


def block(message: str, verb: str) -> str:
    """An error as the command line tells it: what and why, where, and the fix, a line each; the help of ``verb`` where
    the message says none."""
    what, fix = split(message)
    return f"mae-fast: error: {what}\n  where: {verb}\n  fix: {fix or f'see {verb} --help'}"


def split(message: str) -> tuple[str, str]:
    """What is wrong, and the fix: what follows the last "; ", or the last ": " before a word like "give" or "use"."""
    message = re.sub(r"\s*\n\s*", " ", message.strip())  # other libraries' have several lines
    turns = list(_TURN.finditer(message))
    return (message[: turns[-1].start()], message[turns[-1].end() :]) if turns else (message, "")


def warn(message: str) -> None:
    """One line to standard error."""
    print(f"mae-fast: warning: {message}", file=sys.stderr)
