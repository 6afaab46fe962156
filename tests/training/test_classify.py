"""Fine-tuning of all blocks or the last ones, and linear probing: optimizers, frozen parts, runs, evaluation."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import assert_close, perturb, pictures, tiny_vit
from torch import nn

from mae_fast.errors import UserError
from mae_fast.models.mae import build
from mae_fast.models.vit import build as vit_build
from mae_fast.training.config import FINETUNE_PRESETS, LINPROBE_PRESETS, FinetuneConfig, LinprobeConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.tasks import classify
from mae_fast.training.tasks.classifier import evaluate
from mae_fast.training.tasks.classify import finetune, freeze, lars, linprobe
from mae_fast.weights.create import load_run
from mae_fast.weights.trained import build_classifier

ALONE = DistContext(torch.device("cpu"))
SMALL = {"num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "log_every": 1}


def config(kind, images, run, **changes):
    presets = LINPROBE_PRESETS if kind is LinprobeConfig else FINETUNE_PRESETS
    small = {"data_path": images, "output_dir": run, "epochs": 2, "warmup_epochs": 1, "batch_size": 24}
    return kind(**{**presets["tiny"], **SMALL, **small, **changes})


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights_of(run):
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "model.safetensors")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """Weights of an autoencoder, in a file."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "mae.safetensors"
    save_file(perturb(build("mae_vit_tiny_patch4")).state_dict(), path)
    return path


