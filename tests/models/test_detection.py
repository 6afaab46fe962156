"""Mask R-CNN on the pyramid: parts equal torchvision's, coordinates are fp32, and it learns."""

import pytest
import torch
from support import assert_close, one_thread, tiny, tiny_vit  # noqa: F401
from timm.optim import param_groups_layer_decay
from torchvision.ops import MultiScaleRoIAlign

from mae_fast.models.detection import Detector
from mae_fast.ops.patches import standardise

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 32


def detector(seed=0, num_classes=2, size=SIZE, encoder=None, **options):
    encoder = encoder or tiny_vit(seed=seed, num_classes=0, img_size=size, depth=4)
    torch.manual_seed(seed)
    return Detector(encoder, num_classes, size, **{"window": None, **options})


def pictures(n=2, size=SIZE, seed=0):
    """uint8 images with one bright or dark square each, and their targets."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(100, 140, (n, size, size, 3), generator=rng, dtype=torch.uint8)
    targets = []
    for i in range(n):
        left, top, side = 4 + 3 * i, 6, size // 2
        masks = torch.zeros(1, size, size, dtype=torch.uint8)
        masks[0, top : top + side, left : left + side] = 1
        images[i, masks[0] == 1] = (250, 10)[i % 2]
        boxes = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        targets.append({"boxes": boxes, "labels": torch.tensor([1 + i % 2]), "masks": masks})
    return images, targets


LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("masks", [True, False])
def test_every_weight_is_trained(masks, window):
    encoder = tiny_vit(num_classes=0, img_size=SIZE, depth=4)
    model = detector(encoder=encoder, masks=masks, window=window).train()
    images, targets = pictures()
    losses = model(images, targets)
    assert losses.keys() == (LOSSES | {"loss_mask"} if masks else LOSSES)
    assert all(x.ndim == 0 and x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # With windows, there is no class token.
        assert (parameter.grad.abs().sum() > 0) == (window is None or "cls_token" not in name), name
    assert encoder.blocks[3].mlp.fc2.weight.grad is not None
    assert model.blocks is model.backbone.net.blocks
    assert len(model.blocks) == 4


@pytest.mark.parametrize("masks", [True, False])
def test_detections_have_the_documented_shapes(masks):
    model = detector(masks=masks).eval()
    model.roi_heads.score_thresh = 0.0
    images, _ = pictures(n=3)
    with torch.no_grad():
        found = model(images)
    assert len(found) == 3
    for one in found:
        m = len(one["scores"])
        assert 0 < m <= 100
        assert one.keys() == ({"boxes", "labels", "scores", "masks"} if masks else {"boxes", "labels", "scores"})
        assert one["boxes"].shape == (m, 4)
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= SIZE).all()
        assert set(one["labels"].tolist()) <= {1, 2}
        if masks:
            assert one["masks"].shape == (m, 1, 28, 28)
            assert ((one["masks"] >= 0) & (one["masks"] <= 1)).all()


def test_images_are_standardised_once():
    model = detector().eval()
    images, _ = pictures()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
        direct = model.backbone(images)
        again = model.backbone(
            standardise(images, *(getattr(model.backbone.net, f"pixel_{x}") for x in ("mean", "std")))
        )
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    assert_close({"images": seen[0]}, {"images": expected}, 1e-6)
    assert_close(dict(direct), dict(again), 1e-5)
    assert not any("transform" in name for name in model.state_dict())


@pytest.mark.parametrize(("patch", "size", "strides"), [(4, 64, (1, 2, 4, 8, 16)), (6, 72, (1.5, 3, 6, 12, 24))])
def test_anchors_and_pooling_follow_the_strides(patch, size, strides):
    encoder = tiny_vit(num_classes=0, img_size=size, patch_size=patch)
    model = detector(encoder=encoder, size=size)
    with torch.no_grad():
        maps = model.backbone(pictures(size=size)[0])
    for one, stride in zip(maps.values(), strides, strict=True):
        assert one.shape[2:] == (size / stride, size / stride)
    anchors = model.rpn.anchor_generator
    assert anchors.sizes == tuple((8 * x,) for x in strides)
    assert anchors.aspect_ratios == ((0.5, 1.0, 2.0),) * 5
    for pool, side in ((model.roi_heads.box_roi_pool, 7), (model.roi_heads.mask_roi_pool, 14)):
        assert pool.output_size == (side, side)
        assert pool.scales == [1 / x for x in strides[:4]]
        # A box whose side is 14 cells of a map is pooled from that map (eq. 1 of the FPN paper: 224 pixels, stride 16).
        for level, stride in enumerate(strides[:4]):
            box = torch.tensor([[0.0, 0, 14 * stride, 14 * stride]])
            assert pool.map_levels([box]).tolist() == [level]
            assert pool.map_levels([box * 1.9]).tolist() == [min(level, 3)]


def test_pooling_scales_equal_those_that_torchvision_infers():
    model = detector(size=64, encoder=tiny_vit(num_classes=0, img_size=64))
    with torch.no_grad():
        maps = model.backbone(pictures(size=64)[0])
    boxes = [torch.tensor([[3.0, 4, 30, 41], [0, 0, 64, 60]]), torch.tensor([[10.0, 1, 14, 9]])]
    theirs = MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], 7, 2)
    expected = theirs(maps, boxes, [(64, 64)] * 2)
    assert_close({"x": model.roi_heads.box_roi_pool(maps, boxes, [(64, 64)] * 2)}, {"x": expected}, 1e-6)


def test_heads_have_the_layers_of_vitdet():
    model = detector(encoder=tiny_vit(num_classes=0, img_size=SIZE, embed_dim=512, depth=1))
    assert model.backbone.out_channels == 256
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if not name.startswith("backbone")}
    convs = [shape for name, shape in shapes.items() if len(shape) == 4 and shape[2:] == (3, 3)]
    assert convs == [(256, 256, 3, 3)] * (2 + 4 + 4)
    norms = [name for name, shape in shapes.items() if shape == (256,) and name.endswith(".1.weight")]
    assert len(norms) == 4 + 4
    assert shapes["roi_heads.box_head.5.weight"] == (1024, 256 * 7 * 7)
    assert shapes["roi_heads.box_predictor.cls_score.weight"] == (3, 1024)
    assert shapes["roi_heads.mask_predictor.mask_fcn_logits.weight"] == (3, 256, 1, 1)
    assert detector().backbone.out_channels == 16


@pytest.mark.parametrize(("size", "share"), [(32, 1 / 8), (128, 1 / 4), (256, 1), (512, 1)])
def test_small_images_get_fewer_proposals(size, share):
    model = detector(size=size)
    assert model.rpn._pre_nms_top_n == model.rpn._post_nms_top_n == {"training": 2000 * share, "testing": 1000 * share}
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 512 * share


@pytest.mark.parametrize(("size", "window"), [(40, None), (8, None), (SIZE, 0)])
def test_wrong_sizes_of_a_detector_raise_value_errors(size, window):
    told = "window must be at least 1" if window == 0 else f"multiple of 4 patches of 4 pixels, got {size}"
    with pytest.raises(ValueError, match=told):
        detector(size=size, encoder=tiny_vit(), window=window)


def test_layer_decay_groups_of_a_detector():
    model = detector()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    found = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        group = found.pop(id(p))
        inner = name.removeprefix("backbone.net.")
        stem = inner.split(".")[0] in ("cls_token", "pos_embed", "patch_embed")
        layer = 0 if stem else int(inner.split(".")[1]) + 1 if inner.startswith("blocks") else 5
        assert group["lr_scale"] == 0.5 ** (5 - layer), name
        assert group["weight_decay"] == (0.05 if p.ndim > 1 and inner not in ("cls_token", "pos_embed") else 0), name
    assert not found


def test_a_detector_accepts_an_autoencoder():
    model = detector(encoder=tiny(img_size=SIZE)).train()
    losses = model(*pictures())
    assert all(x.isfinite() for x in losses.values())


def test_coordinates_are_in_full_precision_under_autocast():
    model = detector(size=64, encoder=tiny_vit(num_classes=0, img_size=64)).train()
    images, targets = pictures(size=64)
    seen = {}
    for name in ("backbone", "rpn.head", "rpn", "roi_heads.box_predictor", "roi_heads.mask_predictor"):
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    losses = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses[bf16] = model(images, targets)
    flat = torch.utils._pytree.tree_leaves(list(seen.values()))
    assert {x.dtype for x in flat} == {torch.float32}
    assert {x.dtype for x in losses[True].values()} == {torch.float32}
    assert model.rpn.anchor_generator.cell_anchors[0].dtype == torch.float32
    boxes = torch.cat(seen["rpn"][0])
    assert (boxes.bfloat16().float() != boxes).any()
    for name in ("loss_objectness", "loss_rpn_box_reg", "loss_classifier"):
        assert torch.isclose(losses[True][name], losses[False][name], rtol=0.03), name
    inside = model.roi_heads.box_head[0][0](torch.zeros(1, 16, 7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.roi_heads.box_head[0][0](torch.zeros(1, 16, 7, 7)).dtype == torch.bfloat16  # layers stay in bf16
    assert inside.dtype == torch.float32


def test_images_without_objects_give_finite_losses():
    model = detector().train()
    images, targets = pictures()
    empty = {name: x[:0] for name, x in targets[0].items()}
    losses = model(images, [empty, empty])
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_detector_overfits_two_images():
    model = detector(seed=1).train()
    images, targets = pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(50):
        torch.manual_seed(step)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    model.eval()
    with torch.no_grad():
        found = model(images)
    for one, target in zip(found, targets, strict=True):
        best = one["scores"].argmax()
        assert one["labels"][best] == target["labels"][0]
        assert one["scores"][best] > 0.5
        assert (one["boxes"][best] - target["boxes"][0]).abs().max() < 4
        assert one["masks"][best].mean() > 0.7
