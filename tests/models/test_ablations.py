"""The paper's ablations: mask tokens in the encoder, decoders of any depth, other targets, given masks."""

import copy

import pytest
import torch
from support import (
    assert_close,
    assert_no_worse_than_eager,
    inputs,
    one_thread,  # noqa: F401
    run,
    run_loss,
    tie_free,
    tiny,
)

from mae_fast.models import MaskedAutoencoderViT
from mae_fast.models.reference import ReferenceMAE

pytestmark = pytest.mark.usefixtures("one_thread")

DVAE = {"kind": "dvae", "vocab_size": 32, "hidden": 8, "groups": 2, "blocks_per_group": 1}
VARIANTS = {
    "encoder with mask tokens": {"encoder_mask_token": True},
    "encoder with mask tokens, linear decoder": {"encoder_mask_token": True, "decoder_depth": 0},
    "and standardised pixels": {"encoder_mask_token": True, "norm_pix_loss": True, "img_size": (24, 16)},
    "deep decoder": {"decoder_depth": 4},
    "wide decoder": {"decoder_embed_dim": 48, "decoder_num_heads": 3},
    "components": {"target": {"kind": "pca", "components": 6}},
    "components, 5 channels": {"target": {"kind": "pca", "components": 80}, "in_chans": 5, "patch_size": (4, 6)},
    "components, encoder with mask tokens": {"target": {"kind": "pca", "components": 48}, "encoder_mask_token": True},
    "tokens": {"target": DVAE},
    "tokens, encoder with mask tokens": {"target": {**DVAE, "vocab_size": 7}, "encoder_mask_token": True},
}


def variant(name, **options):
    model = tiny(**{**VARIANTS[name], **options})
    if "pca" in str(VARIANTS[name]):
        values, size = model.target.basis.shape
        generator = torch.Generator().manual_seed(5)
        model.target.basis.copy_(torch.linalg.qr(torch.randn(values, values, generator=generator))[0][:, :size])
        model.target.centre.copy_(torch.randn(values, generator=generator))
    return model


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("mask_ratio", [0.75, 0.3])
def test_ablated_models_equal_the_reference(name, mask_ratio):
    model = variant(name).double()
    images, noise = inputs(model)
    reference = ReferenceMAE.of(model)
    expected = run(reference, images, mask_ratio, noise)
    assert_close(run(model, images, mask_ratio, noise), expected)
    only = {key: value for key, value in expected.items() if key not in ("pred", "mask")}
    assert_close(run_loss(model, images, mask_ratio, noise), only)


@pytest.mark.parametrize("name", VARIANTS)
def test_ablated_models_in_bf16_are_no_worse_than_eager(name):
    model = variant(name)
    images, noise = inputs(model)
    truth = run_reference_loss(ReferenceMAE.of(model).double(), images.double(), noise)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run_loss(model, images, 0.75, noise)
        eager = run_reference_loss(ReferenceMAE.of(model), images, noise)
    assert_no_worse_than_eager(ours, eager, truth, torch.bfloat16)


def run_reference_loss(reference, images, noise):
    got = run(reference, images, 0.75, noise)
    return {key: value for key, value in got.items() if key not in ("pred", "mask")}


