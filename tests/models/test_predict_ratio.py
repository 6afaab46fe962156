"""``loss`` with a predict ratio: the decoder has tokens for a share of the removed patches and predicts only these."""

import copy
import math

import pytest
import torch
from support import assert_close, assert_no_worse_than_eager, inputs, one_thread, run_loss, tiny  # noqa: F401
from torch import nn

from mae_fast.models import MaskedAutoencoderViT, blocks
from mae_fast.models.reference import ReferenceMAE
from mae_fast.models.sizes import num_predicted
from mae_fast.ops import decoder_tokens as op

pytestmark = pytest.mark.usefixtures("one_thread")

PCA = {"kind": "pca", "components": 6}
DVAE = {"kind": "dvae", "vocab_size": 32, "hidden": 8, "groups": 2, "blocks_per_group": 1}
VARIANTS = {
    "one block": {},
    "three blocks, standardised pixels": {"decoder_depth": 3, "norm_pix_loss": True},
    "wide image": {"img_size": (24, 40), "patch_size": (6, 4), "in_chans": 5},
    "no decoder block": {"decoder_depth": 0},
    "encoder with mask tokens": {"encoder_mask_token": True},
    "encoder with mask tokens, no decoder block": {"encoder_mask_token": True, "decoder_depth": 0},
    "components": {"target": PCA},
    "tokens": {"target": DVAE},
    "tokens, encoder with mask tokens": {"target": DVAE, "encoder_mask_token": True, "decoder_depth": 2},
}
variants = pytest.mark.parametrize("name", VARIANTS)
ratios = pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.9])


def made(name):
    model = tiny(**VARIANTS[name])
    if VARIANTS[name].get("target") == PCA:
        model.target.basis.copy_(torch.linalg.qr(torch.randn(48, 48))[0][:, :6])
    return model


