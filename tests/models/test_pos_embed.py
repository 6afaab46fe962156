"""Position tables equal those of an independent numpy implementation and of transformers."""

import numpy as np
import pytest
import torch
from transformers import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from mae_fast.models.pos_embed import sincos_2d

GRIDS = [(14, 14), (1, 1), (3, 5), (7, 2), (1, 9)]


def by_loops(width, grid):
    """The table by loops over all values, in fp64."""
    quarter = width // 4
    table = np.zeros((1 + grid[0] * grid[1], width), dtype=np.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            out = table[1 + row * grid[1] + column]
            for k in range(quarter):
                omega = 1.0 / 10000.0 ** (k / quarter)
                out[k], out[quarter + k] = np.sin(column * omega), np.cos(column * omega)
                out[2 * quarter + k], out[3 * quarter + k] = np.sin(row * omega), np.cos(row * omega)
    return table


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("width", [4, 24, 64])
def test_sincos_tables_equal_numpy(width, grid):
    table = sincos_2d(width, grid)
    assert table.shape == (1, 1 + grid[0] * grid[1], width)
    assert table.dtype == torch.float32
    # computed in fp64, then rounded to fp32 once
    np.testing.assert_allclose(table[0].double(), by_loops(width, grid), rtol=2**-24, atol=1e-15)


def test_class_token_row_is_zero_and_optional():
    table = sincos_2d(16, (3, 5))
    assert not table[0, 0].any()
    assert torch.equal(sincos_2d(16, (3, 5), cls_token=False), table[:, 1:])


def test_the_column_is_encoded_first():
    table = sincos_2d(16, (3, 5), cls_token=False).reshape(3, 5, 16)
    x, y = table[..., :8], table[..., 8:]
    assert torch.equal(x, x[:1].expand_as(x))
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert not torch.equal(x[0, 0], x[0, 1])
    assert not torch.equal(y[0, 0], y[1, 0])


@pytest.mark.parametrize("width", [6, 50, 1, 1022])
def test_width_must_be_a_multiple_of_four(width):
    with pytest.raises(ValueError, match=rf"multiple of 4, got {width}"):
        sincos_2d(width, (2, 2))


@pytest.mark.parametrize(("width", "side"), [(768, 14), (1024, 14), (1280, 16), (512, 14), (512, 16)])
def test_sincos_tables_equal_transformers(width, side):
    embeddings = ViTMAEEmbeddings(ViTMAEConfig(hidden_size=width, image_size=16 * side))
    embeddings.initialize_weights()
    theirs = embeddings.position_embeddings
    assert theirs[0, 1:].any()
    # the arguments of sin and cos may differ in the last bit of fp64
    torch.testing.assert_close(sincos_2d(width, (side, side)), theirs.detach(), rtol=0, atol=1e-7)
