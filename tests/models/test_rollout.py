"""Attention maps equal softmax(q k^T / sqrt d) of the eager references, and agree with the fused attention."""

import pytest
import torch
from support import (  # noqa: F401
    assert_close,
    assert_no_worse_than_eager,
    one_thread,
    pictures,
    tiny,
    tiny_vit,
)
from torch import nn

from mae_fast.models import attention_maps
from mae_fast.models.reference import ReferenceMAE, ReferenceViT

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "autoencoder": lambda: tiny(depth=3),
    "encoder with mask tokens": lambda: tiny(encoder_mask_token=True),
    "classifier": lambda: tiny_vit(depth=3),
    "pooled classifier": lambda: tiny_vit(global_pool=True),
    "one wide head, rectangles": lambda: tiny_vit(num_heads=1, img_size=(24, 16), patch_size=(4, 8)),
    "one block": lambda: tiny_vit(depth=1),
}


def eager(model, images):
    """Both maps from the modules of the reference and the formulas of the paper, in the model's dtype."""
    reference = (ReferenceViT if hasattr(model, "head") else ReferenceMAE).of(model)
    packed = []
    for block in reference.blocks:
        block.attn.qkv.register_forward_hook(lambda _module, _inputs, output: packed.append(output))
    with torch.no_grad():
        if hasattr(model, "head"):
            reference(images)
        else:
            order = torch.arange(model.patch_embed.num_patches).expand(len(images), -1)
            reference.forward_encoder(images, 0.0, order)
    heads, (h, w) = model.blocks[0].attn.num_heads, model.patch_embed.grid_size
    rollout = torch.eye(1 + h * w).to(images)
    for qkv in packed:
        n, t, width = qkv.shape
        q, k, _ = qkv.reshape(n, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
        mixed = attention.mean(1) + torch.eye(t).to(images)
        rollout = mixed / mixed.sum(2, keepdim=True) @ rollout
    return {"heads": attention[:, :, 0, 1:].reshape(n, heads, h, w), "rollout": rollout[:, 0, 1:].reshape(n, h, w)}


@pytest.mark.parametrize("kind", MODELS)
def test_maps_equal_those_of_the_eager_reference(kind):
    model = MODELS[kind]().double().eval()
    images = pictures(model)
    assert_close(attention_maps(model, images)._asdict(), eager(model, images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
def test_lower_precision_is_no_worse_than_eager(kind, dtype):
    model = MODELS[kind]().to(dtype).eval()
    images = pictures(model)
    truth = eager(MODELS[kind]().to(dtype).double().eval(), images.double())
    plain = {name: x.float() for name, x in eager(model, images).items()}
    assert_no_worse_than_eager(attention_maps(model, images)._asdict(), plain, truth, dtype)


@pytest.mark.parametrize("size", [(24, 24), (32, 20)], ids=str)
def test_values_weighted_by_the_maps_are_the_output_of_the_fused_attention(size):
    model = tiny_vit(depth=2).double().eval()
    images = pictures(model, size=size)
    seen = {}
    last = model.blocks[-1].attn
    last.qkv.register_forward_hook(lambda _module, _inputs, output: seen.update(qkv=output))
    last.proj.register_forward_pre_hook(lambda _module, inputs: seen.update(attended=inputs[0]))
    with torch.no_grad():
        model(images)
    to_patches = attention_maps(model, images).heads.flatten(2)  # [N, H, L]
    to_itself = 1 - to_patches.sum(2, keepdim=True)
    values = seen["qkv"].unflatten(2, (3, 4, 8))[:, :, 2]  # [N, T, H, d]
    attended = torch.einsum("nht,nthd->nhd", torch.cat([to_itself, to_patches], 2), values).flatten(1)
    assert_close({"class token": attended}, {"class token": seen["attended"][:, 0]})


def test_pixels_of_8_bits_and_hooked_modules_give_the_same_maps():
    model = tiny(depth=2).eval()
    pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    standard = (pixels.permute(0, 3, 1, 2) / 255 - model.pixel_mean[:, None, None]) / model.pixel_std[:, None, None]
    expected = attention_maps(model, standard)._asdict()
    assert_close(attention_maps(model, pixels)._asdict(), expected, 1e-5)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    assert_close(attention_maps(model, standard)._asdict(), expected, 1e-5)


def test_attention_is_uniform_if_queries_are_zero():
    model = tiny_vit(depth=2).double().eval()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
    maps = attention_maps(model, pictures(model, n=1))
    assert maps.heads.shape == (1, 4, 6, 6)
    assert torch.allclose(maps.heads, torch.tensor(1 / 37).double())
    # Each block keeps half and spreads half over 37 tokens: two blocks spread 3/4.
    assert torch.allclose(maps.rollout, torch.tensor(0.75 / 37).double())


def test_attention_maps_change_neither_gradients_nor_the_model():
    model = tiny_vit().eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    maps = attention_maps(model, pictures(model))
    assert not maps.heads.requires_grad
    assert_close(dict(model.state_dict()), before, 0)
    maps.heads.mul_(2)  # an ordinary tensor


def test_blocks_of_other_packages_raise_value_errors():
    model = tiny_vit()
    model.blocks[1].attn = nn.MultiheadAttention(32, 4)
    with pytest.raises(ValueError, match="block 1 must be a mae_fast"):
        attention_maps(model, pictures(model))
    with pytest.raises(ValueError, match="without blocks"):
        attention_maps(tiny_vit(depth=0), pictures(model))
    with pytest.raises(ValueError, match="multiples of 4 x 4"):
        attention_maps(tiny_vit(), torch.zeros(1, 3, 25, 24))
