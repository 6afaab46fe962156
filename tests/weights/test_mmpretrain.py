"""mmpretrain's names and shapes, copied from its code: its dependencies can no longer be installed."""

import pytest
import torch
from interop_cases import KINDS, assert_same, linear_probe
from support import tiny, tiny_vit

from mae_fast.errors import UserError
from mae_fast.weights import convert, detect


def block(name, width):
    shapes = {
        "ln1": [(width,), (width,)],
        "attn.qkv": [(3 * width, width), (3 * width,)],
        "attn.proj": [(width, width), (width,)],
        "ln2": [(width,), (width,)],
        "ffn.layers.0.0": [(4 * width, width), (4 * width,)],
        "ffn.layers.1": [(width, 4 * width), (width,)],
    }
    return {f"{name}.{layer}": both for layer, both in shapes.items()}


def state_dict(layers, others):
    shapes = {f"{name}.{kind}": size for name, both in layers.items() for kind, size in zip(KIND, both, strict=True)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in {**shapes, **others}.items()}


KIND = ("weight", "bias")
BACKBONE = {
    "backbone.patch_embed.projection": [(32, 3, 4, 4), (32,)],
    **block("backbone.layers.0", 32),
    **block("backbone.layers.1", 32),
}
TOKENS = {"backbone.cls_token": (1, 1, 32), "backbone.pos_embed": (1, 37, 32)}
LN1, LN2 = ({f"backbone.ln{i}": [(32,), (32,)]} for i in (1, 2))
NECK = {
    "neck.decoder_embed": [(24, 32), (24,)],
    **block("neck.decoder_blocks.0", 24),
    "neck.ln1": [(24,), (24,)],
    "neck.decoder_pred": [(48, 24), (48,)],
}
# For each of our models, the layers and tokens of mmpretrain's.
MODELS = {
    "MAE": (tiny, {**BACKBONE, **LN1, **NECK}, {"neck.mask_token": (1, 1, 24), "neck.decoder_pos_embed": (1, 37, 24)}),
    "avg_featmap, LinearClsHead": (
        lambda: tiny_vit(global_pool=True),
        {**BACKBONE, **LN2, "head.fc": [(5, 32), (5,)]},
        {},
    ),
    "cls_token, VisionTransformerClsHead": (tiny_vit, {**BACKBONE, **LN1, "head.layers.head": [(5, 32), (5,)]}, {}),
    "linear probe": (
        linear_probe,
        {**BACKBONE, **LN1, "head.layers.head": [(5, 32), (5,)]},
        {"neck.bn.running_mean": (32,), "neck.bn.running_var": (32,), "neck.bn.num_batches_tracked": ()},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_mmpretrain_load_into_our_models(kind):
    make, layers, others = MODELS[kind]
    theirs = state_dict(layers, {**TOKENS, **others})
    assert detect(theirs) == "mmpretrain"
    ours = convert(theirs, "mmpretrain", "ours").weights
    model = make()
    model.load_state_dict(ours)
    back = convert(model.state_dict(), "ours", "mmpretrain").weights
    if "cls_token" in kind:  # two equivalent heads: we write the other one
        back = {name.replace("head.fc", "head.layers.head"): x for name, x in back.items()}
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], x.to(back[name])) for name, x in theirs.items())


def test_norms_of_the_same_name_in_neck_and_backbone_are_distinguished():
    theirs = convert(KINDS["full"](), "ours", "mmpretrain").weights
    assert_same({"x": theirs["neck.ln1.bias"]}, {"x": KINDS["full"]()["decoder_norm.bias"]})
    assert_same({"x": theirs["backbone.ln1.bias"]}, {"x": KINDS["full"]()["norm.bias"]})


def test_a_hidden_layer_in_the_head_is_refused():
    _, layers, _ = MODELS["cls_token, VisionTransformerClsHead"]
    theirs = state_dict({**layers, "head.layers.pre_logits": [(32, 32), (32,)]}, TOKENS)
    with pytest.raises(UserError, match=r"2 names .*: head\.layers\.pre_logits\.weight"):
        convert(theirs, "mmpretrain", "ours")


def test_verification_is_not_supported(outputs_differ_by):
    model = tiny()
    with pytest.raises(UserError, match=r"--verify does not support.*mmpretrain"):
        outputs_differ_by(model, "mmpretrain")
