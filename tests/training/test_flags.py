"""The effects of flags on a run, observed in the calls of the model's loss and in the log."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import one_thread  # noqa: F401

from mae_fast.errors import UserError
from mae_fast.models import vit
from mae_fast.models.blocks import Attention
from mae_fast.models.mae import MaskedAutoencoderViT
from mae_fast.models.targets.dvae import DVAE
from mae_fast.training import config as configs
from mae_fast.training.task import evaluation_config
from mae_fast.training.tasks.classify import finetune
from mae_fast.training.tasks.dvae import train_dvae
from mae_fast.training.tasks.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "input_size": 32, "num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "log_every": 1,
    "warmup_epochs": 0,
}  # fmt: skip


def pretraining(images, run, **changes):
    """Epochs of five steps of eight images."""
    values = {**configs.PRESETS["tiny"], **SMALL, "batch_size": 8, "data_path": images, "output_dir": run, **changes}
    return configs.PretrainConfig(**values)


def log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("images_per_s", "waiting")} for line in lines]


def newest(run):
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def spy(monkeypatch, model, note):
    """Call ``note(*arguments)`` in each call of the model's loss."""
    loss = model.loss

    def noted(self, *arguments):
        note(*arguments)
        return loss(self, *arguments)

    monkeypatch.setattr(model, "loss", noted)


def test_micro_batches_are_numbered_through_the_run(images, tmp_path, monkeypatch):
    """Micro-batches of a step share its temperature but have different random numbers. A resumed run has the same."""
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
    """Make the losses of the steps in ``bad`` non-finite. Counts all calls."""
    loss, calls = MaskedAutoencoderViT.loss, []

    def poisoned(self, *arguments):
        calls.append(1)
        value = loss(self, *arguments)
        return value * float("nan") if len(calls) in bad else value

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", poisoned)
    return calls


def roll_backs(run):
    return json.loads((newest(run) / "state.json").read_text())["guard"]["roll_backs"]


def test_bad_steps_between_good_ones_are_skipped_without_a_rollback(images, tmp_path, monkeypatch):
    bad = {3, 5, 7, 9, 11, 13, 15, 17}
    calls = poison(monkeypatch, bad)
    pretrain(pretraining(images, tmp_path, epochs=4, save_every=1))
    assert len(calls) == 20
    assert roll_backs(tmp_path) == 0
    assert {line["step"] for line in log(tmp_path) if line["train_loss"] is None} == bad
    assert log(tmp_path)[-1]["not_finite"] == len(bad)


def test_the_fifth_bad_step_in_a_row_rolls_back(images, tmp_path, monkeypatch, capsys, caplog):
    poison(monkeypatch, {4, 5, 6, 7, 9, 10, 11, 12, 13})  # four bad steps, a good one, five bad steps
    pretrain(pretraining(images, tmp_path, epochs=4, save_every=1))
    assert roll_backs(tmp_path) == 1
    told = capsys.readouterr()
    assert "step 7\n" in told.out + told.err + caplog.text  # the newest checkpoint with finite next gradients


# flag -> valid values at its limits, and invalid values just outside
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
    "keep": ([1], [0]),
    "keep_every": ([1], [0]),
    "ema_decay": ([0.001, 0.9999], [0, 1]),
}
OF_VERBS = {
    "PretrainConfig": {
        "mask_ratio": ([0.01, 0.99], [0, 1]),
        "decoder_depth": ([0], [-1]),
        "decoder_embed_dim": ([1], [0]),
        "decoder_num_heads": ([1], [0]),
        "pca_components": ([1], [0]),
        "eval_every": ([1], [0]),
    },
    "FinetuneConfig": {
        "eval_every": ([1], [0]),
        "layer_decay": ([0.01, 1], [0, 1.01]),
        "beta2": ([0, 0.999], [-0.1, 1]),
        "drop_path": ([0, 0.99], [-0.1, 1]),
        "reprob": ([0, 1], [-0.1, 1.1]),
        "smoothing": ([0, 0.99], [-0.1, 1]),
        "scale": ([(0.5, 0.5), (0.01, 1)], [(0, 1), (0.5, 0.4), (0.5, 1.1)]),
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
def test_flags_accept_their_limits_and_nothing_beyond(kind, name, inside, outside):
    small = {"data_path": "data", "output_dir": "run", "epochs": 1, "warmup_epochs": 0}
    for value in inside:
        assert getattr(getattr(configs, kind)(**{**small, name: value}), name) == value
    for value in outside:
        with pytest.raises(UserError, match=name.replace("_", "[-_]")):
            getattr(configs, kind)(**{**small, name: value})


PATHS = {"data_path": "data", "output_dir": "run"}


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("PretrainConfig", {"blr": 1e-2}, {"lr": None, "blr": 1e-2}),
        ("PretrainConfig", {"lr": 1e-2}, {"lr": 1e-2}),
        ("FinetuneConfig", {"blr": 1e-2}, {"lr": None}),
        ("LinprobeConfig", {"lr": 1.0}, {"lr": 1.0}),
        ("PretrainConfig", {"epochs": 7, "input_size": 64}, {"epochs": 7, "input_size": 64, "lr": 1.5e-3}),
    ],
)
def test_a_given_flag_overrides_the_preset(kind, flags, expected):
    config = getattr(configs, kind).with_preset("tiny", **PATHS, **flags)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_given_target_overrides_norm_pix_loss_of_a_preset():
    config = configs.PretrainConfig.with_preset("base", **PATHS, target="pca")
    assert (config.target, config.norm_pix_loss) == ("pca", False)
    assert configs.PretrainConfig.with_preset("base", **PATHS, target="pixel").norm_pix_loss


