"""FLOPs against torch's own count of the reference's step, and the roofline's arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mae_fast
from mae_fast.predict import MODELS, train_flops
from mae_fast.reference import ReferenceMAE

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


def test_the_papers_figure():
    assert train_flops(MODELS["ViT-B/16"]).total == pytest.approx(58.7e9, rel=1e-3)
