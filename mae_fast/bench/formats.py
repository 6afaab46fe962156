"""Markdown tables and figures for benchmarks and studies."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import UserError


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. The first column is left-aligned, the others are right-aligned."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def cell(row: Mapping[str, Any], key: str, unit: float = 1, form: str = ".2f") -> str:
    """The value ``key`` of a row, divided by ``unit``, as text; "-" if it is missing."""
    return "-" if row.get(key) is None else f"{row[key] / unit:{form}}"


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of this size in inches.

    Raises:
        UserError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib, which is not installed", "pip install 'mae_fast[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")
