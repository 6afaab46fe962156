"""Evaluation during pre-training: its metrics are correct, and it does not affect training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT
from types import SimpleNamespace
from typing import Any

import launch
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mae_fast.data.loader import LoaderConfig, evaluation_batches
from mae_fast.data.rng import mask_noise
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError
from mae_fast.evaluation.knn import KnnOptions, knn
from mae_fast.evaluation.logistic import fit_logistic
from mae_fast.training import progress
from mae_fast.training.config import PretrainConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.run_dir import PLACE
from mae_fast.training.tasks import load_model
from mae_fast.training.tasks.online_eval import OnlineEvaluation
from mae_fast.training.tasks.pretrain import Pretraining, pretrain
from mae_fast.weights import run_reader

EVALUATED = {"val_loss": True, "online_eval": "knn"}
SMALL = {"depth": 1, "decoder_depth": 1, "epochs": 2, "warmup_epochs": 0, "batch_size": 8, "num_workers": 0}
TIMING = ("images_per_s", "waiting")


def run_of(images: Path, run: Path, **flags: Any) -> Path:
    fixed = {"device": "cpu", "dtype": "fp32", "image_decoder": "pil", "log_every": 1, "ema_decay": 0.9, **SMALL}
    pretrain(PretrainConfig.with_preset("tiny", data_path=images, output_dir=run, **{**fixed, **flags}))
    return run


def task_of(images: Path, run: Path, **flags: Any) -> Pretraining:
    fixed = {"data_path": images, "output_dir": run, "device": "cpu", "dtype": "fp32", **SMALL}
    return Pretraining(PretrainConfig.with_preset("tiny", **{**fixed, **flags}), DistContext(torch.device("cpu")))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    path = run_reader.find_checkpoint(run).path
    names = (run_reader.MODEL, run_reader.OPTIM, run_reader.EMA)
    return {f"{file} {name}": x for file in names for name, x in load_file(path / file).items()}


def lines(run: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in TIMING} for line in read]


def losses(run: Path) -> list[float]:
    return [line["train_loss"] for line in lines(run) if "train_loss" in line]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "train_loss" not in line]


def assert_same_training(run: Path, other: Path) -> None:
    ours, theirs = tensors(run), tensors(other)
    assert losses(run) == losses(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def unwatched(labelled_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(labelled_images, tmp_path_factory.mktemp("unwatched") / "run")


@pytest.fixture(scope="module")
def shuffled(labelled_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled images with random classes, so that every image affects the accuracy."""
    folder, rng = tmp_path_factory.mktemp("shuffled"), np.random.default_rng(1)
    for split in ("train", "val"):
        for i, path in enumerate(sorted((labelled_images / split).rglob("*.jpg"))):
            place = folder / split / "xyz"[rng.integers(3)] / f"{i}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    return folder


