"""``loss`` calls the steps of the autoencoder that a subclass overrides, as ``forward`` does."""

import warnings

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


def test_an_overridden_random_masking_is_a_warning():
    with pytest.warns(UserWarning, match=r"Chosen.random_masking is not called: pass noise or mask"):

        class Chosen(MaskedAutoencoderViT):
            def random_masking(self, x, mask_ratio, noise=None):
                raise AssertionError

    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Other(MaskedAutoencoderViT):
            def forward_encoder(self, x, mask_ratio, noise):
                return self.random_masking(x, mask_ratio)

            def random_masking(self, x, mask_ratio, noise=None):
                raise AssertionError

    assert issubclass(Other, MaskedAutoencoderViT)


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
