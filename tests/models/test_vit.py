"""The classifier equals the eager reference and timm: values, gradients, drop path, images of other sizes."""

import copy

import pytest
import torch
from support import (  # noqa: F401
    assert_close,
    assert_no_worse_than_eager,
    gradients,
    one_thread,
    pictures,
    timm_twin,
    tiny_vit,
)  # fmt: skip
from torch import nn

import mae_fast as models_vit
from mae_fast.models import VisionTransformer, vit
from mae_fast.models.reference import ReferenceViT

PAPER = {  # patch, width, depth, heads, parameters in millions with 1000 classes and global pooling
    "vit_base_patch16": (16, 768, 12, 12, 86.568),
    "vit_large_patch16": (16, 1024, 24, 16, 304.327),
    "vit_huge_patch14": (14, 1280, 32, 16, 632.046),
}
SHAPES = {
    "RGB": {},
    "grey, one wide head": {"in_chans": 1, "embed_dim": 80, "num_heads": 1},
    "not square": {"img_size": (24, 16), "patch_size": (4, 8)},
    "no bias in qkv": {"qkv_bias": False},
}


def run(model, images):
    """Logits and every gradient of the cross-entropy."""
    model.zero_grad()
    logits = model(images)
    nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets(images)).backward()
    return {"logits": logits.detach(), **gradients(model)}


def targets(images):
    return torch.arange(len(images)) % 5


@pytest.mark.parametrize("name", PAPER)
def test_classifiers_have_the_published_sizes(name):
    patch, width, depth, heads, millions = PAPER[name]
    with torch.device("meta"):
        model = models_vit.__dict__[name](num_classes=1000, drop_path_rate=0.1, global_pool=True)
        bare = models_vit.__dict__[name]()
    keys = list(model.state_dict())
    assert keys[:2] == ["cls_token", "pos_embed"]
    assert [key for key in keys if "blocks" not in key] == [
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias",
    ]  # fmt: skip
    assert [key for key in bare.state_dict() if "norm" in key and "blocks" not in key] == ["norm.weight", "norm.bias"]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert (model.patch_embed.patch_size, model.cls_token.shape[2], len(model.blocks)) == ((patch, patch), width, depth)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert all(p.requires_grad for p in model.parameters())
    rates = [block.drop_path.drop_prob for block in model.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.1, depth).tolist(), abs=1e-7)
    assert (model.head.in_features, model.no_weight_decay()) == (width, {"pos_embed", "cls_token"})


def test_initial_weights_of_a_classifier_follow_the_published_distributions():
    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=256, depth=1, num_heads=4)
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.startswith("patch_embed"):
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
        elif p.ndim == 1 and not name.startswith("patch_embed"):
            assert p.eq(float("norm" in name and name.endswith("weight"))).all(), name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("global_pool", [True, False], ids=["mean", "cls"])
@pytest.mark.parametrize("shape", SHAPES)
def test_classifier_equals_the_reference(shape, global_pool):
    model = tiny_vit(global_pool=global_pool, **SHAPES[shape]).double()
    images = pictures(model)
    if shape == "no bias in qkv":  # the reference has one
        assert_close({"logits": model(images)}, {"logits": timm_twin(model)(images)})
        return
    assert_close(run(model, images), run(ReferenceViT.of(model), images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_classifier_is_no_worse_than_eager(dtype):
    model = tiny_vit(global_pool=True)
    truth_model = copy.deepcopy(model).double()
    images = pictures(model)
    reference = ReferenceViT.of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, eager = run(model, images), run(reference, images)
    truth = run(ReferenceViT.of(truth_model), images.double())
    assert_no_worse_than_eager(ours, eager, truth, dtype)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("global_pool", [True, False], ids=["mean", "cls"])
def test_classifier_with_drop_path_equals_timm(global_pool):
    """The random draws are the same, so the same images are dropped."""
    model = tiny_vit(global_pool=global_pool, drop_path_rate=0.5).double()
    theirs, images = timm_twin(model), pictures(model, 8)
    results = []
    for one in (model, theirs):
        one.train()
        torch.manual_seed(5)
        results.append(run(one, images))
    assert_close(*results)
    assert not torch.equal(results[0]["logits"], model.eval()(images))
    assert_close({"logits": model(images)}, {"logits": theirs.eval()(images)})


def test_drop_path_keeps_the_mean():
    model = tiny_vit(drop_path_rate=0.5)
    drop = model.blocks[-1].drop_path.train()
    torch.manual_seed(0)
    x = drop(torch.ones(4000, 3, 2))
    assert sorted(set(x.flatten().tolist())) == [0.0, 2.0]
    assert (x == x[:, :1, :1]).all()  # whole images are dropped
    assert x.mean().item() == pytest.approx(1, abs=0.06)
    with pytest.raises(ValueError, match="drop path rate must be at least 0 and below 1, got 1"):
        tiny_vit(drop_path_rate=1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", [(24, 24), (48, 48), (32, 20)], ids=str)
def test_images_of_any_size_equal_timm_with_a_resized_table(size):
    model = tiny_vit(global_pool=True).double()
    images = pictures(model, 2, size)
    theirs = timm_twin(model)
    grid = size[0] // 4, size[1] // 4
    rows = model.pos_embed[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    rows = nn.functional.interpolate(rows, size=grid, mode="bicubic", align_corners=False)
    theirs.patch_embed.strict_img_size = False
    theirs.pos_embed = nn.Parameter(torch.cat([model.pos_embed[:, :1], rows.flatten(2).transpose(1, 2)], 1))
    assert_close({"logits": model(images)}, {"logits": theirs(images)})


def test_classifier_standardises_uint8_images():
    model = tiny_vit()
    images = torch.randint(256, (2, 24, 24, 3), dtype=torch.uint8)
    floating = (images.permute(0, 3, 1, 2) / 255 - model.pixel_mean[:, None, None]) / model.pixel_std[:, None, None]
    assert_close({"logits": model(images)}, {"logits": model(floating)}, 1e-5)


def test_a_classifier_without_head_returns_features():
    model = tiny_vit(num_classes=0)
    images = pictures(model)
    assert torch.equal(model(images), model.forward_features(images))


def test_replaced_heads_are_called():
    """The published linear probe has a batch norm before the head. Hooks on the head run."""
    model = tiny_vit()
    model.head = nn.Sequential(nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6), model.head)
    images = pictures(model)
    features = model.train().forward_features(images)
    expected = model.head[1](nn.functional.batch_norm(features, None, None, training=True, eps=1e-6))
    torch.testing.assert_close(model(images), expected)
    assert model.head[0].num_batches_tracked == 1


def test_an_unknown_classifier_raises_a_value_error():
    with pytest.raises(ValueError, match=r"unknown model 'vit_giant'; known: vit_base_patch16, "):
        vit.build("vit_giant")
