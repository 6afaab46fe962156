"""UPerNet on the encoder: its parts equal plain torch; images of any size; sliding-window inference."""

import math

import pytest
import torch
from support import assert_close, one_thread, pictures, tiny, tiny_vit  # noqa: F401
from torch import nn
from torch.nn import functional as F

from mae_fast.models.segmentation import SegmentationModel, UPerNet, slide
from mae_fast.ops.patches import standardise

pytestmark = pytest.mark.usefixtures("one_thread")


def model(encoder=None, **options):
    """Four blocks, 5 classes, 8 channels."""
    encoder = encoder or tiny_vit(depth=4)
    torch.manual_seed(1)
    made = SegmentationModel(encoder, **{"num_classes": 5, "channels": 8, **options})
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return made.double()


def labels_for(images, seed=0, missing=0.2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (len(images), *images.shape[2:]), generator=generator)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < missing, 255)


def normed(norm, x):
    """The formula of batch norm in training."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def conv(part, x):
    """Convolution without bias, batch norm and ReLU in plain torch."""
    layer = part[0]
    return F.relu(normed(part[1], F.conv2d(x, layer.weight, padding=layer.weight.shape[2] // 2)))


def larger(x, like):
    return F.interpolate(x, like.shape[2:], mode="bilinear")


def plain_upernet(head, maps):
    """UPerNet in plain torch, as in the figure of the paper."""
    p2, p3, p4, p5 = maps
    bins = zip(head.pyramid, (1, 2, 3, 6), strict=True)
    pooled = [larger(conv(level[1], F.adaptive_avg_pool2d(p5, n)), p5) for level, n in bins]
    f5 = conv(head.bottleneck, torch.cat([p5, *pooled], 1))
    t4 = conv(head.lateral[2], p4) + larger(f5, p4)
    t3 = conv(head.lateral[1], p3) + larger(t4, p3)
    t2 = conv(head.lateral[0], p2) + larger(t3, p2)
    f4, f3, f2 = (conv(head.smooth[i], t) for i, t in ((2, t4), (1, t3), (0, t2)))
    fused = conv(head.fusion, torch.cat([larger(f, f2) for f in (f5, f4, f3, f2)], 1))
    return F.conv2d(fused, head.classifier.weight, head.classifier.bias)


def test_the_head_equals_the_papers():
    torch.manual_seed(0)
    head = UPerNet(12, 5, 8).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    maps = [torch.randn(2, 12, *size, dtype=torch.float64) for size in ((28, 20), (14, 10), (7, 5), (4, 3))]
    assert_close({"logits": head(maps)}, {"logits": plain_upernet(head, maps)})


def test_maps_come_from_each_quarter_of_the_blocks_at_four_strides():
    """Two transposed convolutions with norm and GELU between them; one of them; identity; max pooling."""
    made = model(tiny_vit(depth=8))
    assert made.net.layers == [1, 3, 5, 7]
    images = pictures(made.net, size=(28, 20))
    plain = made.net(images)
    found = made._maps(images)
    assert [x.shape[2:] for x in found] == [(28, 20), (14, 10), (7, 5), (4, 3)]
    first, norm, _, second = made.scales[0]
    x = F.conv_transpose2d(plain[0], first.weight, first.bias, stride=2)
    expected = {
        "0": F.conv_transpose2d(F.gelu(normed(norm, x)), second.weight, second.bias, stride=2),
        "1": F.conv_transpose2d(plain[1], made.scales[1].weight, made.scales[1].bias, stride=2),
        "2": plain[2],
        "3": F.max_pool2d(plain[3], 2, ceil_mode=True),
    }
    assert_close({str(i): x for i, x in enumerate(found)}, expected)


def test_encoders_of_any_depth_and_chosen_layers_work():
    assert model(tiny_vit(depth=2)).net.layers == [0, 0, 1, 1]
    assert model(tiny_vit(depth=6)).net.layers == [1, 2, 4, 5]
    made = model(tiny_vit(depth=4), layers=(0, 1, 1, 2))
    assert made.net.layers == [0, 1, 1, 2]
    assert len(made.blocks) == 3
    assert model(tiny(depth=4)).net.window is None


@pytest.mark.parametrize("size", [(24, 24), (25, 24), (24, 31), (7, 9), (3, 2)], ids=str)
def test_images_of_any_size_are_padded_to_whole_patches(size):
    """The padding is below and at the right, in the mean colour, which is 0 in standardised images."""
    made = model()
    images = pictures(made.net, size=size)
    logits = made(images)
    assert logits.shape == (3, 5, *size)
    below, right = -size[0] % 4, -size[1] % 4
    whole = made(F.pad(images, (0, right, 0, below)))
    assert_close({"logits": logits}, {"logits": whole[..., : size[0], : size[1]]})
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    ready = standardise(pixels, made.net.pixel_mean, made.net.pixel_std)
    assert_close({"logits": made(pixels)}, {"logits": made(ready)}, 1e-6)


def test_logits_are_resized_to_the_image():
    made = model()
    images = pictures(made.net)
    small = made.head(made._maps(images))
    assert small.shape == (3, 5, 24, 24)  # a quarter of a patch is a pixel here
    eight = model(tiny_vit(depth=4, img_size=48, patch_size=8))
    images = pictures(eight.net)
    found = eight.head(eight._maps(images))
    assert found.shape == (3, 5, 24, 24)
    assert_close({"x": eight(images)}, {"x": F.interpolate(found.float(), (48, 48), mode="bilinear")})


def test_loss_adds_both_heads():
    """Each is a sum over labelled pixels, divided by the number of pixels. The auxiliary head uses the third map."""
    made = model()
    images = pictures(made.net, size=(21, 24))
    labels = labels_for(images)
    maps = made._maps(images)
    found = []
    for logits in (made.head(maps), F.conv2d(conv(made.auxiliary[0], maps[2]), *made.auxiliary[1].parameters())):
        logits = F.interpolate(logits.float(), (24, 24), mode="bilinear")[..., :21, :]
        entropies = -logits.log_softmax(1).gather(1, labels.where(labels < 255, 0)[:, None])[:, 0]
        found.append((entropies * (labels < 255)).sum() / labels.numel())
    assert_close({"loss": made.loss(images, labels)}, {"loss": found[0] + 0.4 * found[1]}, 1e-6)


def test_losses_of_parts_average_to_the_loss_of_all():
    """Parts may have few labels. The loss of a part without labels is 0, and its gradients are finite."""
    made = model().eval()
    images = pictures(made.net, n=4)
    labels = labels_for(images)
    labels[:2, 3:] = 255
    parts = torch.stack([made.loss(images[i : i + 2], labels[i : i + 2]) for i in (0, 2)])
    assert_close({"loss": parts.mean()}, {"loss": made.loss(images, labels)}, 1e-6)
    nothing = made.loss(images, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0
    assert all(p.grad.isfinite().all() for p in made.parameters())


def test_a_constant_added_to_all_positions_does_not_change_the_logits():
    """Maps of pre-trained encoders have a large mean."""
    torch.manual_seed(0)
    head = UPerNet(12, 5, 8).double()
    maps = [torch.randn(2, 12, *size, dtype=torch.float64) for size in ((28, 20), (14, 10), (7, 5), (4, 3))]
    moved = [x + 100 * torch.randn(12, 1, 1, dtype=torch.float64) for x in maps]
    for lateral, ours, theirs in zip(head.lateral, moved, maps, strict=False):  # these convolutions do not pad
        assert_close({"map": lateral(ours)}, {"map": lateral(theirs)}, 1e-10)


def test_every_weight_is_trained():
    made = model()
    images = pictures(made.net)
    made.loss(images, labels_for(images)).backward()
    for name, p in made.named_parameters():
        assert p.grad.abs().max() > 0, name


def test_initial_predictions_are_nearly_uniform():
    torch.manual_seed(0)
    made = SegmentationModel(tiny_vit(depth=4), 5, 16)
    images = pictures(made.net)
    assert made.loss(images, labels_for(images, missing=0)).item() == pytest.approx(1.4 * math.log(5), 0.05)
    assert sum(p.numel() for p in made.auxiliary.parameters()) == 32 * 8 * 9 + 2 * 8 + 8 * 5 + 5  # half as wide


def test_layer_decay_groups_of_a_segmentation_model():
    from timm.optim import param_groups_layer_decay

    made = model()
    groups = param_groups_layer_decay(made, 0.05, made.no_weight_decay(), layer_decay=0.5)
    found = {id(p): group for group in groups for p in group["params"]}
    for name, p in made.named_parameters():
        part = name.split(".")
        layer = int(part[2]) + 1 if name.startswith("net.blocks.") else 0 if name.startswith("net.") else 5
        assert found[id(p)]["lr_scale"] == 0.5 ** (5 - layer), name
        decayed = p.ndim > 1 and name not in ("net.pos_embed", "net.cls_token")
        assert found[id(p)]["weight_decay"] == (0.05 if decayed else 0.0), name


def test_bf16_logits_are_fp32():
    made = model().float()
    images = pictures(made.net)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(images).dtype == torch.float32
        assert made.loss(images, labels_for(images)).dtype == torch.float32


def local(images):
    """A model whose output depends on each pixel alone: [n, h, w, C] -> [n, 2, h, w]."""
    return images.movedim(3, 1)[:, :2].float() ** 2


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [((24, 24), 24, 16), ((24, 37), 24, 16), ((61, 24), 24, 16), ((50, 43), 24, 7), ((9, 30), 24, 16), ((5, 6), 24, 16),
     ((40, 40), 10, 10), ((33, 32), 16, 16)],
    ids=str,
)  # fmt: skip
def test_sliding_windows_are_exact_for_a_local_model(size, crop, stride):
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shapes, windows = set(), 0

    def call(images):
        nonlocal windows
        shapes.add(tuple(images.shape[1:]))
        windows += len(images)
        assert len(images) <= 8
        return local(images)

    found = slide(call, image, crop, stride)
    assert_close({"logits": found}, {"logits": local(image[None])[0]}, 1e-6)
    assert shapes == {(min(crop, size[0]), min(crop, size[1]), 3)}
    rows, columns = (1 + -(-max(0, side - crop) // stride) for side in size)
    assert windows == rows * columns


def test_overlaps_are_averaged():
    """The model returns the number of the window. The windows start at 0, 3 and 4 of 8 pixels."""
    image = torch.zeros(4, 8, 3, dtype=torch.uint8)

    def numbers(images):
        return torch.arange(1.0, 1 + len(images))[:, None, None, None].expand(-1, 1, *images.shape[1:3])

    found = slide(numbers, image, 4, 3)
    row = [1, 1, 1, 1.5, 2.5, 2.5, 2.5, 3]
    assert torch.equal(found, torch.tensor(row).expand(1, 4, 8))


def test_sliding_windows_equal_calls_on_cropped_images():
    made = model().float().eval()
    image = torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8)
    with torch.no_grad():
        found = slide(made, image, 24, 16)
        left, right = made(image[None, :, :24]), made(image[None, :, 16:])
    assert_close({"left": found[..., :16]}, {"left": left[0, ..., :16]}, 1e-5)
    assert_close({"right": found[..., 24:]}, {"right": right[0, ..., 8:]}, 1e-5)
    both = (left[0, ..., 16:] + right[0, ..., :8]) / 2
    assert_close({"both": found[..., 16:24]}, {"both": both}, 1e-5)


def test_checkpointed_blocks_give_the_same_gradients():
    made = model()
    images = pictures(made.net)
    labels = labels_for(images)
    found = []
    for on in (False, True):
        made.net.set_grad_checkpointing(on)
        made.zero_grad()
        made.loss(images, labels).backward()
        found.append({name: p.grad.clone() for name, p in made.named_parameters()})
    assert_close(*found)
    assert isinstance(made.blocks, nn.ModuleList)
