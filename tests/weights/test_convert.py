"""Changes of weights in a conversion, their notes, and errors."""

import pytest
import torch
from interop_cases import KINDS, assert_same, linear_probe
from support import assert_close, pictures, tiny, tiny_vit

from mae_fast.errors import UserError
from mae_fast.models.pos_embed import sincos_2d
from mae_fast.weights import LAYOUTS, convert, detect


def without(weights, *names):
    assert set(names) <= weights.keys()
    return {name: x for name, x in weights.items() if name not in names}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "lightly"])
def test_notes_exist_only_if_weights_change(layout, kind):
    """A conversion that only renames has no notes."""
    try:
        converted = convert(KINDS[kind](), "ours", layout)
    except UserError:
        assert (kind, layout.startswith("transformers")) == ("mean", True)
        return
    back = convert(converted.weights, layout, "ours").weights
    same = back.keys() == KINDS[kind]().keys()
    assert bool(converted.notes) != same


def test_the_source_is_not_changed():
    ours = KINDS["full"]()
    ours["pos_embed"] = torch.zeros_like(ours["pos_embed"])
    before = {name: x.clone() for name, x in ours.items()}
    for layout in LAYOUTS:
        convert(ours, "ours", layout)
        assert_same(ours, before)


def test_the_decoder_is_left_out_for_timm():
    converted = convert(KINDS["full"](), "ours", "timm")
    assert converted.notes == [
        "left out mask_token, decoder_pos_embed, decoder_embed, decoder_blocks, decoder_norm, decoder_pred: "
        "timm only has the encoder"
    ]
    assert_same(converted.weights, KINDS["encoder"]())


@pytest.mark.parametrize("layout", ["transformers", "transformers5"])
def test_mean_pooled_classifiers_are_refused_for_transformers(layout):
    with pytest.raises(UserError, match=rf"{layout} .*mean-pooled.*; convert to timm"):
        convert(KINDS["mean"](), "ours", layout)


@pytest.mark.parametrize("layout", ["timm", "transformers", "transformers5", "lightly"])
def test_the_batch_norm_of_a_linear_probe_is_folded(layout):
    """The logits of the folded layer are equal in fp64, up to rounding."""
    probe = linear_probe().double()
    converted = convert(probe.state_dict(), "ours", layout)
    assert any("folded the linear probe's batch norm (eps 1e-06)" in note for note in converted.notes)
    plain = tiny_vit().double().eval()
    plain.load_state_dict(convert(converted.weights, layout, "ours").weights)
    images = pictures(probe)
    assert_close({"logits": plain(images)}, {"logits": probe(images)}, 1e-12)


def test_lightlys_extra_mask_token_is_added_and_left_out():
    converted = convert(KINDS["full"](), "ours", "lightly")
    assert [note.split(",")[0] for note in converted.notes] == ["added backbone.mask_token as zeros"]
    assert not converted.weights["backbone.mask_token"].any()
    back = convert(converted.weights, "lightly", "ours")
    assert [note.split(":")[0] for note in back.notes] == ["left out backbone.mask_token"]


def test_the_head_of_a_masked_autoencoder_is_left_out():
    """lightly's encoders are models of timm, which have a head."""
    weights = convert(KINDS["full"](), "ours", "lightly").weights
    weights |= {"backbone.vit.head.weight": torch.ones(5, 32), "backbone.vit.head.bias": torch.ones(5)}
    converted = convert(weights, "lightly", "ours")
    assert "left out head.weight, head.bias: a masked autoencoder has no head" in converted.notes
    assert_same(converted.weights, KINDS["full"]())


def test_ignored_names_are_noted():
    weights = convert(KINDS["full"](), "ours", "mmpretrain").weights
    weights |= {"data_preprocessor.mean": torch.ones(3), "data_preprocessor.std": torch.ones(3)}
    assert detect(weights) == "mmpretrain"
    converted = convert(weights, "mmpretrain", "ours")
    assert_same(converted.weights, KINDS["full"]())
    assert converted.notes == [
        "left out data_preprocessor.mean, data_preprocessor.std: images are standardised by the data loader"
    ]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "timm"])
def test_zero_tables_are_rebuilt(layout):
    """transformers' models have zero tables when trained from scratch. Here: 6 x 6 patches, widths 32 and 24."""
    ours = KINDS["full"]()
    zeros = {name: torch.zeros_like(ours[name]) for name in ("pos_embed", "decoder_pos_embed")}
    converted = convert(convert(ours, "ours", layout).weights | to(zeros, layout), layout, "ours")
    expected = {"pos_embed": sincos_2d(32, (6, 6)), "decoder_pos_embed": sincos_2d(24, (6, 6))}
    assert_same(converted.weights, ours | expected)
    said = [note for note in converted.notes if note.startswith("rebuilt")]
    assert said == [
        f"rebuilt {name}, which was all zero, as the sine-cosine table of 6 x 6 patches" for name in expected
    ]


def to(weights, layout):
    return {LAYOUTS[layout].table[name][0]: x for name, x in weights.items()}


