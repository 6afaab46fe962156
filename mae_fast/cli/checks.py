"""Checks that several verbs share."""

from ..errors import UserError


def at_least(**flags: tuple[int, int]) -> None:
    """Raise ``UserError`` if the value of a flag is below its minimum: ``name=(value, minimum)``."""
    for name, (value, minimum) in flags.items():
        if value < minimum:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range", f"give {minimum} or more")
