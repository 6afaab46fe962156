"""200 training steps of our model and optimizer equal those of the reference, on the same images and masks."""

import pytest
import torch
from support import one_thread  # noqa: F401

from mae_fast.models.mae import build
from mae_fast.models.reference import ReferenceMAE
from mae_fast.training.optim import adamw

STEPS, BATCH = 200, 4


def batches(model):
    """New smooth random images and mask noise for each step."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        coarse = torch.randn(BATCH, 3, 5, 5, generator=generator)
        images = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
        yield images, torch.rand(BATCH, model.patch_embed.num_patches, generator=generator)


def train(model, loss_of, optimizer, bf16, data):
    losses = []
    for step, (images, noise) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(images, noise)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), model.state_dict()


def both(bf16):
    """Losses and final weights of the reference with torch's AdamW, and of our model with our AdamW."""
    torch.manual_seed(0)
    fast = build("mae_vit_tiny_patch4", norm_pix_loss=True)
    slow = ReferenceMAE.of(fast)
    data = list(batches(fast))
    theirs = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in adamw(slow, 1e-3, 0.05).param_groups],
        betas=(0.9, 0.95),
    )
    expected = train(slow, lambda images, noise: slow(images, 0.75, noise)[0], theirs, bf16, data)
    mine = adamw(fast, 1e-3, 0.05, working_dtype=torch.bfloat16 if bf16 else None)
    found = train(fast, lambda images, noise: fast.loss(images, 0.75, noise), mine, bf16, data)
    return expected, found


@pytest.mark.parametrize(
    ("bf16", "limit"), [pytest.param(False, 1e-6, marks=pytest.mark.exhaustive), (True, 1e-2)], ids=["fp32", "bf16"]
)
def test_loss_curves_are_equal(bf16, limit, one_thread):  # noqa: F811
    (expected, theirs), (found, mine) = both(bf16)
    assert expected[-20:].mean() < 0.8 * expected[:5].mean()  # it learns
    worst = ((found - expected).abs() / expected).max().item()
    assert worst <= limit
    if not bf16:
        for name, value in theirs.items():
            difference = (mine[name] - value).abs()
            if name.endswith("qkv.bias"):  # the key's gradient is truly 0, and Adam amplifies its rounding errors
                q, _, v = difference.chunk(3)
                difference = torch.cat([q, v])
            assert difference.max() <= 1e-5, name
