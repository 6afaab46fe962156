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
    """An error as the command line tells it: what and why, where, and the fix, a line each.

    The fix is what follows the last "; " of ``message``, or the last ": " before a word like "give" or "use"; the help
    of ``verb`` where there is none.
    """
    message = re.sub(r"\s*\n\s*", " ", message.strip())  # other libraries' have several lines
    *_, turn = _TURN.finditer(message) if _TURN.search(message) else [None]
    what, fix = (message[: turn.start()], message[turn.end() :]) if turn else (message, f"see {verb} --help")
    return f"mae-fast: error: {what}\n  where: {verb}\n  fix: {fix}"


def warn(message: str) -> None:
    """One line to standard error."""
    print(f"mae-fast: warning: {message}", file=sys.stderr)
