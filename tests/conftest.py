"""Settings shared by all tests."""

from hypothesis import settings

# Shared machines stall: a slow example is not a failure. Examples are the same in every run.
settings.register_profile("mae_fast", deadline=None, derandomize=True)
settings.load_profile("mae_fast")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=25, help="how often runs are killed at random times")
    parser.addoption("--every-operation", action="store_true", help="have each operation on a file of a run fail")
    parser.addoption("--exhaustive", action="store_true", help="every case of the GPU proof")
