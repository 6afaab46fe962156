"""Initial weights, masking, patches, uint8 images and error messages of the model."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from support import assert_close, inputs, one_thread, run, run_loss, tie_free, tiny, tiny_vit  # noqa: F401
from torch import nn

import mae_fast
from mae_fast.models import MaskedAutoencoderViT, build
from mae_fast.models.pos_embed import sincos_2d
from mae_fast.models.reference import ReferenceMAE

pytestmark = pytest.mark.usefixtures("one_thread")


def test_initial_weights_follow_the_published_distributions():
    torch.manual_seed(0)
    model = mae_fast.mae_vit_base_patch16(depth=1, decoder_depth=1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name == "patch_embed.proj":
            weight = module.weight.flatten(1)
            bound = math.sqrt(6 / sum(weight.shape))  # qkv: of the whole (3D, D) matrix
            assert 0.999 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01), name
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    bias, bound = model.patch_embed.proj.bias, 1 / math.sqrt(3 * 16 * 16)  # the default of nn.Conv2d
    assert 0.9 * bound < bias.abs().max() <= bound
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(token.mean().item()) < 0.003
    assert torch.equal(model.pos_embed, sincos_2d(768, (14, 14)))
    assert torch.equal(model.decoder_pos_embed, sincos_2d(512, (14, 14)))


def test_seed_gives_the_published_weights():
    sizes = {"img_size": (12, 8), "patch_size": (4, 4), "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    torch.manual_seed(3)
    ours = MaskedAutoencoderViT(**sizes, **decoder).state_dict()
    torch.manual_seed(3)  # build modules in the published order, then initialize them in one pass
    plain = ReferenceMAE(**sizes, **decoder, hidden=64, decoder_hidden=32, eps=1e-5, norm_pix_loss=False)
    nn.init.xavier_uniform_(plain.patch_embed["proj"].weight.data.flatten(1))
    nn.init.normal_(plain.cls_token, std=0.02)
    nn.init.normal_(plain.mask_token, std=0.02)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, expected in plain.state_dict().items():
        assert "pos_embed" in name or torch.equal(ours[name], expected), name


@pytest.mark.parametrize(
    ("length", "mask_ratio", "kept"), [(196, 0.75, 49), (256, 0.75, 64), (196, 0.9, 19), (100, 0.9, 9), (10, 0.7, 3)]
)
def test_the_number_of_visible_patches_is_truncated(length, mask_ratio, kept):
    model = tiny(img_size=(4, 4 * length))
    x = torch.arange(length)[None, :, None].expand(2, -1, 1)
    noise = tie_free(2, length)
    visible, mask, ids_restore = model.random_masking(x, mask_ratio, noise)
    assert torch.equal(visible[..., 0], noise.argsort(1)[:, :kept])  # in random order
    assert torch.equal(ids_restore, noise.argsort(1).argsort(1))
    assert mask.dtype == torch.float32
    for row, seen in zip(mask, visible[..., 0], strict=True):  # 0 = kept, 1 = removed
        assert row[seen].sum() == 0
        assert row.sum() == length - kept
    images, noise = inputs(model)
    latent, mask, _ = model.forward_encoder(images, mask_ratio, noise)
    assert latent.shape == (2, 1 + kept, 32)
    assert (mask == 0).sum(1).tolist() == [kept, kept]


def test_nothing_removed_gives_nan():
    model = tiny()
    images, noise = inputs(model)
    loss, pred, mask = model(images, 0, noise)
    assert loss.isnan()
    assert pred.isfinite().all()
    assert not mask.any()
    assert model.loss(images, 0.0, noise).isnan()


def test_masks_of_an_empty_batch_are_accepted():
    model = tiny()
    images, mask = torch.zeros(0, 3, 24, 24), torch.zeros(0, 36)
    assert model.loss(images, mask=mask).isnan()
    assert model.forward_features(images, mask=mask).shape == (0, 1, 32)


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=str)
def test_layer_norms_may_have_no_parameters(options):
    model = tiny(norm_layer=partial(nn.LayerNorm, **options)).double()
    images, noise = inputs(model)
    assert_close({"": model.loss(images, 0.75, noise)}, {"": model(images, 0.75, noise)[0]})


@pytest.mark.parametrize(("patch", "channels"), [((2, 2), 3), ((3, 2), 5), ((4, 6), 1)])
def test_patchify_equals_loops_and_unpatchify_inverts_it(patch, channels):
    p, q = patch
    model = tiny(img_size=(12, 24), patch_size=patch, in_chans=channels)
    images = torch.randn(2, channels, 12, 24)
    rows = model.patchify(images)
    assert rows.shape == (2, (12 // p) * (24 // q), p * q * channels)
    for n, c, y, x in np.ndindex(*images.shape):
        place = (n, (y // p) * (24 // q) + x // q, (y % p * q + x % q) * channels + c)
        assert rows[place] == images[n, c, y, x]
    assert torch.equal(model.unpatchify(rows), images)
    assert torch.equal(mae_fast.patchify(images, patch), rows)
    assert torch.equal(mae_fast.unpatchify(rows, patch, (12 // p, 24 // q)), images)


@pytest.mark.parametrize(("channels", "patch"), [(3, 4), (1, (6, 4)), (5, 8)])
def test_uint8_images_equal_standardised_ones(channels, patch):
    model = tiny(img_size=(24, 32), in_chans=channels, patch_size=patch, norm_pix_loss=channels == 3)
    assert model.pixel_mean.tolist() == pytest.approx([0.485, 0.456, 0.406] if channels == 3 else [0.5] * channels)
    assert model.pixel_std.tolist() == pytest.approx([0.229, 0.224, 0.225] if channels == 3 else [0.5] * channels)
    model.double()
    pixels = torch.randint(256, (2, 24, 32, channels), dtype=torch.uint8)
    images = ((pixels.double() / 255 - model.pixel_mean) / model.pixel_std).permute(0, 3, 1, 2)
    noise = tie_free(2, model.patch_embed.num_patches)
    for call in (run, run_loss):
        assert_close(call(model, pixels, noise=noise), call(model, images, noise=noise))


def ask(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD_IMAGES = [
    ask(2, 3, 24, 20),
    ask(2, 3, 32, 32),
    ask(2, 4, 24, 24),
    ask(2, 24, 24, 3),
    ask(3, 24, 24),
    ask(2, 3, 24, 24, dtype=torch.uint8),
    ask(2, 24, 24, 1, dtype=torch.uint8),
    ask(2, 3, 24, 24, dtype=torch.int64),
    ask(2, 3, 24, 24, dtype=torch.bool),
]
BAD_NOISE = [
    ask(2, 35),
    ask(3, 36),
    ask(36),
    ask(2, 36, 1),
    ask(2, 36, dtype=torch.float16),
    ask(2, 36, dtype=torch.int64),
]


def error_message(images, *arguments):
    """The error message of ``forward``. That of ``loss`` differs in its hint."""
    model = tiny()
    messages = []
    for call in (model, model.loss):
        with pytest.raises(ValueError, match="got") as raised:
            call(images, *arguments)
        messages.append(str(raised.value))
    found, hint = messages[0].split("; ") if ";" in messages[0] else (messages[0], "")
    if hint == "in_chans of the constructor sets the number of channels":
        assert messages[1] == messages[0]
    else:
        assert hint == "img_size of the constructor sets the size" * bool(hint)
        assert messages[1] == found + "; loss takes other sizes with any_size=True" * bool(hint)
    return messages[0]


@pytest.mark.parametrize(("shape", "argument"), [((2, 4, 24, 24), "in_chans"), ((2, 3, 32, 32), "img_size")])
def test_the_hint_names_the_argument_that_does_not_fit(shape, argument):
    assert f"; {argument} of the constructor" in error_message(torch.zeros(shape))


@pytest.mark.parametrize("images", BAD_IMAGES, ids=lambda t: f"{t.dtype} {list(t.shape)}")
def test_wrong_images_raise_value_errors(images):
    message = error_message(images)
    assert "floating [N, 3, 24, 24] or uint8 [N, 24, 24, 3]" in message or "raw pixels of dtype uint8" in message
    assert "images must be floating" in message
    assert f"got {images.dtype} {list(images.shape)}" in message


@pytest.mark.parametrize("noise", BAD_NOISE, ids=lambda t: f"{t.dtype} {list(t.shape)}")
def test_wrong_noise_raises_a_value_error(noise):
    message = error_message(ask(2, 3, 24, 24), 0.75, noise)
    if noise.dtype == torch.float32:
        assert message == f"noise must be [N, L] = [2, 36], got {list(noise.shape)}"
    else:
        assert f"noise must be float32 or float64, got {noise.dtype}" in message


@pytest.mark.parametrize("mask_ratio", [-0.01, 1.01, 75, math.nan, math.inf])
def test_a_wrong_mask_ratio_raises_a_value_error(mask_ratio):
    assert error_message(ask(2, 3, 24, 24), mask_ratio) == f"mask_ratio must be in 0..1, got {mask_ratio}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 30}, "img_size=30.*patch_size=4.*28 x 28"),
        ({"img_size": (24, 3)}, r"img_size=\(24, 3\).*24 x 4"),
        ({"patch_size": 0}, "patch_size must be positive, got 0"),
        ({"num_heads": 5}, "32 and 5"),
        ({"decoder_num_heads": 7}, "24 and 7"),
        ({"embed_dim": 34, "num_heads": 2}, "multiple of 4, got 34"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_raise_value_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_wrong_names_and_shapes_raise_value_errors():
    model = tiny()
    with pytest.raises(ValueError, match=r"unknown model 'vit'.*mae_vit_base_patch16"):
        build("vit")
    with pytest.raises(ValueError, match=r"mask \[2, 36\].*\[2, 35\]"):
        model.forward_loss(ask(2, 3, 24, 24), ask(2, 36, 48), ask(2, 35))
    with pytest.raises(ValueError, match=r"\[N, 36, 16 \* C\].*\[2, 36, 50\]"):
        model.unpatchify(ask(2, 36, 50))
    with pytest.raises(ValueError, match="24 x 22"):
        model.patchify(ask(2, 3, 24, 22))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pixel_statistics_stay_fp32_through_casts(dtype):
    model = build("mae_vit_tiny_patch4")
    before = model.pixel_mean.clone()
    model.to(dtype).to(torch.float32)
    assert model.pixel_mean.dtype == torch.float32
    assert torch.equal(model.pixel_mean, before)


@pytest.mark.parametrize("wrong", [np.zeros((2, 3, 24, 24), np.float32), [torch.zeros(3, 24, 24)], None], ids=type)
def test_images_that_are_not_tensors_raise_type_errors(wrong):
    mae, vit = tiny(), tiny_vit()
    steps = [mae, mae.loss, mae.forward_features, mae.patchify, vit, vit.forward_features, vit.forward_intermediates]
    steps += [lambda x: mae.forward_encoder(x, 0.75), lambda x: mae.encode_packed([x])]
    steps += [lambda x: mae.forward_loss(x, ask(2, 36, 48), ask(2, 36))]
    for step in steps:
        with pytest.raises(
            TypeError, match=r"image(s| 0) must be a torch.Tensor, got (numpy.ndarray: .*from_numpy|l|N)"
        ):
            step(wrong)


def test_other_arguments_that_are_not_tensors_raise_type_errors():
    model, images, array = tiny(), ask(2, 3, 24, 24), np.zeros((2, 36), np.float32)
    calls = {
        "noise": [lambda: model(images, noise=array)],
        "mask": [lambda: model.loss(images, mask=array), lambda: model.forward_features(images, array)],
        "x": [lambda: model.forward_decoder(array, ask(2, 36)), lambda: model.unpatchify(array)],
        "features": [lambda: tiny_vit().forward_head(array)],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got numpy.ndarray"):
                call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64], ids=str)
def test_images_of_other_dtypes_raise_value_errors(dtype):
    images = torch.zeros(2, 3, 24, 24, dtype=dtype)
    for step in (tiny(), tiny().loss, tiny().forward_features, tiny_vit(), tiny_vit().forward_intermediates):
        with pytest.raises(ValueError, match=rf"images must be floating.*got {dtype} \[2, 3, 24, 24\]"):
            step(images)


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 2, 3, 24, 24)], ids=str)
def test_images_of_other_ranks_raise_value_errors(shape):
    for step in (
        tiny(),
        tiny().loss,
        tiny().forward_features,
        tiny().patchify,
        tiny_vit(),
        tiny().forward_intermediates,
    ):
        with pytest.raises(ValueError, match=r"images must be .* got .*3, 24, 24"):
            step(torch.zeros(shape))