def reference(model, images, noise, ratio):
    """``loss`` and every gradient by the definition in plain torch."""
    loss = model.predict_ratio_loss(images, 0.75, noise, ratio)
    loss.backward()
    return {"loss": loss.detach(), **{f"grad {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}}


@ratios
@variants
def test_loss_and_gradients_equal_the_reference(name, ratio):
    model = made(name).double()
    images, noise = inputs(model, 3)
    expected = reference(ReferenceMAE.of(model), images, noise, ratio)
    assert_close(run_loss(model, images, 0.75, noise, predict_ratio=ratio), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@variants
def test_low_precision_is_no_worse_than_eager(name, dtype):
    model = made(name)
    images, noise = inputs(model, 4)
    truth = reference(ReferenceMAE.of(copy.deepcopy(model).double()), images.double(), noise, 0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        eager = reference(ReferenceMAE.of(model), images, noise, 0.5)
        ours = run_loss(model, images, 0.75, noise, predict_ratio=0.5)
    assert_no_worse_than_eager(ours, eager, truth, dtype)


@pytest.mark.parametrize("name", ["one block", "no decoder block"])
def test_a_ratio_of_1_changes_no_bit(name):
    model = made(name)
    images, noise = inputs(model)
    expected = run_loss(model, images, 0.75, noise)
    found = run_loss(model, images, 0.75, noise, predict_ratio=1.0)
    assert all(torch.equal(found[key], x) for key, x in expected.items())


@pytest.mark.parametrize(("ratio", "predicted"), [(0.01, 1), (0.25, 7), (0.5, 14), (0.055, 1), (0.999, 27)])
def test_only_predicted_patches_are_computed(ratio, predicted, monkeypatch):
    """27 patches are removed."""
    model, seen, written = tiny(decoder_depth=2), [], []
    mlp, tokens = blocks.mlp, op.decoder_tokens
    monkeypatch.setattr(blocks, "mlp", lambda x, *rest: seen.append(x.shape[1]) or mlp(x, *rest))
    monkeypatch.setattr(
        "mae_fast.models.mae.decoder_tokens",
        lambda *args, **kwargs: [out := tokens(*args, **kwargs), written.append(out.shape[1])][0],
    )
    images, noise = inputs(model)
    model.loss(images, 0.75, noise, predict_ratio=ratio)
    assert seen == [10, 10, 10 + predicted, predicted]
    assert written == [10 + predicted]


def test_halves_are_rounded_to_even_numbers():
    assert [num_predicted(removed, 0.5) for removed in (0, 1, 25, 27)] == [0, 1, 12, 14]


def test_pixels_of_patches_that_are_not_predicted_do_not_change_the_loss():
    model = tiny()
    images, noise = inputs(model)
    order = noise.argsort(1)
    predicted = torch.zeros(2, 36).scatter(1, order[:, 9:16], 1.0)
    visible = torch.zeros(2, 36).scatter(1, order[:, :9], 1.0)
    loss = model.loss(images, 0.75, noise, predict_ratio=0.25)
    for patches, same in ((1 - predicted - visible, True), (predicted, False)):
        changed = model.unpatchify(model.patchify(images) * (1 + patches[:, :, None]))
        assert torch.equal(model.loss(changed, 0.75, noise, predict_ratio=0.25), loss) == same


def test_raw_pixels_and_missing_ones():
    model = tiny(pixel_dtype="float32", norm_pix_loss=True).double()
    _, noise = inputs(model)
    raw = torch.randn(2, 24, 24, 3, generator=torch.Generator().manual_seed(0))
    images = ((raw.double() - model.pixel_mean) / model.pixel_std).permute(0, 3, 1, 2)
    found, expected = (run_loss(model, x, 0.75, noise, predict_ratio=0.5) for x in (raw, images))
    assert_close(found, expected, 1e-6)
    raw[:, :4] = float("nan")
    assert model.loss(raw, 0.75, noise, predict_ratio=0.5).isfinite()


def test_a_given_mask_is_predicted_in_random_order(monkeypatch):
    model = tiny()
    images, noise = inputs(model)
    _, _, mask = model(images, 0.75, noise)
    torch.manual_seed(3)
    drawn = torch.rand(2, 36)
    torch.manual_seed(3)
    found = model.loss(images, mask=mask, predict_ratio=0.25)
    assert torch.equal(found, model.loss(images, 0.75, mask + drawn, predict_ratio=0.25))
    assert found != model.loss(images, mask=mask, predict_ratio=0.25)
    with pytest.raises(ValueError, match="noise or mask, not both"):
        model.loss(images, 0.75, noise, mask, predict_ratio=0.5)


def test_the_loss_is_nan_if_nothing_is_removed():
    model = tiny(decoder_depth=2)
    images, noise = inputs(model)
    assert run_loss(model, images, 0.0, noise, predict_ratio=0.5)["loss"].isnan()


def test_replaced_blocks_and_hooks_get_the_predicted_tokens_only():
    model, seen = tiny(decoder_depth=2), []
    model.decoder_blocks[0].register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    model.decoder_blocks[1] = nn.Identity()
    images, noise = inputs(model)
    model.loss(images, 0.75, noise, predict_ratio=0.25)
    assert seen == [17]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["three blocks, standardised pixels", "no decoder block", "tokens"])
def test_the_loss_compiles_as_one_graph(name, checkpointing):
    model = made(name)
    model.set_grad_checkpointing(checkpointing)
    images, noise = inputs(model)
    expected = run_loss(model, images, 0.75, noise, predict_ratio=0.5)
    torch._dynamo.reset()
    model.zero_grad()
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(images, 0.75, noise, predict_ratio=0.5)
    loss.backward()
    got = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close({"loss": loss.detach(), **got}, expected, 1e-6)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, math.nan, math.inf])
def test_a_ratio_out_of_range_raises_a_value_error(ratio):
    model = tiny()
    images, noise = inputs(model)
    with pytest.raises(ValueError, match=f"predict_ratio must be above 0 and at most 1, got {ratio}"):
        model.loss(images, 0.75, noise, predict_ratio=ratio)


@pytest.mark.parametrize("name", ["mask_ratio", "predict_ratio"])
def test_a_ratio_that_is_not_a_number_raises_a_type_error(name):
    model = tiny()
    with pytest.raises(TypeError, match=f"{name} must be a number, got '0.5'"):
        model.loss(inputs(model, 2)[0], **{name: "0.5"})


@pytest.mark.parametrize("step", ["forward_encoder", "forward_decoder", "forward_loss"])
def test_a_ratio_below_1_with_an_overridden_step_raises_a_value_error(step):
    model = tiny()
    model.__class__ = type("Other", (MaskedAutoencoderViT,), {step: lambda self, *args: None})
    with pytest.raises(ValueError, match=f"predict_ratio must be 1 .*{step}"):
        model.loss(*inputs(model)[:1], predict_ratio=0.5)
