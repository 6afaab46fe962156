"""Small models of every kind for weight conversion, and the parameter names of the layouts."""

import torch
from support import tiny, tiny_vit
from torch import nn

from mae_fast.weights import LAYOUTS


def encoder_of(weights):
    """The encoder of a masked autoencoder, with the names of the published files."""
    return {name: x for name, x in weights.items() if not name.startswith(("decoder_", "mask_token"))}


def linear_probe():
    """A classifier with the head of the published linear probe: batch norm without weights, then a linear layer."""
    model = tiny_vit()
    model.head = nn.Sequential(nn.BatchNorm1d(32, affine=False, eps=1e-6), model.head)
    with torch.no_grad():
        model.head[0].running_mean.normal_()
        model.head[0].running_var.uniform_(0.5, 2)
        model.head[0].num_batches_tracked.fill_(7)
    return model.eval()


KINDS = {
    "full": lambda: tiny().state_dict(),
    "encoder": lambda: encoder_of(tiny().state_dict()),
    "class token": lambda: tiny_vit().state_dict(),
    "mean": lambda: tiny_vit(global_pool=True).state_dict(),
    "no qkv bias": lambda: tiny_vit(qkv_bias=False).state_dict(),
    "linear probe": lambda: linear_probe().state_dict(),
}


def holds(layout, kind):
    """Whether a layout has names for all weights of a kind of model."""
    if kind == "full":
        return layout != "timm"
    if kind == "mean":
        return not layout.startswith("transformers")
    return kind != "linear probe" or layout in ("ours", "mmpretrain")


PLACES = [(layout, kind) for layout in LAYOUTS for kind in KINDS if holds(layout, kind)]


def assert_same(found, expected):
    """The names are equal, and the tensors are bitwise equal."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        one, other = (x.contiguous().flatten().view(torch.uint8) for x in (found[name], tensor))
        assert torch.equal(one, other), name
