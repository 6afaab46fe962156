"""``--seconds``: benchmarks that do not begin within them are skipped."""

import math
import time

import pytest

START = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=math.inf, help="begin no benchmark later than that")


@pytest.fixture(autouse=True)
def within_seconds(request):
    if time.monotonic() - START > request.config.getoption("--seconds"):
        pytest.skip(f"{request.node.name}: the budget is spent")
