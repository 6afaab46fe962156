"""Segmentation: training, exact resuming, and metrics against torchmetrics and by hand."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import assert_close, command, one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F

from mae_fast.data.loader import Batch
from mae_fast.data.pixel_format import RGB
from mae_fast.data.segmentation import open_segmentation
from mae_fast.errors import UserError
from mae_fast.models import vit
from mae_fast.models.sizes import VIT_CONFIGS
from mae_fast.training import trainer as loop
from mae_fast.training.config import SEGMENT_PRESETS, SegmentConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.tasks.dense import of_run
from mae_fast.training.tasks.segment import Scores, Segmentation, answers, evaluate, segment
from mae_fast.weights.trained import SEGMENTATION

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = DistContext(torch.device("cpu"))
WHOLE = VIT_CONFIGS["vit_tiny_patch4"]
TINY = {**WHOLE, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """Make the smallest encoder even smaller, so that tests are fast."""
    monkeypatch.setitem(VIT_CONFIGS, "vit_tiny_patch4", TINY)


def scene(rng, height, width):
    """Image and mask of two rectangles of different colours on a background."""
    mask = np.zeros((height, width), np.uint8)
    for value in (1, 2):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask[top : top + height // 2, left : left + width // 2] = value
    colour = np.array([[60, 60, 60], [200, 60, 60], [60, 60, 200]])[mask]
    return (colour + rng.integers(0, 40, colour.shape)).astype(np.uint8), mask


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twelve scenes for training and five of other sizes for evaluation. The fourth class occurs nowhere."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, sizes in (("train", [(24, 28)] * 12), ("val", [(20, 20), (40, 20), (16, 30), (33, 21), (20, 20)])):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i, size in enumerate(sizes):
            image, mask = scene(rng, *size)
            mask[:2, :3] = 255
            Image.fromarray(image).save(root / split / "images" / f"{i:02}.jpg")
            Image.fromarray(mask).save(root / split / "masks" / f"{i:02}.png")
    (root / "classes.txt").write_text("ground\nred [1]\nblue\nnowhere\n")
    return root


def config(scenes, run, **changes):
    """Three epochs of three steps of four images."""
    small = {"data_path": scenes, "output_dir": run, "input_size": 20, "epochs": 3, "warmup_epochs": 0,
             "batch_size": 4, "head_channels": 8, "save_every": 2, "log_every": 1, "num_workers": 0,
             "device": "cpu", "dtype": "fp32", "lr": 2e-3, "drop_path": 0.1}  # fmt: skip
    return SegmentConfig(**{**SEGMENT_PRESETS["tiny"], **small, **changes})


def log(run):
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("images_per_s", "waiting")} for entry in entries]


def newest(run):
    return sorted((run / "checkpoints").glob("step-*"))[-1]


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A finished run with averaged weights."""
    path = tmp_path_factory.mktemp("run") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in all tests: the bits depend on it
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VIT_CONFIGS, "vit_tiny_patch4", TINY)
        segment(config(scenes, path, ema_decay=0.5))
    torch.set_num_threads(threads)
    return path


