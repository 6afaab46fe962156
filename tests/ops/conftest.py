import pytest
import torch


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """Torch fills fresh memory with NaN (integers: their maximum), so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
