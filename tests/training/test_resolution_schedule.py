"""Runs with ``--resolution-schedule``: their stages, steps and learning rates, and exact resuming."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mae_fast.data.loader import LoaderConfig, training_batches
from mae_fast.data.masks import sampler
from mae_fast.data.sources import open_source
from mae_fast.doctor.debug_step import debug_step
from mae_fast.doctor.preflight import preflight
from mae_fast.errors import UserError
from mae_fast.models.mae import MaskedAutoencoderViT
from mae_fast.training import trainer as module
from mae_fast.training.config import PretrainConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.plan import Plan
from mae_fast.training.tasks.pretrain import Pretraining, pretrain
from mae_fast.weights import run_reader

# With 72 images, the epochs have 4, 9 and 18 steps.
SCHEDULE = "16:0.4:16,24x16:0.2,32:0.4:4"
SMALL = {
    "depth": 1, "decoder_depth": 1, "epochs": 5, "warmup_epochs": 1, "batch_size": 8, "num_workers": 0, "lr": None,
    "blr": 0.01,
}  # fmt: skip
FIXED = {"device": "cpu", "dtype": "fp32", "image_decoder": "pil", "log_every": 1, "ema_decay": 0.9}
STEPS = 2 * 4 + 9 + 2 * 18


def config_of(images: Path, run: Path, **flags: Any) -> PretrainConfig:
    fixed = {"data_path": images, "output_dir": run, "resolution_schedule": SCHEDULE, **SMALL, **FIXED}
    return PretrainConfig.with_preset("tiny", **{**fixed, **flags})


def run_of(images: Path, run: Path, **flags: Any) -> Path:
    pretrain(config_of(images, run, **flags))
    return run


def lines(run: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("images_per_s", "waiting")} for line in read]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    path = run_reader.find_checkpoint(run).path
    names = (run_reader.MODEL, run_reader.OPTIM, run_reader.EMA)
    return {f"{file} {name}": x for file in names for name, x in load_file(path / file).items()}


def assert_same(run: Path, other: Path) -> None:
    ours, theirs = tensors(run), tensors(other)
    assert lines(run) == lines(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def plan_of(images: int = 72, world: int = 1, **flags: Any) -> Plan:
    source: Any = type("Images", (), {"__len__": lambda _: images, "root": "images"})()
    return Plan.of(config_of(Path("images"), Path("run"), **flags), (32, 32), source, world)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that a second thread does not help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(labelled_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with online evaluation."""
    return run_of(labelled_images, tmp_path_factory.mktemp("whole") / "run", val_loss=True, online_eval="knn")


def test_stages_follow_each_other() -> None:
    plan = plan_of()
    assert [(x.size, x.batch_size, x.images_per_step) for x in plan.stages] == [
        ((16, 16), 16, 16),
        ((24, 16), 8, 8),
        ((32, 32), 4, 4),
    ]
    assert [(x.first_epoch, x.epochs) for x in plan.stages] == [(0, 2), (2, 1), (3, 2)]
    assert [(x.first_step, x.last_step, x.steps_per_epoch) for x in plan.stages] == [
        (0, 8, 4),
        (8, 17, 9),
        (17, 53, 18),
    ]
    assert plan.total_steps == STEPS
    ends = [0, 4, 8, 17, 35, 53]
    assert [plan.step_of_epoch(epoch) for epoch in range(6)] == ends
    for step in range(STEPS + 1):
        epochs, rest = plan.epochs_and_steps(step)
        assert ends[epochs] + rest == step
        assert plan.epoch(step) == pytest.approx(np.interp(step, ends, range(6)))
        assert plan.position(step) == pytest.approx(18 * plan.epoch(step))
    assert plan.pixels(10) == 8 * 16 * 16 * 16 + 2 * 8 * 24 * 16
    assert plan.pixels(STEPS) == 2 * 64 * 16 * 16 + 72 * 24 * 16 + 2 * 72 * 32 * 32


def test_batches_of_all_processes_and_micro_batches_make_a_step() -> None:
    assert [x.images_per_step for x in plan_of(world=2, accum_iter=2).stages] == [64, 32, 16]
    assert [x.steps_per_epoch for x in plan_of(crops_per_image=2).stages] == [9, 18, 36]


def test_the_largest_stage_has_the_most_pixels_in_a_step() -> None:
    assert plan_of().largest.size == (32, 32)  # as many as the first one: 16 images of 16 x 16 pixels
    assert plan_of(resolution_schedule="16:0.5:32,32:0.5:4").largest.size == (16, 16)


