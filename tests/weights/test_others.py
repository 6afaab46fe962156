"""Encoders of DINO and MoCo v3 load into our classifier. The files are synthetic, with the published names."""

from argparse import Namespace

import pytest
import torch
from interop_cases import encoder_of
from support import perturb, pictures, tiny

from mae_fast.errors import UserError
from mae_fast.weights import convert, detect
from mae_fast.weights.create import create_model
from mae_fast.weights.files import load_weights

SHAPE = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}


def encoder():
    return encoder_of(perturb(tiny()).state_dict())


def dino(weights):
    """A checkpoint of DINO with both networks. The student is wrapped in DDP."""
    head = {
        **{f"head.mlp.{i}.{kind}": torch.ones(2) for i in (0, 2, 4) for kind in ("weight", "bias")},
        "head.last_layer.weight_g": torch.ones(2, 1),
        "head.last_layer.weight_v": torch.ones(2, 2),
    }
    teacher = {**{f"backbone.{name}": x for name, x in weights.items()}, **head}
    student = {f"module.{name}": torch.zeros_like(x) for name, x in teacher.items()}
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 300,
        "args": Namespace(arch="vit_base"),
        "dino_loss": {"center": torch.zeros(1, 2)},
    }


def moco3(weights):
    """A checkpoint of MoCo v3, of a model wrapped in DDP."""
    projection = {f"head.{i}.weight": torch.ones(2, 2) for i in (0, 3, 6)}
    projection |= {f"head.{i}.{kind}": torch.ones(2) for i in (1, 4, 7) for kind in ("running_mean", "running_var")}
    state = {f"module.base_encoder.{name}": x for name, x in {**weights, **projection}.items()}
    state |= {f"module.momentum_encoder.{name}": torch.zeros_like(x) for name, x in {**weights, **projection}.items()}
    state |= {"module.predictor.0.weight": torch.ones(2, 2), "module.predictor.1.running_mean": torch.ones(2)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("file", [dino, moco3, dict], ids=["dino", "moco3", "encoder alone"])
def test_the_encoder_loads_into_our_classifier(tmp_path, file, pooling, caplog):
    weights = encoder()
    path = tmp_path / "checkpoint.pth"
    torch.save(file(weights), path)
    model = create_model("vit_base_patch16", path, **SHAPE, num_classes=5, global_pool=pooling == "mean")
    own = model.state_dict()
    assert {name for name, x in weights.items() if name not in own} == (
        {"norm.weight", "norm.bias"} if pooling == "mean" else set()
    )
    assert all(torch.equal(x, own[name]) for name, x in weights.items() if name in own)
    assert model(pictures(model)).shape == (3, 5)
    assert "the head starts at random" in caplog.text
    assert ("only in its pre-training" in caplog.text) == (file is not dict)


@pytest.mark.parametrize("file", [dino, moco3], ids=["dino", "moco3"])
def test_the_encoder_is_converted_without_changes(tmp_path, file):
    weights = encoder()
    torch.save(file(weights), tmp_path / "checkpoint.pth")
    found = load_weights(tmp_path / "checkpoint.pth")
    assert detect(found) == "ours"
    converted = convert(found, "ours", "timm")
    assert converted.weights.keys() == weights.keys()
    assert all(torch.equal(x, converted.weights[name]) for name, x in weights.items())


def test_missing_and_unknown_names_are_listed():
    theirs = dino(encoder())["teacher"]
    del theirs["backbone.blocks.1.attn.qkv.weight"]
    with pytest.raises(UserError, match=r"missing .*blocks.1.attn.qkv.weight"):
        convert(theirs, "ours", "timm")
    with pytest.raises(UserError, match=r"unknown.*backbone.registers"):
        convert({**dino(encoder())["teacher"], "backbone.registers": torch.ones(1)}, "ours", "timm")
