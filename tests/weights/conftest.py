"""Shared by the tests of conversion."""

import pytest

from mae_fast.weights import convert
from mae_fast.weights.convert_files import save
from mae_fast.weights.metadata import Details
from mae_fast.weights.verify import differences


@pytest.fixture
def off(tmp_path):
    """How far a reader of a file with the weights of a model is from that model, in fp64."""

    def measure(model, layout, weights=None):
        path = tmp_path / "x.safetensors"
        save(path, layout, weights or convert(model.state_dict(), "ours", layout).weights, Details.of(model), None)
        return differences(model, layout, path, model, Details.of(model))

    return measure
