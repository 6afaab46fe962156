"""Weights under other libraries' names and back: bit for bit, complete or refused, and what changed is said."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import perturb, tiny, tiny_vit
from torch import nn

from mae_fast.errors import UserError
from mae_fast.interop import LAYOUTS, convert, detect
from mae_fast.models.position import sincos_2d

DECODER = ("mask_token", "decoder_")
SURPLUS = "backbone.mask_token"  # lightly's own


def encoder_of(weights):
    return {name: x for name, x in weights.items() if not name.startswith((*DECODER, "head", "fc_norm"))}


def linear_probe():
    model = tiny_vit()
    norm = nn.BatchNorm1d(32, affine=False, eps=1e-6)
    norm(torch.randn(64, 32) * 3 + 1)  # statistics that are not 0 and 1
    model.head = nn.Sequential(norm, model.head)
    return model


KINDS = {
    "masked autoencoder": lambda: tiny().state_dict(),
    "encoder": lambda: encoder_of(tiny().state_dict()),
    "classifier of the class token": lambda: tiny_vit().state_dict(),
    "classifier of the mean": lambda: tiny_vit(global_pool=True).state_dict(),
    "classifier without bias in qkv": lambda: tiny_vit(qkv_bias=False).state_dict(),
    "linear probe": lambda: linear_probe().state_dict(),
}
WITHOUT_PROBE = ("timm", "transformers", "transformers5", "lightly")
WITHOUT_MEAN = ("transformers", "transformers5")


def holds(layout, kind):
    """Whether ``layout`` has a place for all of such a model."""
    return not (
        (kind == "masked autoencoder" and layout == "timm")
        or (kind == "classifier of the mean" and layout in WITHOUT_MEAN)
        or (kind == "linear probe" and layout in WITHOUT_PROBE)
    )


HELD = [(layout, kind) for kind in KINDS for layout in LAYOUTS if holds(layout, kind)]


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
        one, other = (y.contiguous().flatten().view(torch.uint8) for y in (got[name], x))
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("source", "kind"), HELD)
def test_every_pair_of_layouts_bit_for_bit(source, kind):
    weights = KINDS[kind]()
    theirs = convert(weights, "ours", source).weights
    assert len(set(theirs)) >= len(weights)
    assert detect(theirs) == ("ours" if source == "timm" else source)
    assert_same_bits(convert(theirs, source, "ours").weights, weights)
    for target in LAYOUTS:
        if holds(target, kind):
            other = convert(theirs, source, target).weights
            assert_same_bits(convert(other, target, source).weights, theirs)


@given(
    data=st.data(),
    layout=st.sampled_from(list(LAYOUTS)),
    depth=st.integers(1, 12),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_bits_at_any_depth(data, layout, depth, dtype):
    """Infinities, NaNs of every payload and subnormal numbers, too; block numbers of two digits."""
    model = tiny(img_size=4, embed_dim=4, num_heads=1, depth=depth, decoder_embed_dim=4, decoder_num_heads=1)
    weights = model.to(dtype).state_dict()
    if layout == "timm":
        weights = encoder_of(weights)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    for name, x in weights.items():
        noise = torch.randint(1, 256, (x.numel() * x.element_size(),), generator=generator, dtype=torch.uint8)
        weights[name] = noise.view(dtype).view(x.shape)
    assert_same_bits(convert(convert(weights, "ours", layout).weights, layout, "ours").weights, weights)


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_changes_nothing_that_it_was_given(kind):
    weights = KINDS[kind]()
    weights["pos_embed"] = torch.zeros_like(weights["pos_embed"])
    before = {name: x.clone() for name, x in weights.items()}
    for layout in LAYOUTS:
        if kind != "classifier of the mean" or layout not in WITHOUT_MEAN:
            result = convert(weights, "ours", layout).weights
            assert all(x.is_contiguous() for x in result.values())
            assert_same_bits(weights, before)


def test_the_decoder_is_left_out_for_timm_and_that_is_said():
    """timm takes a dictionary with a mask token for DINOv2's."""
    weights = tiny().state_dict()
    result = convert(weights, "ours", "timm")
    assert_same_bits(result.weights, encoder_of(weights))
    (note,) = result.notes
    for part in ("mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"):
        assert part in note
    assert "\n" not in note


@pytest.mark.parametrize("layout", WITHOUT_MEAN)
def test_transformers_has_no_classifier_of_the_mean(layout):
    with pytest.raises(UserError, match="class token.*global_pool"):
        convert(KINDS["classifier of the mean"](), "ours", layout)


