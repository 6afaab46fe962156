"""The interface of timm's models gives the same results as timm's ViT with the same weights."""

import re

import pytest
import torch
from support import assert_close, one_thread, pictures, timm_twin, tiny, tiny_vit  # noqa: F401
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from mae_fast.models import VisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")


def flatten(x):
    """The tensors of a nested result, by their path."""
    if isinstance(x, torch.Tensor):
        return {"": x}
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return {f"{key}.{name}": value for key, part in items for name, value in flatten(part).items()}


def encoder_twin(mae):
    """timm's model with the encoder of ``mae``."""
    vit = VisionTransformer(
        img_size=24, patch_size=4, num_classes=0, embed_dim=32, depth=len(mae.blocks), num_heads=4,
        norm_layer=lambda d: nn.LayerNorm(d, eps=1e-6),
    )  # fmt: skip
    vit.load_state_dict({key: x for key, x in mae.state_dict().items() if key in vit.state_dict()})
    return timm_twin(vit.double())


MODELS = {
    "mae": lambda: tiny(depth=4).double(),
    "classifier": lambda: tiny_vit(depth=4).double(),
    "classifier of means": lambda: tiny_vit(depth=4, global_pool=True).double(),
}
models = pytest.mark.parametrize("name", MODELS)
OPTIONS = [
    {},
    {"indices": 2, "norm": True},
    {"indices": [3, -4, 3], "return_prefix_tokens": True},
    {"indices": [1], "stop_early": True, "output_fmt": "NLC"},
    {"indices": [0, 2], "intermediates_only": True, "return_prefix_tokens": True, "norm": True},
    {"indices": 1, "output_dict": True, "return_prefix_tokens": True},
    {"indices": [2], "output_dict": True, "intermediates_only": True, "output_fmt": "NLC"},
]


@models
def test_forward_intermediates_equal_timm(name):
    model = MODELS[name]()
    theirs, images = encoder_twin(model) if name == "mae" else timm_twin(model), pictures(model)
    for options in OPTIONS:
        found = model.forward_intermediates(images, **options)
        expected = theirs.forward_intermediates(images, **options)
        assert type(found) is type(expected)
        assert_close(flatten(found), flatten(expected))


def test_forward_intermediates_run_no_block_after_the_last_one():
    model, ran = tiny(depth=3), []
    model.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    images = torch.randn(1, 3, 48, 24)  # another size than the model's
    (found,) = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert found.shape == (1, 32, 12, 6)
    model.forward_intermediates(images, indices=[1], stop_early=True)
    assert not ran


@pytest.mark.parametrize("wrong", [{"indices": 0}, {"indices": 5}, {"indices": []}, {"indices": [4]}])
def test_blocks_that_do_not_exist_raise_value_errors(wrong):
    with pytest.raises(ValueError, match="indices must"):
        tiny(depth=4).forward_intermediates(torch.randn(1, 3, 24, 24), **wrong)


@models
def test_attributes_have_timms_names(name):
    model = MODELS[name]()
    theirs = encoder_twin(model) if name == "mae" else timm_twin(model)
    for size in ("embed_dim", "num_features", "num_prefix_tokens", "num_classes"):
        assert getattr(model, size) == getattr(theirs, size), size
    assert isinstance(model.get_classifier(), nn.Identity if name == "mae" else nn.Linear)


@models
def test_layer_decay_of_timm_scales_every_block(name):
    model = MODELS[name]()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {id(p): key for key, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == {key for key, p in model.named_parameters() if p.requires_grad}
    blocks = [scale[f"blocks.{i}.norm1.weight"] for i in range(4)]
    assert [b / blocks[0] for b in blocks] == [1, 2, 4, 8]
    assert scale["patch_embed.proj.weight"] == scale["cls_token"] == blocks[0] / 2
    if name == "mae":
        after = ["norm.weight", "decoder_embed.weight", "mask_token", "decoder_blocks.0.norm1.weight"]
        assert [scale[key] / blocks[3] for key in after] == [2, 2, 2, 4]
    last = "decoder_pred.weight" if name == "mae" else "head.weight"
    assert scale[last] == 1 == max(scale.values())
    assert not any(re.compile(pattern).groups for pattern in model.group_matcher(coarse=True).values())
    assert create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.5)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [None, "avg", "token", True, False])
def test_reset_classifier_equals_a_new_model(before, after, tmp_path):
    model = tiny_vit(global_pool=before).double().eval()
    norm = (model.fc_norm if before else model.norm).weight
    model.reset_classifier(7, after)
    pools = before if after is None else after in ("avg", True)
    fresh = tiny_vit(global_pool=pools, num_classes=7).double().eval()
    assert [*model.state_dict()] == [*fresh.state_dict()]
    fresh.load_state_dict(model.state_dict())
    images = pictures(model)
    assert torch.equal(model(images), fresh(images))
    assert (model.fc_norm if pools else model.norm).weight is norm
    assert (model.num_classes, model.global_pool, model.head.training) == (7, pools, False)
    assert 0.01 < model.head.weight.std() < 0.03
    model.save_pretrained(tmp_path)
    again = VisionTransformer.from_pretrained(tmp_path).double().eval()
    torch.testing.assert_close(again(images), model(images), rtol=1e-6, atol=1e-6)


def test_a_head_can_be_removed_but_not_given_to_an_autoencoder():
    model = tiny_vit()
    model.reset_classifier(0)
    assert torch.equal(model(pictures(model)), model.forward_features(pictures(model)))
    with pytest.raises(ValueError, match="global_pool must be a bool, 'avg' or 'token', got 'map'"):
        model.reset_classifier(5, "map")
    mae = tiny()
    mae.reset_classifier(0)
    with pytest.raises(ValueError, match=r"no classifier.*num_classes="):
        mae.reset_classifier(10)