@pytest.mark.parametrize(
    ("shares", "epochs", "expected"),
    [
        ((0.4, 0.3, 0.3), 800, [320, 240, 240]),
        ((0.4, 0.3, 0.3), 10, [4, 3, 3]),
        ((0.5, 0.5), 5, [3, 2]),
        ((0.333333, 0.333333, 0.333334), 100, [33, 34, 33]),
        ((0.1, 0.1, 0.8), 5, [1, 0, 4]),
    ],
)
def test_stages_end_at_the_nearest_whole_epoch(shares: tuple[float, ...], epochs: int, expected: list[int]) -> None:
    schedule = ",".join(f"32:{share}" for share in shares)
    flags = {"resolution_schedule": schedule, "epochs": epochs}
    if 0 in expected:
        with pytest.raises(UserError, match=r"with --epochs 5, a share of 0\.1 is not one whole epoch") as caught:
            plan_of(**flags)
        assert caught.value.hint == "use --epochs 10 or more, or larger shares"
        assert plan_of(**{**flags, "epochs": 10}).stages
        return
    assert [stage.epochs for stage in plan_of(**flags).stages] == expected


def test_without_a_schedule_steps_are_positions_to_the_last_bit() -> None:
    plan = plan_of(resolution_schedule=None, batch_size=5, epochs=1000)
    assert [plan.position(step) for step in range(plan.total_steps)] == list(range(14000))


def cosine(epoch: float, peak: float) -> float:
    """The learning rate of a schedule of 5 epochs, the first of them for the warm-up."""
    return peak * epoch if epoch < 1 else 1e-4 + (peak - 1e-4) * (1 + math.cos(math.pi * (epoch - 1) / 4)) / 2


@pytest.mark.parametrize("lr", [None, 0.001])
def test_the_learning_rate_follows_the_epochs_and_the_images_of_a_step(
    images: Path, tmp_path: Path, lr: float | None
) -> None:
    """With ``blr``, the peak is proportional to the images per step. With ``lr``, it is the same in all stages."""
    blr = {"blr": 0.01} if lr is None else {"blr": PretrainConfig.model_fields["blr"].default}
    flags = {k: v for k, v in {**SMALL, **FIXED, "min_lr": 1e-4, "lr": lr, **blr}.items() if k != "blr" or lr is None}
    config = PretrainConfig(
        model="mae_vit_tiny_patch4", input_size=32, data_path=images, output_dir=tmp_path, mask_ratio=0.9,
        resolution_schedule=SCHEDULE, **flags,
    )  # fmt: skip
    pretrain(config)
    plan, log = Plan.of(config, (32, 32), open_source(images)), lines(tmp_path)
    assert len(log) == plan.total_steps
    peaks = [lr or 0.01 * count / 256 for count in (16, 8, 4)]
    expected = [cosine(plan.epoch(i), peaks[plan.stages.index(plan.stage(i))]) for i in range(plan.total_steps)]
    assert [line["train_lr"] for line in log] == pytest.approx(expected, rel=1e-9)


