"""FLOPs against torch's own count of the reference's step, and the roofline's arithmetic."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mae_fast
from mae_fast.bench import predict
from mae_fast.bench.predict import ASSUMED, GPUS, MODELS, Assumed, Counted, Gpu, Sizes, predicted_seconds, train_flops
from mae_fast.models.mae import build
from mae_fast.models.reference import ReferenceMAE
from mae_fast.studies.paper import MASK_TOKEN_FLOPS

FACTORIES = {
    "ViT-B/16": mae_fast.mae_vit_base_patch16,
    "ViT-L/16": mae_fast.mae_vit_large_patch16,
    "ViT-H/14": mae_fast.mae_vit_huge_patch14,
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_torch_counts(name):
    """Forward only: torch counts a backward's recomputed scores and leaves out the pixels' gradient."""
    with torch.device("meta"):
        model = ReferenceMAE.of(FACTORIES[name]())
        images, noise = torch.empty(2, 3, 224, 224), torch.empty(2, MODELS[name].patches)
    with FlopCounterMode(display=False) as counter:
        model(images, 0.75, noise)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "bmm" in str(op))  # on meta, SDPA is written out
    flops = train_flops(MODELS[name])
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
def test_flops_of_ablated_models_are_those_torch_counts(name):
    """Encoder and decoder: what makes a target of pixels is no part of either."""
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


def test_sizes_of_the_papers_models():
    with torch.device("meta"):
        for name, factory in FACTORIES.items():
            assert Sizes.of(factory()) == dataclasses.replace(MODELS[name], predicted=MODELS[name].values)


def test_the_papers_saving_by_leaving_mask_tokens_out_of_the_encoder():
    """Table 1c: of the whole training, with the decoder of 8 blocks in both."""
    sizes = MODELS["ViT-L/16"]
    seen = train_flops(dataclasses.replace(sizes, encoder_mask_token=True))
    assert seen.total / train_flops(sizes).total == pytest.approx(MASK_TOKEN_FLOPS, rel=0.05)


def test_the_papers_figure():
    assert train_flops(MODELS["ViT-B/16"]).total == pytest.approx(58.7e9, rel=1e-3)


GPU = Gpu("a GPU of round figures", peak=100e12, bandwidth=1e12)


def test_roofline(monkeypatch):
    """Worked by hand: one group bound by arithmetic, the others by memory, ten launches."""
    monkeypatch.setitem(predict.STEPS, "ViT-B/16", Counted((1, 1e9), (2, 3e12), (3, 0.5e12), (4, 2e12)))
    flops = train_flops(MODELS["ViT-B/16"], least=True)
    gemm, attention = 256 * flops.gemm, 256 * flops.attention * 3.5 / 3
    assert gemm / 50e12 > 1e9 / 0.25e12  # bound by arithmetic
    assert attention / 10e12 < 3e12 / 0.25e12  # bound by memory
    seconds = predicted_seconds("ViT-B/16", GPU, Assumed(gemm=0.5, attention=0.1, memory=0.25, gap=0.001))
    assert seconds == pytest.approx(gemm / 50e12 + 12 + 2 + 8 + 10 * 0.001)


def test_data_sheet_bounds_every_assumption():
    for model in MODELS:
        for gpu in GPUS.values():
            bound, graph, launches = (predicted_seconds(model, gpu, assumed) for assumed in ASSUMED)
            assert bound < graph < launches


def test_least_leaves_out_what_the_loss_does_not_need():
    sizes = MODELS["ViT-B/16"]
    whole, least = train_flops(sizes), train_flops(sizes, least=True)
    embedding, prediction = 2 * 768 * 768, 2 * 512 * 768  # FLOPs of a patch's forward pass
    saved = (3 * 196 - 2 * 49) * embedding + 3 * (197 - 147) * prediction
    assert whole.gemm - least.gemm == saved
    assert whole.attention == least.attention


def test_bench_says_that_it_predicts_and_loads_no_torch():
    code = "import sys; sys.argv = ['mae-fast', 'bench', '--predict']; from mae_fast.cli import main; main()"
    command = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "Predicted, not measured" in done.stdout
    for model in MODELS:
        assert done.stdout.count(model) == len(GPUS) * len(ASSUMED)
