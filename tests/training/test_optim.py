"""Optimiser groups and learning rate against the published formulas."""

import math

import pytest
import torch
from torch import nn

from mae_fast.models.mae import build
from mae_fast.training.optim import WarmupCosine, adamw


@pytest.mark.parametrize(("warmup", "total", "low"), [(40, 800, 0.0), (0, 10, 0.0), (5, 6, 1e-5), (13, 97, 1e-4)])
def test_schedule_is_linear_then_half_a_cosine(warmup: int, total: int, low: float) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.3)
    schedule = WarmupCosine(optimizer, warmup_steps=warmup, total_steps=total, min_lr=low)
    for step in [*range(total), 0, total // 2]:  # also backwards: the step alone decides
        if step < warmup:
            expected = 0.3 * step / warmup
        else:
            share = (step - warmup) / (total - warmup)
            expected = low + (0.3 - low) * 0.5 * (1 + math.cos(math.pi * share))
        assert schedule.set(step) == pytest.approx(expected, abs=1e-15)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-15)


def test_matrices_and_tokens_decay_but_vectors_and_biases_do_not() -> None:
    model = build("mae_vit_tiny_patch4")
    optimizer = adamw(model, lr=1.0, weight_decay=0.05)
    decay = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert name in ("pos_embed", "decoder_pos_embed")
            assert all(p is not q for group in optimizer.param_groups for q in group["params"])
        else:
            assert (p in decay) == (p.ndim > 1 and not name.endswith(".bias")), name
    assert {model.cls_token, model.mask_token} <= decay
    assert optimizer.defaults["betas"] == (0.9, 0.95)