# Flags without effect: the class, the flags, and the flag that the error names.
CONTRADICTIONS = [
    ("PretrainConfig", {"lr": 1e-3, "blr": 1e-3}, "--blr"),
    ("DvaeConfig", {"lr": 1e-3, "blr": 1e-3}, "--blr"),
    ("PretrainConfig", {"masks": "m.npy", "mask_ratio": 0.75}, "--mask-ratio"),
    ("PretrainConfig", {"masks": "m.npy", "mask_sampling": "random"}, "--mask-sampling"),
    ("PretrainConfig", {"pca_components": 5}, "--pca-components"),
    ("PretrainConfig", {"decoder_depth": 0, "encoder_mask_token": True, "decoder_num_heads": 2}, "--decoder-num-heads"),
    ("FinetuneConfig", {"eval_only": True, "dry_run": True}, "--dry-run"),
    ("FinetuneConfig", {"model": "timm/vit_tiny_patch16_224", "global_pool": False}, "--global-pool"),
    ("LinprobeConfig", {"model": "timm/vit_tiny_patch16_224", "attention": "sdpa"}, "--attention"),
    ("DvaeConfig", {"attention": "auto"}, "--attention"),
    ("FinetuneConfig", {"train_blocks": 1, "cache_features": True, "aa": "rand-m9"}, "--aa"),
    ("FinetuneConfig", {"train_blocks": 1, "cache_features": True, "mixup": 0.8}, "--mixup"),
    ("FinetuneConfig", {"train_blocks": 1, "cache_features": True, "cutmix": 1.0}, "--cutmix"),
    ("FinetuneConfig", {"train_blocks": 1, "cache_features": True, "smoothing": 0.1}, "--smoothing"),
    ("FinetuneConfig", {"train_blocks": 1, "cache_features": True, "reprob": 0.1}, "--reprob"),
    ("FinetuneConfig", {"train_blocks": 1, "cache_features": True, "scale": (0.2, 1)}, "--scale"),
    ("FinetuneConfig", {"train_blocks": 0.5, "drop_path": 0.1}, "--drop-path"),
    ("FinetuneConfig", {"train_blocks": 0, "grad_checkpointing": True}, "--grad-checkpointing"),
    ("FinetuneConfig", {"train_blocks": 0, "layer_decay": 0.7}, "--layer-decay"),
    ("LinprobeConfig", {"grad_checkpointing": True}, "--grad-checkpointing"),
    ("SegmentConfig", {"freeze_encoder": True, "drop_path": 0.1}, "--drop-path"),
    ("DetectConfig", {"freeze_encoder": True, "layer_decay": 0.7}, "--layer-decay"),
    ("DetectConfig", {"freeze_encoder": True, "grad_checkpointing": True}, "--grad-checkpointing"),
]


@pytest.mark.parametrize(("kind", "flags", "named"), CONTRADICTIONS)
def test_a_flag_without_effect_beside_the_others_is_refused(kind, flags, named):
    with pytest.raises(UserError, match=f"{named} .* has no effect") as caught:
        getattr(configs, kind).with_preset(None, **PATHS, **flags)
    assert caught.value.hint == "leave one of them out"


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("FinetuneConfig", {"train_blocks": 1, "cache_features": True}),  # the preset's drop path, the default mixing
        ("FinetuneConfig", {"train_blocks": 1, "cache_features": True, "mixup": 0.0, "cutmix": 0.0, "aa": None}),
        ("SegmentConfig", {"freeze_encoder": True, "drop_path": 0.0, "layer_decay": 1.0}),
        ("LinprobeConfig", {"grad_checkpointing": False}),
    ],
)
def test_defaults_and_flags_that_are_off_contradict_nothing(kind, flags):
    for preset in (None, "tiny", "base"):
        getattr(configs, kind).with_preset(preset, **PATHS, **flags)


