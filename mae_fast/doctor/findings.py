"""The findings of ``mae-fast doctor``: table rows with a verdict and a fix."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        what: the subject of the check.
        found: its result.
        fix: what to do about it; empty if there is nothing to do.
        bad: whether training fails or is very slow without the fix.
    """

    what: str
    found: str
    fix: str = ""
    bad: bool = False

    @property
    def verdict(self) -> str:
        """One of "ok", "note" or "problem"."""
        return "problem" if self.bad else "note" if self.fix else "ok"

    @classmethod
    def refused(cls, what: str, error: UserError) -> "Finding":
        """A problem, from an error that training would raise."""
        return cls(what, error.message, error.hint or "see --help", bad=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*columns, title=title, show_header=any(columns), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    with console.capture() as text:  # if rich printed to a closed pipe, it would exit with its own status
        console.print(table)
    print(text.get(), end="")


def show_findings(title: str, findings: Sequence[Finding]) -> None:
    """Print a table of findings."""
    show(title, ("check", "found", "verdict", "fix"), [(f.what, f.found, f.verdict, f.fix) for f in findings])


def tally(findings: Sequence[Finding]) -> str:
    """The number of problems and notes, as text."""
    verdicts = [f.verdict for f in findings]
    return f"problems: {verdicts.count('problem')}, notes: {verdicts.count('note')}"