def test_a_resumed_run_is_identical(run, scenes, tmp_path, caplog):
    original = loop.Progress.update

    def stop(progress, step, *rest):
        original(progress, step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Progress, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            segment(config(scenes, parts, ema_decay=0.5))
    assert newest(parts).name == "step-00000004"
    caplog.clear()
    segment(config(scenes, parts, ema_decay=0.5))
    assert f"resuming {parts} at step 4 of 9" in caplog.text
    assert log(parts) == log(run)
    for name in ("model", "optim", "ema"):
        ours, theirs = (load_file(newest(path) / f"{name}.safetensors") for path in (parts, run))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_it_learns_more_than_the_most_frequent_class(scenes, tmp_path):
    """It is better than predicting the most frequent class everywhere."""
    segment(config(scenes, tmp_path, epochs=16, drop_path=0.0, head_channels=16, eval_every=16))
    entries = log(tmp_path)
    losses = [entry["train_loss"] for entry in entries if "train_loss" in entry]
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.3
    assert entries[-1]["val_miou"] > 40
    assert entries[-1]["val_acc"] > 75


def test_logged_metrics_equal_torchmetrics(run, scenes):
    """The logged metrics equal torchmetrics on predictions in the size of the masks."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    found, model = of_run(run, False, SEGMENTATION, "segment")
    classes = found.state["classes"]
    assert classes == ["ground", "red [1]", "blue", "nowhere"]
    assert not model.training
    _, val = open_segmentation(scenes)
    miou = MulticlassJaccardIndex(4, ignore_index=255)
    accuracy = MulticlassAccuracy(4, average="micro", ignore_index=255)
    entropies, count = 0.0, 0
    found = list(answers(model, val, config(scenes, run), ALONE, RGB))
    assert [i for i, _, _ in found] == [0, 1, 2, 3, 4]
    for i, logits, labels in found:
        assert np.array_equal(labels, val.pair(i)[1])
        assert logits.shape == (4, *labels.shape)
        miou.update(logits.argmax(0), labels)
        accuracy.update(logits.argmax(0), labels)
        entropies += F.cross_entropy(logits[None], labels[None], ignore_index=255, reduction="sum").item()
        count += int((labels != 255).sum())
    evaluated = [entry for entry in log(run) if "val_miou" in entry]
    assert [entry["step"] for entry in evaluated] == [3, 6, 9]
    last = evaluated[-1]
    assert last["val_miou"] == pytest.approx(100 * miou.compute().item(), rel=1e-5)
    assert last["val_acc"] == pytest.approx(100 * accuracy.compute().item(), rel=1e-5)
    assert last["val_loss"] == pytest.approx(entropies / count, rel=1e-5)
    assert last["val_miou_ema"] != last["val_miou"]


def test_logits_come_from_sliding_windows(run, scenes):
    """An image of the size of the window has the logits of the model. One of twice the height has three windows."""
    _, model = of_run(run, False, SEGMENTATION, "segment")
    _, val = open_segmentation(scenes)
    found = {i: logits for i, logits, _ in answers(model, val, config(scenes, run), ALONE, RGB)}
    with torch.no_grad():
        image = torch.from_numpy(np.array(val.pair(0)[0]))
        assert_close({"x": found[0]}, {"x": model(image[None])[0]}, 1e-5)
        image = torch.from_numpy(np.array(val.pair(1)[0]))
        windows = [model(image[None, top : top + 20])[0] for top in (0, 13, 20)]
    total, counts = torch.zeros(4, 40, 20), torch.zeros(40, 1)
    for top, window in zip((0, 13, 20), windows, strict=True):
        total[:, top : top + 20] += window
        counts[top : top + 20] += 1
    assert_close({"x": found[1]}, {"x": total / counts}, 1e-5)
    image = val.pair(2)[0].resize((38, 20), Image.Resampling.BICUBIC)  # of 30 x 16
    with torch.no_grad():
        wide = torch.from_numpy(np.array(image))
        first = model(wide[None, :, :20])[0]
    small = F.interpolate(first[None], scale_factor=(1, 1), mode="bilinear")
    assert found[2].shape == (4, 16, 30)
    corner = F.interpolate(small, size=(16, 16), mode="bilinear")[0, :, :4, :4]
    assert (found[2][:, :4, :4] - corner).abs().max() < 0.2 * corner.abs().max()


def test_metrics_by_hand():
    """Four classes: one is partly right, one is predicted as another, one occurs only in predictions, one nowhere."""
    labels = torch.tensor([[0, 0, 0, 0], [1, 1, 255, 255]])
    guesses = torch.tensor([[0, 0, 0, 1], [1, 2, 2, 0]])
    logits = F.one_hot(guesses, 4).permute(2, 0, 1).float() * 50
    scores = Scores(4)
    scores.add(logits[:, :1], labels[:1])
    scores.add(logits[:, 1:], labels[1:])
    iou, accuracy = scores.of_classes()
    assert iou[:3].tolist() == pytest.approx([3 / 4, 1 / 3, 0])
    assert accuracy[:2].tolist() == pytest.approx([3 / 4, 1 / 2])
    assert iou.isnan().tolist() == [False, False, False, True]
    assert accuracy.isnan().tolist() == [False, False, True, True]
    figures = scores.figures(ALONE)
    assert figures["val_miou"] == pytest.approx(100 * (3 / 4 + 1 / 3) / 3)
    assert figures["val_acc"] == pytest.approx(100 * 4 / 6)
    assert figures["val_macc"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)
    assert figures["val_loss"] == pytest.approx(50 * 2 / 6)
    with pytest.raises(UserError, match="no labelled pixel"):
        Scores(4).figures(ALONE)


def test_scores_equal_torchmetrics():
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    torch.manual_seed(0)
    labels = torch.randint(0, 6, (9, 11))
    labels[:3, :4] = 255
    logits = torch.randn(8, 9, 11)
    logits[6] = -100  # 6 occurs nowhere, 7 only in predictions
    scores = Scores(8)
    scores.add(logits, labels)
    figures = scores.figures(ALONE)
    miou = MulticlassJaccardIndex(8, ignore_index=255)(logits[None], labels[None])
    assert figures["val_miou"] == pytest.approx(100 * miou.item(), rel=1e-6)
    accuracy = MulticlassAccuracy(8, average="micro", ignore_index=255)(logits[None], labels[None])
    assert figures["val_acc"] == pytest.approx(100 * accuracy.item(), rel=1e-6)
    recalls = MulticlassAccuracy(8, average="none", ignore_index=255)(logits[None], labels[None])
    assert figures["val_macc"] == pytest.approx(100 * recalls[:6].mean().item(), rel=1e-6)


def test_the_task_has_the_configured_parts(scenes, tmp_path):
    task = Segmentation(config(scenes, tmp_path, grad_checkpointing=True), ALONE)
    assert task.schedule == "linear"
    assert task.title == "vit_tiny_patch4 and UPerNet, 4 classes"
    assert task.model.net.grad_checkpointing
    assert task.model.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)
    assert task.model.head.fusion[0].in_channels == 4 * 8
    about = {"name": "segmentation", "encoder": "vit_tiny_patch4", "img_size": 20, "channels": 8}
    about["settings"] = vit.build("vit_tiny_patch4", img_size=20).settings()
    recorded = task.state.pop("preprocessing")
    assert (recorded["size"], recorded["resize"], recorded["channels"]) == ([20, 20], "shorter_side", 3)
    assert task.state == {"model": about, "classes": ["ground", "red [1]", "blue", "nowhere"]}
    images, labels = torch.zeros(2, 20, 20, 3, dtype=torch.uint8), torch.full((2, 20, 20), 2)
    batch = Batch(images, torch.empty(2, 0), torch.arange(2), labels)
    ours = task.inputs(batch, 0)
    assert ours[0] is images
    assert ours[1] is labels
    task.model.eval()
    assert torch.equal(task.loss(task.model, *ours), task.model.loss(images, labels))


def test_resuming_with_other_masks_is_an_error(run, scenes, tmp_path):
    """This holds for a changed mask in either split."""
    for split in ("train", "val"):
        data, copy = (shutil.copytree(of, tmp_path / split / name) for of, name in ((scenes, "scenes"), (run, "run")))
        mask = data / split / "masks" / "03.png"
        mask.write_bytes(mask.read_bytes() + b"\0")
        changed = config(data, copy, ema_decay=0.5)
        saved = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(saved | {"data_path": str(data)}))
        with pytest.raises(UserError, match="masks: masks with other names, sizes or classes"):
            segment(changed)


def test_frozen_encoder(scenes, tmp_path):
    """The head learns. The encoder does not change and has no gradients."""
    task = Segmentation(config(scenes, tmp_path, freeze_encoder=True), ALONE)
    optimizer = task.optimizer(1e-3, None)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = dict(task.model.named_parameters())
    assert trained == {id(p) for name, p in named.items() if not name.startswith("net.")}
    segment(config(scenes, tmp_path / "run", freeze_encoder=True, epochs=1, seed=3))
    torch.manual_seed(3)
    at_first = Segmentation(config(scenes, tmp_path, freeze_encoder=True, seed=3), ALONE).model.state_dict()
    saved = load_file(newest(tmp_path / "run") / "model.safetensors")
    for name, x in saved.items():
        assert torch.equal(x, at_first[name]) == name.startswith("net."), name


def test_it_starts_from_weights(scenes, tmp_path):
    from safetensors.torch import save_file

    from mae_fast.models.features import decode_arguments
    from mae_fast.models.mae import MaskedAutoencoderViT

    torch.manual_seed(5)
    mae = MaskedAutoencoderViT(**decode_arguments(TINY), decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    save_file(mae.state_dict(), tmp_path / "mae.safetensors")
    task = Segmentation(config(scenes, tmp_path, weights=str(tmp_path / "mae.safetensors")), ALONE)
    ours, theirs = task.model.net.state_dict(), mae.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "pos_embed")
    assert ours["pos_embed"].shape == (1, 26, 32)


def test_optimizer_steps_follow_a_line(run):
    """Without warm-up. The rate would be 0 after the last step."""
    rates = [entry["train_lr"] for entry in log(run) if "train_lr" in entry]
    assert rates == pytest.approx([2e-3 * (1 - step / 9) for step in range(9)])


def test_pictures_show_image_label_and_prediction(scenes, tmp_path):
    """Each row has an image, its label and its prediction. The training loop sends the picture to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"input_size": 40, "epochs": 1, "save_every": 100}
    segment(config(scenes, tmp_path / "run", log_dir=tmp_path / "board", **changes))
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    [tag] = board.Tags()["images"]
    assert [picture.step for picture in board.Images(tag)] == [3]
    task = Segmentation(config(scenes, tmp_path, **changes), ALONE)
    for module in task.model.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    task.model.head.classifier.bias.data = torch.tensor([0.0, 0.0, 0.0, 1.0])
    modes = []
    task.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    picture = np.asarray(task.drawing()())
    assert modes == [False]  # drop path would change the picture
    assert task.model.training
    scale = picture.shape[1] // 120
    assert picture.shape == (4 * 40 * scale, 3 * 40 * scale, 3)
    picture = picture[::scale, ::scale].astype(int)
    _, val = open_segmentation(scenes)
    small = val.pair(0)[0].resize((40, 40), Image.Resampling.BICUBIC)
    assert np.abs(picture[:40, :40] - np.asarray(small)).max() <= 1
    from mae_fast.data.segmentation import colours

    truth = np.array(Image.fromarray(val.pair(4)[1]).resize((40, 40), Image.Resampling.NEAREST))
    assert np.array_equal(picture[120:, 40:80], colours(torch.from_numpy(truth)))
    assert (picture[:, 80:] == colours(torch.tensor(3)).numpy()).all()


