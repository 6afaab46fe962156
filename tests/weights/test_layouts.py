"""The tables of names: one to one, complete, equal to the libraries' names. A round trip changes no bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interop_cases import KINDS, PLACES, assert_same, encoder_of
from support import tiny

from mae_fast.errors import UserError
from mae_fast.weights import LAYOUTS, convert, detect
from mae_fast.weights.layouts import count_known_keys, format_keys, missing_keys, rename_keys

# Files on the hub, written by transformers 4.x.
HUB_BLOCK = [
    *(f"attention.attention.{which}" for which in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"),
]
HUB = {
    f"{place}.{kind}"
    for place in (
        *(f"vit.encoder.layer.{i}.{layer}" for i in range(2) for layer in HUB_BLOCK),
        *(f"decoder.decoder_layers.0.{layer}" for layer in HUB_BLOCK),
        *("vit.embeddings.patch_embeddings.projection", "vit.layernorm"),
        *("decoder.decoder_embed", "decoder.decoder_norm", "decoder.decoder_pred"),
    )
    for kind in ("weight", "bias")
} | {
    "vit.embeddings.cls_token",
    "vit.embeddings.position_embeddings",
    "decoder.mask_token",
    "decoder.decoder_pos_embed",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_are_one_to_one(layout):
    theirs = [name for names in LAYOUTS[layout].table.values() for name in names]
    assert len(set(theirs)) == len(theirs)


def test_names_equal_those_of_files_on_the_hub():
    assert set(convert(KINDS["full"](), "ours", "transformers").weights) == HUB


@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize(("here", "kind"), PLACES)
def test_a_round_trip_changes_no_bit(here, there, kind):
    """Between all pairs of layouts that have all names of the model."""
    if (there, kind) not in PLACES:
        return  # tested in test_convert.py
    ours = KINDS[kind]()
    start = convert(ours, "ours", here).weights
    assert_same(convert(start, here, "ours").weights, ours)
    between = convert(start, here, there).weights
    assert_same(convert(between, there, here).weights, start)
    assert_same(convert(between, there, "ours").weights, ours)


@pytest.mark.parametrize(("layout", "kind"), PLACES)
def test_the_layout_is_detected(layout, kind):
    found = convert(KINDS[kind](), "ours", layout).weights
    assert detect(found) == ("ours" if layout == "timm" else layout)


def test_the_prefix_of_data_parallel_models_is_removed():
    ours = KINDS["full"]()
    wrapped = {f"module.{name}": x for name, x in convert(ours, "ours", "mmpretrain").weights.items()}
    assert detect(wrapped) == "mmpretrain"
    assert_same(convert(wrapped, "mmpretrain", "ours").weights, ours)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module.", "net.encoder.",
               "model._orig_mod.module.", "_fsdp_wrapped_module._orig_mod.", "ema_model.", "teacher.module."],
)  # fmt: skip
def test_prefixes_of_wrappers_are_removed(layout, prefix):
    ours = KINDS["encoder"]()
    wrapped = {f"{prefix}{name}": x for name, x in convert(ours, "ours", layout).weights.items()}
    assert detect(wrapped) == ("ours" if layout == "timm" else layout)
    converted = convert(wrapped, layout, "ours")
    assert_same(converted.weights, ours)
    (note,) = [note for note in converted.notes if note.startswith("removed ")]
    assert all(repr(f"{part}.") in note or f"{part}." in note for part in prefix.split(".") if part)


def test_names_of_wrapped_blocks_are_recognised():
    """Single blocks may be compiled or checkpointed."""
    ours = KINDS["full"]()
    wrapped = {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._orig_mod."): x for name, x in ours.items()
    }
    assert_same(convert(wrapped, "ours", "ours").weights, ours)


def test_tensors_outside_of_the_wrapped_model_are_left_out():
    """Modules of Lightning also have losses and metrics."""
    ours = KINDS["full"]()
    wrapped = {f"model.{name}": x for name, x in ours.items()}
    converted = convert({"criterion.weight": torch.ones(2), **wrapped}, "ours", "ours")
    assert_same(converted.weights, ours)
    assert converted.notes == [
        "removed 'model.' from the names of the weights",
        "left out criterion.weight: outside of 'model.'",
    ]


def test_unknown_names_keep_their_prefixes():
    with pytest.raises(UserError, match=r"no patch embedding among model\.conv\.weight"):
        detect({"model.conv.weight": torch.ones(1)})


@given(
    layout=st.sampled_from(list(LAYOUTS)),
    depth=st.integers(1, 12),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_a_round_trip_keeps_any_bit_pattern(layout, depth, dtype, seed):
    """Including infinities, NaN payloads and subnormal numbers, and block numbers of two digits."""
    model = tiny(img_size=4, embed_dim=4, num_heads=1, depth=depth, decoder_embed_dim=4, decoder_num_heads=1)
    weights = model.to(dtype).state_dict()
    if layout == "timm":
        weights = encoder_of(weights)
    generator = torch.Generator().manual_seed(seed)
    for name, x in weights.items():
        noise = torch.randint(1, 256, (x.numel() * x.element_size(),), generator=generator, dtype=torch.uint8)
        weights[name] = noise.view(dtype).view(x.shape)
    assert_same(convert(convert(weights, "ours", layout).weights, layout, "ours").weights, weights)


def test_qkv_is_split_into_query_key_and_value():
    qkv = torch.arange(6.0)[:, None] * torch.ones(2)
    found, unknown = rename_keys({"blocks.11.attn.qkv.weight": qkv}, "transformers5")
    assert not unknown
    assert {name: x[0, 0].item() for name, x in found.items()} == {
        "vit.layers.11.attention.q_proj.weight": 0,
        "vit.layers.11.attention.k_proj.weight": 2,
        "vit.layers.11.attention.v_proj.weight": 4,
    }


def test_weights_without_a_patch_embedding_have_no_layout():
    assert count_known_keys({"head.weight": torch.ones(1), "norm.weight": torch.ones(1)}, "ours") == 0


@pytest.mark.parametrize(("layout", "kind"), PLACES)
def test_each_missing_name_is_named(layout, kind):
    weights = convert(KINDS[kind](), "ours", layout).weights
    for name in weights:
        if name != "backbone.mask_token":  # not needed
            rest = {other: x for other, x in weights.items() if other != name}
            with pytest.raises(UserError) as error:
                convert(rest, layout, "ours")
            assert str(error.value) == f"missing in the weights of layout {layout!r}: {name}"


def test_a_gap_between_blocks_is_named():
    ours = {n: x for n, x in KINDS["full"]().items() if not n.startswith("blocks.0.")}
    assert {name for name in missing_keys(ours) if "norm1.weight" in name} == {"blocks.0.norm1.weight"}
    huge = {**KINDS["full"](), "blocks.999999999.norm1.weight": torch.ones(32)}
    assert {name for name in missing_keys(huge) if "norm1.weight" in name} == {"blocks.2.norm1.weight"}


@pytest.mark.parametrize("number", ["00", "01", "-1", "\u0663", "9" * 5000, "{i}", ""], ids=lambda x: ascii(x)[:9])
def test_invalid_block_numbers_are_unknown_names(number):
    _, unknown = rename_keys({f"blocks.{number}.norm1.weight": torch.ones(1)}, "timm", back=True)
    assert len(unknown) == 1


def test_lists_of_names_are_shortened():
    names = ["norm.bias", "blocks.0.norm1.bias", "blocks.10.norm1.bias", "blocks.1.mlp.fc1.weight"]
    assert format_keys(names) == "norm.bias, blocks.{0, 10}.norm1.bias, blocks.1.mlp.fc1.weight"
    assert format_keys(f"x{i}" for i in range(6)) == "x0, x1, x2, x3, x4, x5"
    names = [*(f"x{i}" for i in range(6)), *(f"blocks.{i}.norm1.bias" for i in range(24))]
    assert format_keys(names) == "x0, x1, x2, x3, x4 and 25 more"
    assert len(format_keys(f"blocks.{i}.norm1.bias" for i in range(9999))) < 80
