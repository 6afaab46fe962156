"""Fixtures for the tests of conversion."""

import pytest

from mae_fast.weights import convert
from mae_fast.weights.convert_files import save_weights
from mae_fast.weights.metadata import ModelMetadata
from mae_fast.weights.verify import differences


@pytest.fixture
def outputs_differ_by(tmp_path):
    """A function that writes weights, reads them with a library, and returns the differences of outputs in fp64."""

    def measure(model, layout, weights=None):
        path = tmp_path / "x.safetensors"
        save_weights(
            path,
            layout,
            weights or convert(model.state_dict(), "ours", layout).weights,
            ModelMetadata.from_model(model),
            None,
        )
        return differences(model, layout, path, model, ModelMetadata.from_model(model))

    return measure
