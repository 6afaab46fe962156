"""The one exception for mistakes that the user can fix."""


class UserError(Exception):
    """A bad input, told in one line: what was given, what was expected, how to fix it.

    The command line prints the line and exits with status 2; no traceback.
    """
