from collections import defaultdict
from itertools import combinations

import pytest
import torch

SMALL_GRID = 16  # a test with no more cases runs all of them


def pytest_collection_modifyitems(config, items):
    """Without --exhaustive, each test runs some of its cases, in which any two values of its parameters meet."""
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
    """Keys of ``sets`` whose sets have all that there is, the one with most that is new first."""
    missing, chosen = set().union(*sets.values()), set()
    if not missing:  # one parameter has no pairs
        return sets.keys()
    while missing:
        best = max(sets, key=lambda name: len(sets[name] & missing))
        chosen.add(best)
        missing -= sets[best]
    return chosen


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """Torch fills fresh memory with NaN (integers: their maximum), so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
