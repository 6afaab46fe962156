"""``--seconds``: what is not begun within them is left out."""

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
