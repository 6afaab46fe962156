"""Checks of flags that verbs share."""

from ..errors import UserError


def at_least(**flags: tuple[int, int]) -> None:
    """Raise ``UserError`` for a flag whose value is below its smallest one: ``name=(value, smallest)``."""
    for name, (value, least) in flags.items():
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}", f"give {least} or more")
