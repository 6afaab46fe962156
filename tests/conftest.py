"""Settings shared by all tests."""

from hypothesis import settings

# Shared machines stall: a slow example is not a failure. Examples are the same in every run.
settings.register_profile("mae_fast", deadline=None, derandomize=True)
settings.load_profile("mae_fast")