@pytest.fixture(scope="module")
def watched(labelled_images: Path, shuffled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    flags = {"eval_data": shuffled, "log_dir": folder / "board", "keep_best": "val_acc1", **EVALUATED}
    return run_of(labelled_images, folder / "run", **flags)


def test_evaluation_changes_nothing_in_training(unwatched: Path, watched: Path) -> None:
    assert_same_training(watched, unwatched)
    names = {*PLACE, "val_loss", "val_acc1", "val_loss_ema", "val_acc1_ema"}
    assert [line.keys() for line in metrics(watched)] == [names, names]
    assert [line["step"] for line in metrics(watched)] == [9, 18]


def test_the_loss_uses_fixed_masks(labelled_images: Path, tmp_path: Path) -> None:
    """In batches of 5, 5, 5, 5 and 4 images, over all removed patches."""
    task = task_of(labelled_images, tmp_path, batch_size=5, val_loss=True, predict_ratio=0.5)
    val = open_source(labelled_images, "val")
    evaluate = task.evaluation()
    assert evaluate is not None
    batch = next(evaluation_batches(val, LoaderConfig(size=(32, 32), batch_size=len(val))))
    noise = np.stack([mask_noise(0, 0, i, 64) for i in range(len(val))])
    with torch.no_grad():
        expected = task.model(batch.images, 0.75, torch.from_numpy(noise))[0].item()
    assert evaluate() == {"val_loss": pytest.approx(expected, rel=1e-5)}


def test_the_accuracies_equal_those_of_separate_evaluations(shuffled: Path, watched: Path, tmp_path: Path) -> None:
    for line, ema in (("val_acc1", False), ("val_acc1_ema", True)):
        top1 = knn(str(watched), shuffled, options=KnnOptions(device="cpu"), ema=ema).top1
        assert metrics(watched)[-1][line] == pytest.approx(100 * top1)
        assert top1 < 0.8
    run = run_of(shuffled, tmp_path / "run", online_eval="linear", eval_every=2, ema_decay=None)
    assert [line["val_acc1"] for line in metrics(run)] == [pytest.approx(linear_accuracy(run, shuffled))]


def linear_accuracy(run: Path, images: Path) -> float:
    model, found = load_model(run), []
    for split in ("train", "val"):
        source = open_source(images, split)
        batch = next(evaluation_batches(source, LoaderConfig(size=(32, 32), batch_size=len(source))))
        with torch.no_grad():
            found += [model.forward_features(batch.images, pool="mean"), batch.labels]
    features, labels, queries, truth = found
    return 100 * (fit_logistic(features, labels, 3).predict(queries) == truth).float().mean().item()


def test_trackers_and_the_best_checkpoint_use_the_metrics(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(watched.parent / "board")).Reload()
    for name in ("val_loss", "val_acc1", "val_loss_ema", "val_acc1_ema"):
        assert [event.step for event in board.Scalars(name)] == [9, 18], name
    best = run_reader.read_checkpoint(watched / "checkpoints" / "best").state["best"]
    assert best["metric"] == "val_acc1"
    assert best["value"] == max(line["val_acc1"] for line in metrics(watched))


def test_evaluation_does_not_change_the_random_state(labelled_images: Path, tmp_path: Path) -> None:
    """This includes the start of worker processes, which draws from torch's generator."""
    task = task_of(labelled_images, tmp_path, num_workers=1, **EVALUATED)
    before, weights = torch.get_rng_state(), {name: x.clone() for name, x in task.model.state_dict().items()}
    evaluate = task.evaluation()
    assert evaluate is not None
    assert evaluate() == evaluate()
    assert torch.get_rng_state().equal(before)
    assert all(x.equal(weights[name]) for name, x in task.model.state_dict().items())
    assert all(p.grad is None for p in task.model.parameters())


def test_a_process_without_images_takes_part_with_its_shards(labelled_images: Path, tmp_path: Path) -> None:
    """It runs the model on a blank image, which does not count."""
    flags = {"data_path": labelled_images, "output_dir": tmp_path, "strategy": "fsdp", **SMALL, **EVALUATED}
    dist = DistContext(torch.device("cpu"), rank=30, world=31)
    evaluation, seen = OnlineEvaluation(PretrainConfig.with_preset("tiny", **flags), dist), []
    loader = LoaderConfig(size=(32, 32), batch_size=8, rank=dist.rank, world=dist.world)

    def loss(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape)
        return images.sum(dtype=torch.float32)

    assert evaluation.val is not None
    with pytest.raises(
        UserError, match=r"no image of .*val can be used"
    ):  # there are 24, the first processes have them
        evaluation.mean_loss(evaluation.val, loss, loader)
    assert seen == [(1, 32, 32, 3)]


def launched(images: Path, run: Path, shuffled: Path, **changes: object) -> list[str]:
    small = {name.replace("_", "-"): value for name, value in SMALL.items()}
    return [
        *launch.words(images, run, **{**small, **changes}),
        "--val-loss",
        "--online-eval=knn",
        f"--eval-data={shuffled}",
    ]


@pytest.mark.parametrize("moment", ["epoch 1: val_acc1", "step 18/18"])
def test_a_killed_run_resumes_bit_for_bit(
    labelled_images: Path, shuffled: Path, watched: Path, tmp_path: Path, moment: str
) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    line = launched(labelled_images, run, shuffled)
    process = launch.start(line, output)
    launch.until(output, lambda text: moment in text, process)
    process.kill()
    launch.join(process)
    launch.finish(line, output)
    assert_same_training(run, watched)
    assert lines(run) == lines(watched)


def two_processes(line: list[str], kill_at: str | None = None) -> None:
    """Run two processes by ``torchrun`` to the end, or until they print ``kill_at`` and are killed."""
    starter = ("torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    words = [sys.executable, "-m", *starter, "-m", "mae_fast", *line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, stdout=PIPE, stderr=STDOUT, text=True) as process:
        assert process.stdout is not None
        read: list[str] = []
        for text in process.stdout:
            read.append(text)
            if kill_at and kill_at in text:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for child in (*map(int, children), process.pid):
                    os.kill(child, signal.SIGKILL)
    assert kill_at or process.returncode == 0, "".join(read)
    assert not kill_at or process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_evaluate_together(
    labelled_images: Path, shuffled: Path, watched: Path, tmp_path: Path, strategy: str
) -> None:
    """Two processes are killed in the second epoch and resumed. The weights equal those of a run without evaluation,
    and the metrics those of a single process."""
    two = {"batch-size": 4, "strategy": strategy, "save-every": 4}
    two_processes(launched(labelled_images, tmp_path / "plain", shuffled, **two)[:-3])
    line = launched(labelled_images, tmp_path / "run", shuffled, **two)
    two_processes(line, kill_at="step 14/18")
    assert len(metrics(tmp_path / "run")) == 1
    two_processes(line)
    assert_same_training(tmp_path / "run", tmp_path / "plain")
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(watched), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16-bit images of two classes with five bands, each with a missing corner."""
    folder, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for label, name in enumerate(("bare", "green")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(900, 1100, (40, 48, 5)).astype(np.uint16)
                pixels[:, :, 1] += 1500 * label
                pixels[:4, :4] = 60000
                np.save(folder / split / name / f"{i}.npy", pixels)
    return folder


def test_bands_of_16_bits_are_evaluated(scenes: Path, tmp_path: Path) -> None:
    run = run_of(scenes, tmp_path / "run", bands="4,2", nodata=60000, ema_decay=None, **EVALUATED)
    last = metrics(run)[-1]
    assert 0 < last["val_loss"] < 3
    assert last["val_acc1"] == 100 * knn(str(run), scenes, options=KnnOptions(device="cpu")).top1 > 80


def test_images_without_labels_train_with_labelled_evaluation_data(
    images: Path, labelled_images: Path, tmp_path: Path
) -> None:
    run = run_of(images, tmp_path / "run", eval_data=labelled_images, ema_decay=None, **EVALUATED)
    assert [line.keys() for line in metrics(run)] == [{*PLACE, "val_loss", "val_acc1"}] * 2
    run_of(images, run, epochs=2, ema_decay=None)  # a resumed run need not evaluate


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        ({"val_loss": True}, r"image folder .*val does not exist", "train/ and val/"),
        ({"online_eval": "knn"}, r"--online-eval knn: .*val|--online-eval knn: .*train", "--eval-data"),
        (
            {"eval_data": Path("x")},
            "--eval-data and --eval-every require --val-loss",
            "add --val-loss or --online-eval",
        ),
        ({"eval_every": 2}, "--eval-data and --eval-every require --val-loss", "add --val-loss or --online-eval"),
        (
            {"keep_best": "val_loss", "online_eval": "knn", "eval_data": "labelled"},
            "is not a metric of this run",
            "val_acc1",
        ),
    ],
)
def test_wrong_flags_are_errors(
    images: Path, labelled_images: Path, tmp_path: Path, flags: dict[str, Any], message: str, hint: str
) -> None:
    if flags.get("eval_data") == "labelled":
        flags = {**flags, "eval_data": labelled_images}
    with pytest.raises(UserError, match=message) as caught:
        run_of(images, tmp_path / "run", **flags)
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


def test_rates_leave_out_evaluations(labelled_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation takes 1000 s by a patched clock."""
    late, clock, evaluate = [0.0], time.perf_counter, OnlineEvaluation.__call__

    def slow(*arguments: Any) -> dict[str, Any]:
        late[0] += 1000
        return evaluate(*arguments)

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock() + late[0]))
    monkeypatch.setattr(OnlineEvaluation, "__call__", slow)
    run = run_of(labelled_images, tmp_path / "run", val_loss=True)
    rates = [json.loads(x).get("images_per_s") for x in (run / "log.jsonl").read_text().splitlines()]
    assert late[0] >= 2000
    assert min(x for x in rates if x is not None) > 1
