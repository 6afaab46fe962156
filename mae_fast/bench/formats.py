"""Markdown tables and figures, as all benchmarks and studies write them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import UserError


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text, and whose other columns are figures."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def cell(row: Mapping[str, Any], key: str, unit: float = 1, form: str = ".2f") -> str:
    """A figure of a row, in units of ``unit``; "-" if it is missing."""
    return "-" if row.get(key) is None else f"{row[key] / unit:{form}}"


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, sizes in inches.

    Raises:
        UserError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib", "pip install 'mae_fast[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")