@pytest.mark.parametrize("layout", WITHOUT_PROBE)
def test_a_linear_probe_is_folded_into_one_layer(layout):
    probe = linear_probe().double().eval()
    result = convert(probe.state_dict(), "ours", layout)
    assert any("batch norm" in note for note in result.notes)
    back = convert(result.weights, layout, "ours").weights
    features = torch.randn(7, 32, dtype=torch.float64)
    folded = features @ back["head.weight"].T + back["head.bias"]
    assert (folded - probe.head(features)).abs().max() < 1e-12
    assert_same_bits(encoder_of(back), encoder_of(probe.state_dict()))


@pytest.mark.parametrize(("layout", "kind"), HELD)
def test_whatever_is_missing_is_named(layout, kind):
    weights = convert(KINDS[kind](), "ours", layout).weights
    for name in weights:
        if name != SURPLUS:
            rest = {other: x for other, x in weights.items() if other != name}
            with pytest.raises(UserError) as error:
                convert(rest, layout, "ours")
            assert name in str(error.value), str(error.value)


@pytest.mark.parametrize(("layout", "kind"), HELD)
def test_a_gap_between_blocks_is_no_shallower_model(layout, kind):
    weights = convert(KINDS[kind](), "ours", layout).weights
    gap = {name: x for name, x in weights.items() if ".0." not in name or "neck.decoder" in name}
    with pytest.raises(UserError, match=r"missing.*0"):
        convert(gap, layout, "ours")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unknown_names_are_all_listed(layout):
    weights = convert(encoder_of(tiny().state_dict()), "ours", layout).weights
    block = next(name for name in weights if ".1." in name).split(".1.")[0] + ".1."
    extra = ["reg_token", f"{block}ls1.gamma", f"{block}attn.q_norm.weight", "norm_pre.weight", "heads.bias"]
    with pytest.raises(UserError) as error:
        convert({**weights, **{name: torch.zeros(1) for name in extra}}, layout, "ours")
    assert all(name in str(error.value) for name in extra), str(error.value)
    assert "\n" not in str(error.value)


def test_layouts_are_told_apart():
    for weights in ({}, {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}):
        with pytest.raises(UserError, match="known layout"):
            detect(weights)
    with pytest.raises(UserError, match=r"unknown layout 'dino'.*mmpretrain"):
        convert(tiny().state_dict(), "ours", "dino")
    with pytest.raises(UserError, match=r"vit\.embeddings"):  # the wrong one
        convert(convert(tiny().state_dict(), "ours", "transformers").weights, "ours", "timm")


def test_the_prefix_of_ddp():
    weights = tiny().state_dict()
    wrapped = {f"module.{name}": x for name, x in weights.items()}
    assert detect(wrapped) == "ours"
    assert_same_bits(convert(wrapped, detect(wrapped), "ours").weights, weights)


ZEROED = [("pos_embed",), ("decoder_pos_embed",), ("pos_embed", "decoder_pos_embed")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", ZEROED)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "timm"])
def test_tables_that_are_all_zero_are_made_anew(layout, names, dtype):
    weights = tiny().to(dtype).state_dict()
    zeroed = {name: torch.zeros_like(x) if name in names else x for name, x in weights.items()}
    theirs, _ = convert_quietly(zeroed, layout)
    result = convert(theirs, layout, "ours")
    for name in names:
        assert any(name in note and "6 x 6" in note for note in result.notes)
    expected = {name: sincos_2d(x.shape[2], (6, 6)).to(dtype) if name in names else x for name, x in weights.items()}
    assert_same_bits(result.weights, expected)


def convert_quietly(weights, layout):
    """Zero tables under the names of ``layout``: ``convert`` would make them anew on the way there."""
    marked = {name: x + 1 if "pos_embed" in name and not x.any() else x for name, x in weights.items()}
    ones = convert(marked, "ours", layout).weights
    return {name: torch.zeros_like(x) if x.ndim == 3 and (x == 1).all() else x for name, x in ones.items()}, marked


def test_other_tables_are_not_touched():
    weights = perturb(tiny()).state_dict()
    table = torch.zeros_like(weights["pos_embed"])
    table[0, -1, -1] = 1e-30
    result = convert({**weights, "pos_embed": table}, "ours", "ours")
    assert torch.equal(result.weights["pos_embed"], table)
    assert result.notes == []


@pytest.mark.parametrize("shape", [(1, 7, 32), (1, 37, 30), (37, 32), (1, 1, 32), (1, 0, 32)], ids=str)
def test_zero_tables_that_cannot_be_made_anew(shape):
    with pytest.raises(UserError, match="pos_embed is all zero"):
        convert({**encoder_of(tiny().state_dict()), "pos_embed": torch.zeros(shape)}, "ours", "ours")