def test_each_step_has_the_images_and_masks_of_its_stage(
    labelled_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They equal those of a loader with the size and the epochs of the stage, independent of earlier stages."""
    loss, seen = MaskedAutoencoderViT.loss, []

    def record(
        self: MaskedAutoencoderViT, images: torch.Tensor, ratio: float, noise: torch.Tensor, **options: Any
    ) -> Any:
        seen.append((images.clone(), noise.clone()))
        return loss(self, images, ratio, noise, **options)

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", record)
    run_of(labelled_images, tmp_path, mask_sampling="block")
    source, number = open_source(labelled_images, "train"), 0
    for size, batch_size, first, epochs in (((16, 16), 16, 0, 2), ((24, 16), 8, 2, 1), ((32, 32), 4, 3, 2)):
        loader = LoaderConfig(size=size, batch_size=batch_size, epochs=epochs, first_epoch=first)
        masking = sampler("block", (size[0] // 4, size[1] // 4), 0.75)
        for batch in training_batches(source, loader, masking=masking):
            images, noise = seen[number]
            assert batch.images.equal(images)
            assert batch.noise.equal(noise)
            number += 1
    assert number == len(seen) == STEPS
    sizes = [line["img_size"] for line in lines(tmp_path)]
    assert sizes == [16] * 8 + [[24, 16]] * 9 + [32] * 36
    assert [line["epoch"] for line in lines(tmp_path)] == [0] * 4 + [1] * 4 + [2] * 9 + [3] * 18 + [4] * 18
    changes = [text for text in caplog.messages if "pixels" in text]
    assert changes == [
        "from epoch 0 on: images of 16 x 16 pixels, 16 per step, peak lr 6.25e-04",
        "from epoch 2 on: images of 24 x 16 pixels, 8 per step, peak lr 3.13e-04",
        "from epoch 3 on: images of 32 x 32 pixels, 4 per step, peak lr 1.56e-04",
    ]


def test_each_line_of_the_log_has_one_image_size(images: Path, tmp_path: Path) -> None:
    run_of(images, tmp_path, log_every=100, resolution_schedule="16:0.4:8,32:0.6")
    assert [(line["step"], line["img_size"]) for line in lines(tmp_path)] == [(10, 16), (25, 32)]
    assert [(line["epochs"], line["images"]) for line in lines(tmp_path)] == [(2, 10 * 8), (5, 25 * 8)]


def test_a_run_without_a_schedule_has_no_image_size_in_its_log(images: Path, tmp_path: Path) -> None:
    run = run_of(images, tmp_path, resolution_schedule=None, epochs=2)
    assert all("img_size" not in line for line in lines(run))
    assert json.loads((run / "config.json").read_text())["resolution_schedule"] is None


def test_a_single_stage_equals_training_without_a_schedule(images: Path, tmp_path: Path) -> None:
    plain = run_of(images, tmp_path / "plain", resolution_schedule=None, batch_size=4, epochs=2)
    assert_same(run_of(images, tmp_path / "run", resolution_schedule="32:1:4", epochs=2), plain)
    halves = run_of(images, tmp_path / "halves", resolution_schedule="32:0.5,32:0.5", batch_size=4, epochs=2)
    assert all(x.equal(y) for x, y in zip(tensors(halves).values(), tensors(plain).values(), strict=True))


def test_evaluation_is_at_the_models_own_size_and_leaves_training_alone(
    labelled_images: Path, tmp_path: Path, whole: Path
) -> None:
    plain = run_of(labelled_images, tmp_path / "run")
    assert all(x.equal(y) for x, y in zip(tensors(plain).values(), tensors(whole).values(), strict=True))
    evaluated = [line for line in lines(whole) if "val_loss" in line]
    assert [(line["step"], line["epoch"]) for line in evaluated] == [(4, 0), (8, 1), (17, 2), (35, 3), (53, 4)]
    assert "img_size" not in evaluated[0]
    model = run_reader.find_checkpoint(whole).state["model"]
    assert model["img_size"] == 32
    shapes = {name: tuple(x.shape) for name, x in tensors(whole).items() if "pos_embed" in name}
    assert {shape[1] for shape in shapes.values()} == {65}


def words(images: Path, run: Path, **changes: object) -> list[str]:
    """The command line of the run ``whole``."""
    flags = {**SMALL, "resolution_schedule": SCHEDULE, "save_every": 3, **changes}
    flags = {name.replace("_", "-"): value for name, value in flags.items() if name != "lr"}
    return [*launch.words(images, run, **flags), "--val-loss", "--online-eval=knn"]


@pytest.mark.parametrize(
    ("moments", "workers"),
    [
        # In the first stage; at the start of the second stage, before its first step; in the last stage.
        (["step 5/", "images of 24 x 16 pixels", "step 41/"], 1),
        # After the last step of a stage, before its evaluation or save; in the first step of a stage.
        (["step 8/", "step 18/"], 2),
        (["step 17/", "step 53/"], 0),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    labelled_images: Path, tmp_path: Path, whole: Path, moments: list[str], workers: int
) -> None:
    """Runs with online evaluation are killed by SIGKILL."""
    run, line = tmp_path / "run", words(labelled_images, tmp_path / "run", num_workers=workers)
    for i, moment in enumerate(moments):
        output = tmp_path / f"{i}.txt"
        process = launch.start(line, output)
        launch.until(output, lambda text, moment=moment: moment in text, process)
        process.kill()
        launch.join(process)
        assert len([x for x in lines(run) if "train_loss" in x]) <= STEPS
    launch.finish(line, tmp_path / "last.txt")
    assert_same(run, whole)


def test_a_signal_at_a_change_of_stage_saves_and_the_run_resumes(
    labelled_images: Path,
    tmp_path: Path,
    whole: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = module.Trainer._start_stage

    def interrupted(self: module.Trainer, stage: Any) -> None:
        start(self, stage)
        if stage.first_step == self.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module.Trainer, "_start_stage", interrupted)
    with pytest.raises(SystemExit):
        run_of(labelled_images, tmp_path, val_loss=True, online_eval="knn", num_workers=1)
    monkeypatch.undo()
    assert (
        "at step 9: run the same command again" in caplog.text or "at step 8: run the same command again" in caplog.text
    )
    assert_same(run_of(labelled_images, tmp_path, val_loss=True, online_eval="knn", num_workers=1), whole)


@pytest.mark.parametrize(
    "flags",
    [
        {"cache": True, "num_workers": 1},
        {"image_decoder": "dali", "num_workers": 1},
        {"accum_iter": 2, "batch_size": 4, "resolution_schedule": "16:0.4:8,24x16:0.2,32:0.4:2"},
        pytest.param({"execution": "compile"}, marks=pytest.mark.exhaustive),
    ],
    ids=["cache", "dali", "accum_iter", "compile"],
)
def test_other_flags_change_at_most_rounding(
    labelled_images: Path, tmp_path: Path, whole: Path, flags: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    log = lines(run_of(labelled_images, tmp_path, **flags))
    theirs = [line for line in lines(whole) if "train_loss" in line]
    assert "steps are eager" not in caplog.text
    assert [line["img_size"] for line in log] == [line["img_size"] for line in theirs]
    rtol = 0 if "cache" in flags else 0.02 if "image_decoder" in flags else 1e-4
    np.testing.assert_allclose([x["train_loss"] for x in log], [x["train_loss"] for x in theirs], rtol=rtol)


def test_crops_of_an_image_share_a_batch_in_each_stage(images: Path, tmp_path: Path) -> None:
    log = lines(run_of(images, tmp_path, crops_per_image=4, epochs=3, resolution_schedule="16:0.6:16,32:0.4"))
    assert [line["img_size"] for line in log] == [16] * 20 + [32] * 20


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(labelled_images: Path, tmp_path: Path, whole: Path, strategy: str) -> None:
    schedule = "16:0.4:8,24x16:0.2:4,32:0.4:2"
    line = words(labelled_images, tmp_path, resolution_schedule=schedule, batch_size=4, strategy=strategy)
    starter = ("torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    done = subprocess.run(
        [sys.executable, "-m", *starter, "-m", "mae_fast", *line[:-2]],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = ([x for x in lines(run) if "train_loss" in x] for run in (tmp_path, whole))
    assert [line["img_size"] for line in ours] == [line["img_size"] for line in theirs]
    np.testing.assert_allclose([x["train_lr"] for x in ours], [x["train_lr"] for x in theirs], rtol=1e-12)
    np.testing.assert_allclose([x["train_loss"] for x in ours], [x["train_loss"] for x in theirs], rtol=1e-5)
    # One process resumes the same run.
    assert json.loads((tmp_path / "config.json").read_text())["resolution_schedule"] == "16:0.4:16,24x16:0.2:8,32:0.4:4"
    run_of(labelled_images, tmp_path, strategy=strategy, device="auto")


def test_a_resumed_run_must_have_the_same_schedule_and_epochs(
    labelled_images: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.suffix in (".json", ".jsonl")}
    run_of(labelled_images, whole, resolution_schedule="16x16:0.40:16, 24x16:.2:8,32:0.4:4")  # the same
    assert "is finished" in caplog.messages[-1]
    with pytest.raises(UserError, match=r"resolution_schedule: '16:0\.4:16.* in the run, '16:0\.6:16"):
        run_of(labelled_images, whole, resolution_schedule="16:0.6:16,32:0.4:4")
    with pytest.raises(UserError, match=r"resolution_schedule: .* in the run, None now"):
        run_of(labelled_images, whole, resolution_schedule=None, batch_size=4)
    for epochs in (6, 10, 3):
        with pytest.raises(UserError, match=rf"\(epochs: 5 in the run, {epochs} now, which would move the stages"):
            run_of(labelled_images, whole, epochs=epochs)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_checkpoints_of_epochs_are_kept_in_all_stages(images: Path, tmp_path: Path) -> None:
    schedule = "16:0.4:8,32:0.6:4"  # epochs end at steps 5, 10, 20, 30, 40
    run_of(images, tmp_path, keep_every=2, keep=1, save_every=1000, resolution_schedule=schedule)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000010", "step-00000030", "step-00000040"]


def test_the_dry_run_takes_a_step_of_the_largest_stage(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, shapes = MaskedAutoencoderViT.loss, []

    def record(self: MaskedAutoencoderViT, images: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        shapes.append(tuple(images.shape))
        return loss(self, images, *args, **options)

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", record)
    for schedule, shape in (("16:0.4:8,24:0.2:20,32:0.4:4", (20, 24, 24, 3)), ("16:0.4:40,32:0.6:8", (40, 16, 16, 3))):
        shapes.clear()
        run_of(images, tmp_path / "run", resolution_schedule=schedule, dry_run=True)
        assert shapes == [shape]
        text = f"in the largest stage: images of {shape[1]} x {shape[1]} pixels, {shape[0]} per step"
        assert caplog.messages[-1].endswith(text)
        assert not (tmp_path / "run").exists()
    run_of(images, tmp_path / "run", resolution_schedule="16:0.2:40,32:0.8:8")
    shapes.clear()
    run_of(images, tmp_path / "run", resolution_schedule="16:0.2:40,32:0.8:8", dry_run=True)  # finished
    assert not shapes


def test_a_dry_run_of_a_run_past_its_largest_stage_takes_a_step_of_that(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = module.Trainer._log_and_evaluate
    monkeypatch.setattr(module.Trainer, "_log_and_evaluate", lambda self, rate: end(self, rate) or self.step == 3)
    run_of(images, tmp_path, resolution_schedule="16:0.2:40,32:0.8:8")
    loss, shapes = MaskedAutoencoderViT.loss, []

    def record(self: MaskedAutoencoderViT, images: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        shapes.append(tuple(images.shape))
        return loss(self, images, *args, **options)

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", record)
    run_of(images, tmp_path, resolution_schedule="16:0.2:40,32:0.8:8", dry_run=True)
    assert shapes == [(40, 16, 16, 3)]


def findings(images: Path, run: Path, **flags: Any) -> dict[str, Any]:
    found = preflight(config_of(images, run, **flags), Pretraining)
    return {finding.what: finding for finding in found}


def test_preflight_estimates_the_largest_stage(images: Path, tmp_path: Path) -> None:
    """The memory equals that of a run with only this size and batch size."""
    schedule = "16:0.4:8,24:0.2:20,32:0.4:4"
    found = findings(images, tmp_path, resolution_schedule=schedule)
    assert found["steps"].found == (
        "32 in total: 2 epochs of 5 steps, images of 16 x 16 pixels, 8 per step; 1 epochs of 2 steps, "
        "images of 24 x 24 pixels, 20 per step; 2 epochs of 10 steps, images of 32 x 32 pixels, 4 per step per process"
    )
    alone = findings(images, tmp_path, resolution_schedule=None, input_size=24, batch_size=20)

    def activations(memory: Any) -> float:
        return float(memory.found.rpartition(" ")[2])

    assert activations(found["memory"]) == pytest.approx(activations(alone["memory"]), abs=0.011)


def test_preflight_finds_other_epochs_of_a_run(labelled_images: Path, whole: Path) -> None:
    found = findings(labelled_images, whole, epochs=10)
    assert "epochs: 5 in the run, 10 now, which would move the stages" in found["run"].found
    assert found["run"].bad
    assert not findings(labelled_images, whole)["run"].bad


def test_a_rollback_may_go_back_to_an_earlier_stage(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 11 to 15 of stage two roll back to weights of stage one. ``debug_step`` loads the images of a step."""
    loss, calls = MaskedAutoencoderViT.loss, []

    def poisoned(self: MaskedAutoencoderViT, images: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(images)
        value = loss(self, images, *args, **options)
        return value * float("nan") if 11 <= len(calls) <= 15 else value

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", poisoned)
    run_of(images, tmp_path, resolution_schedule="16:0.4:8,32:0.6:4", save_every=5)
    assert "rolled back to the weights of step 5" in caplog.text  # the gradients after step 10 are not finite
    assert lines(tmp_path)[-1]["not_finite"] == 5
    assert [x.shape[1] for x in calls] == [16] * 10 + [32] * 30
    dumps = sorted((tmp_path / "not_finite").glob("step-*.json"))
    assert [json.loads(dump.read_text())["step"] for dump in dumps] == [11, 12, 13, 14, 15]
    debug_step(dumps[1], "cpu")
    assert calls[40].equal(calls[11])
    assert "other images" not in caplog.text
    first = tmp_path / "not_finite" / "first.json"
    first.write_text(dumps[0].read_text().replace('"step": 11', '"step": 3'))
    debug_step(first, "cpu")
    assert calls[-1].equal(calls[2])


def test_the_loader_starts_at_the_first_epoch_of_a_stage(labelled_images: Path) -> None:
    source = open_source(labelled_images, "train")
    batches = partial(training_batches, source, num_patches=16)
    whole = list(batches(LoaderConfig(size=(16, 16), batch_size=8, epochs=3)))
    last = LoaderConfig(size=(16, 16), batch_size=8, epochs=2, first_epoch=1, first=11)
    found = list(batches(last))
    assert len(found) == 7
    for ours, theirs in zip(found, whole[-7:], strict=True):
        assert ours.images.equal(theirs.images)
        assert ours.noise.equal(theirs.noise)
        assert ours.ids.equal(theirs.ids)


def test_principal_components_are_of_the_models_own_size(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, sizes = Pretraining.prepare, defaultdict(int)

    def record(self: Pretraining, batches: Any, dist: DistContext) -> None:
        def counted() -> Any:
            for batch in batches:
                sizes[tuple(batch.images.shape)] += 1
                yield batch

        prepare(self, counted(), dist)

    monkeypatch.setattr(Pretraining, "prepare", record)
    run_of(images, tmp_path, target="pca", pca_components=8, epochs=2, resolution_schedule="16:0.5:8,32:0.5:4")
    assert sizes == {(4, 32, 32, 3): 10}


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        ({"resolution_schedule": "16:0.5"}, r"shares must sum to 1, got 0\.5", "change"),
        ({"resolution_schedule": "16:0.5,32:0.6"}, r"shares must sum to 1, got 1\.1", "change"),
        ({"resolution_schedule": "16:0.5,24:0.5"}, "last stage has images of 24 pixels", "32"),
        ({"resolution_schedule": "32:0.5,32x16:0.5"}, "last stage has images of 32x16 pixels", "32"),
        ({"resolution_schedule": "16,32:1"}, "'16' is not a stage", "SIZE:SHARE:BATCH"),
        ({"resolution_schedule": ""}, "'' is not a stage", "SIZE:SHARE:BATCH"),
        ({"resolution_schedule": "16:a,32:1"}, "'16:a' is not a stage", "112:0.4:512"),
        ({"resolution_schedule": "16:0.5:0,32:0.5"}, "'16:0.5:0' is not a stage", "SIZE"),
        ({"resolution_schedule": "16:0.5:8:9,32:0.5"}, "'16:0.5:8:9' is not a stage", "SIZE"),
        ({"resolution_schedule": "16:-1,32:2"}, "'16:-1' is not a stage", "SIZE"),
        ({"resolution_schedule": "16:nan,32:1"}, "'16:nan' is not a stage", "SIZE"),
        ({"resolution_schedule": "x:0.5,32:0.5"}, "--resolution-schedule x", "HEIGHTxWIDTH"),
        ({"resolution_schedule": "18:0.5,32:0.5"}, "18x18 pixels cannot be divided into patches of 4x4", "use 16x16"),
        ({"resolution_schedule": "8:0.5,32:0.5", "mask_ratio": 0.8}, "leaves no visible patch of 4", "use 0.25 to"),
        ({"mask_sampling": "grid", "resolution_schedule": "20:0.5,32:0.5"}, "--mask-sampling grid: 5 x 5", ""),
        ({"resolution_schedule": "16:0.5:6,32:0.5", "crops_per_image": 4}, "got 6 and 4", "use 4"),
        ({"resolution_schedule": "16:0.5:99,32:0.5"}, "fewer than one step of 99", "lower"),
        ({"min_lr": 2e-4}, r"--min-lr 0.0002 is above the learning rate, 0.00015625", "lower --min-lr"),
    ],
)
def test_wrong_flags_are_errors(images: Path, tmp_path: Path, flags: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_of(images, tmp_path / "run", **flags)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "run").exists()


def test_masks_of_one_size_are_refused(images: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "masks.npy", np.eye(8)[None])
    with pytest.raises(UserError, match="has masks for images of one size") as caught:
        config_of(images, tmp_path / "run", masks=tmp_path / "masks.npy")
    assert caught.value.hint == "leave one of them out"