@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_tables_with_other_values_do_not_change(name):
    ours = KINDS["full"]()
    ours[name] = torch.zeros_like(ours[name])
    ours[name][0, 1, 3] = 1e-30
    converted = convert(ours, "ours", "transformers")
    assert converted.notes == []
    assert_same(convert(converted.weights, "transformers", "ours").weights, ours)


def test_rebuilt_tables_keep_their_dtype():
    ours = {name: x.bfloat16() for name, x in KINDS["encoder"]().items()}
    ours["pos_embed"] = torch.zeros_like(ours["pos_embed"])
    assert_same(
        {"pos_embed": convert(ours, "ours", "ours").weights["pos_embed"]},
        {"pos_embed": sincos_2d(32, (6, 6)).bfloat16()},
    )


@pytest.mark.parametrize("shape", [(1, 36, 32), (1, 37, 30), (37, 32), (1, 1, 32), (1, 0, 32)], ids=str)
def test_zero_tables_of_wrong_shapes_raise_errors(shape):
    with pytest.raises(UserError, match="pos_embed is all zero and cannot be rebuilt: it must be"):
        convert({**KINDS["encoder"](), "pos_embed": torch.zeros(shape)}, "ours", "ours")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unexpected_names_are_listed(layout):
    weights = convert(KINDS["encoder"](), "ours", layout).weights
    odd = {f"blocks.{i}.ls1.gamma": torch.ones(32) for i in range(12)} | {"reg_token": torch.ones(1, 4, 32)}
    with pytest.raises(UserError) as error:
        convert(weights | odd, layout, "ours")
    expected = f"13 names are unknown in the layout '{layout}': blocks.{{0, 1, 2, 3, ..., 11}}.ls1.gamma, reg_token"
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.bias", "pos_embed", "norm.weight", "blocks.0.attn.qkv.weight"])
def test_missing_names_are_listed_in_the_source_layout(layout, name):
    weights = convert(KINDS["encoder"](), "ours", layout).weights
    layer, _, kind = name.rpartition(".") if "." in name else (name, "", "")
    number = next((i for i in "01" if f".{i}." in name), "")
    (*_, theirs) = LAYOUTS[layout].table[layer.replace(f".{number}.", ".{i}.") if number else layer]
    lost = theirs.replace("{i}", number) + (f".{kind}" if kind else "")
    with pytest.raises(UserError, match="missing in the weights") as error:
        convert(without(weights, lost), layout, "ours")
    assert lost in str(error.value)


def test_a_missing_qkv_projection_is_listed_as_three_names():
    weights = convert(KINDS["encoder"](), "ours", "transformers").weights
    lost = [name for name in weights if ".layer.1.attention.attention." in name and name.endswith("weight")]
    with pytest.raises(UserError) as error:
        convert(without(weights, *lost), "transformers", "ours")
    assert all(name in str(error.value) for name in lost)


def test_an_incomplete_decoder_is_refused_but_a_lone_mask_token_is_left_out():
    encoder = {**KINDS["encoder"](), "mask_token": torch.ones(1, 1, 24)}
    with pytest.raises(UserError, match=r"missing in .*'ours': decoder_pos_embed, decoder_embed\.weight"):
        convert({**encoder, "decoder_pred.bias": torch.ones(48)}, "ours", "ours")
    converted = convert(encoder, "ours", "ours")
    assert_same(converted.weights, KINDS["encoder"]())
    assert converted.notes == ["left out mask_token: these weights have no decoder"]


def test_two_final_norms_are_refused():
    both = KINDS["mean"]() | {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}
    with pytest.raises(UserError, match="norm before and one after the pooling"):
        convert(both, "timm", "ours")


def test_mmpretrains_head_on_the_class_token_is_read():
    """VisionTransformerClsHead, without the batch norm of a probe."""
    weights = convert(KINDS["class token"](), "ours", "mmpretrain").weights
    theirs = {name.replace("head.fc", "head.layers.head"): x for name, x in weights.items()}
    assert theirs.keys() != weights.keys()
    assert_same(convert(theirs, "mmpretrain", "ours").weights, KINDS["class token"]())


@pytest.mark.parametrize(
    "weights", [{}, {"conv1.weight": torch.ones(1)}, {"head.weight": torch.ones(1)}], ids=["empty", "CNN", "head alone"]
)
def test_weights_in_no_known_layout_are_refused(weights):
    with pytest.raises(UserError, match=r"not weights of a ViT or MAE in a known layout \(ours, timm.*\): no patch"):
        detect(weights)


@pytest.mark.parametrize(("source", "target"), [("keras", "ours"), ("ours", "keras")])
def test_an_unknown_layout_is_refused(source, target):
    with pytest.raises(UserError, match="unknown layout 'keras'; known: ours, timm, transformers"):
        convert(KINDS["encoder"](), source, target)


def test_one_decoder_or_none():
    assert "decoder_embed.weight" not in KINDS["encoder"]()
    assert_same(convert(tiny().state_dict(), "ours", "ours").weights, tiny().state_dict())
