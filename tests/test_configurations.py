"""Generated configurations: each either builds a model that computes a loss on the meta device, without memory, or is
refused with an error and a hint. ``--configurations`` sets their number."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_fast.errors import UserError, block
from mae_fast.models import MaskedAutoencoderViT, VisionTransformer
from mae_fast.training import config as flags
from mae_fast.training.distributed import DistContext
from mae_fast.training.tasks.classify import Finetuning, LinearProbing
from mae_fast.training.tasks.dvae import DvaeTraining
from mae_fast.training.tasks.pretrain import Pretraining

META = DistContext(torch.device("meta"))


def mostly(good, *bad):
    """Values of ``good``, and one in twelve of ``bad``."""
    return st.integers(0, 11).flatmap(lambda i: st.sampled_from(bad) if i == 0 else good)


def few(**flags):
    """A random subset of the flags, with values from their strategies."""
    return st.fixed_dictionaries({}, optional=flags)


odd = (0, -1, math.nan, math.inf)
sizes = mostly(st.sampled_from([16, 32, 64, 96, 112, 128, 224, 320]), 0, -16, 1, 30, 100, 225)
sides = st.integers(1, 12).map(lambda n: 16 * n)
share = st.floats(0, 1)
RUN = few(
    input_size=sizes,
    batch_size=mostly(st.integers(1, 8), 0, -3),
    crops_per_image=mostly(st.sampled_from([1, 1, 2, 4]), 0),
    epochs=mostly(st.integers(1, 900), 0),
    warmup_epochs=mostly(st.floats(0, 5), *odd, 1e9),
    blr=mostly(st.floats(1e-6, 1), *odd),
    lr=st.none() | mostly(st.floats(1e-6, 1), *odd),
    min_lr=mostly(st.floats(0, 1e-3), -1, math.nan),
    weight_decay=mostly(share, -1, math.nan, math.inf),
    clip_grad=st.none() | mostly(st.floats(0.1, 9), *odd),
    seed=mostly(st.integers(0, 2**63 - 1), -1, 2**63),
    ema_decay=st.none() | mostly(st.floats(0.1, 0.999), 0, 1, 2),
    max_bad_fraction=mostly(share, -0.1, 1.1),
    grad_checkpointing=st.booleans(),
)
PRETRAIN = few(
    model=mostly(st.just("mae_vit_tiny_patch4"), "resnet50", "vit_base_patch16", ""),
    mask_ratio=mostly(st.floats(0.05, 0.95), 1e-9, 0, 1, 0.9999, -0.5, math.nan),
    predict_ratio=mostly(st.floats(0.01, 1), 0, -0.5, 1.1, math.nan),
    mask_sampling=st.sampled_from(["random", "random", "block", "grid"]),
    resolution_schedule=mostly(st.none(), "16:0.5,32:0.5", "16:0.4:4,32:0.1,64:0.5:2", "32:0.5,30:0.5", "32"),
    masks=mostly(st.none(), "eight.npy", "nowhere.npy"),
    augmentation=st.sampled_from(["none", "crop-fixed", "crop", "crop-jitter"]),
    encoder_mask_token=st.booleans(),
    decoder_depth=st.none() | mostly(st.integers(0, 4), -1),
    decoder_embed_dim=st.none() | mostly(st.integers(1, 24).map(lambda n: 8 * n), 0, -8, 30, 33),
    decoder_num_heads=st.none() | mostly(st.sampled_from([1, 2, 4, 8]), 0, -1, 5),
    target=mostly(st.sampled_from(["pixel", "pca"]), "dvae"),
    norm_pix_loss=st.booleans(),
    pca_components=mostly(st.integers(1, 48), 0, 49, 10**6),
    tokenizer=mostly(st.none(), "nowhere"),
    init=mostly(st.none(), "nowhere.pth"),
)
CLASSIFY = few(
    model=mostly(st.just("vit_tiny_patch4"), "resnet50", "mae_vit_base_patch16", "timm/nonsense", ""),
    global_pool=st.booleans(),
    weights=mostly(st.none(), "nowhere.pth"),
    eval_every=mostly(st.integers(1, 5), 0),
)
FINETUNE = few(
    layer_decay=mostly(st.floats(0.1, 1), 0, 1.1, math.nan),
    beta2=mostly(st.floats(0, 0.999), 1, -1),
    drop_path=mostly(st.floats(0, 0.9), 1, -0.1),
    aa=st.none() | mostly(st.just("rand-m9-mstd0.5-inc1"), "trivial", ""),
    scale=mostly(st.sampled_from([(0.08, 1.0), (0.5, 0.5)]), (0.5, 0.2), (0.0, 1.0), (0.5, 2.0)),
    reprob=mostly(share, -0.1, 1.1),
    smoothing=mostly(st.floats(0, 0.9), 1, -0.1),
    mixup=mostly(share, -1, math.inf),
    cutmix=mostly(share, -1, math.nan),
)
PARTIAL = few(
    train_blocks=mostly(st.sampled_from([0, 0.5, 1, 2, 3, 4, "all"]), 0.7, 1.5, 5, -1, math.nan),
    cache_features=st.booleans(),
)
DVAE = few(
    vocab_size=mostly(st.integers(2, 64), 1, 0, -2),
    hidden=mostly(st.integers(1, 8).map(lambda n: 4 * n), 0, -4, 6),
    groups=mostly(st.integers(1, 4), 0, -1, 12, 60),
    kl_weight=mostly(st.floats(0, 9), -1, math.nan),
    temperature_start=mostly(st.floats(0.1, 2), *odd),
    temperature_end=mostly(st.floats(0.01, 1), *odd),
    anneal_epochs=mostly(st.floats(0, 20), -1, math.nan, math.inf),
)
# For each verb: the class of the configuration, its presets, the task, and the flags.
VERBS = {
    "pretrain": (flags.PretrainConfig, flags.PRESETS, Pretraining, (RUN, PRETRAIN)),
    "finetune": (flags.FinetuneConfig, flags.FINETUNE_PRESETS, Finetuning, (RUN, CLASSIFY, FINETUNE)),
    "partial": (flags.FinetuneConfig, flags.FINETUNE_PRESETS, Finetuning, (RUN, CLASSIFY, FINETUNE, PARTIAL)),
    "linprobe": (
        flags.LinprobeConfig,
        flags.LINPROBE_PRESETS,
        LinearProbing,
        (RUN, CLASSIFY, few(cache_features=st.booleans())),
    ),
    "train-dvae": (flags.DvaeConfig, flags.DVAE_PRESETS, DvaeTraining, (RUN, DVAE)),
}  # fmt: skip

number = mostly(st.integers(1, 4), 0, -1)
VIT = few(
    img_size=sizes | st.tuples(sides, sides),
    patch_size=mostly(st.sampled_from([4, 8, 16, (8, 16)]), 0, -4, 7),
    in_chans=mostly(st.integers(1, 5), 0, -1),
    embed_dim=mostly(st.sampled_from([16, 32, 48, 64]), 0, -16, 18, 33),
    depth=mostly(st.integers(0, 3), -1),
    num_heads=mostly(st.sampled_from([1, 2, 4]), 0, -1, 5),
    mlp_ratio=mostly(st.floats(0.5, 4), 0, -1, math.nan),
)
MODELS = {
    MaskedAutoencoderViT: few(
        decoder_embed_dim=mostly(st.sampled_from([16, 32, 48]), 0, -16, 18, 33),
        decoder_depth=mostly(st.integers(0, 2), -1),
        decoder_num_heads=mostly(st.sampled_from([1, 2, 4]), 0, -1, 5),
        norm_pix_loss=st.booleans(),
        encoder_mask_token=st.booleans(),
        target=mostly(st.none(), {"kind": "pca", "components": 9}, {"kind": "pca", "components": 10**6}, {}),
    ),
    VisionTransformer: few(
        global_pool=st.booleans(),
        num_classes=mostly(st.integers(0, 9), -1),
        qkv_bias=st.booleans(),
        drop_path_rate=mostly(st.floats(0, 0.9), 1.5, -0.1, math.nan),
    ),
}  # fmt: skip
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    for i in range(16):
        folder = place / "images" / ("train" if i < 8 else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.jpg")
    np.save(place / "eight.npy", np.eye(8, dtype=bool)[None])
    return place


@pytest.fixture
def generated(pytestconfig):
    """Hypothesis settings: one seventh of all configurations for each of seven kinds."""
    return settings(
        max_examples=math.ceil(pytestconfig.getoption("configurations") / 7),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def loss_of(task):
    """The loss of two images, computed as in training, on the meta device."""
    images = torch.empty(2, *task.size, task.pixels.channels, dtype=torch.uint8)
    if isinstance(task, Pretraining):
        return task.loss(task.model, images, torch.empty(2, task.model.patch_embed.num_patches))
    if isinstance(task, DvaeTraining):
        return task.loss(task.model, torch.empty(2, task.pixels.channels, *task.size), torch.ones(()))
    return task.loss(task.model, task.prepared(images), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("verb", VERBS)
def test_flags(verb, place, generated, monkeypatch):
    kind, presets, task_of, strategies = VERBS[verb]
    monkeypatch.chdir(place)
    outcomes = Counter()
    preset = st.sampled_from(["tiny"] * 9 + [*presets])

    @generated
    @given(preset, st.tuples(*strategies))
    def check(preset, chosen):
        given = {**presets[preset], **{name: value for flags in chosen for name, value in flags.items()}}
        try:
            config = kind(**{"num_workers": 0, "data_path": "images", "output_dir": "out", **given})
            with torch.device("meta"):
                task = task_of(config, META)
        except UserError as error:
            lines = block(error, f"mae-fast {verb}").splitlines()
            assert len(lines) == 2
            assert len(lines[0]) < 600
            outcomes["refused"] += 1
            return
        outcomes["built"] += 1
        assert all(parameter.is_meta for parameter in task.model.parameters())
        assert json.loads(json.dumps(task.state)) == task.state
        if preset == "tiny":
            with torch.device("meta"):
                optimizer = task.optimizer(config.lr or 1.0, None)
                loss = loss_of(task)
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert {id(p) for p in task.model.parameters() if p.requires_grad} <= trained
            assert loss.shape == ()
            assert loss.requires_grad
            outcomes["run"] += 1

    check()
    total = outcomes["built"] + outcomes["refused"]
    assert min(outcomes["refused"], outcomes["run"]) > total / 20, outcomes


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_constructor_arguments(model, generated):
    outcomes = Counter()
    small = SMALL | (SMALL_DECODER if model is MaskedAutoencoderViT else {})

    @generated
    @given(VIT, MODELS[model])
    def check(sizes, more):
        try:
            with torch.device("meta"):
                built = model(**{**small, **sizes, **more})
        except ValueError:
            outcomes["refused"] += 1
            return
        outcomes["built"] += 1
        images = torch.empty(2, built.in_chans, *built.patch_embed.img_size, device="meta")
        if model is VisionTransformer:
            assert built(images).shape == (2, built.num_classes or built.patch_embed.proj.out_channels)
        elif built.patch_embed.num_patches > 1:
            loss = built.loss(images, 0.5)
            assert (loss.shape, loss.is_meta, loss.requires_grad) == ((), True, True)

    check()
    assert min(outcomes.values()) > outcomes.total() / 10, outcomes


WRONG = {
    "img_size": (0, -16, 30),
    "patch_size": (0, -4, 7),
    "in_chans": (0, -1),
    "embed_dim": (0, -16, 33),
    "depth": (-1,),
    "num_heads": (0, -2, 5),
    "mlp_ratio": (0, -1, math.nan),
    "decoder_embed_dim": (0, -16, 18, 33),
    "decoder_depth": (-1,),
    "decoder_num_heads": (0, -2, 5),
    "target": ({}, {"kind": "pca", "components": 0}),
    "num_classes": (-1,),
    "drop_path_rate": (1, -0.1, math.nan),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_each_invalid_argument_is_refused(name, value):
    """Tests each argument alone, because a generated configuration may be refused for another one."""
    model = VisionTransformer if name in ("num_classes", "drop_path_rate") else MaskedAutoencoderViT
    with torch.device("meta"), pytest.raises(ValueError, match=r"\bgot\b|NaN"):
        model(**{**SMALL, **(SMALL_DECODER if model is MaskedAutoencoderViT else {}), name: value})
