"""The published recipes: each preset, and the optimizer and learning rates that training builds from it.

The tables are written by hand from

- He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, appendix A: pre-training, fine-tuning, linear
  probing, training from scratch, ADE20K; and the commands published with its code, whose
  fine-tuning rates are those for normalized pixels;
- Bao et al., BEiT, ICLR 2022: the rates of UPerNet on ADE20K, which the paper above refers to;
- Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022: COCO;
- Ramesh et al., Zero-Shot Text-to-Image Generation, ICML 2021: the dVAE.

The batches of the papers are for many GPUs; ``batch_size`` is that of one GPU. The "tiny" recipes are for the demos.
"""

import gc
import math

import pytest
from coco_files import write_scenes
from PIL import Image
from support import one_thread  # noqa: F401
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mae_fast.models.sizes import VIT_CONFIGS
from mae_fast.training import config as configs
from mae_fast.training.tasks.classify import finetune, linprobe
from mae_fast.training.tasks.detect import detect
from mae_fast.training.tasks.dvae import train_dvae
from mae_fast.training.tasks.pretrain import pretrain
from mae_fast.training.tasks.segment import segment

VERBS = {
    "pretrain": (configs.PretrainConfig, configs.PRESETS, pretrain),
    "finetune": (configs.FinetuneConfig, configs.FINETUNE_PRESETS, finetune),
    "linprobe": (configs.LinprobeConfig, configs.LINPROBE_PRESETS, linprobe),
    "segment": (configs.SegmentConfig, configs.SEGMENT_PRESETS, segment),
    "detect": (configs.DetectConfig, configs.DETECT_PRESETS, detect),
    "train-dvae": (configs.DvaeConfig, configs.DVAE_PRESETS, train_dvae),
}
NO_PRESET = ""

