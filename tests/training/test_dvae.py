"""Training of a discrete VAE: learning, exact resuming, metrics by hand, and errors of other verbs on its runs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import command, one_thread  # noqa: F401

from mae_fast.data.loader import Batch, centred_image
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError
from mae_fast.models.targets.dvae import DVAE
from mae_fast.training import trainer as loop
from mae_fast.training.config import DVAE_PRESETS, DvaeConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.tasks.dvae import DvaeTraining, load_tokenizer, train_dvae

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = DistContext(torch.device("cpu"))


def config(images, run, **changes):
    """Three epochs of three steps of 24 images."""
    small = {"data_path": images, "output_dir": run, "epochs": 3, "warmup_epochs": 0, "batch_size": 24, "hidden": 8,
             "vocab_size": 32, "anneal_epochs": 2, "input_size": 16, "save_every": 2, "log_every": 1, "num_workers": 0,
             "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "lr": 3e-3, "kl_weight": 6.6}  # fmt: skip
    return DvaeConfig(**{**DVAE_PRESETS["tiny"], **small, **changes})


def log(run):
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("images_per_s", "waiting")} for entry in entries]


def newest(run):
    return sorted((run / "checkpoints").glob("step-*"))[-1]


@pytest.fixture(scope="module")
def run(labelled_images, tmp_path_factory):
    """A finished run."""
    path = tmp_path_factory.mktemp("run") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in all tests: the bits depend on it
    train_dvae(config(labelled_images, path))
    torch.set_num_threads(threads)
    return path


def test_a_resumed_run_is_identical(run, labelled_images, tmp_path, caplog):
    original = loop.Progress.update

    def stop(progress, step, *rest):
        original(progress, step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Progress, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            train_dvae(config(labelled_images, parts))
    assert newest(parts).name == "step-00000004"
    caplog.clear()
    train_dvae(config(labelled_images, parts))
    assert f"resuming {parts} at step 4 of 9" in caplog.text
    assert log(parts) == log(run)
    for name in ("model", "optim"):
        ours, theirs = (load_file(newest(path) / f"{name}.safetensors") for path in (parts, run))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_it_learns_more_than_the_mean_colour(labelled_images, tmp_path):
    """The error is below the variance of the images, that of their mean colour, and several codes are used."""
    changes = {"lr": 1e-2, "kl_weight": 1.0, "epochs": 60, "anneal_epochs": 60, "hidden": 16}
    train_dvae(config(labelled_images, tmp_path, **changes))
    entries = log(tmp_path)
    losses = [entry["train_loss"] for entry in entries if "train_loss" in entry]
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.2
    source = open_source(labelled_images / "val")
    images = torch.stack([centred_image(source, i, (16, 16)) for i in range(len(source))]).float() / 255
    constant = (images - images.mean((0, 1, 2))).square().mean().item()
    last = entries[-1]
    assert last["val_mse"] < 0.6 * constant
    assert last["val_codes"] >= last["val_perplexity"] > 3


def test_metrics_by_hand(run, labelled_images):
    """The last line of the log has the metrics of the last checkpoint."""
    model = DVAE(vocab_size=32, hidden=8, groups=3)
    model.load_state_dict(load_file(newest(run) / "model.safetensors"))
    source = open_source(labelled_images / "val")
    from batches import evaluation_batches

    batches = evaluation_batches(source, size=(16, 16), channels=3, batch_size=5)
    pixels = torch.cat([batch.images for batch in batches]).permute(0, 3, 1, 2).float() / 255
    assert len(pixels) == 24
    with torch.no_grad():
        made, tokens = model(pixels)
    shares = np.unique(tokens.numpy(), return_counts=True)[1] / tokens.numel()
    evaluated = [entry for entry in log(run) if "val_mse" in entry]
    assert [entry["step"] for entry in evaluated] == [3, 6, 9]
    last = evaluated[-1]
    assert last["val_mse"] == pytest.approx(float((made - pixels).square().mean()), rel=1e-4)
    assert last["val_codes"] == len(shares)
    assert last["val_perplexity"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_the_tokenizer_of_a_run_loads(run):
    for path in (run, newest(run), newest(run) / "model.safetensors"):
        found = load_tokenizer(path)
        assert found.config == {"vocab_size": 32, "hidden": 8, "groups": 3, "blocks_per_group": 2, "in_chans": 3}
        saved = load_file(newest(run) / "model.safetensors")
        assert all(torch.equal(x, saved[f"encoder.{name}"]) for name, x in found.state_dict().items())
    assert json.loads((newest(run) / "state.json").read_text())["model"]["name"] == "dvae"


def test_a_damaged_checkpoint_is_skipped(run, tmp_path, caplog):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    damaged = newest(copy) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    found = load_tokenizer(copy)
    assert "skipped damaged checkpoint" in caplog.text
    before = load_file(copy / "checkpoints" / "step-00000008" / "model.safetensors")
    assert all(torch.equal(x, before[f"encoder.{name}"]) for name, x in found.state_dict().items())


def test_temperature_follows_half_a_cosine(labelled_images, tmp_path):
    """It falls over two epochs of three steps. The micro-batches of a step have the same temperature."""
    changes = {"temperature_start": 1.0, "temperature_end": 0.2, "batch_size": 12, "accum_iter": 2}
    task = DvaeTraining(config(labelled_images, tmp_path, **changes), ALONE)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)] + [0.2] * 3
    batch = Batch(torch.zeros(12, 16, 16, 3, dtype=torch.uint8), torch.empty(12, 0), torch.arange(12))
    got = [float(task.inputs(batch, micro)[1]) for micro in range(18)]
    assert got == pytest.approx([x for x in expected for _ in range(2)])
    task = DvaeTraining(config(labelled_images, tmp_path, anneal_epochs=0, temperature_end=0.3), ALONE)
    assert task.temperature(0) == 0.3


def test_noise_depends_only_on_seed_step_and_rank(labelled_images, tmp_path):
    """It does not depend on earlier random numbers, and differs between steps, processes and seeds."""
    batch = Batch(torch.full((4, 16, 16, 3), 200, dtype=torch.uint8), torch.empty(4, 0), torch.arange(4))
    tasks = {
        "ours": DvaeTraining(config(labelled_images, tmp_path), ALONE),
        "rank": DvaeTraining(config(labelled_images, tmp_path, batch_size=12), DistContext(ALONE.device, 1, 2)),
        "seed": DvaeTraining(config(labelled_images, tmp_path, seed=1), ALONE),
    }

    def loss(task, micro_step):
        task.model.load_state_dict(tasks["ours"].model.state_dict())
        torch.rand(3)
        return float(task.loss(task.model, task.inputs(batch, micro_step)[0], torch.tensor(0.5)).detach())

    first = loss(tasks["ours"], 7)
    assert loss(tasks["ours"], 7) == first
    assert len({first, loss(tasks["ours"], 8), loss(tasks["rank"], 7), loss(tasks["seed"], 7)}) == 4


def test_kl_weight_and_pixels_reach_the_loss(labelled_images, tmp_path):
    task = DvaeTraining(config(labelled_images, tmp_path, kl_weight=4.0), ALONE)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    pixels, temperature = task.inputs(Batch(images, torch.empty(4, 0), torch.arange(4)), 0)
    assert torch.equal(pixels, images.permute(0, 3, 1, 2) / 255)
    torch.manual_seed(0)
    got = task.loss(task.model, pixels, temperature)
    torch.manual_seed(0)
    assert torch.equal(got, task.model.loss(pixels, 1.0, 4.0))


def test_optimizer_has_the_settings_of_the_paper(labelled_images, tmp_path):
    task = DvaeTraining(config(labelled_images, tmp_path, weight_decay=0.01), ALONE)
    optimizer = task.optimizer(1e-3, torch.bfloat16)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in task.model.named_parameters():
        group = groups.pop(id(p))
        assert group["weight_decay"] == (0.01 if name.endswith(".w") else 0.0), name
        assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.999))
    assert not groups


def test_checkpointed_blocks_give_the_same_run(run, labelled_images, tmp_path):
    train_dvae(config(labelled_images, tmp_path, grad_checkpointing=True))
    assert log(tmp_path) == log(run)


def test_images_without_val_and_its_pictures(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_dvae(config(images, tmp_path / "run", epochs=2, anneal_epochs=0, log_dir=tmp_path / "board"))
    assert not any("val_mse" in entry for entry in log(tmp_path / "run"))
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    pictures = board.Images("reconstructions")
    assert [picture.step for picture in pictures] == [2]
    assert min(pictures[0].width, pictures[0].height) >= 4 * 16


@pytest.mark.parametrize("damaged", ["one", "all"])
def test_bad_images_of_val(labelled_images, tmp_path, damaged):
    folder = tmp_path / "images"
    shutil.copytree(labelled_images, folder)
    for path in sorted((folder / "val").rglob("*.jpg"))[: 1 if damaged == "one" else None]:
        path.write_bytes(b"no image")
    small = config(folder, tmp_path / "run", epochs=1, anneal_epochs=1, max_bad_fraction=1.0)
    if damaged == "one":
        train_dvae(small)
        assert log(tmp_path / "run")[-1]["val_mse"] > 0
    else:
        with pytest.raises(UserError, match="no image of val/ can be used"):
            train_dvae(small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 30}, "--input-size 30 is not a multiple of 4.*; use --input-size 28"),
        ({"input_size": 3}, "use --input-size 4"),
        ({"hidden": 30}, "--hidden 30 is invalid; input should be a multiple of 4"),
        ({"vocab_size": 1}, "--vocab-size 1"),
        ({"temperature_end": 0.0}, "--temperature-end 0.0"),
    ],
)
def test_impossible_settings_are_errors(labelled_images, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_dvae(config(labelled_images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_command(labelled_images, tmp_path, monkeypatch, capsys):
    words = ["train-dvae", "--preset", "tiny", "--data-path", labelled_images, "--output-dir", tmp_path / "run"]
    words += [
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--hidden",
        8,
        "--num-workers",
        0,
        "--image-decoder",
        "pil",
        "--device",
        "cpu",
    ]
    told = command(monkeypatch, capsys, *words)
    assert told.returncode == 0, told.stderr
    assert "dVAE of 256 codes, 72 images, 1 epochs = 4 steps of 16 images" in told.stdout
    assert "epoch 1: val_mse " in told.stdout
    assert load_tokenizer(tmp_path / "run").config["hidden"] == 8
    told = command(monkeypatch, capsys, *words, "--resume", "x")
    assert told.returncode == 2
    assert told.stderr.endswith("a run resumes when its command is run again\nhint: leave the flag out\n")


VERBS = {
    "reconstruct": ["{run}", "--images", "{data}", "--output", "{out}.png"],
    "logreg-probe": ["{run}", "--data-path", "{data}"],
    "knn": ["{run}", "--data-path", "{data}"],
    "convert": ["{run}", "{out}.safetensors", "--to", "timm"],
    "export": ["{run}", "{out}.pt2", "--what", "encoder"],
    "finetune": ["--preset", "tiny", "--data-path", "{data}", "--output-dir", "{out}", "--weights", "{run}"],
    "linprobe": ["--preset", "tiny", "--data-path", "{data}", "--output-dir", "{run}", "--eval-only"],
    "pretrain": ["--preset", "tiny", "--data-path", "{data}", "--output-dir", "{run}"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_other_verbs_refuse_a_run_of_train_dvae(run, labelled_images, tmp_path, monkeypatch, capsys, verb):
    words = [word.format(run=run, data=labelled_images, out=tmp_path / "out") for word in VERBS[verb]]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    told = command(monkeypatch, capsys, verb, *words)
    assert told.returncode == 2
    assert told.stderr.count("\n") == 2
    assert str(run) in told.stderr
    assert "dvae" in told.stderr or "is a run of train-dvae" in told.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def test_runs_of_other_models_are_not_tokenizers(images, tmp_path):
    from mae_fast.training.config import PRESETS, PretrainConfig
    from mae_fast.training.tasks.pretrain import pretrain

    small = {
        "epochs": 1,
        "warmup_epochs": 0,
        "batch_size": 40,
        "num_workers": 0,
        "image_decoder": "pil",
        "device": "cpu",
    }
    pretrain(PretrainConfig(**{**PRESETS["tiny"], **small, "data_path": images, "output_dir": tmp_path / "mae"}))
    with pytest.raises(UserError, match="is a run of mae_vit_tiny_patch4; give a run of 'mae-fast train-dvae'"):
        load_tokenizer(tmp_path / "mae")
    with pytest.raises(UserError, match=r"is not a dVAE encoder") as caught:
        load_tokenizer(newest(tmp_path / "mae") / "model.safetensors")
    for name in ('"blocks.input.w"', '"blocks.output.conv.b"', '"cls_token"', '"blocks.0.attn.qkv.weight"'):
        assert name in str(caught.value)
