"""Replaced and hooked patch embeddings are called, everywhere."""

import pytest
import torch
from support import inputs, one_thread, tiny, tiny_vit  # noqa: F401
from timm.layers import PatchEmbed
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def with_norm(model):
    model.patch_embed = PatchEmbed(24, 4, 3, 32, norm_layer=nn.LayerNorm)
    nn.init.normal_(model.patch_embed.norm.weight)


def overlapping(model):
    model.patch_embed.proj = nn.Conv2d(3, 32, 6, stride=4, padding=1)


def dilated(model):
    model.patch_embed.proj = nn.Conv2d(3, 32, 4, stride=4, dilation=2, padding=2)


def deep(model):
    model.patch_embed.proj = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Conv2d(8, 32, 1))


def hooked(model):
    model.patch_embed.register_forward_hook(lambda *call: 2 * call[-1])


def convolution_hooked(model):
    model.patch_embed.proj.register_forward_hook(lambda *call: 2 * call[-1])


CHANGES = [with_norm, overlapping, dilated, deep, hooked, convolution_hooked]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pixels", ["floating", "raw"])
@pytest.mark.parametrize("kind", [tiny, tiny_vit])
def test_the_embedding_is_called(kind, pixels, change):
    model = kind()
    change(model)
    given = images = inputs(tiny())[0]
    if pixels == "raw":
        given = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
        images = ((given / 255 - model.pixel_mean) / model.pixel_std).permute(0, 3, 1, 2)
    embedded = model.patch_embed(images) + model.pos_embed[:, 1:]
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1)
    everything = model.embed_patches(given, None, (6, 6))
    torch.testing.assert_close(everything, torch.cat([cls, embedded], 1))
    ids = torch.tensor([[3, 1, 30], [0, 35, 7]])
    assert torch.equal(model.embed_patches(given, ids, (6, 6))[:, 1:], everything[torch.arange(2)[:, None], 1 + ids])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"encoder_mask_token": True}])
def test_training_uses_the_embedding(change, options):
    model = tiny(**options)
    images, noise = inputs(model)
    before = model.loss(images, noise=noise)
    change(model)
    loss = model.loss(images, noise=noise)
    assert loss != before
    torch.testing.assert_close(loss, model(images, noise=noise)[0])
    loss.backward()
    assert all(x.grad.abs().sum() > 0 for x in model.patch_embed.parameters())


def test_the_plain_embedding_is_not_called(monkeypatch):
    model = tiny()
    monkeypatch.setattr(type(model.patch_embed), "forward", lambda *_: pytest.fail("embeds removed patches"))
    model.loss(*inputs(model)[:1])