ALL = {"lr": None, "accum_iter": 1, "clip_grad": None}
NO_EMA = {"ema_decay": None}
PRETRAIN = {
    **ALL, **NO_EMA, "input_size": 224, "batch_size": 64, "epochs": 800, "warmup_epochs": 40, "blr": 1.5e-4,
    "min_lr": 0, "weight_decay": 0.05, "mask_ratio": 0.75, "mask_sampling": "random", "augmentation": "crop",
    "target": "pixel", "encoder_mask_token": False, "decoder_depth": None, "decoder_embed_dim": None,
    "decoder_num_heads": None, "pca_components": 96,
}  # fmt: skip
AUGMENTED = {
    "scale": (0.08, 1.0),
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
}
FINETUNE = {
    **ALL, **NO_EMA, **AUGMENTED, "input_size": 224, "batch_size": 32, "warmup_epochs": 5, "min_lr": 1e-6,
    "weight_decay": 0.05, "beta2": 0.999, "global_pool": True, "train_blocks": "all",
}  # fmt: skip
FINETUNED = {
    NO_PRESET: {"model": "vit_base_patch16", "blr": 5e-4, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.1},
    "base": {"model": "vit_base_patch16", "blr": 5e-4, "epochs": 100, "layer_decay": 0.65, "drop_path": 0.1},
    "large": {"model": "vit_large_patch16", "blr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.2},
    "huge": {"model": "vit_huge_patch14", "blr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.3},
    "small": {"model": "vit_small_patch16", "blr": 5e-4, "epochs": 100, "layer_decay": 0.65, "drop_path": 0.05},
    "tiny16": {"model": "vit_tiny_patch16", "blr": 5e-4, "epochs": 100, "layer_decay": 0.65, "drop_path": 0},
    "tiny": {
        "model": "vit_tiny_patch4", "blr": 5e-4, "lr": 1e-3, "epochs": 15, "warmup_epochs": 1, "layer_decay": 0.75,
        "drop_path": 0, "input_size": 32, "aa": None, "mixup": 0, "cutmix": 0,
    },
}  # fmt: skip
SCRATCH = {
    **ALL, **AUGMENTED, "input_size": 224, "batch_size": 32, "warmup_epochs": 20, "blr": 1e-4, "min_lr": 1e-6,
    "weight_decay": 0.3, "beta2": 0.95, "layer_decay": 1, "ema_decay": 0.9999, "global_pool": True,
    "train_blocks": "all",
}  # fmt: skip
LINPROBE = {
    **ALL, **NO_EMA, "input_size": 224, "batch_size": 512, "warmup_epochs": 10, "blr": 0.1, "min_lr": 0,
    "weight_decay": 0, "global_pool": False,
}  # fmt: skip
SEGMENT = {
    **ALL, **NO_EMA, "input_size": 512, "batch_size": 16, "epochs": 100, "warmup_epochs": 1, "blr": 1.6e-3, "min_lr": 0,
    "weight_decay": 0.05, "head_channels": 512, "freeze_encoder": False,
}  # fmt: skip
DETECT = {
    **ALL, **NO_EMA, "input_size": 1024, "batch_size": 64, "epochs": 100, "warmup_epochs": 0.14, "blr": 4e-4,
    "min_lr": 0, "weight_decay": 0.1, "window": 14, "scale": (0.1, 2.0), "masks": True, "freeze_encoder": False,
}  # fmt: skip
DVAE = {
    **ALL, **NO_EMA, "input_size": 112, "batch_size": 64, "epochs": 50, "warmup_epochs": 1, "blr": 5e-5, "min_lr": 0,
    "weight_decay": 1e-4, "vocab_size": 8192, "hidden": 256, "groups": 4, "kl_weight": 6.6, "temperature_start": 1,
    "temperature_end": 1 / 16, "anneal_epochs": 10,
}  # fmt: skip

RECIPES = {
    ("pretrain", NO_PRESET): {**PRETRAIN, "model": "mae_vit_large_patch16", "norm_pix_loss": False},
    ("pretrain", "base"): {**PRETRAIN, "model": "mae_vit_base_patch16", "norm_pix_loss": True},
    ("pretrain", "large"): {**PRETRAIN, "model": "mae_vit_large_patch16", "norm_pix_loss": True},
    ("pretrain", "huge"): {**PRETRAIN, "model": "mae_vit_huge_patch14", "norm_pix_loss": True},
    ("pretrain", "small"): {**PRETRAIN, "model": "mae_vit_small_patch16", "norm_pix_loss": True},
    ("pretrain", "tiny16"): {**PRETRAIN, "model": "mae_vit_tiny_patch16", "norm_pix_loss": True},
    ("pretrain", "tiny"): {
        **PRETRAIN, "model": "mae_vit_tiny_patch4", "norm_pix_loss": False, "input_size": 32, "batch_size": 32,
        "epochs": 15, "warmup_epochs": 1, "lr": 1.5e-3,
    },
    **{("finetune", preset): {**FINETUNE, **values} for preset, values in FINETUNED.items()},
    ("finetune", "scratch-base"): {**SCRATCH, "model": "vit_base_patch16", "epochs": 300, "drop_path": 0.1},
    ("finetune", "scratch-large"): {**SCRATCH, "model": "vit_large_patch16", "epochs": 200, "drop_path": 0.2},
    ("finetune", "scratch-huge"): {**SCRATCH, "model": "vit_huge_patch14", "epochs": 200, "drop_path": 0.2},
    ("linprobe", NO_PRESET): {**LINPROBE, "model": "vit_base_patch16", "epochs": 90},
    ("linprobe", "base"): {**LINPROBE, "model": "vit_base_patch16", "epochs": 90},
    ("linprobe", "large"): {**LINPROBE, "model": "vit_large_patch16", "epochs": 50},
    ("linprobe", "huge"): {**LINPROBE, "model": "vit_huge_patch14", "epochs": 50},
    ("linprobe", "small"): {**LINPROBE, "model": "vit_small_patch16", "epochs": 90},
    ("linprobe", "tiny16"): {**LINPROBE, "model": "vit_tiny_patch16", "epochs": 90},
    ("linprobe", "tiny"): {
        **LINPROBE, "model": "vit_tiny_patch4", "input_size": 32, "batch_size": 256, "epochs": 60, "warmup_epochs": 6,
        "blr": 30,
    },
    ("segment", NO_PRESET): {**SEGMENT, "model": "vit_base_patch16", "layer_decay": 0.65, "drop_path": 0.1},
    ("segment", "base"): {**SEGMENT, "model": "vit_base_patch16", "layer_decay": 0.65, "drop_path": 0.1},
    ("segment", "large"): {**SEGMENT, "model": "vit_large_patch16", "layer_decay": 0.75, "drop_path": 0.2},
    # Patches of 14 pixels: 37 in a row.
    ("segment", "huge"): {
        **SEGMENT, "model": "vit_huge_patch14", "layer_decay": 0.8, "drop_path": 0.3, "input_size": 518,
    },
    ("segment", "tiny"): {
        **SEGMENT, "model": "vit_tiny_patch4", "layer_decay": 0.75, "drop_path": 0, "input_size": 64, "epochs": 20,
        "lr": 1e-3, "head_channels": 32,
    },
    ("detect", NO_PRESET): {**DETECT, "model": "vit_base_patch16", "layer_decay": 0.7, "drop_path": 0.1},
    ("detect", "base"): {**DETECT, "model": "vit_base_patch16", "layer_decay": 0.7, "drop_path": 0.1},
    ("detect", "large"): {**DETECT, "model": "vit_large_patch16", "layer_decay": 0.8, "drop_path": 0.4},
    # Patches of 14 pixels: 72 in a row.
    ("detect", "huge"): {
        **DETECT, "model": "vit_huge_patch14", "layer_decay": 0.9, "drop_path": 0.5, "input_size": 1008,
    },
    ("detect", "tiny"): {
        **DETECT, "model": "vit_tiny_patch4", "layer_decay": 0.75, "drop_path": 0, "input_size": 64, "batch_size": 16,
        "epochs": 20, "warmup_epochs": 1, "lr": 1e-3, "weight_decay": 0.05, "window": 0, "scale": (0.8, 1.25),
    },
    ("train-dvae", NO_PRESET): DVAE,
    ("train-dvae", "base"): DVAE,
    ("train-dvae", "large"): DVAE,
    ("train-dvae", "huge"): {**DVAE, "input_size": 128},
    ("train-dvae", "tiny"): {
        **DVAE, "input_size": 32, "batch_size": 16, "epochs": 8, "lr": 1e-2, "vocab_size": 256, "hidden": 16,
        "groups": 3, "kl_weight": 3, "temperature_end": 0.1, "anneal_epochs": 8,
    },
}  # fmt: skip

# Flags that are not part of a recipe. They have the same default for every verb.
OTHERS = {
    "seed": 0, "dtype": "auto", "device": "auto", "image_decoder": "auto", "strategy": "ddp", "execution": "eager",
    "attention": "auto", "pixels": "auto", "bands": None, "nodata": None, "clip": None, "mean": None, "std": None,
    "in_chans": None, "patch_size": None, "embed_dim": None, "depth": None, "num_heads": None, "mlp_ratio": None,
    "img_size": None, "resolution_schedule": None,
    "num_workers": 2, "crops_per_image": 1, "cache": False, "exif": False, "bad_list": None, "max_bad_fraction": 0.01,
    "log_every": 20, "save_every": 1000, "grad_checkpointing": False, "log_dir": None, "wandb": None, "profile": None,
    "dry_run": False, "weights": None, "init": None, "tokenizer": None, "eval_every": 1, "eval_only": False,
    "predictions": None, "ema": False, "cache_features": False, "class_weights": "none", "sampler": "shuffle",
    "labels": None, "multi_label": None, "keep": 2, "keep_every": None, "keep_best": None,
    "val_loss": False, "online_eval": None, "eval_data": None, "predict_ratio": 1.0,
}  # fmt: skip


def name_of(case):
    return "-".join(word for word in case if word)


def made(verb, preset, **changes):
    kind, presets, _ = VERBS[verb]
    return kind(**{"data_path": "data", "output_dir": "run", **presets.get(preset, {}), **changes})


@pytest.mark.parametrize("case", RECIPES, ids=name_of)
def test_a_preset_has_the_values_of_the_published_recipe(case):
    config, expected = made(*case), RECIPES[case]
    assert {name: getattr(config, name) for name in expected} == expected
    others = {name for name in type(config).model_fields if name not in ("data_path", "output_dir", *expected)}
    if case == ("pretrain", case[1]):  # a file of masks, not the switch of Mask R-CNN
        assert config.masks is None
        others.remove("masks")
    assert {name: getattr(config, name) for name in others} == {name: OTHERS[name] for name in others}


def test_the_table_has_every_preset():
    presets = {(verb, preset) for verb, (_, presets, _) in VERBS.items() for preset in (NO_PRESET, *presets)}
    assert RECIPES.keys() == presets


class Stopped(Exception):
    pass


def name_parameters(optimizer):
    """The optimizer's parameters by their names in the trained model."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    models = [x for x in gc.get_objects() if issubclass(type(x), nn.Module) and own <= {id(p) for p in x.parameters()}]
    whole = max(models, key=lambda model: len(list(model.modules())))
    return {id(p): (name, p) for name, p in whole.named_parameters() if id(p) in own}


def record_steps(train, config, count=None):
    """Optimizer and options of each parameter in the first ``count`` steps of training, or in all steps."""
    steps, named = [], {}

    def record(optimizer, args, kwargs):
        named.update({} if named else name_parameters(optimizer))
        groups = [{**group, "optimizer": type(optimizer).__name__} for group in optimizer.param_groups]
        steps.append({named[id(p)][0]: {**group, "p": p} for group in groups for p in group["params"]})
        if len(steps) == count:
            raise Stopped

    hook = register_optimizer_step_pre_hook(record)
    try:
        train(config)
    except Stopped:
        pass
    finally:
        hook.remove()
    return steps


@pytest.fixture(scope="module")
def folders(labelled_images, tmp_path_factory):
    """Data with as many training images as one step of a small run."""
    root = tmp_path_factory.mktemp("recipes")
    for split, count in (("train", BATCH), ("val", 2)):
        for i, path in enumerate(sorted((labelled_images / split).rglob("*.jpg"))[:count]):
            for kind in ("images", "masks"):
                (root / "pairs" / split / kind).mkdir(parents=True, exist_ok=True)
            Image.open(path).save(root / "pairs" / split / "images" / f"{i}.png")
            Image.new("L", (36, 40), i % 2).save(root / "pairs" / split / "masks" / f"{i}.png")
            folder = root / "classes" / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(folder / f"{i}.png")
    (root / "pairs" / "classes.txt").write_text("dark\nbright\n")
    (root / "coco").mkdir()
    write_scenes(root / "coco", train=BATCH, val=2)
    return {"segment": root / "pairs", "detect": root / "coco"}, root / "classes"


BATCH = 4
SMALL = {
    "input_size": 32, "batch_size": BATCH, "num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32",
    "log_every": 1,
}  # fmt: skip
TINY = {"pretrain": {"model": "mae_vit_tiny_patch4"}, "train-dvae": {"hidden": 8, "vocab_size": 16, "groups": 3}}
CLASSIFIER = {"model": "vit_tiny_patch4"}
WHOLE = VIT_CONFIGS["vit_tiny_patch4"]
BLOCKS = 2


@pytest.fixture(autouse=True)
def smaller(monkeypatch, one_thread):  # noqa: F811
    monkeypatch.setitem(VIT_CONFIGS, "vit_tiny_patch4", {**WHOLE, "embed_dim": 32, "depth": BLOCKS, "num_heads": 2})


def small(verb, preset, folders, run, **changes):
    of_verb, others = folders
    sizes = {**SMALL, **TINY.get(verb, CLASSIFIER), "data_path": of_verb.get(verb, others), "output_dir": run}
    if verb == "detect":
        sizes["window"] = 0
    if verb in ("segment", "detect"):
        sizes["image_decoder"] = "auto"
    if verb == "segment":
        sizes["head_channels"] = 8
    return made(verb, preset, **{**sizes, **changes})


def layer_of(name):
    """The layer of a parameter in layer-wise decay: embedding, blocks, then everything else."""
    name = name.removeprefix("net.").removeprefix("backbone.net.")
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else BLOCKS + 1


def is_decayed(verb, name, p):
    tokens = () if verb == "pretrain" else ("cls_token", "pos_embed")
    return p.ndim > 1 and not name.endswith(".bias") and name.split(".")[-1] not in tokens


ADAMW = {"optimizer": "AdamW", "eps": 1e-8}
BUILT = {
    "pretrain": {**ADAMW, "betas": (0.9, 0.95)},
    "finetune": {**ADAMW, "betas": (0.9, 0.999)},
    "scratch": {**ADAMW, "betas": (0.9, 0.95)},
    "linprobe": {"optimizer": "Lars", "momentum": 0.9, "trust_coeff": 0.001, "nesterov": False, "dampening": 0},
    "segment": {**ADAMW, "betas": (0.9, 0.999)},
    "detect": {**ADAMW, "betas": (0.9, 0.999)},
    "train-dvae": {**ADAMW, "betas": (0.9, 0.999)},
}


@pytest.mark.parametrize("case", [case for case in RECIPES if case[1] not in (NO_PRESET, "tiny")], ids=name_of)
def test_training_builds_the_optimizer_of_the_recipe(case, folders, tmp_path):
    """It has the right class and options, decays and rates per parameter, and rates in the first warm-up steps."""
    verb, preset = case
    recipe, train = RECIPES[case], VERBS[verb][2]
    steps = record_steps(train, small(verb, preset, folders, tmp_path), count=3)
    built = BUILT["scratch" if preset.startswith("scratch-") else verb]
    warmup = round(recipe["warmup_epochs"])  # an epoch is one step
    peak, depth = recipe["blr"] * BATCH / 256, BLOCKS + 1
    for step, found in enumerate(steps):
        rate = peak * min(1, step / warmup) if warmup else peak
        for name, group in found.items():
            assert {option: group[option] for option in built} == built, name
            scale = recipe.get("layer_decay", 1) ** (depth - layer_of(name))
            if (verb, step) == ("train-dvae", 2) or (verb, step) == ("segment", 2):  # just past the warm-up
                assert 0.9 * peak * scale < group["lr"] < peak * scale
            else:
                assert group["lr"] == pytest.approx(rate * scale, rel=1e-9, abs=1e-15), (step, name)
            decay = recipe["weight_decay"] if is_decayed(verb, name, group["p"]) else 0
            assert group["weight_decay"] == decay, name
            if verb == "linprobe":  # only matrices are scaled by the ratio of norms
                assert group["always_adapt"] == (group["p"].ndim > 1)


def trained_names(found):
    return {name.removesuffix(".weight").removesuffix(".bias") for name in found}


def test_training_gives_the_optimizer_the_parameters_of_its_recipe(folders, tmp_path):
    def names(verb, **changes):
        train = VERBS[verb][2]
        path = tmp_path / f"{verb}-{len(list(tmp_path.iterdir()))}"
        return trained_names(record_steps(train, small(verb, "base", folders, path, **changes), count=1)[0])

    block = {f"blocks.1.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
    assert names("linprobe") == {"head.1"}  # behind a batch norm without weights
    assert names("finetune", train_blocks=1) == {*block, "fc_norm", "head"}
    mlp = {"blocks.1.norm2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}
    assert names("finetune", train_blocks=0.5) == {*mlp, "fc_norm", "head"}
    assert {"cls_token", "mask_token"} <= names("pretrain")
    assert not {"pos_embed", "decoder_pos_embed"} & names("pretrain")  # sine and cosine, as published
    assert {"cls_token", "pos_embed", "patch_embed.proj"} <= names("finetune")


@pytest.mark.parametrize("verb", VERBS)
def test_learning_rates_follow_the_schedule_of_the_recipe(verb, folders, tmp_path):
    """In all steps of a run: a linear warm-up, then half a cosine, a line for UPerNet, or two drops for ViTDet."""
    changes = {"lr": 1e-3, "epochs": 9, "warmup_epochs": 3, "min_lr": 0 if verb == "detect" else 1e-4}
    if verb not in ("pretrain", "train-dvae"):
        changes["eval_every"] = 9
    config = small(verb, "base", folders, tmp_path, **changes)
    steps = record_steps(VERBS[verb][2], config)
    found = [max(group["lr"] for group in step.values()) for step in steps]
    shares = [step / 6 for step in range(6)]  # of the steps after the warm-up
    if verb == "detect":  # to a tenth at 8/9 of the 9 steps; the hundredth at 26/27 rounds to the end
        falling = [1e-3] * 5 + [1e-4]
    elif verb == "segment":
        falling = [1e-3 - 9e-4 * share for share in shares]
    else:
        falling = [1e-4 + 9e-4 * (1 + math.cos(math.pi * share)) / 2 for share in shares]
    assert found == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, *falling], rel=1e-6, abs=1e-12)


def test_beta2_of_the_command_line_reaches_the_optimizer(folders, tmp_path, monkeypatch):
    from mae_fast.cli import main

    flags = {**SMALL, **CLASSIFIER, "data_path": folders[1], "output_dir": tmp_path, "epochs": 1, "warmup_epochs": 0}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    monkeypatch.setattr("sys.argv", ["mae-fast", "finetune", *words, "--beta2=0.7", "--weight-decay=0.2"])
    (step,) = record_steps(lambda _: main(), None, count=1)
    assert all(group["betas"] == (0.9, 0.7) for group in step.values())
    assert {group["weight_decay"] for group in step.values()} == {0, 0.2}
