"""The pre-training command: it learns, resumes exactly after kill -9, and reports errors."""

import copy
import itertools
import json
import logging
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
import torch
from launch import words
from safetensors.torch import load_file

from mae_fast.data.cache import Cached
from mae_fast.data.check import check
from mae_fast.data.loader import LoaderConfig
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.sources import Source, open_source
from mae_fast.doctor.debug_step import debug_step
from mae_fast.errors import UserError
from mae_fast.models.mae import MaskedAutoencoderViT, build
from mae_fast.training import trainer as module
from mae_fast.training.checkpoint import Snapshot, write
from mae_fast.training.config import PRESETS, PretrainConfig
from mae_fast.training.distributed import init_dist
from mae_fast.training.tasks.pretrain import Pretraining, pretrain
from mae_fast.training.trainer import RunResult
from mae_fast.weights import convert, run_reader
from mae_fast.weights.convert_files import save_weights
from mae_fast.weights.create import create_model
from mae_fast.weights.metadata import ModelMetadata


def flags(images: Path, run: Path, **changes: object) -> dict[str, object]:
    return {
        **PRESETS["tiny"],
        "data_path": images,
        "output_dir": run,
        "batch_size": 8,
        "epochs": 4,
        "log_every": 1,
        "save_every": 3,
        "num_workers": 0,
        "dtype": "fp32",
        **changes,
    }


