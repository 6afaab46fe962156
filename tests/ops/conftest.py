from collections import defaultdict
from itertools import combinations

import pytest
import torch

SMALL_GRID = 16  # tests with at most this many cases run all of them


def pytest_collection_modifyitems(config, items):
    """Without --exhaustive, run only a subset of the cases of each test that covers all pairs of parameter values."""
    if config.getoption("exhaustive"):
        return
    grids = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            grids[item.path, item.originalname].append(item)
    left_out = set()
    for grid in grids.values():
        if len(grid) > SMALL_GRID:
            values = {item: [(name, repr(x)) for name, x in sorted(item.callspec.params.items())] for item in grid}
            pairs = {item: set(combinations(of_item, 2)) for item, of_item in values.items()}
            left_out |= pairs.keys() - cover(pairs)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def cover(sets):
    """Choose keys greedily until the union of their sets is the union of all ``sets``."""
    missing, chosen = set().union(*sets.values()), set()
    if not missing:  # a single parameter has no pairs
        return sets.keys()
    while missing:
        best = max(sets, key=lambda name: len(sets[name] & missing))
        chosen.add(best)
        missing -= sets[best]
    return chosen


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """Make torch fill new memory with NaN (integers: the maximum), so that tests detect unwritten outputs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
