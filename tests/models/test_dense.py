"""Dense maps and ViTDet's window attention equal the plain formula, transformers' ViTDet and timm."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, assert_no_worse_than_eager, one_thread, perturb, pictures, tiny, tiny_vit  # noqa: F401
from torch import nn
from torch.nn import functional as F

from mae_fast.models import VisionTransformer
from mae_fast.models import blocks as layers
from mae_fast.models.blocks import Attention, Windows
from mae_fast.models.dense import DenseEncoder, SimpleFeaturePyramid

CASES = {  # grid of patches, window
    "whole windows": ((6, 6), 3),
    "padded below and right": ((7, 5), 3),
    "padded right": ((6, 4), 3),
    "higher than the grid": ((2, 9), 4),
    "larger than the grid": ((3, 4), 14),
    "one window": ((4, 4), 4),
    "one patch each": ((2, 3), 1),
}


def attended(attn, x):
    """Self-attention of tokens [N, T, D] by the plain formula."""
    n, t, d = x.shape
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).reshape(n, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    p = (q @ k.transpose(2, 3) / k.shape[3] ** 0.5).softmax(-1)
    return F.linear((p @ v).transpose(1, 2).reshape(n, t, d), attn.proj.weight, attn.proj.bias)


def windowed(attn, x, side):
    """Window attention on a map [N, h, w, D]: a loop over windows, which are padded with zeros and cropped."""
    n, h, w, d = x.shape
    rows = []
    for i in range(0, h, side):
        row = []
        for j in range(0, w, side):
            cut = x[:, i : i + side, j : j + side]
            _, a, b, _ = cut.shape
            cut = torch.cat([cut, cut.new_zeros(n, a, side - b, d)], 2)
            cut = torch.cat([cut, cut.new_zeros(n, side - a, side, d)], 1)
            row.append(attended(attn, cut.flatten(1, 2)).unflatten(1, (side, side))[:, :a, :b])
        rows.append(torch.cat(row, 2))
    return torch.cat(rows, 1)


def dropped(x, rate, training):
    if not training or not rate:
        return x
    return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - rate).div_(1 - rate)


def plain_maps(encoder, images, window, global_blocks):
    """The outputs of all blocks [N, D, h, w] without a class token, in plain torch."""
    proj, table = encoder.patch_embed.proj, encoder.pos_embed[:, 1:].unflatten(1, encoder.patch_embed.grid_size)
    x = F.conv2d(images, proj.weight, proj.bias, proj.stride)
    size = x.shape[2:]
    table = table.permute(0, 3, 1, 2)
    if table.shape[2:] != size:
        table = F.interpolate(table, size=size, mode="bicubic", align_corners=False)
    x, maps = (x + table).permute(0, 2, 3, 1), []
    for i, block in enumerate(encoder.blocks):
        rate, norms = block.drop_path.drop_prob, (block.norm1, block.norm2)
        y = F.layer_norm(x, x.shape[3:], norms[0].weight, norms[0].bias, norms[0].eps)
        if i in global_blocks:
            y = attended(block.attn, y.flatten(1, 2)).unflatten(1, size)
        else:
            y = windowed(block.attn, y, window)
        x = x + dropped(y, rate, block.training)
        y = F.layer_norm(x, x.shape[3:], norms[1].weight, norms[1].bias, norms[1].eps)
        y = F.linear(F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias)), block.mlp.fc2.weight)
        x = x + dropped(y + block.mlp.fc2.bias, rate, block.training)
        maps.append(x.permute(0, 3, 1, 2))
    return maps


def maps_and_gradients(model, maps):
    """Maps by number, and the gradients of a weighted sum of them for all trained parameters of ``model``."""
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in maps]
    total = sum((x * weight).sum() for x, weight in zip(maps, weights, strict=True))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(trained.values(), grads, strict=True)]
    return {f"map {i}": x.detach() for i, x in enumerate(maps)} | dict(zip(trained, grads, strict=True))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [partial(tiny, depth=3), partial(tiny_vit, depth=3, global_pool=True)])
def test_maps_equal_the_formula(make, case):
    encoder, (grid, window) = make().double(), CASES[case]
    dense = DenseEncoder(encoder, layers=(0, 1, 2), window=window, global_blocks=(1,))
    images = pictures(encoder, 2, (4 * grid[0], 4 * grid[1]))
    ours = maps_and_gradients(dense, dense(images))
    assert_close(ours, maps_and_gradients(dense, plain_maps(encoder, images, window, (1,))))
    assert ours["map 0"].shape == (2, 32, *grid)


@pytest.mark.usefixtures("one_thread")
def test_deferred_biases_do_not_change_the_maps(monkeypatch):
    """On GPUs, biases are added, and their gradients summed, by ops that see tokens with or without padding."""
    monkeypatch.setattr(layers, "defers_biases", lambda x: True)
    encoder = tiny_vit(depth=2).double()
    dense, images = DenseEncoder(encoder, (0, 1), window=3, global_blocks=(1,)), pictures(encoder, 2, (20, 28))
    ours = maps_and_gradients(dense, dense(images))
    assert_close(ours, maps_and_gradients(dense, plain_maps(encoder, images, 3, (1,))))


@pytest.mark.usefixtures("one_thread")
def test_gradients_reach_the_images():
    encoder = tiny(depth=1).double()
    dense, images = DenseEncoder(encoder, window=4, global_blocks=()), pictures(encoder, 2, (24, 20)).requires_grad_()
    ours, theirs = dense(images)[0], plain_maps(encoder, images, 4, ())[0]
    weight = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view(ours.shape)
    found = [torch.autograd.grad((x * weight).sum(), images)[0] for x in (ours, theirs)]
    assert_close(*({"images": x} for x in found))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", [(24, 24), (28, 44)], ids=str)
def test_maps_equal_those_of_transformers_vitdet(size):
    from transformers import VitDetConfig, VitDetModel

    encoder = tiny_vit(depth=4, in_chans=2).double()
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_channels": 2, "patch_size": 4}
    windows = {"window_size": 3, "window_block_indices": [0, 2, 3]}
    theirs = VitDetModel(VitDetConfig(pretrain_image_size=24, **sizes, **windows)).double()
    names = {"patch_embed.proj": "embeddings.projection", "pos_embed": "embeddings.position_embeddings"}
    state = {}
    for name, value in encoder.state_dict().items():
        if name.startswith(("patch_embed", "pos_embed", "blocks")):
            for old, new in names.items():
                name = name.replace(old, new)
            state[name.replace("blocks.", "encoder.layer.").replace(".attn.", ".attention.")] = value
    theirs.load_state_dict(state)
    images = pictures(encoder, 2, size)
    expected = theirs(images, output_hidden_states=True).hidden_states[1:]
    found = DenseEncoder(encoder, layers=range(4), window=3, global_blocks=(1,))(images)
    assert_close(dict(enumerate(found)), dict(enumerate(expected)))


@pytest.mark.usefixtures("one_thread")
def test_a_window_as_large_as_the_grid_is_global_attention():
    encoder = tiny(depth=2).double()
    images = pictures(encoder, 2)
    windowed = DenseEncoder(encoder, window=6, global_blocks=())
    everywhere = DenseEncoder(encoder, window=6, global_blocks=(0, 1))
    assert_close({"map": windowed(images)[0]}, {"map": everywhere(images)[0]})
    larger = DenseEncoder(encoder, window=7, global_blocks=())  # padding takes part in attention, as in ViTDet
    assert (larger(images)[0] - windowed(images)[0]).abs().max() > 1e-4


@given(
    n=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    side=st.integers(1, 11),
)
def test_join_inverts_split(n, grid, side):
    h, w = grid
    x = torch.arange(1, 1 + n * h * w * 2, dtype=torch.float32).reshape(n, h * w, 2).requires_grad_()
    windows = Windows(grid, side)
    parts = windows.split(x)
    rows, columns = -(-h // side), -(-w // side)
    assert windows.count == (rows, columns)
    assert parts.shape == (n * rows * columns, side * side, 2)
    assert torch.equal(windows.join(parts), x)
    assert (parts == 0).sum() == parts.numel() - x.numel()  # the rest is padding
    image = x.unflatten(1, grid)
    for i, part in enumerate(parts.unflatten(1, (side, side))):
        rest, column = divmod(i, columns)
        number, row = divmod(rest, rows)
        cut = image[number, row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert torch.equal(part[: len(cut), : cut.shape[1]], cut)
    windows.join(2 * parts).sum().backward()
    assert (x.grad == 2).all()


def test_global_blocks_are_the_last_of_each_quarter():
    found = {depth: DenseEncoder(tiny(depth=depth)).global_blocks for depth in (12, 24, 32, 4, 5)}
    assert found == {
        12: [2, 5, 8, 11],
        24: [5, 11, 17, 23],
        32: [7, 15, 23, 31],
        4: [0, 1, 2, 3],
        5: [1, 2, 3, 4],
    }
    assert DenseEncoder(tiny(depth=1)).global_blocks == [0] * 4


@pytest.mark.parametrize("size", [(24, 24), (8, 36)], ids=str)
def test_without_windows_maps_equal_the_encoders(size):
    for encoder in (tiny(depth=3), tiny_vit(depth=3), tiny_vit(depth=3, global_pool=True)):
        images = pictures(encoder, 2, size)
        dense = DenseEncoder(encoder, layers=(-1, 0, 1), window=None)
        expected = encoder.forward_features(images, layers=(-1, 0, 1), pool="map")
        assert all(map(torch.equal, dense(images), expected))
        assert len(dense(images)) == 3


@pytest.mark.usefixtures("one_thread")
def test_layers_come_in_any_order_and_later_blocks_do_not_run():
    encoder = tiny_vit(depth=4)
    images = pictures(encoder, 2, (20, 28))
    every = DenseEncoder(encoder, layers=range(4), window=3, global_blocks=(-4,))(images)
    some = DenseEncoder(encoder, layers=(2, -4, 2), window=3, global_blocks=(0,))
    assert all(map(torch.equal, some(images), (every[2], every[0], every[2])))
    assert len(some.blocks) == 3
    assert len(encoder.blocks) == 4


@pytest.mark.parametrize("make", [tiny, tiny_vit])
def test_maps_in_bf16_are_no_worse_than_eager(make):
    encoder = make(depth=2)
    exact = copy.deepcopy(encoder).double()
    dense, images = DenseEncoder(encoder, (0, 1), window=3, global_blocks=(1,)), pictures(encoder, 2, (20, 28))
    with torch.autocast("cpu", torch.bfloat16):
        maps, plain = dense(images), plain_maps(encoder, images, 3, (1,))
    ours, eager = maps_and_gradients(dense, maps), maps_and_gradients(dense, plain)
    truth = maps_and_gradients(DenseEncoder(exact, (0, 1)), plain_maps(exact, images.double(), 3, (1,)))
    assert_no_worse_than_eager(ours, eager, truth, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_on_a_gpu_equal_the_formula(dtype):
    encoder = tiny_vit(depth=2).cuda()
    exact = copy.deepcopy(encoder).double()
    dense, images = DenseEncoder(encoder, (0, 1), window=3, global_blocks=(1,)), pictures(encoder, 2, (20, 28))
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        maps, plain = dense(images), plain_maps(encoder, images, 3, (1,))
    ours, eager = maps_and_gradients(dense, maps), maps_and_gradients(dense, plain)
    truth = maps_and_gradients(DenseEncoder(exact, (0, 1)), plain_maps(exact, images.double(), 3, (1,)))
    assert_no_worse_than_eager(ours, eager, truth, dtype)


@pytest.mark.slow
def test_compiled_maps_equal_eager_ones():
    dense = DenseEncoder(tiny_vit(depth=1), window=4, global_blocks=())
    images = pictures(dense, 2, (24, 20))
    compiled = torch.compile(dense, fullgraph=True)
    ours, expected = (maps_and_gradients(dense, f(images)) for f in (compiled, dense))
    assert_close(ours, expected, 1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_drop_path_drops_whole_images(checkpointing):
    """Not windows. The random draws are the same, in the same order, as in the plain formula."""
    encoder = tiny_vit(depth=3, drop_path_rate=0.5).double().train()
    dense = DenseEncoder(encoder, range(3), window=3, global_blocks=(1,))
    dense.set_grad_checkpointing(checkpointing)
    images, found = pictures(encoder, 4, (20, 28)), []
    for maps in (dense, lambda images: plain_maps(encoder, images, 3, (1,))):
        torch.manual_seed(3)
        found.append(maps_and_gradients(dense, maps(images)))
    assert_close(*found)
    assert not torch.equal(found[0]["map 2"], dense.eval()(images)[2])


def test_checkpointed_blocks_are_recomputed():
    dense, ran = DenseEncoder(tiny_vit(depth=2), window=3, global_blocks=()), []
    dense.blocks[1].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    for on, times in ((False, 1), (True, 2)):
        dense.set_grad_checkpointing(on)
        dense(pictures(dense))[0].sum().backward()
        assert len(ran) == times
        ran.clear()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("what", ["hook on the block", "hook on the attention", "other attention", "derived block"])
def test_replaced_or_hooked_blocks_attend_within_windows(what):
    encoder = tiny_vit(depth=2).double()
    images, block = pictures(encoder, 2, (20, 28)), encoder.blocks[0]
    expected = plain_maps(encoder, images, 3, (1,))
    called = []
    if what == "hook on the block":
        block.register_forward_hook(lambda *_: called.append(what))
    elif what == "hook on the attention":
        block.attn.register_forward_hook(lambda *_: called.append(what))
    elif what == "other attention":
        block.attn.__class__ = type(
            "Other", (Attention,), {"forward": lambda self, x: called.append(x) or attended(self, x)}
        )
    else:
        block.__class__ = type("Derived", (type(block),), {})
        called.append(what)
    found = DenseEncoder(encoder, (0, 1), window=3, global_blocks=(1,))(images)
    assert_close(dict(enumerate(found)), dict(enumerate(expected)))
    assert called


def test_blocks_without_a_windows_argument_raise_an_error():
    encoder = tiny_vit(depth=2)
    encoder.blocks[0] = nn.Identity()
    images = pictures(encoder)
    with pytest.raises(TypeError, match="windows"):
        DenseEncoder(encoder, window=3, global_blocks=(1,))(images)
    DenseEncoder(encoder, window=3, global_blocks=(0,))(images)


def test_maps_of_uint8_images_of_any_size():
    dense = DenseEncoder(tiny(), window=3, global_blocks=(1,))
    pixels = torch.randint(0, 256, (2, 20, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    standardised = ((pixels / 255 - dense.pixel_mean) / dense.pixel_std).permute(0, 3, 1, 2)
    assert_close({"map": dense(pixels)[0]}, {"map": dense(standardised)[0]}, 1e-5)
    assert dense.bfloat16().pixel_mean.dtype == torch.float32


@pytest.mark.parametrize("make", [tiny, tiny_vit, partial(tiny_vit, global_pool=True)])
def test_checkpoints_load_both_ways(make):
    published, other = make(seed=1), make(seed=2)
    dense, images = DenseEncoder(other, window=3, global_blocks=(0,)), pictures(other)
    result = dense.load_state_dict(published.state_dict(), strict=False)
    assert not result.missing_keys
    assert not {name.split(".")[0] for name in result.unexpected_keys} & {"blocks", "patch_embed", "pos_embed"}
    expected = DenseEncoder(published, window=3, global_blocks=(0,))(images)[0]
    assert torch.equal(dense(images)[0], expected)
    trained = [model.blocks[1].mlp.fc2.weight for model in (other, published)]  # shared with the encoder
    assert torch.equal(*trained)
    third = make(seed=3)
    result = third.load_state_dict(dense.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {name.split(".")[0] for name in result.missing_keys} <= {
        *("norm", "fc_norm", "head", "mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks"),
        *("decoder_norm", "decoder_pred"),
    }
    assert torch.equal(DenseEncoder(third, window=3, global_blocks=(0,))(images)[0], expected)


@pytest.mark.parametrize("window", [None, 3])
def test_every_parameter_is_trained(window):
    """Otherwise, DistributedDataParallel would wait for gradients that never come."""
    dense = DenseEncoder(tiny_vit(depth=3), layers=(0, 1), window=window, global_blocks=(1,))
    sum(x.sum() for x in dense(pictures(dense))).backward()
    assert all(p.grad is not None for p in dense.parameters())
    assert sorted(dense.state_dict())[:2] == ["blocks.0.attn.proj.bias", "blocks.0.attn.proj.weight"]
    assert not [name for name in dense.state_dict() if name.startswith(("norm", "head", "blocks.2"))]
    fixed = DenseEncoder(tiny(), window=window)
    assert [name for name, p in fixed.named_parameters() if not p.requires_grad] == ["pos_embed"]


@pytest.mark.usefixtures("one_thread")
def test_interface_equals_timms_features_only():
    import timm

    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}
    theirs = timm.create_model(
        "vit_base_patch16_224", features_only=True, out_indices=(1, 3), dynamic_img_size=True, **sizes
    )
    encoder = perturb(VisionTransformer(**sizes, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    ours = DenseEncoder(encoder, layers=(1, 3), window=None)
    missing, unexpected = theirs.model.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    for ask in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, ask)() == getattr(theirs.feature_info, ask)()
    assert ours.feature_info.out_indices == theirs.feature_info.out_indices
    assert (ours.feature_info.channels(), ours.feature_info.reduction()) == ([32, 32], [4, 4])
    images = pictures(encoder, 2)
    found, expected = ours(images), theirs(images)
    assert type(found) is type(expected) is list
    assert_close(dict(enumerate(found)), dict(enumerate(expected)), 1e-5)
    for size in ((16, 40), (24, 24)):
        images = pictures(encoder, 2, size)
        assert [x.shape for x in DenseEncoder(encoder, (1, 3))(images)] == [x.shape for x in theirs(images)]


def test_feature_info_of_patches_that_are_not_square():
    info = DenseEncoder(tiny_vit(img_size=(24, 16), patch_size=(4, 8)), layers=(1, 0)).feature_info
    assert (info.channels(), info.reduction(), info.module_name()) == ([32] * 2, [8] * 2, ["blocks.1", "blocks.0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 2)}, r"layers must be in -2..1, got \[0, 2\]"),
        ({"layers": ()}, "layers must name at least one block"),
        ({"global_blocks": (-3,)}, r"global_blocks must be in -2..1, got \[-3\]"),
        ({"window": 0}, "window must be at least 1.*got 0"),
    ],
)
def test_wrong_arguments_of_dense_encoder_raise_value_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DenseEncoder(tiny(), **options)


@pytest.mark.parametrize("window", [None, 3])
def test_sides_that_are_not_multiples_of_the_patch_size_raise_value_errors(window):
    dense = DenseEncoder(tiny(), window=window)
    with pytest.raises(ValueError, match="images must have sides that are multiples of 4 x 4, got 24 x 26"):
        dense(torch.randn(2, 3, 24, 26))
    with pytest.raises(ValueError, match=r"images must be floating \[N, 3, H, W\] or uint8"):
        dense(torch.randn(2, 24, 24, 3))


def pyramid(**options):
    torch.manual_seed(0)
    return perturb(SimpleFeaturePyramid(DenseEncoder(tiny_vit(), (0, -1), window=3), **options))


def plain_pyramid(state, x):
    """p2 to p5 from the last map and the published parameter names, in plain torch."""

    def norm(x, name):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def up(x, name):
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    scaled = {
        "simfp_2": (up(F.gelu(norm(up(x, "simfp_2.0"), "simfp_2.1")), "simfp_2.3"), 4),
        "simfp_3": (up(x, "simfp_3.0"), 1),
        "simfp_4": (x, 0),
        "simfp_5": (F.max_pool2d(x, 2), 1),
    }
    out = {}
    for name, (x, i) in scaled.items():
        x = norm(F.conv2d(x, state[f"{name}.{i}.weight"]), f"{name}.{i}.norm")
        x = F.conv2d(x, state[f"{name}.{i + 1}.weight"], padding=1)
        out[f"p{name[-1]}"] = norm(x, f"{name}.{i + 1}.norm")
    return {**out, "p6": out["p5"][:, :, ::2, ::2]}


@pytest.mark.usefixtures("one_thread")
def test_pyramid_equals_the_formula():
    model = pyramid(out_channels=16).double()
    images = pictures(model.net, 2, (32, 48))
    found, state = model(images), model.state_dict()
    assert_close(found, plain_pyramid(state, model.net(images)[-1]))
    assert [(name, x.shape[2:]) for name, x in found.items()] == [
        ("p2", (32, 48)), ("p3", (16, 24)), ("p4", (8, 12)), ("p5", (4, 6)), ("p6", (2, 3)),
    ]  # fmt: skip
    used = {f"simfp_2.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")}
    used |= {"simfp_3.0.weight", "simfp_3.0.bias"}
    for level, first in ((2, 4), (3, 1), (4, 0), (5, 1)):
        names = ("weight", "norm.weight", "norm.bias")
        used |= {f"simfp_{level}.{i}.{name}" for i in (first, first + 1) for name in names}
    assert {name for name in state if not name.startswith("net.")} == used
    sum(x.sum() for x in found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pyramid_has_the_strides_of_the_paper():
    with torch.device("meta"):
        encoder = VisionTransformer(num_classes=0)
        found = SimpleFeaturePyramid(DenseEncoder(encoder))(torch.empty(1, 3, 1024, 1024))
    assert {name: list(x.shape) for name, x in found.items()} == {
        f"p{i}": [1, 256, 1024 // 2**i, 1024 // 2**i] for i in range(2, 7)
    }


def test_the_pyramid_is_a_backbone_for_torchvisions_detectors():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=64, num_classes=0, embed_dim=32, depth=2, num_heads=2)
    detector = FasterRCNN(
        SimpleFeaturePyramid(DenseEncoder(encoder, window=3, global_blocks=(1,)), out_channels=16),
        num_classes=3,
        min_size=64,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(tuple((4 * s,) for s in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], 7, 2),
        box_detections_per_img=5,
    )
    images = [torch.rand(3, 64, 90), torch.rand(3, 70, 50)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 45.0]])
    losses = detector(images, [{"boxes": boxes, "labels": torch.tensor([1])}] * 2)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    assert len(detector.eval()(images)) == 2
