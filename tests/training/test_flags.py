"""What flags of a run do inside of it, seen from a model's loss and the run's log."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import one_thread  # noqa: F401

from mae_fast.errors import UserError
from mae_fast.models import vit
from mae_fast.models.mae import MaskedAutoencoderViT
from mae_fast.models.targets.dvae import DVAE
from mae_fast.training import config as configs
from mae_fast.training.tasks.classify import finetune
from mae_fast.training.tasks.dvae import train_dvae
from mae_fast.training.tasks.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "input_size": 32, "num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "log_every": 1,
    "warmup_epochs": 0,
}  # fmt: skip


def pretraining(images, run, **changes):
    """Five steps of eight images an epoch."""
    values = {**configs.PRESETS["tiny"], **SMALL, "batch_size": 8, "data_path": images, "output_dir": run, **changes}
    return configs.PretrainConfig(**values)


def log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("images_per_s", "waiting")} for line in lines]


def newest(run):
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def spy(monkeypatch, model, note):
    """``note(*arguments)`` of each call of the model's loss."""
    loss = model.loss

    def noted(self, *arguments):
        note(*arguments)
        return loss(self, *arguments)

    monkeypatch.setattr(model, "loss", noted)


def test_micro_batches_are_numbered_through_the_run(images, tmp_path, monkeypatch):
    """Both micro-batches of a step have its temperature, each has draws of its own, and a resumed run has the same."""
    calls = []
    spy(monkeypatch, DVAE, lambda pixels, temperature, kl: calls.append((float(temperature), torch.initial_seed())))
    config = configs.DvaeConfig(
        **{
            **configs.DVAE_PRESETS["tiny"], **SMALL, "data_path": images, "output_dir": tmp_path, "batch_size": 4,
            "accum_iter": 2, "epochs": 2, "save_every": 3, "hidden": 8, "vocab_size": 16, "temperature_start": 1.0,
            "temperature_end": 0.2, "anneal_epochs": 2,
        }
    )  # fmt: skip
    train_dvae(config)
    of_steps = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert [temperature for temperature, _ in calls] == pytest.approx([x for x in of_steps for _ in range(2)])
    assert len({seed for _, seed in calls}) == 20
    whole, kept = calls.copy(), load_file(newest(tmp_path) / "model.safetensors")
    shutil.rmtree(newest(tmp_path))
    calls.clear()
    train_dvae(config)
    assert calls == whole[2 * 9 :]
    found = load_file(newest(tmp_path) / "model.safetensors")
    assert all(torch.equal(found[name], x) for name, x in kept.items())