def test_bad_pairs_are_counted(scenes, tmp_path, caplog):
    data = shutil.copytree(scenes, tmp_path / "scenes")
    (data / "train" / "masks" / "02.png").write_bytes(b"no mask")
    Image.fromarray(np.full((20, 20), 9, np.uint8)).save(data / "val" / "masks" / "00.png")
    (data / "val" / "masks" / "04.png").unlink()
    segment(config(data, tmp_path / "run", max_bad_fraction=0.5))
    told = caplog.text
    drawn = Segmentation(config(data, tmp_path), ALONE).drawing()()
    assert drawn.height * 3 == drawn.width * 3  # the first of four pairs is bad
    assert "skipped '02.jpg' (not an image: mask 02.png: no known image format)" in told
    assert "skipped '00.jpg' (unsupported: mask 00.png: no class has value 9, there are 4 classes)" in told
    assert "val/images: left out 1 images without a mask" in told
    entries = log(tmp_path / "run")
    assert [entry["skipped"] for entry in entries if "skipped" in entry][-1] == 1
    assert entries[-1]["val_miou"] > 0
    with pytest.raises(UserError, match=r"cannot be used, more than the allowed 1\.0%"):
        segment(config(data, tmp_path / "strict"))


def test_evaluate_logs_and_predicts(run, scenes, tmp_path, caplog):
    caplog.set_level("INFO", "mae_fast")
    folder = tmp_path / "predictions"
    figures = evaluate(config(scenes, run, predictions=folder, eval_only=True))
    assert figures == pytest.approx({k: v for k, v in log(run)[-1].items() if k in figures}, rel=1e-5)
    out = caplog.text
    assert f"val_miou {figures['val_miou']:.4g}" in out
    assert ", of 5 images" in out
    assert f"wrote 5 masks to {folder}" in out
    _, val = open_segmentation(scenes)
    _, model = of_run(run, False, SEGMENTATION, "segment")
    scores = Scores(4)
    for i, logits, labels in answers(model, val, config(scenes, run), ALONE, RGB):
        scores.add(logits, labels)
        with Image.open(folder / f"{i:02}.png") as image:
            assert image.mode == "L"
            assert np.array_equal(image, logits.argmax(0))
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in out.splitlines() if line.count("│") > 3}
    iou, accuracy = scores.of_classes()
    shares = scores.confusion.sum(1) / scores.confusion.sum()
    for i, name in enumerate(("ground", "red [1]", "blue")):
        expected = [f"{100 * x:.1f}" for x in (iou[i], accuracy[i], shares[i])]
        assert [cell.strip() for cell in rows[name]] == expected
    assert rows["nowhere"][1].strip() == "-"
    assert len(list(folder.iterdir())) == 5 + 1
    assert (folder / "classes.txt").read_text() == (scenes / "classes.txt").read_text()
    with pytest.raises(UserError, match=r"--input-size 64: the evaluated run .* has"):
        evaluate(config(scenes, run, input_size=64, eval_only=True))
    with pytest.raises(UserError, match="already exists; give a new folder"):
        evaluate(config(scenes, run, predictions=folder, eval_only=True))
    averaged = evaluate(config(scenes, run, ema=True, eval_only=True))
    assert averaged["val_loss"] == pytest.approx(log(run)[-1]["val_loss_ema"], rel=1e-5)


