"""The other verbs from the command line, on every kind of data; and that the table of runs has all it must have."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import run_matrix
from run_matrix import CLASSIFIERS, COLUMNS, EXCLUDED, FORMATS, ROWS, SAMPLE, TRAINERS, Row, pairs, parameters, possible


@pytest.mark.parametrize("row", parameters([row for row in ROWS if row.verb not in CLASSIFIERS]))
def test_the_run_ends_with_all_its_figures_and_leaves_no_process(
    row: Row, check: Callable[[Row, Path], None], tmp_path: Path
) -> None:
    check(row, tmp_path)


def test_every_possible_pair_of_values_occurs_in_a_run() -> None:
    plain = [row.values for row in ROWS if not row.flags]
    assert len(plain) == len(set(plain))
    assert set(plain) <= set(possible())
    wanted, there = (set().union(*map(pairs, rows)) for rows in (possible(), plain))
    assert wanted == there


def test_the_sample_has_every_value_and_a_resumed_run_of_every_verb_that_trains() -> None:
    assert {str(row) for row in ROWS} >= SAMPLE
    sample = [row for row in ROWS if str(row) in SAMPLE]
    assert [{row[column] for row in sample} for column in range(len(COLUMNS))] == [set(values) for values in COLUMNS]
    assert {row.verb for row in sample if row.course == "resumed"} == set(TRAINERS)
    assert {row.verb for row in sample if row.decoder == "dali"} == {"pretrain", *CLASSIFIERS}


def test_every_classifier_trains_on_every_kind_of_jpeg_with_dali_and_workers() -> None:
    """Three values at once: evaluation then starts processes while DALI's threads are alive."""
    kinds = [kind for kind in COLUMNS[1] if "jpg" in FORMATS.get(str(kind), ("jpg",))]
    assert kinds == ["jpeg", "mixed", "shards", "dataset"]
    there = {row[:4] for row in ROWS if not row.flags}
    assert {(verb, kind, "dali", 2) for verb in CLASSIFIERS for kind in kinds} <= there


def test_excluded_pairs_are_values_of_two_columns_and_have_a_reason() -> None:
    column = {value: number for number, values in enumerate(COLUMNS) for value in values}
    assert all(column[first] < column[second] for first, second in EXCLUDED)
    assert all(EXCLUDED.values())


SLEEPS = "import time; time.sleep(600)"
STARTS_ANOTHER = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); print('started')"


def test_a_run_that_hangs_fails_with_the_stacks_of_all_its_processes_which_are_killed(tmp_path: Path) -> None:
    line = [sys.executable, "-c", f"{STARTS_ANOTHER}; {SLEEPS}"]
    with pytest.raises(pytest.fail.Exception) as failure:
        run_matrix.finish(line, tmp_path / "output.txt", 1.5)
    said = str(failure.value)
    assert "is not done after 1.5 s. Its output:\nstarted\n" in said
    assert said.count('File "<string>", line 1 in <module>') == 2
    processes = re.findall(r"^process (\d+): ", said, re.M)
    assert len(processes) == 2
    assert not run_matrix.alive(int(processes[0]))


def test_a_run_that_leaves_a_process_behind_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_matrix, "GRACE", 0.2)
    with pytest.raises(pytest.fail.Exception, match=r"left processes behind:\n\d+: .*sleep"):
        run_matrix.finish([sys.executable, "-c", STARTS_ANOTHER], tmp_path / "output.txt", 60)


def test_a_run_that_fails_shows_its_output(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"ended with status 1\. Its output:\n(?s:.*)ZeroDivisionError"):
        run_matrix.finish([sys.executable, "-c", "1 / 0"], tmp_path / "output.txt", 60)