def test_the_command_line_knows_which_flags_are_given():
    from mae_fast.cli.flags import parse

    words = ["--data_path", "data", "--output-dir=run", "--preset", "tiny"]
    config = parse("pretrain", [*words, "--blr", "0.01", "--no-exif"])
    assert (config.lr, config.blr) == (None, 0.01)
    assert [name for name in ("exif", "blr", "lr", "epochs", "data_path") if config.was_given(name)] == [
        "exif", "blr", "data_path",
    ]  # fmt: skip
    flags = {"data_path": "data", "output_dir": "run", "blr": 0.01, "exif": False}
    assert config == configs.PretrainConfig.with_preset("tiny", **flags)
    with pytest.raises(UserError, match=r"--blr 0.01 has no effect with --lr 0.1"):
        parse("pretrain", [*words, "--blr", "0.01", "--lr=0.1"])
    assert config.changed(epochs=9).was_given("epochs")
    assert not config.changed(epochs=9).was_given("input_size")


def test_none_in_any_case_leaves_an_optional_flag_unset():
    from mae_fast.cli.flags import parse

    words = ["--data_path", "data", "--output-dir=run"]
    config = parse("finetune", [*words, "--aa", "none", "--weights=NONE", "--lr", "None", "--ema_decay", "none"])
    assert (config.aa, config.weights, config.lr, config.ema_decay) == (None, None, None, None)
    config = parse("pretrain", [*words, "--augmentation", "none", "--init", "none", "--preset", "tiny", "--lr", "none"])
    assert (config.augmentation, config.init, config.lr) == ("none", None, None)


def test_the_exif_setting_follows_the_weights(images, labelled_images, tmp_path, caplog):
    """A run from the weights of another run has its EXIF setting, unless a flag changes it."""
    pretrain(pretraining(images, tmp_path / "turned", epochs=1, exif=True))
    pretrain(pretraining(images, tmp_path / "plain", epochs=1))
    flags = {**SMALL, "batch_size": 24, "epochs": 1, "data_path": labelled_images}

    def recorded(name, **changes):
        config = configs.FinetuneConfig.with_preset("tiny", **{**flags, **changes}, output_dir=tmp_path / name)
        finetune(config)
        return json.loads((tmp_path / name / "config.json").read_text())["exif"]

    assert not recorded("from-plain", weights=str(tmp_path / "plain"))
    assert "EXIF" not in caplog.text
    assert recorded("from-turned", weights=str(tmp_path / "turned"))
    assert "images are rotated by their EXIF orientation, as in" in caplog.text
    assert not recorded("told", weights=str(tmp_path / "turned"), exif=False)
    # A resumed run keeps its own setting, whatever that of its initial weights, and is evaluated with it.
    (tmp_path / "turned" / "config.json").unlink()
    assert recorded("from-turned", weights=str(tmp_path / "turned"))
    config = configs.FinetuneConfig.with_preset("tiny", **flags, output_dir=tmp_path / "from-turned", eval_only=True)
    assert evaluation_config(config, tmp_path / "from-turned", config.model, 32).exif


def test_pictures_of_a_run_are_rotated_and_skip_bad_images(images, tmp_path):
    """``--log-dir`` draws training images if there are no held-out images."""
    from mae_fast.data.loader import centred_image, sample_images
    from mae_fast.data.pixel_format import PixelFormat
    from mae_fast.data.sources import open_source

    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    pixels = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(folder / "1.jpg", exif=exif)
    (folder / "2.jpg").write_bytes(b"no image")
    source = open_source(tmp_path, "val")
    places, turned = sample_images(source, 8, (32, 32), PixelFormat(exif=True))
    assert (places, len(turned)) == ([0], 1)
    assert torch.equal(turned[0], centred_image(source, 0, (32, 32), PixelFormat(exif=True)))
    assert not torch.equal(turned[0], centred_image(source, 0, (32, 32)))
    (folder / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"2\.jpg"):
        sample_images(open_source(tmp_path, "val"), 8, (32, 32))


def test_the_backend_of_attention_is_used_by_every_block(images, tmp_path, monkeypatch):
    backends = []

    def noted(self, *arguments):
        backends.extend(module.backend for module in self.modules() if isinstance(module, Attention))
        return loss(self, *arguments)

    loss = MaskedAutoencoderViT.loss
    monkeypatch.setattr(MaskedAutoencoderViT, "loss", noted)
    pretrain(pretraining(images, tmp_path, attention="sdpa", epochs=1, dry_run=True))
    assert len(backends) == 4 + 2  # blocks of encoder and decoder, of one step
    assert {*backends} == {"sdpa"}


@pytest.mark.parametrize("backend", ["triton", "xformers"])
def test_a_backend_for_gpus_is_refused_on_a_cpu(images, tmp_path, backend):
    with pytest.raises(UserError, match=f"--attention {backend} needs a GPU"):
        pretrain(pretraining(images, tmp_path, attention=backend))
