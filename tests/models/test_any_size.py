"""``loss(any_size=True)``: images of other sizes than the model's own, against the eager model of that size."""

import pytest
import torch
from support import assert_close, assert_no_worse_than_eager, gradients, one_thread, pictures, tie_free, tiny  # noqa: F401
from torch.nn import functional as F

from mae_fast.models.reference import ReferenceMAE

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"smaller": (16, 16), "larger": (36, 32), "wide": (8, 40), "own": (24, 24)}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
OPTIONS = {
    "pixels": {},
    "norm_pix": {"norm_pix_loss": True},
    "encoder mask token": {"encoder_mask_token": True},
    "principal components": {"target": {"kind": "pca", "components": 5}},
    "tall patches": {"patch_size": (4, 2), "img_size": (24, 24)},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def resized(table, model, size):
    """``table`` [1, 1+L, D] for images of ``size``, by torch's bicubic interpolation."""
    (rows, columns), (p, q) = model.patch_embed.grid_size, model.patch_embed.patch_size
    maps = table[:, 1:].unflatten(1, (rows, columns)).movedim(3, 1)
    maps = F.interpolate(maps, (size[0] // p, size[1] // q), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], maps.flatten(2).mT], 1)


def reference(model, size, **options):
    """The eager model for images of ``size``, with the weights of ``model`` and resized position tables."""
    other = tiny(**{**options, "img_size": size}).to(model.cls_token)
    tables = {name: resized(getattr(model, name).detach(), model, size) for name in ("pos_embed", "decoder_pos_embed")}
    other.load_state_dict({**model.state_dict(), **tables})
    return ReferenceMAE.of(other)


def loss_and_gradients(model, images, noise, **options):
    model.zero_grad()
    loss = model.loss(images, 0.75, noise, **options) if options else model(images, 0.75, noise)[0]
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def case(size, options):
    model = tiny(**options)
    for buffer in model.target.buffers() if model.target else ():  # they are zero before ``fit``
        torch.nn.init.normal_(buffer)
    p, q = model.patch_embed.patch_size
    return model, pictures(model, size=size), tie_free(3, size[0] // p * (size[1] // q))


@sizes
@options
def test_other_sizes_equal_the_reference_of_that_size(size, options):
    model, images, noise = case(size, options)
    model.double()
    ours = loss_and_gradients(model, images.double(), noise, any_size=True)
    assert_close(ours, loss_and_gradients(reference(model, size, **options), images.double(), noise))


@pytest.mark.parametrize("size", [(16, 16), (36, 32)], ids=str)
@options
def test_a_predict_ratio_works_with_other_sizes(size, options):
    model, images, noise = case(size, options)
    model.double()
    eager = reference(model, size, **options)
    loss = eager.predict_ratio_loss(images.double(), 0.75, noise, 0.5)
    loss.backward()
    ours = loss_and_gradients(model, images.double(), noise, any_size=True, predict_ratio=0.5)
    assert_close(ours, {"loss": loss.detach(), **gradients(eager)})


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@sizes
def test_other_sizes_are_no_worse_than_eager(size, autocast):
    model, images, noise = case(size, {"norm_pix_loss": True})
    eager = reference(model, size, norm_pix_loss=True)
    truth = loss_and_gradients(reference(model, size, norm_pix_loss=True).double(), images.double(), noise)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = loss_and_gradients(model, images, noise, any_size=True), loss_and_gradients(eager, images, noise)
    assert_no_worse_than_eager(ours, theirs, truth, torch.bfloat16 if autocast else torch.float32)


def test_raw_pixels_of_another_size_are_standardised():
    model = tiny().double()
    pixels = torch.randint(256, (2, 16, 32, 3), dtype=torch.uint8)
    images = ((pixels.double() / 255 - model.pixel_mean) / model.pixel_std).permute(0, 3, 1, 2)
    noise = tie_free(2, 32)
    ours, theirs = (loss_and_gradients(model, x, noise, any_size=True) for x in (pixels, images))
    assert_close(ours, theirs, 1e-6)


def test_any_size_does_not_change_the_models_position_tables():
    model = tiny()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.loss(pictures(model, size=(16, 40)), any_size=True).backward()
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())


def test_another_size_needs_any_size():
    model = tiny()
    images = pictures(model, size=(16, 16))
    with pytest.raises(ValueError, match=r"images must be floating \[N, 3, 24, 24\]"):
        model.loss(images)
    with pytest.raises(ValueError, match="multiples of 4 x 4, got 18 x 16"):
        model.loss(pictures(model, size=(18, 16)), any_size=True)
    with pytest.raises(ValueError, match=r"got .*\[3, 3, 16, 16\]; loss takes other sizes with any_size=True"):
        model.loss(pictures(model, size=(16, 16)))
    with pytest.raises(ValueError, match=r"noise must be \[N, L\] = \[3, 16\], got \[3, 36\]"):
        model.loss(images, noise=tie_free(3, 36), any_size=True)


def test_an_overridden_step_accepts_only_the_models_own_size():
    class Other(type(tiny())):
        def forward_decoder(self, x, ids_restore):
            return super().forward_decoder(x, ids_restore)

    model = tiny()
    model.__class__ = Other
    assert model.loss(pictures(model), any_size=True).isfinite()
    with pytest.raises(ValueError, match=r"images must be floating \[N, 3, 24, 24\]"):
        model.loss(pictures(model, size=(16, 16)), any_size=True)