def losses(run: Path) -> list[str]:
    """The loss curve, bit for bit."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [float(line["train_loss"]).hex() for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run_reader.find_checkpoint(run).path / run_reader.MODEL)


def test_it_learns_and_ends(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = PretrainConfig(**flags(images, tmp_path / "run"))
    result = pretrain(config)
    curve = [float.fromhex(value) for value in losses(tmp_path / "run")]
    assert len(curve) == 20
    assert np.mean(curve[-4:]) < 0.7 * np.mean(curve[:4])
    again = pretrain(config)
    assert caplog.messages[-1] == f"{tmp_path / 'run'} is finished: 20 steps, 4 epochs"
    assert result == again == RunResult(tmp_path / "run", result.metrics, 20)
    assert result.metrics["train_loss"].hex() == losses(tmp_path / "run")[-1]
    assert "step" not in result.metrics


def test_accumulation_equals_a_larger_batch(images: Path, tmp_path: Path) -> None:
    curves = []
    for name, sizes in {"one": {"batch_size": 8}, "two": {"batch_size": 4, "accum_iter": 2}}.items():
        pretrain(PretrainConfig(**flags(images, tmp_path / name, epochs=2, lr=None, blr=0.01, **sizes)))
        curves.append([float.fromhex(value) for value in losses(tmp_path / name)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_another_configuration_is_refused_and_shown(images: Path, tmp_path: Path) -> None:
    pretrain(PretrainConfig(**flags(images, tmp_path, epochs=2)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"mask_ratio: 0\.75 in the run, 0\.5 now; seed: 0 in the run, 3 now"):
        pretrain(PretrainConfig(**flags(images, tmp_path, epochs=2, seed=3, mask_ratio=0.5)))
    assert sorted(tmp_path.rglob("*")) == before


def test_learning_rate_follows_the_effective_batch(images: Path, tmp_path: Path) -> None:
    changes = {"lr": None, "blr": 0.064, "accum_iter": 2, "epochs": 3, "warmup_epochs": 1}
    pretrain(PretrainConfig(**flags(images, tmp_path, **changes)))
    rates = [json.loads(line)["train_lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(0.064 * 16 / 256)


def test_a_diverged_run_rolls_back_then_stops_and_keeps_its_good_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain_config = PretrainConfig(**flags(images, tmp_path, epochs=8))
    original = module.Schedule.set

    def explode(schedule: module.Schedule, step: int) -> float:
        rate = original(schedule, step)
        for group in schedule.optimizer.param_groups:
            group["lr"] = rate if step < 4 else 1e30
        return rate

    monkeypatch.setattr(module.Schedule, "set", explode)
    with pytest.raises(UserError, match=r"3 rollbacks .* did not help"):
        pretrain(pretrain_config)
    told = caplog.text
    assert told.count("rolled back to the weights of step ") == 3
    bad_steps = {int(path.stem[-8:]) for path in (tmp_path / "not_finite").glob("*.json")}
    good = run_reader.newest_checkpoint(tmp_path / "checkpoints", bad_steps)
    assert good is not None
    assert all(t.abs().max() < 100 for t in load_file(good.path / run_reader.MODEL).values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "pixel"])
def test_nonfinite_steps_are_skipped_and_recorded(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, dtype: str
) -> None:
    """At steps 4 and 5 a value is non-finite. The weights do not change, and the run continues from them."""
    loss, calls = MaskedAutoencoderViT.loss, []

    def poisoned(self: MaskedAutoencoderViT, images: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        calls.append({name: p.detach().clone() for name, p in self.named_parameters()})
        if where == "pixel" and len(calls) in (4, 5):
            images = images.permute(0, 3, 1, 2).float()
            images[0, 0, 0, 0] = float("nan")
        value = loss(self, images, *args)
        if len(calls) not in (4, 5) or where == "pixel":
            return value
        if where == "loss":
            return value * float("inf")
        if where == "gradient":
            value.register_hook(lambda gradient: gradient * float("nan"))
            return value
        with torch.no_grad():  # poison a copy; the test above covers a weight that stays NaN
            broken = copy.deepcopy(self)
            broken.norm.weight[0] = float("nan")
        return value + loss(broken, images, *args) * sum(p.sum() for p in self.parameters() if p.requires_grad)

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", poisoned)
    pretrain(PretrainConfig(**flags(images, tmp_path, dtype=dtype)))
    unchanged = [all(torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(calls)]
    assert [step for step, same in enumerate(unchanged, 1) if same and step > 1] == [4, 5]
    assert all(p.isfinite().all() for p in weights(tmp_path).values())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["not_finite"] for line in lines][-1] == 2
    assert all(line["train_loss"] is None or np.isfinite(line["train_loss"]) for line in lines)
    dumps = [json.loads(path.read_text()) for path in sorted((tmp_path / "not_finite").glob("*.json"))]
    assert [(dump["step"], len(dump["ids"]), dump["seed"]) for dump in dumps] == [(4, 8, 0), (5, 8, 0)]
    assert dumps[0]["weights"] == "step-00000004.safetensors"
    saved = load_file(tmp_path / "not_finite" / dumps[0]["weights"])
    assert all(torch.equal(saved[name], p) for name, p in calls[3].items())


def test_bad_images_are_skipped_counted_and_limited(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "07.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 40 images cannot be used, more than the allowed 1.0%"):
        pretrain(PretrainConfig(**flags(folder, tmp_path / "strict")))
    pretrain(PretrainConfig(**flags(folder, tmp_path / "strict", max_bad_fraction=0.1)))  # as the error advises
    pretrain(PretrainConfig(**flags(folder, tmp_path / "run", max_bad_fraction=0.1)))
    assert "skipped '07.jpg' (not an image: no known image format)" in caplog.text
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 1
    assert 0 <= last["waiting"] < 1


def test_list_of_bad_images_changes_nothing_else(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "07.jpg").write_bytes(b"no image")
    pretrain(PretrainConfig(**flags(folder, tmp_path / "found", max_bad_fraction=0.1)))
    check(open_source(folder))
    pretrain(PretrainConfig(**flags(folder, tmp_path / "known", max_bad_fraction=0.1)))
    assert losses(tmp_path / "known") == losses(tmp_path / "found")


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_cache_and_workers_change_nothing(images: Path, tmp_path: Path, decoder: str) -> None:
    pretrain(PretrainConfig(**flags(images, tmp_path / "plain", image_decoder=decoder)))
    pretrain(PretrainConfig(**flags(images, tmp_path / "run", image_decoder=decoder, cache=True, num_workers=2)))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_repeats_and_dali(images: Path, tmp_path: Path) -> None:
    """Four crops per image, 40 images and 8 crops per step are 20 steps per epoch."""
    pretrain(PretrainConfig(**flags(images, tmp_path / "run", crops_per_image=4, epochs=2, image_decoder="dali")))
    assert len(losses(tmp_path / "run")) == 40
    with pytest.raises(UserError, match="--batch-size 6"):
        PretrainConfig(**flags(images, tmp_path / "other", crops_per_image=3))


def test_a_path_may_be_spelled_otherwise_and_images_may_move(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("here", "there"):
        shutil.copytree(images, tmp_path / name)
    pretrain(PretrainConfig(**flags(tmp_path / "here", tmp_path / "run", epochs=1, warmup_epochs=0)))
    monkeypatch.chdir(tmp_path)
    caplog.clear()
    for spelled in (Path("here"), tmp_path / "there" / ".." / "here"):
        pretrain(PretrainConfig(**flags(spelled, Path("run"), epochs=1, warmup_epochs=0)))
        assert caplog.messages[-1] == "run is finished: 5 steps, 1 epochs"
        assert {record.levelname for record in caplog.records} == {"INFO"}
        caplog.clear()
    pretrain(PretrainConfig(**flags(Path("there"), Path("run"), epochs=1, warmup_epochs=0)))
    warning, *_, finished = caplog.records
    assert "is finished" in finished.message
    assert warning.levelname == "WARNING"
    assert re.match(
        r"run was started with images of the same names in another folder .*here' in the run, .*there' now",
        warning.message,
    )
    caplog.clear()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({**saved, "data_path": "here"})
    )  # as earlier versions wrote it
    pretrain(PretrainConfig(**flags(Path("here"), Path("run"), epochs=1, warmup_epochs=0)))
    assert {record.levelname for record in caplog.records} == {"INFO"}
    with pytest.raises(UserError, match=r"data_path: 'here' in the run, .*there' now; seed: 0 in the run, 3 now"):
        pretrain(PretrainConfig(**flags(Path("there"), Path("run"), epochs=1, seed=3, warmup_epochs=0)))


def test_run_is_not_resumed_on_other_images(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    pretrain(PretrainConfig(**flags(folder, tmp_path / "run")))
    shutil.copy(folder / "00.jpg", folder / "40.jpg")
    with pytest.raises(UserError, match=r"images: 40 images in the run, 41 now, 1 new \(40.jpg\)"):
        pretrain(PretrainConfig(**flags(folder, tmp_path / "run")))


def test_the_folder_of_a_running_run_is_locked(images: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    process = launch.start(words(images, run), output)
    launch.until(output, lambda text: "step 1/" in text, process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on "):
            pretrain(PretrainConfig(**flags(images, run)))
    finally:
        process.kill()
        process.join()
    launch.finish(words(images, run), output)  # leftovers of a killed run do not prevent resuming


def test_flags_reach_the_loader(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Caught(Exception):
        pass

    def catch(source: Source, loader: LoaderConfig, **_: object) -> None:
        raise Caught(source, loader)

    monkeypatch.setattr("mae_fast.training.tasks.pretrain.training_batches", catch)
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "07.jpg").write_bytes(b"no image")
    check(open_source(folder), tmp_path / "list.jsonl")
    changes = {"exif": True, "crops_per_image": 2, "image_decoder": "dali"}
    changes |= {"bad_list": tmp_path / "list.jsonl"}
    for cache in (False, True):
        changes["cache"] = cache
        with pytest.raises(Caught) as caught:
            pretrain(PretrainConfig(**flags(folder, tmp_path / f"run {cache}", num_workers=1, **changes)))
        source, loader = caught.value.args
        assert isinstance(source, Cached) == cache
        assert loader.pixels == PixelFormat(exif=not cache)  # cached images are already rotated
        assert (loader.repeats, loader.decoder, loader.num_workers) == (2, "dali", 1)
    assert [source.names[i] for i in loader.bad] == ["07.jpg"]


def test_averaged_weights_follow_the_formula(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    update = module.Ema.update

    def watch(ema: module.Ema) -> None:
        update(ema)
        seen.append({name: p.detach().double() for name, p in ema.weights.items()})

    monkeypatch.setattr(module.Ema, "update", watch)
    pretrain(PretrainConfig(**flags(images, tmp_path, epochs=2, ema_decay=0.9, warmup_epochs=0)))
    torch.manual_seed(0)
    start = build(PRESETS["tiny"]["model"], img_size=32)
    expected = {name: dict(start.named_parameters())[name].detach().double() for name in seen[0]}
    for weights_then in seen:
        expected = {name: 0.9 * e + 0.1 * weights_then[name] for name, e in expected.items()}
    found = run_reader.find_checkpoint(tmp_path)
    found.load_model(start, ema=True)
    for name, p in start.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_checkpointed_blocks_give_the_same_run(images: Path, tmp_path: Path) -> None:
    pretrain(PretrainConfig(**flags(images, tmp_path / "plain", epochs=2)))
    pretrain(PretrainConfig(**flags(images, tmp_path / "run", epochs=2, grad_checkpointing=True)))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_dry_run_takes_a_step_and_saves_nothing(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = pretrain(PretrainConfig(**flags(images, tmp_path / "run", dry_run=True)))
    assert re.search(r"Peak memory per process: \d\.\d\d GiB .* weights 0\.0\d, gradients", caplog.text)
    assert (result.metrics, result.step) == ({}, 1)
    assert not any(tmp_path.iterdir())


def test_tensorboard_gets_curves_and_pictures(images: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(PretrainConfig(**flags(images, tmp_path / "run", epochs=2, log_dir=tmp_path / "board")))
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    curve = [event.value for event in board.Scalars("train_loss")]
    expected = [float.fromhex(value) for value in losses(tmp_path / "run")]
    assert curve == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in board.Images("reconstructions")] == [3, 6, 9, 10]


def test_wandb_gets_curves_and_pictures(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = PretrainConfig(**flags(images, tmp_path, epochs=2, wandb="project"))
    pretrain(config)
    shutil.rmtree(run_reader.find_checkpoint(tmp_path).path)
    pretrain(config)  # goes on with the same run
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    value, pictures = str(last["train_loss"]).encode(), tmp_path / "wandb"

    def is_written() -> bool:
        logged = files[-1].read_bytes()
        found = pictures.glob("offline-run-*/files/media/images/reconstructions_*.png")
        return b"train_loss" in logged and value in logged and any(found)

    deadline = time.monotonic() + 120  # another process writes the files, and may still be running
    while not is_written() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert is_written()


def test_wandb_without_a_login_is_an_error_with_a_hint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_key(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", no_key)
    with pytest.raises(UserError, match="--wandb project: No API key configured") as told:
        pretrain(PretrainConfig(**flags(images, tmp_path / "run", wandb="project")))
    assert "wandb login" in str(told.value.hint)


def test_weights_of_a_file_start_a_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = build("mae_vit_tiny_patch4").state_dict()
    monkeypatch.chdir(tmp_path)
    for init, lacking in ("whole.pth", ()), ("encoder.pth", "decoder"):
        torch.save({"model": {name: x for name, x in state.items() if not name.startswith(lacking)}}, init)
    changes = {"epochs": 1, "warmup_epochs": 0, "lr": 1e-9, "save_every": 99}
    pretrain(PretrainConfig(**flags(images, tmp_path / "run", init=tmp_path / "whole.pth", **changes)))
    ours = weights(tmp_path / "run")
    assert all(torch.allclose(ours[name], x, atol=1e-6) for name, x in state.items())
    again = {**changes, "init": "whole.pth"}  # the same file
    assert pretrain(PretrainConfig(**flags(images, tmp_path / "run", **again))).step == 5
    task = task_of(images, tmp_path / "other", init="encoder.pth")  # only the mask token of the decoder is missing
    assert torch.equal(task.model.blocks[3].mlp.fc2.weight, state["blocks.3.mlp.fc2.weight"])


def save_as(form: str, model: MaskedAutoencoderViT, folder: Path) -> Path:
    """Save the weights of ``model`` as another library or another run would."""
    state = dict(model.state_dict())
    if form in ("run", "fine-tuned run"):
        name = "mae_vit_tiny_patch4"
        if form == "fine-tuned run":
            name, options = "vit_tiny_patch4", {"num_classes": 3, "global_pool": True}
            classifier = create_model(name, **options)
            classifier.load_state_dict(state, strict=False)
            state = dict(classifier.state_dict())
        made = {"name": name, **(options if form == "fine-tuned run" else {"norm_pix_loss": True})}
        tensors = {run_reader.MODEL: state, run_reader.OPTIM: {"x": torch.zeros(1)}}
        write(folder / "checkpoints", Snapshot(1, tensors, {"model": made}, True))
        return folder
    if form == "transformers folder":
        layout, path = "transformers", folder
    elif form == "timm file":
        layout, path = "timm", folder.with_suffix(".safetensors")
    else:
        path = folder.with_suffix(".pth")
        content = {f"module.{name}": x for name, x in convert(state, "ours", "mmpretrain").weights.items()}
        history = {"message_hub": copy.deepcopy, "meta": {"epoch": 3}, "state_dict": content}
        torch.save(history, path, _use_new_zipfile_serialization=False)
        return path
    converted = convert(state, "ours", layout).weights
    save_weights(path, layout, converted, ModelMetadata.from_model(model), model)
    return path


def task_of(images: Path, run: Path, **changes: object) -> Pretraining:
    with init_dist("cpu") as dist:
        return Pretraining(PretrainConfig(**flags(images, run, **changes)), dist)


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(
    "form", ["run", "fine-tuned run", "transformers folder", "timm file", "wrapped legacy file of mmpretrain"]
)
def test_weights_of_any_origin_start_a_run(
    images: Path, tmp_path: Path, form: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    norm = partial(torch.nn.LayerNorm, eps=1e-5)
    model = build("mae_vit_tiny_patch4", norm_layer=norm, pixel_mean=(0.5,) * 3, pixel_std=(0.25,) * 3)
    path = save_as(form, model, tmp_path / "weights")
    task = task_of(images, tmp_path / "run", init=path, input_size=size)
    ours, lacking = task.model.state_dict(), ("decoder", "mask_token", "norm.")
    if form in ("fine-tuned run", "timm file"):
        assert "these weights have no decoder: it starts at random" in caplog.text
    else:
        assert "decoder:" not in caplog.text
        lacking = ()
    for name, x in model.state_dict().items():
        if not name.startswith(lacking) and (size == 32 or not name.endswith("pos_embed")):
            assert torch.equal(ours[name], x), name
    assert ours["pos_embed"].shape[1] == 1 + (size // 4) ** 2
    made = task.state["model"]
    if form == "transformers folder":  # it records more than the weights
        assert (made["norm_layer"], made["pixel_mean"]) == ({"eps": 1e-5}, [0.5] * 3)
    assert made["norm_pix_loss"] is False  # by the flag, not by the weights
    assert str(build(**made)) == str(task.model)  # every layer, with its sizes and eps


def test_a_run_of_an_ablation_starts_another_one(images: Path, tmp_path: Path) -> None:
    ablation = {"encoder_mask_token": True, "decoder_depth": 0}
    model = build("mae_vit_tiny_patch4", **ablation)
    tensors = {run_reader.MODEL: model.state_dict(), run_reader.OPTIM: {"x": torch.zeros(1)}}
    state = {"model": {"name": "mae_vit_tiny_patch4", **ablation}}
    write(tmp_path / "first" / "checkpoints", Snapshot(1, tensors, state, True))
    task = task_of(images, tmp_path / "next", init=tmp_path / "first", **ablation)
    for name, x in task.model.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name


def test_weights_that_do_not_fit_the_run_are_refused(images: Path, tmp_path: Path) -> None:
    state = build("mae_vit_tiny_patch4").state_dict()
    torch.save({"model": {**state, "extra.weight": torch.ones(1)}}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"more\.pth: 1 names are unknown in the layout 'ours': extra\.weight"):
        task_of(images, tmp_path / "more", init=tmp_path / "more.pth")
    torch.save(state, tmp_path / "mae.pth")
    with pytest.raises(UserError, match=r"mae\.pth does not fit the model: it has decoder_depth 2 instead of 1"):
        task_of(images, tmp_path / "less", init=tmp_path / "mae.pth", decoder_depth=1)


def test_debug_step_reproduces_a_skipped_step(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = module.Schedule.set

    def explode(schedule: module.Schedule, step: int) -> float:
        rate = original(schedule, step)
        for group in schedule.optimizer.param_groups:
            group["lr"] = rate if step < 4 else 1e30
        return rate

    with monkeypatch.context() as patch:
        patch.setattr(module.Schedule, "set", explode)
        with pytest.raises(UserError, match="mae-fast debug-step"):
            pretrain(PretrainConfig(**flags(images, tmp_path, epochs=8)))
    dump = sorted((tmp_path / "not_finite").glob("*.json"))[0]
    assert json.loads(dump.read_text()).keys() == {"step", "seed", "ids", "weights"}
    caplog.clear()
    with caplog.at_level(logging.INFO, "mae_fast"):
        assert debug_step(dump, "cpu")
    assert "first layer whose output is not finite: " in caplog.text
    assert caplog.records[-1].getMessage() == "reproduced"
    assert "other images" not in caplog.text
    good = json.loads(dump.read_text()) | {"step": 1, "weights": None}
    (dump.parent / "good.json").write_text(json.dumps(good))
    assert not debug_step(dump.parent / "good.json", "cpu")
    with pytest.raises(UserError, match="is not a dump of a skipped step"):
        debug_step(tmp_path / "config.json")


@pytest.mark.parametrize("place", ["update", "waiting"])
def test_a_signal_when_the_disk_is_full_reports_that_nothing_was_saved(
    place: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    method, save_file = getattr(module.Progress, place), module.checkpoint.save_file
    calls: list[int] = []

    def interrupted(progress: module.Progress, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return method(progress, *args)

    def full(tensors: Any, path: Path, *args: Any) -> None:
        if "step-00000002" not in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, *args)

    monkeypatch.setattr(module.Progress, place, interrupted)
    monkeypatch.setattr(module.checkpoint, "save_file", full)
    with pytest.raises(SystemExit) as caught:
        pretrain(PretrainConfig(**flags(images, tmp_path, save_every=2)))
    assert caught.value.code == 143
    newest = tmp_path / "checkpoints" / "step-00000002"
    assert re.search(
        f"nothing was saved at step [34], the newest checkpoint is {newest}: .*No space", caplog.messages[-1]
    )
    assert "run the same command again" not in caplog.text


def test_a_profile_that_cannot_be_written_is_a_warning(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert pretrain(PretrainConfig(**flags(images, tmp_path, profile=Path("/proc/trace.json")))).step == 20
    assert "--profile /proc/trace.json cannot be written" in caplog.text
    assert "wrote /proc" not in caplog.text


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_the_run_and_reaches_the_caller(
    number: signal.Signals, error: type[BaseException], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = module.Progress.update

    def interrupted(progress: module.Progress, step: int, *args: Any) -> None:
        update(progress, step, *args)
        if step == 2:
            os.kill(os.getpid(), number)

    config, handler = PretrainConfig(**flags(images, tmp_path, save_every=1000)), signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(module.Progress, "update", interrupted)
        with pytest.raises(error) as caught:
            pretrain(config)
    assert number == signal.SIGINT or caught.value.code == 143
    assert signal.getsignal(number) == handler
    saved = run_reader.find_checkpoint(tmp_path)
    assert saved.step in (2, 3)
    assert pretrain(config).step == 20


def test_a_run_outside_of_the_main_thread(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(pretrain, PretrainConfig(**flags(images, tmp_path))).result()
    assert result.step == 20
    assert len(losses(tmp_path)) == 20
    assert "is not in the main thread" in caplog.text
