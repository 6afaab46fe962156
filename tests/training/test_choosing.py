"""Retention of checkpoints, the best checkpoint, and the commands that list and slim runs."""

import json
import math
import os
import shutil
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import load_file
from support import one_thread  # noqa: F401

from mae_fast.errors import UserError
from mae_fast.training import checkpoint, runs
from mae_fast.training.config import FINETUNE_PRESETS, FinetuneConfig, PretrainConfig
from mae_fast.training.run_dir import RunFolder
from mae_fast.training.tasks import load_model
from mae_fast.training.tasks.classifier import evaluate
from mae_fast.training.tasks.classify import finetune
from mae_fast.training.tasks.pretrain import pretrain
from mae_fast.training.trainer import Trainer
from mae_fast.weights import run_reader

SMALL = {"num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "log_every": 1}


def config(images, run, **changes):
    flags = {"data_path": images, "output_dir": run, "epochs": 4, "warmup_epochs": 1, "batch_size": 24, "lr": 2e-3}
    return FinetuneConfig(**{**FINETUNE_PRESETS["tiny"], **SMALL, **flags, **changes})


def steps(run):
    return [int(path.name[5:]) for path in sorted((run / "checkpoints").glob("step-*"))]


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def best_of(run):
    return run_reader.read_checkpoint(run / "checkpoints" / "best")


def snapshot(step, best=None):
    model = torch.nn.Linear(2, 2)
    state = {"best": {"step": best}} if best else {}
    return checkpoint.snapshot(step, model, torch.optim.AdamW(model.parameters()), state)


def test_newest_periodic_and_best_checkpoints_are_kept(tmp_path):
    for step in range(1, 11):
        checkpoint.write(
            tmp_path, snapshot(step, best=2 if step > 1 else 1), frozenset(), checkpoint.Retention(1, {4, 8})
        )
    names = sorted(path.name for path in tmp_path.iterdir())
    # Step 9 is the newest checkpoint whose next gradients are known to be finite.
    assert names == ["best", *(f"step-{step:08}" for step in (2, 4, 8, 9, 10))]
    assert os.readlink(tmp_path / "best") == "step-00000002"


@pytest.fixture(scope="module")
def finished(labelled_images, tmp_path_factory) -> Path:
    """A run of four epochs of three steps whose evaluations are 50, 80, 70 and 80 %."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        play(patch, [50.0, 80.0, 70.0, 80.0])
        finetune(config(labelled_images, run, keep=1, keep_every=3, keep_best="val_acc1"))
    return run


METRICS = Trainer._metrics


def play(patch, values):
    """Patch the evaluation to return these top-1 accuracies, one per epoch."""

    def metrics(self):
        return {**METRICS(self), "val_acc1": values[self.plan.epochs_and_steps(self.step)[0] - 1]}

    patch.setattr(Trainer, "_metrics", metrics)


def test_the_first_of_the_best_evaluations_is_the_best(finished, labelled_images):
    assert steps(finished) == [6, 9, 12]
    best = best_of(finished)
    assert best.state["best"] == {"metric": "val_acc1", "value": 80.0, "step": 6}
    assert run_reader.find_checkpoint(finished).step == 12


def test_every_reader_takes_the_best_checkpoint(finished, labelled_images, tmp_path):
    path = finished / "checkpoints" / "best"
    ours = load_model(path).state_dict()
    assert torch.equal(ours["head.weight"], load_file(path / "model.safetensors")["head.weight"])
    figures = evaluate(config(labelled_images, path).model_copy(update={"eval_only": True}))
    logged = next(line for line in log(finished) if line["step"] == 6 and "val_loss" in line)
    assert figures["val_loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
    assert run_reader.run_folder(path) == finished
    finetune(config(labelled_images, tmp_path / "next", weights=str(path), epochs=2, dry_run=True))


def test_a_resumed_run_knows_its_best_evaluation(finished, labelled_images, tmp_path, monkeypatch, one_thread):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    play(monkeypatch, [50.0, 80.0, 70.0, 79.0])
    finetune(config(labelled_images, run, keep=1, keep_best="val_acc1", save_every=7, log_every=2, num_workers=1))
    assert best_of(run).step == 6
    play(monkeypatch, [50.0, 80.0, 70.0, 79.0, 81.0])
    finetune(config(labelled_images, run, keep_best="val_acc1", epochs=5))
    assert best_of(run).step == 15
    play(monkeypatch, [0.0] * 6)
    finetune(config(labelled_images, run, keep_best="val_loss", epochs=6))  # another metric starts without a best value
    losses = {line["step"]: line["val_loss"] for line in log(run) if "val_loss" in line}
    assert best_of(run).state["best"] == {"metric": "val_loss", "value": losses[18], "step": 18}


def test_a_run_resumed_without_keep_best_keeps_the_best_evaluation(
    finished, labelled_images, tmp_path, monkeypatch, caplog
):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    play(monkeypatch, [0.0] * 4 + [90.0, 79.0, 70.0])
    finetune(config(labelled_images, run, keep=1, epochs=5))
    assert best_of(run).step == 6
    finetune(config(labelled_images, run, keep=1, epochs=6, keep_best="val_acc1"))
    assert best_of(run).state["best"] == {"metric": "val_acc1", "value": 80.0, "step": 6}
    monkeypatch.setattr(Trainer, "_metrics", lambda self: {**METRICS(self), "val_loss": math.nan})
    finetune(config(labelled_images, run, keep=1, epochs=7, keep_best="val_loss"))
    assert best_of(run).step == 6  # until the new metric has a value
    assert "--keep-best val_loss: the value nan at step 21 is ignored" in caplog.text


def test_a_folder_named_best_becomes_a_link_again(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.write(folder, snapshot(1, best=1))
    copy = tmp_path / "copy" / "checkpoints"
    shutil.copytree(folder, copy)  # follows links
    assert not (copy / "best").is_symlink()
    (copy / "step-00000001" / "model.safetensors").write_bytes(b"damaged")
    checkpoint.link_best(copy, {"best": {"step": 1}})
    assert best_of(copy.parent).step == 1
    shutil.copytree(folder / "step-00000001", copy / "step-00000001", dirs_exist_ok=True)
    checkpoint.link_best(copy, {"best": {"step": 1}})
    assert os.readlink(copy / "best") == "step-00000001"
    assert sorted(path.name for path in copy.iterdir()) == ["best", "step-00000001"]


def test_a_folder_named_best_is_slimmed_too(tmp_path):
    run = tmp_path / "run"
    checkpoint.write(run / "checkpoints", snapshot(1, best=1))
    (run / "config.json").write_text("{}")
    shutil.copytree(run, tmp_path / "copy")
    assert runs.slim(tmp_path / "copy") == 2 * runs.slim(run)
    assert isinstance(best_of(tmp_path / "copy"), run_reader.Checkpoint)


def test_a_finished_run_says_that_it_has_no_best_value(finished, labelled_images, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    finetune(config(labelled_images, run, keep_best="val_acc1"))
    assert "--keep-best" not in caplog.text
    finetune(config(labelled_images, run, keep_best="val_loss"))
    assert "--keep-best val_loss: the run is finished" in caplog.text


def test_a_kill_between_a_save_and_its_link_is_mended(finished, labelled_images, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    best = run / "checkpoints" / "best"
    best.unlink()
    best.symlink_to("step-00000009")
    finetune(config(labelled_images, run, keep=1, keep_every=3, keep_best="val_acc1"))  # is finished
    assert best_of(run).step == 6


def test_kills_around_the_link_leave_a_best_checkpoint(labelled_images, tmp_path):
    """Kills before, during and after the rename that replaces the link for the second time."""
    words = ["finetune", "--preset", "tiny", f"--data-path={labelled_images}", "--epochs=3", "--warmup-epochs=1",
             "--batch-size=24", "--num-workers=0", "--dtype=fp32", "--image-decoder=pil", "--log-every=1",
             "--keep-best=val_loss", "--keep=1", "--lr=2e-3"]  # fmt: skip
    whole, output = tmp_path / "whole", tmp_path / "output"
    launch.finish([*words, f"--output-dir={whole}"], output, root=whole)
    names = Path(f"{output}.operations").read_text().splitlines()
    links = [i for i, name in enumerate(names, 1) if name.startswith("os.rename /checkpoints/.tmp-best")]
    assert len(links) == 3
    for number in (links[1] - 1, links[1], links[1] + 1):
        run = tmp_path / f"killed-{number}"
        process = launch.start([*words, f"--output-dir={run}"], output, run, (number, 0))
        assert launch.join(process) == -9
        assert isinstance(best_of(run), run_reader.Checkpoint)
        launch.finish([*words, f"--output-dir={run}"], output)
        ours, theirs = (load_file(x / "checkpoints/best/model.safetensors") for x in (run, whole))
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize(("metric", "message"), [("val_acc", "give one of val_loss, val_acc1, val_balanced_acc")])
def test_an_unknown_metric_is_refused_before_training(labelled_images, tmp_path, metric, message):
    with pytest.raises(UserError, match=f"--keep-best {metric} is not a metric of this run; {message}"):
        finetune(config(labelled_images, tmp_path / "run", keep_best=metric))
    assert not (tmp_path / "run").exists()


def test_pre_training_has_no_metric(images, tmp_path):
    made = PretrainConfig.with_preset("tiny", data_path=images, output_dir=tmp_path / "run", keep_best="val_loss")
    with pytest.raises(UserError, match="leave it out: the run has no evaluation"):
        pretrain(made)


def test_a_run_of_an_earlier_version_may_change_its_log(finished, labelled_images, tmp_path):
    """Earlier versions recorded flags that do not affect the weights."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    settings = json.loads((run / "config.json").read_text())
    assert "save_every" not in settings
    (run / "config.json").write_text(json.dumps({**settings, "save_every": 1000, "log_every": 20}))
    finetune(config(labelled_images, run, save_every=5, log_every=3))
    with pytest.raises(UserError, match=r"another configuration \(lr: 0.002 in the run, 0.003 now\)"):
        finetune(config(labelled_images, run, lr=3e-3))


def test_runs_are_listed_with_step_metric_best_and_size(finished, images, tmp_path):
    shutil.copytree(finished, tmp_path / "a" / "tuned", symlinks=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "broken" / "checkpoints").mkdir(parents=True)
    (tmp_path / "broken" / "config.json").write_text("{")
    (found,) = runs.list_runs(tmp_path)
    assert (found.verb, found.epochs, found.step) == ("finetune", 4, 12)
    assert (found.metric, found.best) == ("val_acc1 80", "val_acc1 80, step 6")
    files = [x for x in found.path.rglob("*") if x.is_file() and "best" not in x.parts]
    assert found.bytes == sum(x.stat().st_size for x in files)
    assert "a/tuned" in runs.format_runs([found], tmp_path)
    with pytest.raises(UserError, match="no run in"):
        runs.list_runs(tmp_path / "other")


def test_a_slimmed_run_is_read_but_not_resumed(finished, labelled_images, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    weights = load_model(run).state_dict()
    before = sum(x.stat().st_size for x in run.rglob("*") if x.is_file())
    freed = runs.slim(run)
    assert freed > 0.6 * before * 0.9
    assert sum(x.stat().st_size for x in run.rglob("*") if x.is_file()) < before - freed + 10_000
    assert not list(run.rglob("optim.safetensors"))
    assert all(torch.equal(x, weights[name]) for name, x in load_model(run).state_dict().items())
    assert best_of(run).step == 6
    finetune(config(labelled_images, run))  # is finished
    with pytest.raises(UserError, match=r"cannot resume from step 12: 'mae-fast slim' removed the state"):
        finetune(config(labelled_images, run, epochs=5))
    assert runs.slim(run) == 0


@pytest.mark.parametrize("number", range(1, 6))
def test_an_interrupted_slim_loses_no_weights(finished, tmp_path, monkeypatch, number):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    calls = []

    def fail(name):
        original = getattr(Path, name)

        def failing(self, *arguments, **options):
            calls.append(name)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(self, *arguments, **options)

        return failing

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, fail(name))
    with pytest.raises(KeyboardInterrupt):
        runs.slim(run)
    monkeypatch.undo()
    for path in run_reader.checkpoints_in(run / "checkpoints"):
        assert isinstance(run_reader.read_checkpoint(path), run_reader.Checkpoint)
    runs.slim(run)
    assert not list(run.rglob("optim.safetensors"))


def test_a_run_in_progress_and_a_damaged_one_are_not_slimmed(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    folder = RunFolder(run, {})
    folder.acquire()
    try:
        with pytest.raises(UserError, match="is in use by"):
            runs.slim(run)
    finally:
        folder.close()
    victim = run / "checkpoints" / "step-00000012" / "model.safetensors"
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    runs.slim(run)
    assert (victim.parent / "optim.safetensors").exists()
    with pytest.raises(UserError, match="is not a run"):
        runs.slim(tmp_path)
