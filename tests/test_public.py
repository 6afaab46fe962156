"""Compatibility with the published package: names, sizes, checkpoints, and torch's tools on the model."""

import copy
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file, save_file
from support import assert_close, inputs, one_thread, run, run_loss, tie_free, tiny  # noqa: F401
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mae_fast as models_mae
from mae_fast.models import MaskedAutoencoderViT
from mae_fast.models.sizes import MAE_ALIASES, MAE_CONFIGS
from mae_fast.ops import patches

PAPER = {  # patch, width, depth, heads, parameters in millions
    "mae_vit_base_patch16": (16, 768, 12, 12, 111.908),
    "mae_vit_large_patch16": (16, 1024, 24, 16, 329.542),
    "mae_vit_huge_patch14": (14, 1280, 32, 16, 657.075),
}


def test_dir_lists_names_that_are_imported_on_first_use():
    listed = dir(models_mae)
    assert {"MaskedAutoencoderViT", "create_model", "pretrain", "load", "mae_vit_base_patch16"} <= {*listed}
    assert "TYPE_CHECKING" not in listed
    assert all(hasattr(models_mae, name) for name in listed)


@pytest.mark.parametrize("given", [{}, True])
def test_create_model_takes_a_path(given):
    with pytest.raises(TypeError, match=r"must be a path or a name, got (dict|bool); for a state dict, use load_state"):
        models_mae.create_model("mae_vit_tiny_patch4", given)


def published_state(patch, width, depth, decoder_width=512, decoder_depth=8):
    """The keys, in order, and shapes of a published checkpoint for 224 pixels."""
    tokens, e = (224 // patch) ** 2 + 1, decoder_width

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name, d):
        return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

    def blocks(name, count, d):
        out = {}
        for at in (f"{name}.{i}" for i in range(count)):
            out |= norm(f"{at}.norm1", d) | linear(f"{at}.attn.qkv", 3 * d, d) | linear(f"{at}.attn.proj", d, d)
            out |= norm(f"{at}.norm2", d) | linear(f"{at}.mlp.fc1", 4 * d, d) | linear(f"{at}.mlp.fc2", d, 4 * d)
        return out

    return (
        {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width)}
        | {"mask_token": (1, 1, e), "decoder_pos_embed": (1, tokens, e)}
        | {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
        | blocks("blocks", depth, width)
        | norm("norm", width)
        | linear("decoder_embed", e, width)
        | blocks("decoder_blocks", decoder_depth, e)
        | norm("decoder_norm", e)
        | linear("decoder_pred", patch * patch * 3, e)
    )


@pytest.mark.parametrize("name", PAPER)
def test_published_sizes(name):
    patch, width, depth, heads, millions = PAPER[name]
    with torch.device("meta"):
        model = models_mae.__dict__[name](norm_pix_loss=True)
    expected = published_state(patch, width, depth)
    assert [(key, tuple(t.shape)) for key, t in model.state_dict().items()] == list(expected.items())
    assert [key for key, _ in model.named_parameters()] == list(expected)  # optimizer states depend on this order
    assert {k for k, p in model.named_parameters() if not p.requires_grad} == {"pos_embed", "decoder_pos_embed"}
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.attn.num_heads for block in model.decoder_blocks} == {16}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert model.norm_pix_loss is True


def test_bare_class_is_large_with_the_default_layer_norm():
    with torch.device("meta"):
        model = MaskedAutoencoderViT()
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == published_state(16, 1024, 24)
    assert {block.attn.num_heads for block in [*model.blocks, *model.decoder_blocks]} == {16}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert model.norm_pix_loss is False
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} <= {"none"}


def test_names():
    for short, full in MAE_ALIASES.items():
        assert getattr(models_mae, short) is getattr(models_mae, full)
        assert full in MAE_CONFIGS
    assert {name for name in dir(models_mae) if name.startswith("mae_vit")} == {*MAE_ALIASES, *MAE_CONFIGS}
    assert models_mae.MaskedAutoencoderViT is MaskedAutoencoderViT
    assert (models_mae.patchify, models_mae.unpatchify) == (patches.patchify, patches.unpatchify)
    with pytest.raises(AttributeError, match="mae_vit_giant"):
        _ = models_mae.mae_vit_giant
    model = models_mae.mae_vit_tiny_patch4(depth=1, in_chans=1)
    assert (len(model.blocks), model.patch_embed.proj.weight.shape) == (1, (128, 1, 4, 4))


def test_import_is_cheap():
    code = "import sys, mae_fast; print(*{'torch', 'numpy', 'torchvision', 'timm', 'PIL'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (output.stdout.strip(), output.stderr) == ("", "")


def test_checkpoint_round_trip(tmp_path):
    model, other = tiny(norm_pix_loss=True), tiny(seed=1, norm_pix_loss=True)
    images, noise = inputs(model)
    expected = run(model, images, noise=noise)
    assert not torch.equal(run(other, images, noise=noise)["loss"], expected["loss"])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert str(other.load_state_dict(load_file(tmp_path / "model.safetensors"))) == "<All keys matched successfully>"
    assert_close(run(other, images, noise=noise), expected, 0)


def test_deepcopy_is_independent():
    model = tiny()
    images, noise = inputs(model)
    expected = run(model, images, noise=noise)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(run(other, images, noise=noise), expected, 0)


@pytest.mark.parametrize("images", [(2, 3, 24, 24), (2, 24, 24, 3)], ids=["float", "uint8"])
@pytest.mark.parametrize("device", ["meta", "fake cpu", "fake cuda"])
def test_shapes_without_data(device, images):
    mode = FakeTensorMode() if "fake" in device else nullcontext()
    with mode, torch.device(device.removeprefix("fake ")):
        model = tiny()
        pixels = torch.empty(images, dtype=torch.float32 if images[1] == 3 else torch.uint8)
        loss, pred, mask = model(pixels)
        latent, *_ = model.forward_encoder(pixels, 0.75)
        total = loss + model.loss(pixels)
        if "cuda" not in device:  # the backward engine needs a real GPU
            total.backward()
            assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
    assert [tuple(t.shape) for t in (loss, pred, mask, latent)] == [(), (2, 36, 48), (2, 36), (2, 10, 32)]
    assert {t.device.type for t in (loss, pred, mask, latent)} == {device.removeprefix("fake ")}


def test_functional_call():
    model, other = tiny(), tiny(seed=1)
    images, noise = inputs(model)
    expected = run_loss(model, images, noise=noise)
    weights = {name: p.detach().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    loss, *_ = torch.func.functional_call(other, weights, (images, 0.75, noise))
    loss.backward()
    grads = {f"grad {name}": p.grad for name, p in weights.items() if p.requires_grad}
    assert_close({"loss": loss.detach(), **grads}, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["loss", "forward"])
def test_compile(entry):
    model = tiny(depth=1)
    images, noise = inputs(model)
    expected = run(model, images, noise=noise)
    compiled = torch.compile(getattr(model, entry), fullgraph=True)
    model.zero_grad()
    result = compiled(images, 0.75, noise)
    loss = result if entry == "loss" else result[0]
    loss.backward()
    got = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_close({"loss": loss.detach(), **got}, {n: v for n, v in expected.items() if n not in ("pred", "mask")}, 1e-6)


@pytest.mark.slow
def test_compiled_once_for_all_batch_sizes():
    model = tiny(depth=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=True, backend=counter)
    for n in (2, 3, 5, 8, 13):
        images, noise = inputs(model, n)
        torch.testing.assert_close(compiled(images, 0.75, noise), model.loss(images, 0.75, noise), rtol=1e-6, atol=0)
    assert counter.frame_count <= 2
