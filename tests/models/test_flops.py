"""FLOPs by formula equal torch's count and the paper's numbers."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_fast.models.flops import Sizes, train_flops
from mae_fast.models.mae import build
from mae_fast.models.reference import ReferenceMAE
from mae_fast.models.sizes import MAE_ALIASES, MAE_CONFIGS
from mae_fast.studies.paper import MASK_TOKEN_FLOPS

SIZES = {name: Sizes.of_config(MAE_CONFIGS[long]) for name, long in MAE_ALIASES.items()}


@pytest.mark.parametrize("name", SIZES)
def test_forward_flops_equal_torchs_count(name):
    """Only the forward pass is compared: in the backward pass, torch also counts recomputed attention scores."""
    with torch.device("meta"):
        mine = build(name)
        model = ReferenceMAE.of(mine)
        images = torch.empty(2, 3, *mine.patch_embed.img_size)
        noise = torch.empty(2, SIZES[name].patches)
    with FlopCounterMode(display=False) as counter:
        model(images, 0.75, noise)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "bmm" in str(op))  # on the meta device, SDPA consists of bmm ops
    flops = train_flops(SIZES[name])
    assert 3 * attention == 2 * flops.attention
    assert 3 * (sum(counts.values()) - attention) == 2 * flops.gemm


DVAE = {"kind": "dvae", "vocab_size": 512, "hidden": 8, "groups": 3, "blocks_per_group": 1}
ABLATED = {
    "mask tokens in the encoder": ("mae_vit_large_patch16", {"encoder_mask_token": True}, 0.75),
    "linear decoder": ("mae_vit_base_patch16", {"encoder_mask_token": True, "decoder_depth": 0}, 0.75),
    "narrow decoder": ("mae_vit_large_patch16", {"decoder_embed_dim": 128, "decoder_num_heads": 4}, 0.75),
    "wide and deep decoder": ("mae_vit_tiny_patch4", {"decoder_embed_dim": 192, "decoder_depth": 12}, 0.4),
    "principal components": ("mae_vit_huge_patch14", {"target": {"kind": "pca", "components": 73}}, 0.75),
    "tokens": ("mae_vit_tiny_patch4", {"target": DVAE}, 0.9),
}


@pytest.mark.parametrize("name", ABLATED)
def test_forward_flops_of_ablated_models_equal_torchs_count(name):
    """For encoder and decoder. The computation of the target is not counted."""
    factory, options, mask_ratio = ABLATED[name]
    with torch.device("meta"):
        mine = build(factory, **options)
        model = ReferenceMAE.of(mine)
        images = torch.empty(2, 3, *mine.patch_embed.img_size)
        noise = torch.empty(2, mine.patch_embed.num_patches)
    with FlopCounterMode(display=False) as counter:
        latent, _, ids_restore = model.forward_encoder(images, mask_ratio, noise)
        model.forward_decoder(latent, ids_restore)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "bmm" in str(op))
    flops = train_flops(Sizes.of(mine), mask_ratio)
    assert 3 * attention == 2 * flops.attention
    assert 3 * (sum(counts.values()) - attention) == 2 * flops.gemm


@pytest.mark.parametrize("name", ABLATED)
@pytest.mark.parametrize("predict_ratio", [0.5, 0.25])
def test_flops_with_a_predict_ratio_equal_torchs_count(name, predict_ratio):
    """For the eager definition, which embeds all patches and projects all tokens of the decoder."""
    factory, options, mask_ratio = ABLATED[name]
    with torch.device("meta"):
        mine = build(factory, **{**options, "target": None})
        model = ReferenceMAE.of(mine)
        images = torch.empty(2, 3, *mine.patch_embed.img_size)
        noise = torch.empty(2, mine.patch_embed.num_patches)
    with FlopCounterMode(display=False) as counter:
        model.predict_ratio_loss(images, mask_ratio, noise, predict_ratio)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "bmm" in str(op))
    flops = train_flops(Sizes.of(mine), mask_ratio, predict_ratio=predict_ratio)
    assert 3 * attention == 2 * flops.attention
    assert 3 * (sum(counts.values()) - attention) == 2 * flops.gemm


def test_model_sizes_equal_the_papers():
    assert SIZES["mae_vit_base_patch16"] == Sizes(196, 768, 768, 12)
    assert SIZES["mae_vit_large_patch16"] == Sizes(196, 768, 1024, 24)
    assert SIZES["mae_vit_huge_patch14"] == Sizes(256, 588, 1280, 32)
    assert SIZES["mae_vit_tiny_patch4"] == Sizes(64, 48, 128, 4, 96, 2)
    with torch.device("meta"):
        for name, sizes in SIZES.items():
            assert Sizes.of(build(name)) == dataclasses.replace(sizes, predicted=sizes.values)


def test_an_encoder_without_mask_tokens_saves_the_flops_of_table_1c():
    """For training, with a decoder of 8 blocks in both."""
    sizes = SIZES["mae_vit_large_patch16"]
    seen = train_flops(dataclasses.replace(sizes, encoder_mask_token=True))
    assert seen.total / train_flops(sizes).total == pytest.approx(MASK_TOKEN_FLOPS, rel=0.05)


def test_a_step_of_vit_base_takes_the_published_flops():
    assert train_flops(SIZES["mae_vit_base_patch16"]).total == pytest.approx(58.7e9, rel=1e-3)


def test_least_counts_only_the_operations_of_the_loss():
    sizes = SIZES["mae_vit_base_patch16"]
    whole, least = train_flops(sizes), train_flops(sizes, least=True)
    embedding, prediction = 2 * 768 * 768, 2 * 512 * 768  # FLOPs of a patch's forward pass
    saved = (3 * 196 - 2 * 49) * embedding + 3 * (197 - 147) * prediction
    last_block = 3 * (197 - 147) * 2 * 512**2 * (1 + 4 + 4)  # proj, fc1 and fc2 of the tokens that are not predicted
    assert whole.gemm - least.gemm == saved + last_block
    assert whole.attention - least.attention == 3 * 4 * (197 - 147) * 197 * 512
    shallow = dataclasses.replace(sizes, decoder_depth=0)
    assert train_flops(shallow).gemm - train_flops(shallow, least=True).gemm == saved
    nothing_removed = train_flops(sizes, 0.0), train_flops(sizes, 0.0, least=True)
    assert nothing_removed[0].attention == nothing_removed[1].attention
