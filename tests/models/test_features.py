"""``forward_features`` of the autoencoder and the classifier, with and without masks, for every layer and size."""

import pytest
import torch
from support import assert_close, inputs, one_thread, pictures, tie_free, tiny, tiny_vit  # noqa: F401
from torch import nn

from mae_fast.models import VisionTransformer
from mae_fast.models.reference import ReferenceMAE


def in_order(model, n):
    return torch.arange(model.patch_embed.num_patches, dtype=torch.float32).expand(n, -1)


@pytest.mark.usefixtures("one_thread")
def test_features_use_all_patches_by_default():
    model = tiny().double()
    images, _ = inputs(model)
    expected, _, _ = ReferenceMAE.of(model).forward_encoder(images, 0.0, in_order(model, len(images)))
    found = model.forward_features(images)
    assert_close({"tokens": found}, {"tokens": expected})
    for pool, value in (
        ("cls", expected[:, 0]),
        ("mean", expected[:, 1:].mean(1)),
        ("map", expected[:, 1:].transpose(1, 2).unflatten(2, (6, 6))),
    ):
        assert_close({"features": model.forward_features(images, pool=pool)}, {"features": value})


@pytest.mark.usefixtures("one_thread")
def test_masked_features_equal_the_encoders_latent():
    model = tiny().double()
    images, noise = inputs(model)
    latent, mask, _ = model.forward_encoder(images, 0.75, noise)
    ids_keep = noise.argsort(1)[:, : latent.shape[1] - 1]
    order = ids_keep.argsort(1)  # latents are in random order, features in image order
    expected = torch.cat([latent[:, :1], latent[:, 1:].gather(1, order[:, :, None].expand(-1, -1, 32))], 1)
    for form in (mask, mask.bool(), mask.long()):
        assert_close({"tokens": model.forward_features(images, form)}, {"tokens": expected})
    assert_close({"mean": model.forward_features(images, mask, pool="mean")}, {"mean": expected[:, 1:].mean(1)}, 1e-12)


@pytest.mark.usefixtures("one_thread")
def test_layers_returns_the_outputs_of_blocks():
    model = tiny(depth=4).double()
    images, _ = inputs(model)
    reference = ReferenceMAE.of(model)
    outputs = []
    for block in reference.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    reference.forward_encoder(images, 0.0, in_order(model, len(images)))
    found = model.forward_features(images, layers=[0, -1, 2, 0], pool="map")
    for got, i in zip(found, (0, 3, 2, 0), strict=True):
        expected = outputs[i][:, 1:].transpose(1, 2).unflatten(2, (6, 6))
        assert_close({"map": got}, {"map": expected})
    ran = []
    model.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    model.forward_features(images, layers=[1])
    assert not ran  # later blocks do not run
    assert model.forward_features(images, layers=[]) == []


@pytest.mark.parametrize("size", [(48, 48), (20, 36), (4, 4)], ids=str)
def test_features_of_images_of_any_size(size):
    model = tiny()
    images = torch.randn(2, 3, *size)
    noise = [torch.arange(size[0] * size[1] // 16).float() for _ in images]
    packed = torch.stack([latent for latent, _, _ in model.encode_packed(images, 0.0, noise)])
    assert_close({"tokens": model.forward_features(images)}, {"tokens": packed}, 1e-6)
    maps = model.forward_features(images, pool="map")
    assert maps.shape == (2, 32, size[0] // 4, size[1] // 4)
    assert torch.equal(maps.flatten(2).transpose(1, 2), model.forward_features(images)[:, 1:])


def test_features_of_the_classifier_are_the_input_of_its_head():
    images = pictures(tiny_vit())
    with_cls, with_mean = tiny_vit(), tiny_vit(global_pool=True)
    assert torch.equal(with_cls.head(with_cls.forward_features(images)), with_cls(images))
    assert torch.equal(with_cls.forward_features(images), with_cls.forward_features(images, pool="cls"))
    assert torch.equal(with_mean.forward_features(images), with_mean.forward_features(images, pool="mean"))
    tokens = with_mean.forward_features(images, layers=[-1], pool="tokens")[0]
    assert torch.equal(with_mean.forward_features(images), with_mean.fc_norm(tokens[:, 1:].mean(1)))
    maps = with_mean.forward_features(images, pool="map")
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), with_mean.fc_norm(tokens[:, 1:]))


def test_checkpointing_does_not_change_gradients_of_features():
    model = tiny_vit(drop_path_rate=0.3).train()
    images = pictures(model)
    found = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        torch.manual_seed(2)
        sum(x.square().mean() for x in model.forward_features(images, layers=[0, 1], pool="map")).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert set(model.state_dict()) - set(grads) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
        found.append(grads)
    assert_close(*found, 1e-6)


@pytest.mark.slow
def test_compiled_features_equal_eager_ones():
    for model in (tiny(depth=1), tiny_vit(depth=1, global_pool=True)):
        model.eval()
        images = torch.randn(2, 3, 24, 24)
        compiled = torch.compile(model.forward_features, fullgraph=True)
        with torch.no_grad():
            assert_close({"features": compiled(images)}, {"features": model.forward_features(images)}, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.full((2, 36), 0.5)}, "mask must be 1 for removed patches and 0 for visible ones"),
        ({"images": torch.randn(2, 4, 24, 24)}, r"images must be floating \[N, 3, H, W\] or uint8"),
        ({"images": torch.randn(3, 24, 24)}, r"images must be floating .* got torch.float32 \[3, 24, 24\]"),
        ({"images": torch.ones(2, 3, 24, 24, dtype=torch.int64)}, "images must be floating"),
        ({"images": torch.randn(2, 3, 24, 26)}, "multiples of 4 x 4, got 24 x 26"),
        ({"mask": torch.ones(2, 35)}, r"mask must be \[N, L\] = \[2, 36\], got \[2, 35\]"),
        ({"mask": tie_free(2, 36) > torch.tensor([[0.3], [0.5]])}, r"same number of patches.*got \[\d+, \d+\]"),
        ({"layers": [0, 2]}, r"layers must be in -2..1, got \[0, 2\]"),
        ({"layers": [-3]}, "layers must be in"),
        ({"pool": "avg"}, "pool must be 'tokens', 'cls', 'mean' or 'map', got 'avg'"),
        ({"pool": "map", "mask": torch.zeros(2, 36)}, "needs all patches"),
    ],
)
def test_wrong_arguments_of_forward_features_raise_value_errors(change, message):
    for model in (tiny(), tiny_vit()):
        with pytest.raises(ValueError, match=message):
            model.forward_features(**{"images": torch.randn(2, 3, 24, 24), **change})


def test_replaced_blocks_are_called():
    model = VisionTransformer(img_size=8, patch_size=4, num_classes=0, embed_dim=8, depth=2, num_heads=1)
    model.blocks[1] = nn.Identity()
    images = torch.randn(1, 3, 8, 8)
    first, second = model.forward_features(images, layers=[0, 1])
    assert torch.equal(first, second)
