"""Targets other than pixels equal their definitions."""

import pytest
import torch
from support import assert_close, one_thread  # noqa: F401
from torch.nn import functional as F

from mae_fast.models.targets import PcaTarget, TokenTarget, tokens
from mae_fast.models.targets.dvae import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def pixels(n=40, size=(12, 8), seed=0):
    """Smooth uint8 images [n, H, W, 3], whose patches have large and small components."""
    small = torch.rand(n, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    large = F.interpolate(small, size, mode="bicubic", align_corners=False).clamp(0, 1)
    return (large * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def rows(images, patch=(4, 4)):
    """All standardised patches [n * L, P], channel fastest, by loops."""
    standard = (images.double() / 255 - MEAN.double()) / STD.double()
    (p, q), (_, h, w, _) = patch, images.shape
    return torch.stack(
        [im[i : i + p, j : j + q].reshape(-1) for im in standard for i in range(0, h, p) for j in range(0, w, q)]
    )


def fitted(images, components=5, batch=7):
    target = PcaTarget((4, 4), 3, components)
    kept = target.fit(*target.moments(images.split(batch), MEAN, STD))
    return target, kept


def test_components_are_the_directions_of_largest_variance():
    images = pixels()
    target, kept = fitted(images)
    centred = rows(images) - rows(images).mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    assert_close({"centre": target.centre.double()}, {"centre": rows(images).mean(0)}, 1e-6)
    for i in range(5):  # largest first; the sign is arbitrary
        assert abs(target.basis[:, i].double() @ directions[i]) == pytest.approx(1, abs=1e-5), i
    assert kept == pytest.approx((sizes[:5].square().sum() / sizes.square().sum()).item(), abs=1e-6)


def test_moments_do_not_depend_on_batches():
    images = pixels()
    (one, _), (other, _) = fitted(images, batch=40), fitted(images, batch=3)
    assert_close(dict(one.named_buffers()), dict(other.named_buffers()), 1e-5)


def test_moments_of_processes_add_up():
    images = pixels()
    target = PcaTarget((4, 4), 3, 5)
    whole = target.moments([images], MEAN, STD)
    parts = [target.moments([part], MEAN, STD) for part in images.split(20)]
    for a, *b in zip(whole, *parts, strict=True):
        assert_close({"moment": sum(b)}, {"moment": a}, 1e-5)


def test_fitting_without_patches_raises_a_value_error():
    target = PcaTarget((4, 4), 3, 5)
    with pytest.raises(ValueError, match="at least one patch"):
        target.fit(*target.moments([], MEAN, STD))


@pytest.mark.parametrize("floating", [False, True])
def test_coefficients_equal_the_formula(floating):
    images = pixels()
    target, _ = fitted(images)
    ids = torch.stack([torch.randperm(6)[:4] for _ in range(40)])
    expected = (rows(images) - target.centre.double()) @ target.basis.double()
    expected = expected.reshape(40, 6, 5).gather(1, ids[:, :, None].expand(-1, -1, 5))
    given = ((images.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2) if floating else images
    with torch.autocast("cpu", torch.bfloat16):  # the target is not rounded
        got = target(given, ids, MEAN, STD)
    assert not got.requires_grad
    assert_close({"coefficients": got.double()}, {"coefficients": expected}, 1e-5)


def test_pixels_of_all_components_are_the_patches():
    images = pixels(n=60)
    target, kept = fitted(images, components=48)
    assert kept == pytest.approx(1)
    ids = torch.arange(6).expand(60, -1)
    again = target.pixels(target(images, ids, MEAN, STD))
    assert_close({"patches": again.flatten(0, 1).double()}, {"patches": rows(images)}, 1e-5)


def test_coefficients_minimise_the_loss():
    """An exact prediction has loss 0, and an error of d has loss d^2."""
    images = pixels()
    target, _ = fitted(images)
    ids = torch.arange(6).expand(40, -1)
    mask = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    right = target(images, ids, MEAN, STD)
    assert target.loss(images, right, mask, ids, MEAN, STD) == 0
    off = right + 3 * mask[:, :, None] + 100 * (1 - mask[:, :, None])
    assert target.loss(images, off, mask, ids, MEAN, STD).item() == pytest.approx(9, rel=1e-5)


@pytest.fixture
def token_target():
    torch.manual_seed(0)
    return TokenTarget(Tokenizer(vocab_size=50, hidden=8, groups=2, blocks_per_group=1), (4, 4))


@pytest.mark.parametrize("floating", [False, True])
def test_token_targets_equal_the_tokens_of_the_patches(token_target, floating):
    images = pixels(n=3)
    ids = torch.tensor([[5, 0], [1, 2], [3, 3]])
    whole = token_target.tokenizer.tokens(images.permute(0, 3, 1, 2).float() / 255, (3, 2))
    assert whole.shape == (3, 6)
    assert whole.unique().numel() > 1
    given = ((images.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2) if floating else images
    assert torch.equal(token_target(given, ids, MEAN, STD), whole.gather(1, ids))


@pytest.mark.parametrize("max_logits", [50, 51 * 7, 2**23])
def test_cross_entropy_in_parts_equals_the_whole(token_target, max_logits, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_LOGITS", max_logits)
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(16, 50).double(), torch.randn(3, 6, 16).double().requires_grad_()
    wanted = torch.randint(50, (3, 6))

    def run(loss):
        layer.zero_grad()
        x.grad = None
        loss.backward()
        return {
            "loss": loss.detach(),
            "x": x.grad,
            "weight": layer.weight.grad.clone(),
            "bias": layer.bias.grad.clone(),
        }

    whole = run(F.cross_entropy(layer(x).flatten(0, 1), wanted.flatten()))
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    assert_close(run(token_target.loss_of_decoded(layer, x, wanted)), whole)
    assert max(seen) * 50 <= max(max_logits, 50)
