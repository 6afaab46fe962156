"""Fine-tuning, partial fine-tuning and linear probing from the command line, on every kind of data."""

from collections.abc import Callable
from pathlib import Path

import pytest
from run_matrix import CLASSIFIERS, ROWS, Row, parameters


@pytest.mark.parametrize("row", parameters([row for row in ROWS if row.verb in CLASSIFIERS]))
def test_the_run_ends_with_all_its_figures_and_leaves_no_process(
    row: Row, check: Callable[[Row, Path], None], tmp_path: Path
) -> None:
    check(row, tmp_path)
