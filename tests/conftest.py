"""Settings shared by all tests."""

import logging

import pytest
from hypothesis import settings

# Shared machines stall: a slow example is not a failure. Examples are the same in every run.
settings.register_profile("mae_fast", deadline=None, derandomize=True)
settings.load_profile("mae_fast")


@pytest.fixture(autouse=True)
def log_messages(caplog):
    """Let ``caplog`` capture the package's messages from level INFO."""
    caplog.set_level(logging.INFO, logger="mae_fast")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="number of times that runs are killed at random")
    parser.addoption("--configurations", type=int, default=500, help="number of generated configurations")
    parser.addoption("--every-operation", action="store_true", help="fail each file operation of a run in turn")
    parser.addoption("--run-limit", type=float, default=120, help="time limit of a run of the matrix, in seconds")
    parser.addoption("--exhaustive", action="store_true", help="also run the exhaustive tests and all cases of the ops")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("exhaustive"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("exhaustive")])
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


@pytest.fixture(scope="session")
def budget_table(pytestconfig):
    """Resources of GPU kernels by name and case, printed at the end of an exhaustive run (with -s)."""
    rows = {}
    yield rows
    if pytestconfig.getoption("exhaustive") and rows:
        figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))  # some kernels have fewer
        lines = [["kernel and case", *figures]]
        lines += [[name, *(str(row.get(figure, "")) for figure in figures)] for name, row in sorted(rows.items())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
