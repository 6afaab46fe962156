"""The model equals the eager one of ``mae_fast.models.reference``: values, gradients, masks and random draws."""

import pytest
import torch
from support import assert_close, assert_no_worse_than_eager, inputs, one_thread, run, run_loss, tiny  # noqa: F401

from mae_fast.models.reference import ReferenceMAE

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "square": {},
    "wide image, tall patch": {"img_size": (24, 40), "patch_size": (6, 4)},
    "grey": {"in_chans": 1, "patch_size": 8},
    "5 channels": {"in_chans": 5, "decoder_depth": 2},
    "a single patch of 3 wide": {"img_size": (4, 3), "patch_size": (4, 3)},
}
shapes = pytest.mark.parametrize("shape", SHAPES)
both_losses = pytest.mark.parametrize("norm_pix", [False, True], ids=["pixels", "norm_pix"])


def make(norm_pix=False, dtype=torch.float64, **options):
    model = tiny(norm_pix_loss=norm_pix, **options).to(dtype)
    return model, ReferenceMAE.of(model)


def without(results, *names):
    return {name: value for name, value in results.items() if name not in names}


@pytest.mark.parametrize("mask_ratio", [0.1, 0.75, 1])
@both_losses
@shapes
def test_model_equals_the_reference_in_fp64(shape, norm_pix, mask_ratio):
    model, eager = make(norm_pix, **SHAPES[shape])
    if model.patch_embed.num_patches == 1:
        mask_ratio = 1  # otherwise nothing is removed, and the loss is NaN
    images, noise = inputs(model, n=3)
    expected = run(eager, images, mask_ratio, noise)
    assert_close(run(model, images, mask_ratio, noise), expected)
    assert_close(run_loss(model, images, mask_ratio, noise), without(expected, "pred", "mask"))


@both_losses
def test_gradients_of_visible_predictions_images_and_tables(norm_pix):
    model, eager = make(norm_pix)
    images, noise = inputs(model)
    cotangent = torch.randn_like(model.patchify(images))
    results = []
    for each in (model, eager):
        each.requires_grad_(True)  # the position tables too
        pixels = images.clone().requires_grad_()
        through_pred = run(each, pixels, noise=noise, cotangent=cotangent)
        through_loss = run(each, pixels, noise=noise)
        both = {
            f"{name} of {i}": value for i, r in enumerate((through_pred, through_loss)) for name, value in r.items()
        }
        results.append({**both, "grad images": pixels.grad})
    assert_close(*results)


@pytest.mark.parametrize("train", ["mask_token", "cls_token", "blocks.1.mlp.fc1.weight", "patch_embed.proj.bias"])
def test_frozen_parameters_change_no_other_gradient(train):
    model, _ = make()
    images, noise = inputs(model)
    expected = run_loss(model, images, noise=noise)
    model.requires_grad_(False).get_parameter(train).requires_grad_(True)
    assert_close(run_loss(model, images, noise=noise), {name: expected[name] for name in ("loss", f"grad {train}")})


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@both_losses
@shapes
def test_model_is_no_worse_than_eager(shape, norm_pix, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    model, eager = make(norm_pix, torch.float32, **SHAPES[shape])
    mask_ratio = 0.75 if model.patch_embed.num_patches > 1 else 1
    images, noise = inputs(model, n=4)
    truth = run(ReferenceMAE.of(model).double(), images.double(), mask_ratio, noise)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, ours = run(eager, images, mask_ratio, noise), run(model, images, mask_ratio, noise)
        alone = run_loss(model, images, mask_ratio, noise)
    assert torch.equal(ours.pop("mask"), expected.pop("mask"))
    del truth["mask"]
    assert_no_worse_than_eager(ours, expected, truth, dtype)
    assert_no_worse_than_eager(alone, without(expected, "pred"), without(truth, "pred"), dtype)


@pytest.mark.parametrize("call", [run, run_loss])
def test_masking_draws_once_from_the_global_generator(call):
    model, eager = make(dtype=torch.float32)
    images, noise = inputs(model)
    torch.manual_seed(7)
    ours = call(model, images)
    ours_state = torch.get_rng_state()
    torch.manual_seed(7)
    expected = run(eager, images)
    torch.manual_seed(7)
    drawn = torch.rand(len(images), model.patch_embed.num_patches)
    assert torch.equal(torch.get_rng_state(), ours_state)
    assert_close(ours, {name: expected[name] for name in ours}, 1e-6)
    assert_close(call(model, images, noise=drawn), ours, 0)
    call(model, images, noise=noise)
    assert torch.equal(torch.get_rng_state(), ours_state)


def test_images_may_have_any_strides():
    model, _ = make()
    images, noise = inputs(model)
    expected = run(model, images, noise=noise)
    assert_close(run(model, images.to(memory_format=torch.channels_last), noise=noise), expected)
    wide = torch.zeros(*images.shape[:3], 2 * images.shape[3], dtype=images.dtype)
    wide[..., ::2] = images
    assert_close(run(model, wide[..., ::2], noise=noise), expected)
    one = images[:1].expand(2, -1, -1, -1)
    assert_close(run(model, one, noise=noise), run(model, one.contiguous(), noise=noise))


def test_an_empty_batch_works():
    model, _ = make()
    images, noise = inputs(model, n=0)
    loss, pred, mask = model(images, 0.75, noise)
    assert (pred.shape, mask.shape) == ((0, 36, 48), (0, 36))
    assert loss.isnan()
    assert model.loss(images, 0.75, noise).isnan()
