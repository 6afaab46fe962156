"""Loss, predictions and gradients equal those of transformers' ViTMAE with the same weights, tables and noise."""

from functools import partial

import pytest
import torch
from support import assert_close, gradients, inputs, one_thread, perturb, run, run_loss, tiny  # noqa: F401
from torch import nn

from mae_fast.bench.contenders import transformers_mae
from mae_fast.models import build
from mae_fast.models.sizes import MAE_CONFIGS
from mae_fast.weights.layouts import rename_keys as under_names_of

TINY = {
    "RGB": {},
    "grey, one wide head": {"in_chans": 1, "embed_dim": 80, "num_heads": 1},
    "5 channels, patch 14": {"in_chans": 5, "img_size": 56, "patch_size": 14, "depth": 1},
    "deep decoder, narrow MLP": {"img_size": 40, "patch_size": 8, "decoder_depth": 3, "mlp_ratio": 2.0},
}


def check(model, images, noise, mask_ratio, limit=1e-12):
    theirs = transformers_mae(model, mask_ratio)
    output = theirs(images, noise=noise)
    output.loss.backward()
    ours = run(model, images, mask_ratio, noise)
    _, mask, ids_restore = model.forward_encoder(images, mask_ratio, noise)
    assert torch.equal(ids_restore, output.ids_restore)
    assert torch.equal(mask, output.mask)
    assert torch.equal(ours.pop("mask"), output.mask)

    def rename_keys(results):
        grads = {name.removeprefix("grad "): value for name, value in results.items() if name.startswith("grad ")}
        theirs_names, _ = under_names_of(grads, "transformers5")
        return {**{name: results[name] for name in ("loss", "pred") if name in results}, **theirs_names}

    grads = {name.removeprefix("grad "): value for name, value in gradients(theirs).items()}
    expected = {"loss": output.loss.detach(), "pred": output.logits.detach(), **grads}
    assert_close(rename_keys(ours), expected, limit)
    del expected["pred"]
    assert_close(rename_keys(run_loss(model, images, mask_ratio, noise)), expected, limit)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm_pix", [False, True], ids=["pixels", "norm_pix"])
@pytest.mark.parametrize("mask_ratio", [0.25, 0.75, 0.9])
@pytest.mark.parametrize("shape", TINY)
def test_small_models_equal_transformers(shape, mask_ratio, norm_pix, dtype):
    model = tiny(norm_pix_loss=norm_pix, **TINY[shape])
    model.decoder_pred.weight.data.mul_(0.25)  # predictions of about 1, so that 1e-6 is a few roundings in fp32
    model.to(dtype)
    check(model, *inputs(model, n=3), mask_ratio, limit=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAE_CONFIGS if "tiny" not in name])
def test_models_of_the_papers_widths_equal_transformers(name):
    torch.manual_seed(0)
    model = perturb(build(name, depth=2, decoder_depth=1, norm_pix_loss=True)).double()
    check(model, *inputs(model, n=1), 0.75)


def test_the_class_defaults_to_torchs_layer_norm_eps():
    model, factories = tiny(norm_layer=nn.LayerNorm).double(), tiny().double()
    images, noise = inputs(model)
    check(model, images, noise, 0.75)
    assert (model(images, 0.75, noise)[0] - factories(images, 0.75, noise)[0]).abs() > 1e-9


def test_patchify_equals_transformers():
    model = tiny(in_chans=5, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    images, _ = inputs(model)
    theirs = transformers_mae(model, 0.75)
    assert torch.equal(model.patchify(images), theirs.patchify(images))
    rows = model.patchify(images)
    assert torch.equal(model.unpatchify(rows), theirs.unpatchify(rows))