def published_layer(name, depth):
    """The layer of a parameter in layer-wise decay: embedding 0, block i is i + 1, everything else depth + 1."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


@pytest.mark.parametrize("layer_decay", [0.65, 1.0])
@pytest.mark.parametrize("global_pool", [True, False], ids=["mean", "cls"])
def test_layer_decay_as_published(labelled_images, tmp_path, layer_decay, global_pool):
    from mae_fast.training.tasks.classify import Finetuning

    options = {"layer_decay": layer_decay, "global_pool": global_pool, "weight_decay": 0.05}
    task = Finetuning(config(FinetuneConfig, labelled_images, tmp_path, **options), ALONE)
    optimizer = task.optimizer(1e-3, None)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    depth = len(task.model.blocks)
    for name, p in task.model.named_parameters():
        group = found.pop(id(p))
        assert group["lr_scale"] == pytest.approx(layer_decay ** (depth + 1 - published_layer(name, depth))), name
        decayed = p.ndim > 1 and name not in ("pos_embed", "cls_token")
        assert group["weight_decay"] == (0.05 if decayed else 0.0), name
        assert group["betas"] == (0.9, 0.999)
    assert not found


def test_the_rate_follows_the_layers(labelled_images, tmp_path):
    """The rate of a layer is that of the schedule times its scale. This also holds for ``min_lr``."""
    from mae_fast.training.optim import Schedule
    from mae_fast.training.tasks.classify import Finetuning

    task = Finetuning(config(FinetuneConfig, labelled_images, tmp_path, layer_decay=0.5), ALONE)
    optimizer = task.optimizer(1e-2, None)
    schedule = Schedule(optimizer, warmup_steps=2, total_steps=10, min_lr=1e-4)
    for step, rate in ((0, 0.0), (1, 5e-3), (2, 1e-2), (6, (1e-2 + 1e-4) / 2)):
        schedule.set(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"], abs=1e-12), step


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_lars_equals_its_formula(decay):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5).double()
    optimizer = lars(layer, lr=0.3, weight_decay=decay)
    w, b = (p.detach().clone() for p in (layer.weight, layer.bias))
    momenta = [torch.zeros_like(w), torch.zeros_like(b)]
    for _ in range(3):
        gw, gb = torch.randn_like(w), torch.randn_like(b)
        layer.weight.grad, layer.bias.grad = gw.clone(), gb.clone()
        optimizer.step()
        dw = gw + decay * w
        momenta[0] = 0.9 * momenta[0] + dw * (0.001 * w.norm() / (gw.norm() + decay * w.norm()))
        momenta[1] = 0.9 * momenta[1] + gb
        w, b = w - 0.3 * momenta[0], b - 0.3 * momenta[1]
        assert_close({"w": layer.weight.detach(), "b": layer.bias.detach()}, {"w": w, "b": b}, 1e-9)


@pytest.mark.parametrize(
    ("blocks", "first", "trained"),
    [
        (0, 3, {"head", "fc_norm"}),
        (0.5, 2, {"head", "fc_norm", "blocks.2.norm2", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2"}),
        (1, 2, {"head", "fc_norm", "blocks.2"}),
        (2, 1, {"head", "fc_norm", "blocks.2", "blocks.1"}),
        (3, 0, {""}),
    ],
)
def test_the_right_parameters_are_frozen(blocks, first, trained):
    model = tiny_vit(depth=3, global_pool=True, drop_path_rate=0.3)
    assert freeze(model, blocks) == first
    for name, p in model.named_parameters():
        assert p.requires_grad == any(name.startswith(f"{part}." if part else "") for part in trained), name
    rates = [block.drop_path.drop_prob for block in model.blocks]
    frozen = 3 - int(blocks) if blocks != 3 else 0
    assert rates == pytest.approx([0.0] * frozen + [0.0, 0.15, 0.3][frozen:])


def test_frozen_blocks_take_no_part_in_autograd():
    model = tiny_vit(depth=3, global_pool=True).train()
    freeze(model, 1)
    came = []
    model.blocks[2].register_forward_pre_hook(lambda _module, inputs: came.append(inputs[0]))
    model(pictures(model)).sum().backward()
    assert came[0].grad_fn is None
    assert not came[0].requires_grad
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("blocks", [-1, 4, 1.5, 0.25])
def test_invalid_numbers_of_blocks_are_errors(blocks):
    with pytest.raises(UserError, match=r"--train-blocks .* is invalid; give 0, 0.5, 1, 2, ..., 3 or all"):
        freeze(tiny_vit(depth=3), blocks)


def test_forward_from_goes_on_where_features_end():
    for global_pool in (True, False):
        model = tiny_vit(depth=3, global_pool=global_pool).double()
        images = pictures(model)
        for first in (1, 2, 3):
            tokens = model.forward_features(images, layers=[first - 1], pool="tokens")[0]
            assert_close({"logits": model.forward_from(tokens, first)}, {"logits": model(images)})


def test_finetune_learns_and_resumes_exactly(labelled_images, encoder, tmp_path, caplog):
    """A run that is stopped after its first epoch and resumed equals an uninterrupted run bit for bit."""
    options = {"weights": str(encoder), "epochs": 3, "save_every": 2, "lr": 2e-3, "drop_path": 0.1, "mixup": 0.8,
               "cutmix": 1.0, "ema_decay": 0.5}  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(config(FinetuneConfig, labelled_images, whole, **options))
    entries = log(whole)
    evaluated = [entry for entry in entries if "val_acc1" in entry]
    assert [entry["step"] for entry in evaluated] == [3, 6, 9]
    assert all("val_acc1_ema" in entry for entry in evaluated)
    assert "epoch 3: val_loss" in caplog.text

    from mae_fast.training import trainer as loop

    original = loop.Progress.update

    def stop(progress, step, *rest):
        original(progress, step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Progress, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(config(FinetuneConfig, labelled_images, parts, **options))
    finetune(config(FinetuneConfig, labelled_images, parts, **options))
    ours, theirs = weights_of(parts), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    timed = ("images_per_s", "waiting")
    assert [{k: v for k, v in e.items() if k not in timed} for e in log(parts)] == [
        {k: v for k, v in e.items() if k not in timed} for e in entries
    ]
    start = load_file(encoder)
    assert not torch.equal(theirs["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    assert theirs["blocks.0.mlp.fc1.weight"].sub(start["blocks.0.mlp.fc1.weight"]).abs().max() < 0.1


def test_finetune_from_scratch_separates_easy_classes(labelled_images, tmp_path):
    """Classes that differ in colour are separated after a few epochs from scratch."""
    options = {"epochs": 12, "lr": 2e-3, "reprob": 0.0, "eval_every": 12, "layer_decay": 1.0}
    finetune(config(FinetuneConfig, labelled_images, tmp_path / "run", **options))
    assert log(tmp_path / "run")[-1]["val_acc1"] > 80
    assert len([entry for entry in log(tmp_path / "run") if "val_acc1" in entry]) == 1


def test_crops_have_the_share_of_the_area_that_scale_gives(labelled_images, tmp_path, monkeypatch):
    from mae_fast.data import loader

    scales = []

    def crop(rng, height, width, scale):
        scales.append(scale)
        return (0, 0, height, width), False

    monkeypatch.setattr(loader, "crop_and_flip", crop)
    options = {"epochs": 1, "warmup_epochs": 0, "scale": (0.5, 0.7)}
    finetune(config(FinetuneConfig, labelled_images, tmp_path / "run", **options))
    assert set(scales) == {(0.5, 0.7)}


@pytest.mark.parametrize("blocks", [0.5, 1])
@pytest.mark.parametrize("cache", [False, True], ids=["", "cached"])
def test_partial_finetuning_does_not_change_frozen_weights(labelled_images, encoder, tmp_path, blocks, cache):
    options = {
        "weights": str(encoder),
        "train_blocks": blocks,
        "cache_features": cache,
        "epochs": 1,
        "warmup_epochs": 0,
    }
    finetune(config(FinetuneConfig, labelled_images, tmp_path / "run", **options))
    ours, theirs = weights_of(tmp_path / "run"), load_file(encoder)
    changed = {name for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])}
    whole = {name for name in ours if name.startswith("blocks.3.")}
    expected = {name for name in whole if blocks == 1 or "mlp" in name or "norm2" in name}
    assert changed == expected
    assert "norm.weight" not in ours


def test_cached_partial_steps_are_those_on_centred_crops(labelled_images, encoder, tmp_path, monkeypatch):
    """If augmentation gives center crops, cached and uncached runs take the same steps."""
    from batches import evaluation_batches

    from mae_fast.data.loader import Batch, KeyedBatches

    def centred(source, loader, **_):
        (every,) = evaluation_batches(source, size=loader.size, batch_size=len(source))
        for keys in KeyedBatches(len(source), loader):
            at = torch.tensor([sample for _, sample in keys])
            yield Batch(every.images[at], torch.empty(len(at), 0), at, every.labels[at])

    monkeypatch.setattr(classify, "training_batches", centred)
    for kind, train, extra in (
        (FinetuneConfig, finetune, {"train_blocks": 1, "smoothing": 0.0, "reprob": 0.0}),
        (LinprobeConfig, linprobe, {}),
    ):
        runs = [tmp_path / f"{kind.__name__} {cache}" for cache in (False, True)]
        for cache, run in zip((False, True), runs, strict=True):
            train(config(kind, labelled_images, run, weights=str(encoder), cache_features=cache, **extra))
        assert_close(weights_of(runs[1]), weights_of(runs[0]), 1e-5)


def test_cached_features_must_fit_into_memory(labelled_images, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "free_memory", lambda: 2**10)
    made = config(LinprobeConfig, labelled_images, tmp_path / "run", weights=str(encoder), cache_features=True)
    with pytest.raises(UserError, match=r"--cache-features needs .* are free"):
        linprobe(made)


@pytest.mark.parametrize("cache", [False, True], ids=["", "cached"])
def test_linear_probe(labelled_images, encoder, tmp_path, cache):
    run = tmp_path / "run"
    options = {"weights": str(encoder), "epochs": 6, "blr": 1.0, "cache_features": cache}
    linprobe(config(LinprobeConfig, labelled_images, run, **options))
    ours, theirs = weights_of(run), load_file(encoder)
    shared = [name for name in ours if name in theirs]
    assert "norm.weight" in shared  # the norm of the class token is from the autoencoder
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert {name for name in ours if name.startswith("head")} == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
    }  # fmt: skip
    assert ours["head.0.num_batches_tracked"] == 18
    assert not ours["head.0.running_mean"].eq(0).any()
    model, found = load_run(run)
    assert found.state["classes"] == ["b", "g", "r"]
    assert torch.equal(model.head[1].weight, ours["head.1.weight"])


def test_a_probe_with_a_fitting_rate_learns(labelled_images, encoder, tmp_path):
    options = {"weights": str(encoder), "epochs": 40, "warmup_epochs": 2, "blr": 10.0, "cache_features": True,
               "global_pool": True, "eval_every": 40}  # fmt: skip
    linprobe(config(LinprobeConfig, labelled_images, tmp_path / "run", **options))
    assert log(tmp_path / "run")[-1]["val_acc1"] > 80


def test_eval_only(labelled_images, encoder, tmp_path, caplog):
    run, table = tmp_path / "run", tmp_path / "predictions.csv"
    made = config(FinetuneConfig, labelled_images, run, weights=str(encoder), epochs=2, lr=1e-3)
    finetune(made)
    logged = log(run)[-1]
    caplog.set_level("INFO", "mae_fast")
    # The image size is that of the run, whatever the default. Another given size is an error.
    flags = {"data_path": labelled_images, "output_dir": run, "eval_only": True, "dtype": "fp32", "num_workers": 0}
    figures = evaluate(FinetuneConfig(**flags, predictions=table))
    for wrong in ({"input_size": 224}, {"model": "vit_base_patch16"}, {"weights": "other"}):
        with pytest.raises(UserError, match=r"the evaluated run .* has"):
            evaluate(FinetuneConfig(**flags, **wrong))
    assert figures == pytest.approx({name: logged[name] for name in figures}, rel=1e-5)
    out = caplog.text
    assert f"val_acc1 {figures['val_acc1']:.4g}" in out
    assert "confusion matrix" in out
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 24
    assert sum(row["class"] == row["prediction"] for row in rows) == round(figures["val_acc1"] * 24 / 100)
    assert {row["image"].split("/")[0] for row in rows} == {"b", "g", "r"}
    assert all(row["image"].split("/")[0] == row["class"] for row in rows)


def test_averaged_weights_are_evaluated_and_do_not_affect_training(labelled_images, encoder, tmp_path):
    """Averaged weights have their own metrics. The weights equal those of a run without averages."""
    options = {"weights": str(encoder), "epochs": 2, "lr": 2e-3}
    finetune(config(FinetuneConfig, labelled_images, tmp_path / "without", **options))
    averaged = config(FinetuneConfig, labelled_images, tmp_path / "with", ema_decay=0.9, **options)
    finetune(averaged)
    ours, theirs = weights_of(tmp_path / "with"), weights_of(tmp_path / "without")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last = log(tmp_path / "with")[-1]
    assert last["val_loss_ema"] != last["val_loss"]
    figures = evaluate(averaged.model_copy(update={"ema": True}))
    assert figures == pytest.approx({name: last[f"{name}_ema"] for name in figures}, rel=1e-5)


def test_bad_images_have_no_cached_features(labelled_images, encoder, tmp_path):
    """Each cached row belongs to its image. Other images replace bad images."""
    import shutil

    from mae_fast.data.loader import LoaderConfig
    from mae_fast.training.tasks.classify import LinearProbing

    shutil.copytree(labelled_images, tmp_path / "data")
    (tmp_path / "data" / "train" / "b" / "03.jpg").write_bytes(b"no image")
    made = config(LinprobeConfig, tmp_path / "data", tmp_path / "run", weights=str(encoder), cache_features=True,
                  max_bad_fraction=0.5)  # fmt: skip
    task = LinearProbing(made, ALONE)
    loader = LoaderConfig(size=task.size, batch_size=24, batches_per_epoch=3)
    batches = list(task.batches(task.source, loader))
    ids = torch.cat([batch.ids for batch in batches])
    assert 3 not in ids
    assert len(ids) == 72
    assert sorted(set(ids.tolist())) == [i for i in range(72) if i != 3]
    images = {i: x for batch in task.all_of(task.source) for i, x in zip(batch.ids.tolist(), batch.images, strict=True)}
    for batch in batches:
        assert torch.equal(batch.labels, torch.tensor([task.source.labels[i] for i in batch.ids]))
        expected = task.frozen(torch.stack([images[i] for i in batch.ids.tolist()]))
        assert_close({"features": batch.images}, {"features": expected}, 1e-5)


def test_eval_only_matches_classes_by_name(labelled_images, encoder, tmp_path):
    import shutil

    made = config(FinetuneConfig, labelled_images, tmp_path / "run", weights=str(encoder), epochs=1, warmup_epochs=0)
    finetune(made)
    shutil.copytree(labelled_images, tmp_path / "data")
    whole = evaluate(made)
    shutil.rmtree(tmp_path / "data" / "train")
    shutil.rmtree(tmp_path / "data" / "val" / "b")  # "g" is now the first class folder, and is class 1 of the run
    table = tmp_path / "table.csv"
    some = evaluate(made.model_copy(update={"data_path": tmp_path / "data", "predictions": table}))
    assert whole["val_acc1"] == some["val_acc1"] == 100
    assert {(row["class"], row["prediction"]) for row in csv.DictReader(table.open())} == {("g", "g"), ("r", "r")}
    other = {"data_path": tmp_path / "data", "output_dir": tmp_path / "none", "weights": str(tmp_path / "run")}
    assert evaluate(made.model_copy(update=other)) == some  # also if the run is given by --weights
    (tmp_path / "data" / "val" / "r").rename(tmp_path / "data" / "val" / "a")
    with pytest.raises(UserError, match=r"val has classes that .*run does not have: a; .* 3 classes: b, g, r"):
        evaluate(made.model_copy(update={"data_path": tmp_path / "data"}))


def test_timm_models_get_images_standardised_by_their_own_statistics(labelled_images, tmp_path):
    import timm

    from mae_fast.training.tasks.classifier import Classifier

    model = timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    task = Classifier(config(FinetuneConfig, labelled_images, tmp_path), ALONE, model)
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    assert_close({"x": task.prepared(images)}, {"x": (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5}, 1e-6)


def test_timm_models_in_the_same_harness(labelled_images, tmp_path):
    """BEiT with relative positions and layer scale, from a file of weights with another number of classes."""
    import timm

    options = {"model": "timm/beit_base_patch16_224", "input_size": 32, "epochs": 1, "warmup_epochs": 0}
    small = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    original = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, *rest, **kw: original(name, *rest, **{**small, **kw}))
        theirs = original("beit_base_patch16_224", img_size=32, num_classes=7, **small)
        path = tmp_path / "beit.pth"
        torch.save(theirs.state_dict(), path)
        model = build_classifier(options["model"], str(path), 3, 32, global_pool=True, drop_path_rate=0.1)
        assert torch.equal(model.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)
        assert model.head.weight.shape == (3, 32)
        for kind, train, changes in ((FinetuneConfig, finetune, {}), (FinetuneConfig, finetune, {"train_blocks": 1}),
                                     (LinprobeConfig, linprobe, {"cache_features": True})):  # fmt: skip
            run = tmp_path / "-".join([kind.__name__, *changes])
            train(config(kind, labelled_images, run, weights=str(path), **{**options, **changes}))
            assert "val_acc1" in log(run)[-1]
            figures = evaluate(config(kind, labelled_images, run, **{**options, **changes}))
            assert figures == pytest.approx({name: log(run)[-1][name] for name in figures}, rel=1e-5)
            kept = torch.equal(weights_of(run)["blocks.0.attn.qkv.weight"], theirs.blocks[0].attn.qkv.weight)
            assert kept == bool(changes)


def test_heads_of_another_task_are_replaced(labelled_images, encoder, tmp_path, caplog):
    """From a probe or a fine-tuned model with the same number of classes, the encoder is used but not the head."""
    runs = tmp_path / "probe", tmp_path / "tuned"
    linprobe(config(LinprobeConfig, labelled_images, runs[0], weights=str(encoder), cache_features=True, epochs=2))
    assert "is not used: the new head" not in caplog.text
    finetune(config(FinetuneConfig, labelled_images, runs[1], weights=str(runs[0]), epochs=1, warmup_epochs=0))
    assert f"the head of {runs[0]} is not used: the new head" in caplog.text
    assert "head.weight" in weights_of(runs[1])
    again = tmp_path / "again"
    linprobe(config(LinprobeConfig, labelled_images, again, weights=str(runs[1]), cache_features=True, epochs=2,
                    global_pool=True))  # fmt: skip
    ours, theirs = weights_of(again), weights_of(runs[1])
    assert torch.equal(ours["fc_norm.weight"], theirs["fc_norm.weight"])
    assert "head.1.weight" in ours
    assert not torch.equal(ours["head.1.weight"], theirs["head.weight"])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (FinetuneConfig, {"model": "vit_giant"}, "--model vit_giant is unknown; known are vit_base_patch16"),
        (FinetuneConfig, {"model": "timm/no_such_model"}, "--model timm/no_such_model: "),
        (FinetuneConfig, {"input_size": 30}, "multiple of the patch size"),
        (FinetuneConfig, {"weights": "nowhere.pth"}, "nowhere.pth"),
        (FinetuneConfig, {"weights": ""}, "weights '': the name is empty"),
        (FinetuneConfig, {"train_blocks": 9}, "--train-blocks 9 is invalid; give 0, 0.5, 1, 2, ..., 4 or all"),
        (FinetuneConfig, {"train_blocks": 4, "cache_features": True}, "no block is frozen"),
        (
            FinetuneConfig,
            {"train_blocks": 1, "cache_features": True, "crops_per_image": 2},
            "leave --crops-per-image out",
        ),
        (FinetuneConfig, {"model": "timm/resnet18"}, "--model timm/resnet18: "),
    ],
)
def test_impossible_settings_are_errors(labelled_images, tmp_path, kind, changes, message):
    with pytest.raises(UserError, match=message):
        finetune(config(kind, labelled_images, tmp_path / "run", **changes))


def test_eval_only_needs_a_model(labelled_images, tmp_path):
    with pytest.raises(UserError, match=r"is not a run; give .*--weights"):
        evaluate(config(FinetuneConfig, labelled_images, tmp_path / "run"))


def test_eval_only_of_a_pre_training_run_is_an_error(labelled_images, tmp_path):
    from mae_fast.training.config import PRESETS, PretrainConfig
    from mae_fast.training.tasks.pretrain import pretrain

    small = {"data_path": labelled_images, "output_dir": tmp_path, "epochs": 1, "warmup_epochs": 0, "batch_size": 24}
    pretrain(PretrainConfig(**{**PRESETS["tiny"], **SMALL, **small}))
    with pytest.raises(UserError, match=r"a run of mae_vit_.*, which has no head"):
        evaluate(config(FinetuneConfig, labelled_images, tmp_path))


def test_other_verbs_refuse_a_classifier(labelled_images, encoder, tmp_path):
    """Reconstruction and debug-step need a run of pre-training."""
    from mae_fast.doctor.debug_step import debug_step
    from mae_fast.evaluation.reconstruct import reconstruct_files

    run = tmp_path / "run"
    finetune(config(FinetuneConfig, labelled_images, run, weights=str(encoder), epochs=1, warmup_epochs=0))
    with pytest.raises(UserError, match="is a run of a classifier, which cannot reconstruct"):
        reconstruct_files(run, [labelled_images / "val"], tmp_path / "picture.png")
    (run / "not_finite").mkdir()
    dump = run / "not_finite" / "step-00000001.json"
    dump.write_text(json.dumps({"step": 1, "seed": 0, "ids": [0], "weights": None}))
    with pytest.raises(UserError, match="is not a pre-training run"):
        debug_step(dump, "cpu")


def test_files_that_do_not_fit_timms_model_are_errors(labelled_images, tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk\0")
    torch.save({"foo": torch.zeros(2)}, tmp_path / "foo.pth")
    for name, message in (("junk.safetensors", "junk.safetensors are damaged"), ("foo.pth", "no name in common")):
        with pytest.raises(UserError, match=message):
            build_classifier("timm/vit_tiny_patch16_224", str(tmp_path / name), 3, 32, global_pool=True)


def test_timms_head_is_kept_where_it_fits(tmp_path):
    import timm

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    wrapped = {f"model._orig_mod.{name}": x for name, x in theirs.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "vit.pth")
    for classes in (3, 4):
        made = build_classifier("timm/vit_tiny_patch16_224", str(tmp_path / "vit.pth"), classes, 32, global_pool=True)
        assert torch.equal(made.blocks[3].attn.qkv.weight, theirs.blocks[3].attn.qkv.weight)
        assert torch.equal(made.head.weight, theirs.head.weight) == (classes == 3)


def test_weights_without_a_fitting_head_are_not_evaluated(labelled_images, encoder, tmp_path):
    made = config(FinetuneConfig, labelled_images, tmp_path / "run", weights=str(encoder))
    with pytest.raises(UserError, match="has no head, but the images have 3 classes; fine-tune it first"):
        evaluate(made)
    from safetensors.torch import save_file

    other = vit_build("vit_tiny_patch4", num_classes=4, global_pool=True)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="has a head of 4 classes, but the images have 3"):
        evaluate(made.model_copy(update={"weights": str(tmp_path / "other.safetensors")}))
    with pytest.raises(UserError, match="--ema needs the folder of a run"):
        evaluate(made.model_copy(update={"ema": True}))


def test_a_probe_of_single_images_is_refused(labelled_images, tmp_path):
    with pytest.raises(UserError, match="needs at least 2 images"):
        linprobe(config(LinprobeConfig, labelled_images, tmp_path / "run", batch_size=1))
    assert not (tmp_path / "run").exists()


def test_caching_more_than_the_free_memory_is_an_error(monkeypatch):

    monkeypatch.setattr(classify, "free_memory", lambda: 1_000_000)
    classify._check_memory(500_000, torch.device("cpu"))
    with pytest.raises(UserError, match=r"--cache-features needs .* GiB"):
        classify._check_memory(500_001, torch.device("cpu"))


def test_no_usable_held_out_image_is_an_error(labelled_images, encoder, tmp_path):
    import shutil

    shutil.copytree(labelled_images, tmp_path / "data")
    for path in (tmp_path / "data" / "val").rglob("*.jpg"):
        path.write_bytes(b"no image")
    made = config(FinetuneConfig, tmp_path / "data", tmp_path / "run", weights=str(encoder), epochs=1, warmup_epochs=0,
                  max_bad_fraction=1.0)  # fmt: skip
    with pytest.raises(UserError, match="no image of val/ can be used"):
        finetune(made)


def test_the_shown_rate_is_the_largest(labelled_images, tmp_path):
    from mae_fast.training.optim import Schedule
    from mae_fast.training.tasks.classify import Finetuning

    task = Finetuning(config(FinetuneConfig, labelled_images, tmp_path, layer_decay=0.5), ALONE)
    schedule = Schedule(task.optimizer(1e-2, None), warmup_steps=2, total_steps=10)
    assert schedule.set(2) == pytest.approx(1e-2)
