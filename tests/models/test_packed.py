"""Images of several sizes in one packed sequence give the same results as single images."""

import pytest
import torch
from support import assert_close, tie_free, tiny
from torch import nn

from mae_fast.models.blocks import Attention, Block
from mae_fast.models.pos_embed import resize_pos_embed, sincos_2d
from mae_fast.models.reference import ReferenceMAE
from mae_fast.ops.attention import attention

SIZES = [(24, 24), (8, 16), (4, 4), (40, 12), (24, 24)]  # 36, 8, 1, 30 and 36 patches of 4 x 4


def images_and_noise(dtype=torch.float64, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator, dtype=dtype) for size in sizes]
    return images, [tie_free(1, h * w // 16, seed=i)[0] for i, (h, w) in enumerate(sizes)]


def gradients(model, encoded):
    model.zero_grad()
    sum((latent * torch.linspace(-1, 1, latent.numel()).view_as(latent)).sum() for latent, *_ in encoded).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model, images, noise, mask_ratio):
    return [model.encode_packed([x], mask_ratio, [z])[0] for x, z in zip(images, noise, strict=True)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_images_equal_single_images(checkpointing):
    model = tiny().double()
    model.set_grad_checkpointing(checkpointing)
    images, noise = images_and_noise()
    together, alone = model.encode_packed(images, 0.5, noise), one_by_one(model, images, noise, 0.5)
    for ours, theirs in zip(together, alone, strict=True):
        assert_close(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert [len(latent) for latent, *_ in together] == [19, 5, 1, 16, 19]
    ours, theirs = gradients(model, together), gradients(model, alone)
    assert "grad" not in ours
    assert_close(ours, theirs)


def test_packed_images_of_the_models_size_equal_forward_encoder():
    model = tiny().double()
    images, noise = images_and_noise(sizes=[(24, 24)] * 3)
    latent, mask, ids_restore = model.forward_encoder(torch.stack(images), 0.75, torch.stack(noise))
    for i, found in enumerate(model.encode_packed(images, 0.75, noise)):
        assert_close(dict(enumerate(found)), {0: latent[i], 1: mask[i], 2: ids_restore[i]})


def test_an_image_of_another_size_equals_a_model_of_that_size():
    """The other model is the eager reference, with a resized position table."""
    model = tiny().double()
    wide = tiny(img_size=(40, 12)).double()
    wide.load_state_dict({n: x for n, x in model.state_dict().items() if "pos_embed" not in n}, strict=False)
    wide.pos_embed.data.copy_(resize_pos_embed(model.pos_embed, (6, 6), (10, 3)))
    reference = ReferenceMAE.of(wide)
    (image,), (noise,) = images_and_noise(sizes=[(40, 12)])
    latent, mask, ids_restore = reference.forward_encoder(image[None], 0.75, noise[None])
    found = model.encode_packed([image], 0.75, [noise])[0]
    assert_close(dict(enumerate(found)), {0: latent[0], 1: mask[0], 2: ids_restore[0]})


def test_packed_uint8_images_are_standardised():
    model = tiny().double()
    pixels = torch.randint(0, 256, (8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    standardised = ((pixels.double() / 255 - model.pixel_mean) / model.pixel_std).permute(2, 0, 1)
    noise = tie_free(1, 6)
    ours, theirs = (model.encode_packed([x], 0.5, [noise[0]])[0][0] for x in (pixels, standardised))
    assert_close({0: ours}, {0: theirs}, 1e-6)


class Other(Attention):
    pass


@pytest.mark.parametrize("what", ["attention", "block", "hook"])
def test_replaced_modules_are_called_on_one_sequence_at_a_time(what):
    model = tiny().double()
    images, noise = images_and_noise()
    expected = model.encode_packed(images, 0.5, noise)
    seen = []
    if what == "attention":
        model.blocks[0].attn.__class__ = Other
    elif what == "block":
        model.blocks[0].__class__ = type("OtherBlock", (Block,), {})
    else:
        model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    for ours, theirs in zip(model.encode_packed(images, 0.5, noise), expected, strict=True):
        assert_close(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert seen == ([19, 5, 1, 16, 19] if what == "hook" else [])


def test_noise_is_drawn_image_by_image():
    model, (images, _) = tiny(), images_and_noise(torch.float32)
    torch.manual_seed(3)
    noise = [torch.rand(1, x.shape[1] * x.shape[2] // 16)[0] for x in images]
    torch.manual_seed(3)
    drawn = model.encode_packed(images)
    assert all(a[2].equal(b[2]) for a, b in zip(drawn, model.encode_packed(images, noise=noise), strict=True))
    assert model.encode_packed([]) == []


@pytest.mark.parametrize(
    ("image", "noise", "message"),
    [
        (
            torch.randn(1, 3, 24, 24),
            None,
            r"image 0 must be floating \[3, H, W\] or uint8 \[H, W, 3\], got .*\[1, 3, 24",
        ),
        (torch.randn(4, 24, 24), None, r"image 0 must be floating \[3, H, W\]"),
        (torch.randn(3, 24, 26), None, "multiples of 4 x 4, got 24 x 26"),
        (torch.randn(3, 0, 24), None, "multiples of 4 x 4, got 0 x 24"),
        (torch.randn(3, 8, 8), torch.rand(5), r"noise must be \[N, L\] = \[1, 4\], got \[1, 5\]"),
    ],
)
def test_wrong_packed_images_raise_value_errors(image, noise, message):
    with pytest.raises(ValueError, match=message):
        tiny().encode_packed([image], noise=None if noise is None else [noise])


def test_attention_stays_within_its_sequence():
    qkv = torch.randn(1, 12, 3 * 8, dtype=torch.float64)
    parts = [attention(part, 2) for part in qkv.split([3, 1, 8], 1)]
    assert torch.equal(attention(qkv, 2, (3, 1, 8)), torch.cat(parts, 1))
    for wrong in ((3, 1), (3, 0, 9), ()):
        with pytest.raises(ValueError, match="lengths must add up"):
            attention(qkv, 2, wrong)
    with pytest.raises(ValueError, match="lengths must add up"):
        attention(qkv.expand(2, -1, -1), 2, (3, 1, 8))


def test_resizing_keeps_corners_and_class_token():
    """Resizing to the same grid changes nothing. A smooth table keeps its class token and the order of its corners."""
    table = torch.cat([torch.full((1, 1, 4), 7.0), sincos_2d(4, (6, 6), cls_token=False)], 1)
    assert resize_pos_embed(table, (6, 6), (6, 6)) is table
    small = resize_pos_embed(table, (6, 6), (3, 5))
    assert small.shape == (1, 16, 4)
    assert small[0, 0].eq(7).all()
    expected = nn.functional.interpolate(
        table[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2), size=(3, 5), mode="bicubic", align_corners=False
    )
    assert torch.equal(small[0, 1:], expected[0].flatten(1).t())
