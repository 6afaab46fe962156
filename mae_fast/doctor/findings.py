"""What doctor finds: a row each, with a verdict and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError


@dataclass(frozen=True)
class Finding:
    """What was looked at, and found.

    Attributes:
        fix: what would be better, if anything.
        bad: whether training is refused or crawls without the fix.
    """

    what: str
    found: str
    fix: str = ""
    bad: bool = False

    @property
    def verdict(self) -> str:
        """A word: "ok", "note" or "problem"."""
        return "problem" if self.bad else "note" if self.fix else "ok"

    @classmethod
    def refused(cls, what: str, error: UserError) -> "Finding":
        """A problem in the words that training would end with."""
        return cls(what, error.message, error.hint or "see --help", bad=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*columns, title=title, show_header=any(columns), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def show_findings(title: str, findings: Sequence[Finding]) -> None:
    """Print a table of them."""
    show(title, ("", "found", "", "what to do"), [(f.what, f.found, f.verdict, f.fix) for f in findings])


def tally(findings: Sequence[Finding]) -> str:
    """How many of them are problems, and how many are notes."""
    verdicts = [f.verdict for f in findings]
    return f"problems: {verdicts.count('problem')}, notes: {verdicts.count('note')}"
