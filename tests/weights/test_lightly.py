"""Names equal lightly's, and outputs equal lightly's if it is installed."""

import pytest
from interop_cases import KINDS, assert_same
from support import tiny, tiny_vit

from mae_fast.weights import convert, detect

# Names in lightly 1.6.0: MaskedVisionTransformerTIMM as ``backbone``, MAEDecoderTIMM as ``decoder``, one block each.
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
LAYERS = (
    "backbone.vit.patch_embed.proj",
    *(f"backbone.vit.blocks.0.{layer}" for layer in BLOCK),
    "backbone.vit.norm",
    "decoder.decoder_embed",
    *(f"decoder.decoder_blocks.0.{layer}" for layer in BLOCK),
    "decoder.decoder_norm",
    "decoder.decoder_pred",
)
NAMES = {
    "backbone.mask_token",
    "backbone.vit.cls_token",
    "backbone.vit.pos_embed",
    "decoder.mask_token",
    "decoder.decoder_pos_embed",
    *(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")),
}


def test_names_equal_lightlys():
    assert set(convert(tiny(depth=1).state_dict(), "ours", "lightly").weights) == NAMES


def test_a_backbone_without_decoder_is_read():
    """The names are those of ``model.backbone.state_dict()``."""
    weights = convert(KINDS["encoder"](), "ours", "lightly").weights
    alone = {name.removeprefix("backbone."): x for name, x in weights.items()}
    assert detect(alone) == "lightly"
    assert_same(convert(alone, "lightly", "ours").weights, KINDS["encoder"]())


@pytest.mark.filterwarnings("ignore:MAEDecoderTIMM is deprecated")
@pytest.mark.parametrize("make", [tiny, tiny_vit, lambda: tiny_vit(global_pool=True)], ids=["full", "cls", "mean"])
def test_outputs_equal_lightlys_in_float64(make, outputs_differ_by):
    pytest.importorskip("lightly.models.modules.masked_vision_transformer_timm", reason="pip install lightly")
    model = make().double().eval()
    found = outputs_differ_by(model, "lightly")
    assert found.keys() == {"features", "logits" if hasattr(model, "head") else "pred"}
    assert all(x <= 1e-12 for x in found.values()), found
