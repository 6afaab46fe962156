"""Helpers of the model tests: small models, noise without ties, gradients by name, and tolerances."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mae_fast.models import MaskedAutoencoderViT, VisionTransformer

# Added to twice the error of eager, relative to the largest correct value. In float64, eager is the correct result and
# zeros are rounding errors, so the floor is relative to at least 1.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


@pytest.fixture
def one_thread():
    """Use one thread, because two threads of a tiny model mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(seed=0, **options):
    """A small model: 24 x 24 images, 36 patches, every weight, bias and layer norm off its initial value."""
    options = {
        "img_size": 24,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "decoder_embed_dim": 24,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        **options,
    }
    torch.manual_seed(seed)
    return perturb(MaskedAutoencoderViT(**options))


def tiny_vit(seed=0, **options):
    """A small classifier whose parameters are all away from their initial zeros and ones."""
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    torch.manual_seed(seed)
    return perturb(VisionTransformer(**{"norm_layer": partial(nn.LayerNorm, eps=1e-6), **sizes, **options}))


def timm_twin(model):
    """A timm model with our sizes and weights."""
    from timm.models.vision_transformer import VisionTransformer as Timm

    block = model.blocks[0]
    theirs = Timm(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size,
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        global_pool="avg" if model.global_pool else "token",
        embed_dim=model.cls_token.shape[2],
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        qkv_bias=block.attn.qkv.bias is not None,
        drop_path_rate=model.blocks[-1].drop_path.drop_prob,
        norm_layer=partial(nn.LayerNorm, eps=block.norm1.eps),
    ).to(model.cls_token)
    theirs.load_state_dict(model.state_dict())
    return theirs


def command(monkeypatch, capsys, *words):
    """Run ``mae-fast WORDS`` in this process. An unexpected exception fails the test."""
    from mae_fast.cli import main  # imported here because GPU machines for tests of ops do not need tyro

    monkeypatch.setattr(sys, "argv", ["mae-fast", *map(str, words)])
    status = 0
    try:
        main()
    except SystemExit as exit:
        status = exit.code or 0
    out, err = capsys.readouterr()
    return SimpleNamespace(returncode=status, stdout=out, stderr=err)


def perturb(model):
    """Add a small shift to all trained parameters, so that a missing bias or swapped layer norm changes the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def tie_free(n, length, seed=0):
    """Noise [n, length] without ties, so that every sort gives the same order."""
    generator = torch.Generator().manual_seed(seed)
    ranks = [torch.randperm(length, generator=generator) for _ in range(n)]
    return torch.stack(ranks).float() / length if n else torch.empty(0, length)


def inputs(model, n=2, seed=0):
    """Standardised images and masking noise for ``model``, in its dtype."""
    size = (n, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return images.to(model.cls_token), tie_free(n, model.patch_embed.num_patches, seed)


def pictures(model, n=3, size=None, seed=0):
    """Standardised images for ``model`` in its dtype, of any size; by default, the size of the model."""
    size = size or model.patch_embed.img_size
    images = torch.randn(n, model.in_chans, *size, generator=torch.Generator().manual_seed(seed))
    return images.to(model.cls_token)


def gradients(model):
    """The gradient of every parameter that should have one; the others must have none."""
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    return {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def run(model, images, mask_ratio=0.75, noise=None, cotangent=None):
    """``loss``, ``pred``, ``mask`` and every gradient, of the loss or of ``(pred * cotangent).sum()``."""
    model.zero_grad()
    loss, pred, mask = model(images, mask_ratio, noise)
    (loss if cotangent is None else (pred * cotangent).sum()).backward()
    return {"loss": loss.detach(), "pred": pred.detach(), "mask": mask, **gradients(model)}


def run_loss(model, images, mask_ratio=0.75, noise=None, **options):
    """``loss`` and every gradient, through ``model.loss``."""
    model.zero_grad()
    loss = model.loss(images, mask_ratio, noise, **options)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_close(ours, theirs, limit=1e-12):
    """``max|a - b| <= limit * max(1, max|b|)``, same shape and dtype, for every tensor of ``theirs``."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
        error = (got - expected).abs().max().item()
        allowed = limit * max(1.0, expected.abs().max().item())
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"  # NaN fails too


def assert_no_worse_than_eager(ours, eager, truth, dtype):
    """The maximum and RMS errors against fp64 are at most twice those of eager, plus a floor."""
    assert ours.keys() == eager.keys() == truth.keys()
    for name, exact in truth.items():
        assert (ours[name].shape, ours[name].dtype) == (exact.shape, eager[name].dtype), name
        floor = FLOOR[dtype] * max(exact.abs().max().item(), dtype == torch.float64)
        for kind, size in (("max", torch.max), ("rms", lambda e: e.square().mean().sqrt())):
            mine, yours = (size((x[name].double() - exact).abs()).item() for x in (ours, eager))
            assert mine <= 2 * yours + floor, f"{name}: {kind} error {mine:.3g}, eager's {yours:.3g}, floor {floor:.3g}"
