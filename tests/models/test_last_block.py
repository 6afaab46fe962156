"""In ``loss``, the last decoder block computes only removed patches, unless a module may depend on the token order."""

import copy

import pytest
import torch
from support import assert_close, assert_no_worse_than_eager, inputs, one_thread, run, run_loss, tiny  # noqa: F401
from torch import nn

from mae_fast.models import blocks, mae
from mae_fast.models.blocks import DropPath

pytestmark = pytest.mark.usefixtures("one_thread")

DVAE = {"kind": "dvae", "vocab_size": 32, "hidden": 8, "groups": 2, "blocks_per_group": 1}
VARIANTS = {
    "one block": {},
    "three blocks": {"decoder_depth": 3, "norm_pix_loss": True},
    "encoder with mask tokens": {"encoder_mask_token": True},
    "tokens": {"target": DVAE},
}


def full_block(model, *arguments):
    """``run_loss``, with all tokens in image order in all blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mae, "ignore_order", lambda blocks: False)
        return run_loss(model, *arguments)


@pytest.fixture
def tokens(monkeypatch):
    """The number of tokens in each call of an MLP."""
    seen, mlp = [], blocks.mlp
    monkeypatch.setattr(blocks, "mlp", lambda x, *rest: seen.append(x.shape[1]) or mlp(x, *rest))
    return seen


@pytest.mark.parametrize(("mask_ratio", "visible", "removed"), [(0.75, 10, 27), (1.0, 1, 36), (0.03, 35, 2)])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_last_block_has_only_the_removed_patches(tokens, name, mask_ratio, visible, removed):
    model = tiny(**VARIANTS[name])
    images, noise = inputs(model)
    model.loss(images, mask_ratio, noise)
    encoder = 37 if model.mask_token is None else visible
    assert tokens == [encoder] * 2 + [37] * (len(model.decoder_blocks) - 1) + [removed]


@pytest.mark.parametrize("mask_ratio", [0.75, 1.0, 0.03])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_equal_those_of_the_full_block(name, mask_ratio):
    model = tiny(**VARIANTS[name]).double()
    images, noise = inputs(model)
    assert_close(run_loss(model, images, mask_ratio, noise), full_block(model, images, mask_ratio, noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_in_low_precision_is_no_worse_than_that_of_the_full_block(name, dtype):
    model = tiny(**VARIANTS[name])
    images, noise = inputs(model)
    exact = run_loss(copy.deepcopy(model).double(), images.double(), 0.75, noise)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = run_loss(model, images, 0.75, noise), full_block(model, images, 0.75, noise)
    assert_no_worse_than_eager(ours, theirs, exact, dtype)


def test_a_trained_position_table_gets_its_gradient():
    model = tiny(decoder_depth=2).double()
    model.decoder_pos_embed.requires_grad_()
    images, noise = inputs(model)
    assert_close(run_loss(model, images, 0.75, noise), full_block(model, images, 0.75, noise))


def test_stochastic_depth_drops_the_branches_of_the_same_images(tokens):
    model = tiny(decoder_depth=2).double()
    for block in model.decoder_blocks:
        block.drop_path = DropPath(0.5)
    images, noise = inputs(model, 6)
    torch.manual_seed(0)
    found = run_loss(model, images, 0.75, noise)
    assert tokens[-1] == 27
    torch.manual_seed(0)
    assert_close(found, full_block(model, images, 0.75, noise))


def test_checkpointing_changes_no_bit(tokens):
    model = tiny(decoder_depth=2)
    images, noise = inputs(model)
    expected = run_loss(model, images, 0.75, noise)
    model.grad_checkpointing = True
    tokens.clear()
    found = run_loss(model, images, 0.75, noise)
    assert tokens.count(27) == 2  # forward, and again in backward
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_compiles_as_one_graph(name):
    model = tiny(**VARIANTS[name])
    images, noise = inputs(model)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, 0.75, noise), model.loss(images, 0.75, noise))


def test_the_compiled_loss_predicts_the_removed_patches_only():
    model, shapes = tiny(), []
    images, noise = inputs(model)

    def backend(graph, _):
        found = (node.meta.get("example_value") for node in graph.graph.nodes)
        shapes.extend(tuple(x.shape) for x in found if isinstance(x, torch.Tensor))
        return graph

    torch._dynamo.reset()
    torch.compile(model.loss, fullgraph=True, backend=backend)(images, 0.75, noise)
    assert (2, 27, 48) in shapes
    assert (2, 36, 48) not in shapes


def test_every_parameter_gets_a_gradient_if_nothing_is_removed():
    model = tiny(decoder_depth=2)
    images, noise = inputs(model)
    assert run_loss(model, images, 0.0, noise)["loss"].isnan()


class Positions(nn.Module):
    """A module whose output depends on the position of a token."""

    def __init__(self, layer=None):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        place = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return (x if self.layer is None else self.layer(x)) * (1 + place / 40)


class Scaled(nn.Linear):
    """A subclass of a layer, such as an adapter."""

    def forward(self, x):
        return super().forward(x) * (1 + torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 40)


def changed(where):
    """A model in which one module of the decoder is replaced."""
    model = tiny(decoder_depth=2).double()
    first, last = model.decoder_blocks
    if where == "block":
        model.decoder_blocks[0] = Positions()
    elif where == "last block":
        model.decoder_blocks[1] = Positions(last)
    elif where == "attention":
        last.attn = Positions(last.attn)
    elif where == "mlp":
        last.mlp = Positions(last.mlp)
    elif where == "norm":
        first.norm2 = Positions(first.norm2)
    elif where == "norm of a sequence":
        last.norm1 = nn.LayerNorm([37, 24]).double()
        nn.init.normal_(last.norm1.weight)
    elif where == "stochastic depth":
        first.drop_path = Positions()
    else:
        layer = Scaled(24, 24).double()
        layer.load_state_dict(last.attn.proj.state_dict())
        last.attn.proj = layer
    return model


@pytest.mark.parametrize(
    "where",
    ["block", "last block", "attention", "mlp", "norm", "norm of a sequence", "stochastic depth", "linear layer"],
)
def test_modules_that_may_depend_on_the_order_get_all_tokens_in_image_order(where):
    model = changed(where)
    images, noise = inputs(model)
    expected = run(model, images, 0.75, noise)
    del expected["pred"], expected["mask"]
    assert_close(run_loss(model, images, 0.75, noise), expected)


def test_an_encoder_of_all_patches_may_depend_on_their_order():
    model = tiny(encoder_mask_token=True).double()
    model.blocks[0].mlp = Positions(model.blocks[0].mlp)
    images, noise = inputs(model)
    assert_close({"": model.loss(images, 0.75, noise)}, {"": model(images, 0.75, noise)[0]})


@pytest.mark.parametrize("where", ["0", "1", "1.attn.qkv", "1.mlp.act", "0.norm1"])
def test_hooks_see_all_tokens_in_image_order(where):
    model, seen = tiny(decoder_depth=2).double(), []
    model.decoder_blocks.get_submodule(where).register_forward_hook(lambda module, given, out: seen.append(out))
    images, noise = inputs(model)
    model.loss(images, 0.75, noise)
    model(images, 0.75, noise)
    assert_close({"": seen[0]}, {"": seen[1]})
