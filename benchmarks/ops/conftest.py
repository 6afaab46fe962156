"""The option ``--seconds``: a time limit after which no further benchmark starts."""

import math
import time

import pytest

START = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=math.inf, help="skip benchmarks after this many seconds")


@pytest.fixture(autouse=True)
def within_seconds(request):
    if time.monotonic() - START > request.config.getoption("--seconds"):
        pytest.skip(f"{request.node.name}: time limit of --seconds reached")
