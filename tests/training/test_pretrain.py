"""The pre-training command, run for real: it learns, resumes exactly after kill -9, and refuses what it should."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_fast.data.check import check
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError
from mae_fast.training import pretrain as module
from mae_fast.training.config import PRESETS, PretrainConfig
from mae_fast.training.pretrain import pretrain


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty smooth pictures of 40 x 36 pixels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((36, 40), Image.Resampling.BICUBIC).save(root / f"{i:02}.png")
    return root


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
    """The loss curve to the last bit."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [float(line["train_loss"]).hex() for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    from mae_fast.training.checkpoint import MODEL, find

    return load_file(find(run, pytest.fail).path / MODEL)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 20 steps, in one thread as the resumed ones."""
    run = tmp_path_factory.mktemp("whole")
    subprocess.run(command(images, run), check=True, env=ENV, stdout=subprocess.DEVNULL)
    return run


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(images: Path, run: Path) -> list[str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags(images, run).items()]
    return [sys.executable, "-m", "mae_fast", "pretrain", *words]


def test_it_learns(whole: Path) -> None:
    curve = [float.fromhex(value) for value in losses(whole)]
    assert len(curve) == 20
    assert np.mean(curve[-4:]) < 0.7 * np.mean(curve[:4])


@pytest.mark.parametrize("after", [1, 4, 10])
def test_kill_and_same_line_again_gives_the_same_run(images: Path, whole: Path, tmp_path: Path, after: int) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(command(images, run), env=ENV, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if f"step {after}/" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    again = subprocess.run(command(images, run), env=ENV, check=True, stdout=subprocess.PIPE, text=True)
    assert ("resuming" in again.stdout) == (after >= 4)  # step 3 is the first that is saved
    assert losses(run) == losses(whole)
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    started = time.monotonic()
    third = subprocess.run(command(images, run), env=ENV, check=True, stdout=subprocess.PIPE, text=True)
    assert "is finished" in third.stdout, f"{third.stdout} after {time.monotonic() - started:.0f} s"


def test_accumulation_equals_a_larger_batch(images: Path, tmp_path: Path) -> None:
    curves = []
    for name, sizes in {"one": {"batch_size": 8}, "two": {"batch_size": 4, "accum_iter": 2}}.items():
        pretrain(PretrainConfig(**flags(images, tmp_path / name, epochs=2, lr=None, blr=0.01, **sizes)))
        curves.append([float.fromhex(value) for value in losses(tmp_path / name)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_another_configuration_is_refused_and_shown(images: Path, tmp_path: Path) -> None:
    pretrain(PretrainConfig(**flags(images, tmp_path, epochs=2)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"epochs: 2 there, 3 now; mask_ratio: 0\.75 there, 0\.5 now"):
        pretrain(PretrainConfig(**flags(images, tmp_path, epochs=3, mask_ratio=0.5)))
    assert sorted(tmp_path.rglob("*")) == before


def test_learning_rate_follows_the_effective_batch(images: Path, tmp_path: Path) -> None:
    changes = {"lr": None, "blr": 0.064, "accum_iter": 2, "epochs": 3, "warmup_epochs": 1}
    pretrain(PretrainConfig(**flags(images, tmp_path, **changes)))
    rates = [json.loads(line)["train_lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(0.064 * 16 / 256)


def test_diverged_run_stops_and_keeps_its_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain_config = PretrainConfig(**flags(images, tmp_path, epochs=4))
    original = module.WarmupCosine.set

    def explode(schedule: module.WarmupCosine, step: int) -> float:
        rate = original(schedule, step)
        for group in schedule.optimizer.param_groups:
            group["lr"] = rate if step < 4 else 1e30
        return rate

    monkeypatch.setattr(module.WarmupCosine, "set", explode)
    with pytest.raises(UserError, match=r"the loss is (nan|inf)"):
        pretrain(pretrain_config)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


def test_bad_images_are_skipped_counted_and_limited(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "07.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 40 images cannot be used, more than the allowed 1.0%"):
        pretrain(PretrainConfig(**flags(folder, tmp_path / "strict")))
    pretrain(PretrainConfig(**flags(folder, tmp_path / "run", max_bad_fraction=0.1)))
    assert "skipped 07.png (not an image: no known image format)" in capsys.readouterr().err
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 1
    assert 0 <= last["waiting"] < 1


def test_list_of_bad_images_changes_nothing_else(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "07.png").write_bytes(b"no image")
    pretrain(PretrainConfig(**flags(folder, tmp_path / "found", max_bad_fraction=0.1)))
    check(open_source(folder))
    pretrain(PretrainConfig(**flags(folder, tmp_path / "known", max_bad_fraction=0.1)))
    assert losses(tmp_path / "known") == losses(tmp_path / "found")


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_cache_and_workers_change_nothing(images: Path, tmp_path: Path, decoder: str) -> None:
    pretrain(PretrainConfig(**flags(images, tmp_path / "plain", decoder=decoder)))
    pretrain(PretrainConfig(**flags(images, tmp_path / "run", decoder=decoder, cache=True, num_workers=2)))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_repeats_and_dali(images: Path, tmp_path: Path) -> None:
    """Four crops of each of 40 images, 8 crops a step: 20 steps an epoch."""
    pretrain(PretrainConfig(**flags(images, tmp_path / "run", repeats=4, epochs=2, decoder="dali")))
    assert len(losses(tmp_path / "run")) == 40
    with pytest.raises(UserError, match="--batch-size 6"):
        PretrainConfig(**flags(images, tmp_path / "other", repeats=3))


def test_run_is_not_resumed_on_other_images(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    pretrain(PretrainConfig(**flags(folder, tmp_path / "run")))
    shutil.copy(folder / "00.png", folder / "40.png")
    with pytest.raises(UserError, match=r"images: '[0-9a-f]{16}' there"):
        pretrain(PretrainConfig(**flags(folder, tmp_path / "run")))


def test_folder_of_a_living_run_is_refused(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(command(images, run), env=ENV, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "step 1/" in line)
        process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(UserError, match=rf"in use by process {process.pid} on "):
                pretrain(PretrainConfig(**flags(images, run)))
        finally:
            process.kill()
    pretrain(PretrainConfig(**flags(images, run)))  # what a killed run leaves does not keep its own line out