def test_a_run_with_accumulation_resumes_at_the_batch_where_it_stopped(images, tmp_path, monkeypatch):
    seen = []
    spy(monkeypatch, MaskedAutoencoderViT, lambda images, ratio, noise: seen.append((images.clone(), noise.clone())))
    config = pretraining(images, tmp_path, batch_size=4, accum_iter=2, epochs=2, save_every=4)
    pretrain(config)
    whole, lines, weights = seen.copy(), log(tmp_path), load_file(newest(tmp_path) / "model.safetensors")
    assert len(whole) == 2 * 10
    shutil.rmtree(newest(tmp_path))
    seen.clear()
    pretrain(config)
    assert len(seen) == 2 * 2  # from step 8, in the middle of an epoch
    for ours, theirs in zip(seen, whole[2 * 8 :], strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert log(tmp_path) == lines
    found = load_file(newest(tmp_path) / "model.safetensors")
    assert all(torch.equal(found[name], x) for name, x in weights.items())


def test_lines_of_the_log_name_step_and_epoch_from_0(images, tmp_path):
    pretrain(pretraining(images, tmp_path, epochs=3, log_every=2))
    assert [(line["step"], line["epoch"]) for line in log(tmp_path)] == [
        (2, 0), (4, 0), (6, 1), (8, 1), (10, 1), (12, 2), (14, 2), (15, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "enabled"), [("bf16", True), ("fp32", False)])
def test_the_loss_is_computed_in_the_dtype_of_the_flag(images, labelled_images, tmp_path, monkeypatch, dtype, enabled):
    seen = []

    def note(*_):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    spy(monkeypatch, MaskedAutoencoderViT, note)
    pretrain(pretraining(images, tmp_path / "mae", epochs=1, dtype=dtype))
    assert len(seen) == 5
    forward = vit.VisionTransformer.forward

    def noted(self, x):
        note()
        return forward(self, x)

    monkeypatch.setattr(vit.VisionTransformer, "forward", noted)
    values = {**configs.FINETUNE_PRESETS["tiny"], **SMALL, "batch_size": 24, "epochs": 1, "dtype": dtype}
    finetune(configs.FinetuneConfig(**values, data_path=labelled_images, output_dir=tmp_path / "vit"))
    assert len(seen) == 5 + 3 + 1  # three steps, one batch of the evaluation
    assert set(seen) == {(enabled, torch.bfloat16)}


def poison(monkeypatch, bad):
    """Losses of the steps in ``bad`` are not finite. Counts all calls."""
    loss, calls = MaskedAutoencoderViT.loss, []

    def poisoned(self, *arguments):
        calls.append(1)
        value = loss(self, *arguments)
        return value * float("nan") if len(calls) in bad else value

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", poisoned)
    return calls


def roll_backs(run):
    return json.loads((newest(run) / "state.json").read_text())["guard"]["roll_backs"]


def test_bad_steps_between_good_ones_are_left_out_and_nothing_is_rolled_back(images, tmp_path, monkeypatch):
    bad = {3, 5, 7, 9, 11, 13, 15, 17}
    calls = poison(monkeypatch, bad)
    pretrain(pretraining(images, tmp_path, epochs=4, save_every=1))
    assert len(calls) == 20
    assert roll_backs(tmp_path) == 0
    assert {line["step"] for line in log(tmp_path) if line["train_loss"] is None} == bad
    assert log(tmp_path)[-1]["not_finite"] == len(bad)


def test_the_fifth_bad_step_in_a_row_rolls_back(images, tmp_path, monkeypatch, capsys, caplog):
    poison(monkeypatch, {4, 5, 6, 7, 9, 10, 11, 12, 13})  # four, a good one, five
    pretrain(pretraining(images, tmp_path, epochs=4, save_every=1))
    assert roll_backs(tmp_path) == 1
    told = capsys.readouterr()
    assert "step 7\n" in told.out + told.err + caplog.text  # the newest one with finite gradients after it


# For each flag values at its limits, and values just outside.
LIMITS = {
    "input_size": ([1], [0]),
    "batch_size": ([1], [0]),
    "accum_iter": ([1], [0]),
    "epochs": ([1], [0]),
    "warmup_epochs": ([0, 0.5], [-0.1, 1]),  # of one epoch
    "blr": ([1e-12], [0]),
    "lr": ([1e-12], [0]),
    "min_lr": ([0], [-1e-12]),
    "weight_decay": ([0], [-1e-12]),
    "clip_grad": ([1e-12], [0]),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "num_workers": ([0], [-1]),
    "max_bad_fraction": ([0, 1], [-0.01, 1.01]),
    "log_every": ([1], [0]),
    "save_every": ([1], [0]),
    "ema_decay": ([0.001, 0.9999], [0, 1]),
}
OF_VERBS = {
    "PretrainConfig": {
        "mask_ratio": ([0.01, 0.99], [0, 1]),
        "decoder_depth": ([0], [-1]),
        "decoder_embed_dim": ([1], [0]),
        "decoder_num_heads": ([1], [0]),
        "pca_components": ([1], [0]),
    },
    "FinetuneConfig": {
        "eval_every": ([1], [0]),
        "layer_decay": ([0.01, 1], [0, 1.01]),
        "beta2": ([0, 0.999], [-0.1, 1]),
        "drop_path": ([0, 0.99], [-0.1, 1]),
        "reprob": ([0, 1], [-0.1, 1.1]),
        "smoothing": ([0, 0.99], [-0.1, 1]),
        "mixup": ([0], [-0.1]),
        "cutmix": ([0], [-0.1]),
    },
    "LinprobeConfig": {},
    "SegmentConfig": {
        "layer_decay": ([0.01, 1], [0, 1.01]),
        "drop_path": ([0, 0.99], [-0.1, 1]),
        "eval_every": ([1], [0]),
        "head_channels": ([1], [0]),
    },
    "DetectConfig": {
        "min_lr": ([0], [-1e-12, 1e-12]),
        "layer_decay": ([0.01, 1], [0, 1.01]),
        "window": ([0], [-1]),
        "scale": ([(0.5, 0.5), (0.01, 9)], [(0, 1), (0.5, 0.4)]),
    },
    "DvaeConfig": {
        "vocab_size": ([2], [1]),
        "hidden": ([4, 8], [0, 6]),
        "groups": ([1], [0]),
        "kl_weight": ([0], [-0.1]),
        "temperature_start": ([0.01], [0]),
        "temperature_end": ([0.01], [0]),
        "anneal_epochs": ([0], [-0.1]),
    },
}
CASES = [(kind, name, *limits) for kind, own in OF_VERBS.items() for name, limits in {**LIMITS, **own}.items()]


@pytest.mark.parametrize(("kind", "name", "inside", "outside"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_flag_takes_its_limits_and_nothing_beyond(kind, name, inside, outside):
    small = {"data_path": "data", "output_dir": "run", "epochs": 1, "warmup_epochs": 0}
    for value in inside:
        assert getattr(getattr(configs, kind)(**{**small, name: value}), name) == value
    for value in outside:
        with pytest.raises(UserError, match=name):
            getattr(configs, kind)(**{**small, name: value})
