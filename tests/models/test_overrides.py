"""``loss`` calls the steps of the autoencoder that a subclass overrides, as ``forward`` does."""

import types

import pytest
import torch
from support import inputs, one_thread, tiny  # noqa: F401

from mae_fast.models import MaskedAutoencoderViT

pytestmark = pytest.mark.usefixtures("one_thread")


class Absolute(MaskedAutoencoderViT):
    """Overrides the loss, with the published signature."""

    def forward_loss(self, imgs, pred, mask):
        return ((pred - self.patchify(imgs)).abs().mean(-1) * mask).sum() / mask.sum()


class Doubled(MaskedAutoencoderViT):
    def forward_encoder(self, x, mask_ratio, noise):
        latent, mask, ids_restore = super().forward_encoder(x, mask_ratio, noise)
        return 2 * latent, mask, ids_restore


class Shifted(MaskedAutoencoderViT):
    def forward_decoder(self, x, ids_restore):
        return super().forward_decoder(x, ids_restore) + 1


class TrainedAlone(Absolute):
    """``forward`` returns only the loss, as in wrappers for DistributedDataParallel."""

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        return self.loss(imgs, mask_ratio, noise)


def made(kind, **options):
    model = tiny(**options)
    model.__class__ = kind
    return model


def by_steps(model, images, noise):
    latent, mask, ids_restore = model.forward_encoder(images, 0.75, noise)
    return model.forward_loss(images, model.forward_decoder(latent, ids_restore), mask)


@pytest.mark.parametrize("kind", [Absolute, Doubled, Shifted, TrainedAlone])
def test_loss_calls_overridden_steps(kind):
    model = made(kind)
    images, noise = inputs(model)
    loss = model.loss(images, 0.75, noise)
    assert torch.equal(loss, by_steps(model, images, noise))
    assert loss != tiny().loss(images, 0.75, noise)
    if kind is not TrainedAlone:
        assert torch.equal(loss, model(images, 0.75, noise)[0])


def test_a_method_set_on_the_instance_is_called():
    model = tiny()
    images, noise = inputs(model)
    model.forward_loss = lambda imgs, pred, mask: pred.sum() * 0 + mask.sum()
    assert model.loss(images, 0.75, noise) == 2 * 27


def test_an_overridden_loss_gets_raw_pixels_standardised():
    model, noise = made(Absolute), inputs(tiny())[1]
    raw = torch.arange(2 * 24 * 24 * 3).reshape(2, 24, 24, 3).mul(7).remainder(256).byte()
    images = ((raw / 255 - model.pixel_mean) / model.pixel_std).permute(0, 3, 1, 2)
    expected = by_steps(model, images, noise)
    for found in (model.loss(raw, 0.75, noise), model(raw, 0.75, noise)[0]):
        torch.testing.assert_close(found, expected)


def test_missing_pixels_are_zero_for_an_overridden_loss():
    model, noise = made(Absolute, pixel_dtype="float32"), inputs(tiny())[1]
    raw = torch.randn(2, 24, 24, 3)
    filled = raw.clone()
    raw[0, :5], filled[0, :5] = float("nan"), model.pixel_mean
    torch.testing.assert_close(model.loss(raw, 0.75, noise), model.loss(filled, 0.75, noise))


@pytest.mark.slow
def test_an_overridden_loss_compiles():
    model = made(Absolute)
    images, noise = inputs(model)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, 0.75, noise), model.loss(images, 0.75, noise))


def keep_first(model, x, mask_ratio):
    """Removes the last patches."""
    n, patches, _ = x.shape
    keep = int(patches * (1 - mask_ratio))
    mask = torch.ones(n, patches)
    mask[:, :keep] = 0
    return 2 * x[:, :keep], mask, torch.arange(patches).expand(n, -1)


class KeepFirst(MaskedAutoencoderViT):
    random_masking = keep_first


class Mixin:
    random_masking = keep_first


class WithMixin(Mixin, MaskedAutoencoderViT):
    pass


@pytest.mark.parametrize("how", ["class", "mixin", "instance"])
@pytest.mark.parametrize("pixels", ["floating", "raw"])
def test_an_overridden_random_masking_is_called(how, pixels):
    model = made({"class": KeepFirst, "mixin": WithMixin}.get(how, MaskedAutoencoderViT))
    if how == "instance":
        model.random_masking = types.MethodType(keep_first, model)
    images, noise = inputs(model)
    if pixels == "raw":
        images = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    loss, _, mask = model(images, 0.75)
    x = model.embed_patches(images, None, (6, 6))
    visible, own_mask, ids_restore = keep_first(model, x[:, 1:], 0.75)
    x = model.run_blocks(model.blocks, torch.cat([x[:, :1], visible], 1)).materialize()
    expected = model.forward_loss(images, model.forward_decoder(model.norm(x), ids_restore), own_mask)
    assert torch.equal(mask, own_mask)
    assert torch.equal(loss, expected)
    assert torch.equal(model.loss(images, 0.75), expected)
    assert torch.equal(model(images, noise=noise)[0], tiny()(images, noise=noise)[0])
    assert torch.equal(model(images, mask=mask)[2], mask)
    with pytest.raises(ValueError, match="predict_ratio must be 1 if random_masking is overridden"):
        model.loss(images, predict_ratio=0.5)


def test_an_own_random_masking_excludes_the_encoders_mask_token():
    model = made(KeepFirst, encoder_mask_token=True)
    images, noise = inputs(model)
    with pytest.raises(ValueError, match="encoder_mask_token does not work with an own random_masking"):
        model(images)
    model(images, noise=noise)


class Tripled(MaskedAutoencoderViT):
    def patchify(self, imgs):
        return 3 * super().patchify(imgs)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("pixels", ["floating", "raw"])
def test_an_overridden_patchify_gives_the_target(norm_pix, pixels):
    model = made(Tripled, norm_pix_loss=norm_pix)
    images, noise = inputs(model)
    if pixels == "raw":
        raw = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
        images = ((raw / 255 - model.pixel_mean) / model.pixel_std).permute(0, 3, 1, 2)
    loss, pred, mask = model(raw if pixels == "raw" else images, noise=noise)
    expected = tiny(norm_pix_loss=norm_pix).forward_loss(3 * images, pred, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert torch.equal(model.loss(raw if pixels == "raw" else images, noise=noise), loss)