def test_evaluation_matches_classes_by_name(run, scenes, tmp_path):
    """Masks may have other class indices and lack classes. Predictions have the indices of the masks."""
    data = shutil.copytree(scenes, tmp_path / "scenes")
    (data / "classes.txt").write_text("blue\nground\nred [1]\n")
    for split in ("train", "val"):
        for path in (data / split / "masks").iterdir():
            values = np.asarray(Image.open(path)).astype(int)
            Image.fromarray(np.select([values == 255, values == 2], [255, 0], values + 1).astype(np.uint8)).save(path)
    whole = evaluate(config(scenes, run, predictions=tmp_path / "before", eval_only=True))
    moved = evaluate(config(data, run, predictions=tmp_path / "after", eval_only=True))
    assert moved == pytest.approx(whole)
    names = {}
    for name in ("before", "after"):
        listed = np.array((tmp_path / name / "classes.txt").read_text().splitlines())
        assert len(listed) == 4
        names[name] = listed[np.asarray(Image.open(tmp_path / name / "03.png"))]
    assert np.array_equal(names["before"], names["after"])


def test_evaluate_refuses_other_runs_and_classes(run, scenes, tmp_path, labelled_images):
    with pytest.raises(UserError, match="no usable checkpoint"):
        evaluate(config(scenes, tmp_path))
    data = shutil.copytree(scenes, tmp_path / "scenes")
    (data / "classes.txt").write_text("ground\nred\nblue\nnowhere\n")
    with pytest.raises(UserError, match=r"val/masks has classes that .*run does not have: red; .* 4 classes: ground, "):
        evaluate(config(data, run))
    from mae_fast.training.config import FINETUNE_PRESETS, FinetuneConfig
    from mae_fast.training.tasks.classify import finetune

    small = {"data_path": labelled_images, "output_dir": tmp_path / "other", "epochs": 1, "warmup_epochs": 0,
             "batch_size": 72, "num_workers": 0, "device": "cpu", "image_decoder": "pil"}  # fmt: skip
    finetune(FinetuneConfig(**{**FINETUNE_PRESETS["tiny"], **small}))
    with pytest.raises(UserError, match="is a run of vit_tiny_patch4; give a run of 'mae-fast segment'"):
        of_run(tmp_path / "other", False, SEGMENTATION, "segment")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": True}, "--cache does not support images with masks; leave it out"),
        ({"image_decoder": "dali"}, "--image-decoder dali does not support images with masks or objects; leave it out"),
        ({"crops_per_image": 2}, "--crops-per-image 2"),
        ({"batch_size": 1}, "--batch-size 1: batch norms need at least 2 images in each process"),
        ({"model": "mae_vit_tiny_patch4"}, "--model mae_vit_tiny_patch4 is unknown; known are"),
    ],
    ids=["cache", "dali", "repeats", "batch", "model"],
)
def test_impossible_settings_are_errors(scenes, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        segment(config(scenes, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def words(scenes, run, **changes):
    flags = {"data-path": scenes, "output-dir": run, "input-size": 20, "epochs": 2, "warmup-epochs": 0} | {
        "batch-size": 4, "head-channels": 8, "log-every": 1, "num-workers": 0, "dtype": "fp32", "device": "cpu",
    }  # fmt: skip
    return ["segment", "--preset", "tiny", *(f"--{name}={value}" for name, value in (flags | changes).items())]


def test_the_command(scenes, tmp_path, monkeypatch, capsys):
    line = words(scenes, tmp_path / "run")
    told = command(monkeypatch, capsys, *line)
    assert told.returncode == 0, told.stderr
    assert "vit_tiny_patch4 and UPerNet, 4 classes, 12 images, 2 epochs = 6 steps of 4 images" in told.stdout
    assert "decoded by pil" in told.stdout
    assert "epoch 2: val_loss " in told.stdout
    told = command(monkeypatch, capsys, *line, "--eval-only", "--predictions", tmp_path / "masks")
    assert told.returncode == 0, told.stderr
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
        *(f"{i:02}.png" for i in range(5)),
        "classes.txt",
    ]
    told = command(monkeypatch, capsys, *line, "--predictions", tmp_path / "masks")
    assert told.returncode == 2
    told = command(monkeypatch, capsys, "knn", tmp_path / "run", "--data-path", scenes)
    assert told.returncode == 2
    assert "segmentation" in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_two_processes_train_together(scenes, tmp_path, monkeypatch, strategy):
    """Metrics equal those of one process with the same weights, also for averaged weights. Five images are split in
    three and two. On a CPU, batch norms use only the images of their process, so weights differ from one process."""
    same = {"ema-decay": 0.5, "batch-size": 2}
    two = words(scenes, tmp_path / "two", **same, strategy=strategy)
    options = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    line = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "mae_fast", *two]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = log(tmp_path / "two")
    losses = [entry["train_loss"] for entry in entries if "train_loss" in entry]
    assert len(losses) == 6
    logged = [entry for entry in entries if "val_miou" in entry][-1]
    monkeypatch.setitem(VIT_CONFIGS, "vit_tiny_patch4", WHOLE)  # as in other processes
    for ema in (False, True):
        figures = evaluate(config(scenes, tmp_path / "two", batch_size=2, ema=ema, eval_only=True))
        for name, value in figures.items():
            assert logged[f"{name}_ema" if ema else name] == pytest.approx(value, rel=1e-4), name


def test_ade20k_predictions_have_its_values(tmp_path):
    """The values are 1 to 150, as in its annotations."""
    rng = np.random.default_rng(1)
    for split, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            image, mask = scene(rng, 20, 20)
            Image.fromarray(image).save(tmp_path / "images" / split / f"{i}.jpg")
            Image.fromarray(mask + np.uint8(148)).save(tmp_path / "annotations" / split / f"{i}.png")
    run = tmp_path / "run"
    segment(config(tmp_path, run, epochs=1, lr=1e-2))
    evaluate(config(tmp_path, run, predictions=tmp_path / "made", eval_only=True))
    found, model = of_run(run, False, SEGMENTATION, "segment")
    classes = found.state["classes"]
    assert len(classes) == 150
    _, val = open_segmentation(tmp_path)
    for i, logits, _ in answers(model, val, config(tmp_path, run), ALONE, RGB):
        with Image.open(tmp_path / "made" / f"{i}.png") as image:
            assert np.array_equal(image, logits.argmax(0) + 1)