@pytest.mark.parametrize("name", ["encoder with mask tokens", "components", "tokens"])
def test_ablated_models_compile_as_one_graph(name):
    model = variant(name)
    images, noise = inputs(model)
    expected = run_loss(model, images, 0.75, noise)
    model.zero_grad()
    torch._dynamo.reset()
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(images, 0.75, noise)
    loss.backward()
    got = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close({"loss": loss.detach(), **got}, expected, 1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_ablated_models_standardise_uint8_images(name):
    model = variant(name).double()
    _, noise = inputs(model)
    c, (h, w) = model.in_chans, model.patch_embed.img_size
    pixels = torch.randint(256, (2, h, w, c), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    stats = model.pixel_mean[:, None, None], model.pixel_std[:, None, None]
    floating = (pixels.permute(0, 3, 1, 2).double() / 255 - stats[0]) / stats[1]
    assert_close(run_loss(model, pixels, 0.5, noise), run_loss(model, floating, 0.5, noise), 1e-9)


def test_removed_pixels_do_not_reach_the_encoder():
    """The encoder has a mask token at the position of each removed patch, but not its pixels."""
    model = variant("encoder with mask tokens")
    images, noise = inputs(model)
    latent, mask, _ = model.forward_encoder(images, 0.75, noise)
    assert latent.shape == (2, 37, 32)
    changed = model.unpatchify(model.patchify(images) + mask[:, :, None])
    assert torch.equal(model.forward_encoder(changed, 0.75, noise)[0], latent)
    changed = model.unpatchify(model.patchify(images) + 1 - mask[:, :, None])
    assert not torch.equal(model.forward_encoder(changed, 0.75, noise)[0], latent)


def test_packed_images_with_mask_tokens_equal_single_images():
    model = variant("encoder with mask tokens").double()
    images = [torch.randn(3, 24, 24), torch.randn(3, 8, 16)]
    noise = [tie_free(1, 36)[0], tie_free(1, 8)[0]]
    packed = model.encode_packed([image.double() for image in images], 0.5, noise)
    assert [latent.shape for latent, *_ in packed] == [(37, 32), (9, 32)]
    alone, _, _ = model.forward_encoder(images[0][None].double(), 0.5, noise[0][None])
    assert_close({"latent": packed[0][0]}, {"latent": alone[0]})


def test_ablations_add_only_their_own_names_to_the_state_dict():
    plain, other = tiny().state_dict(), variant("encoder with mask tokens").state_dict()
    assert plain.keys() - other.keys() == {"mask_token"}
    assert other.keys() - plain.keys() == {"encoder_mask_token"}
    assert variant("components").state_dict().keys() - plain.keys() == {"target.centre", "target.basis"}
    tokens = variant("tokens").state_dict().keys() - plain.keys()
    assert tokens
    assert all(name.startswith("target.tokenizer.") for name in tokens)


def test_the_tokenizer_is_not_trained():
    model = variant("tokens").train()
    images, noise = inputs(model)
    before = copy.deepcopy(model.target.state_dict())
    run_loss(model, images, 0.75, noise)
    assert not any(p.requires_grad for p in model.target.parameters())
    assert not any(module.training for module in model.target.modules())
    assert all(torch.equal(before[name], value) for name, value in model.target.state_dict().items())


def test_disabled_options_do_not_change_the_initial_weights():
    torch.manual_seed(0)
    plain = MaskedAutoencoderViT(24, 4, 3, 32, 1, 4, 24, 1, 2).state_dict()
    torch.manual_seed(0)
    off = MaskedAutoencoderViT(24, 4, 3, 32, 1, 4, 24, 1, 2, encoder_mask_token=False, target=None).state_dict()
    assert plain.keys() == off.keys()
    assert all(torch.equal(plain[name], off[name]) for name in plain)


@pytest.mark.parametrize("name", ["deep decoder", "encoder with mask tokens", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_given_masks_are_used(name, dtype):
    model = variant(name).double()
    images, noise = inputs(model)
    _, _, mask = model(images, 0.6, noise)
    expected = run(model, images, 0.6, mask.float())  # as noise, the mask removes the same patches
    model.zero_grad()
    loss, pred, got = model(images, mask=mask.to(dtype))
    loss.backward()
    assert torch.equal(got, mask)
    assert got.dtype == torch.float32
    assert_close({"loss": loss.detach(), "pred": pred.detach()}, {key: expected[key] for key in ("loss", "pred")})
    assert_close({"loss": model.loss(images, mask=mask.to(dtype))}, {"loss": loss})


def test_wrong_masks_raise_value_errors():
    model = tiny()
    images, noise = inputs(model)
    mask = torch.zeros(2, 36)
    mask[0, :27], mask[1, :26] = 1, 1
    with pytest.raises(ValueError, match=r"same number of patches.*got \[9, 10\]"):
        model(images, mask=mask)
    with pytest.raises(ValueError, match=r"mask must be \[N, L\] = \[2, 36\], got \[2, 35\]"):
        model.loss(images, mask=mask[:, :35])
    with pytest.raises(ValueError, match="noise or mask, not both"):
        model.loss(images, 0.75, noise, mask)


@pytest.mark.parametrize("name", ["deep decoder", "components", "tokens"])
def test_the_mask_of_the_loss_may_have_any_weights(name):
    """In ``forward_loss``, the number of patches left out may differ between images."""
    model = variant(name).double()
    images, noise = inputs(model)
    _, pred, mask = model(images, 0.75, noise)
    weights = mask.clone()
    weights[0, :20] = 0
    weights[1] *= 2
    each = [
        model.forward_loss(images, pred, torch.zeros_like(mask).index_put((torch.tensor([i]), torch.tensor([j])), one))
        for i in range(2)
        for j in range(36)
        for one in [torch.ones((), dtype=mask.dtype)]
    ]
    expected = (torch.stack(each).reshape(2, 36) * weights).sum() / weights.sum()
    assert_close({"loss": model.forward_loss(images, pred, weights)}, {"loss": expected})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"kind": "pca", "components": 49}}, "1 to 48 components, got 49"),
        ({"target": {"kind": "pca", "components": 0}}, "1 to 48 components, got 0"),
        ({"target": {"kind": "hog"}}, "'pca' or 'dvae', got 'hog'"),
        (
            {"target": {"kind": "pca", "components": 6}, "norm_pix_loss": True},
            "norm_pix_loss needs pixels",
        ),
    ],
)
def test_options_that_exclude_each_other_raise_value_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{"patch_size": 4, "img_size": 24, **options})
