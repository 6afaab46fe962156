"""Runs of an earlier version are resumed.

The code of commit d0744c8 made ``old_runs/VERB.json``. SIGTERM ended these runs after step 5 of 12, between two lines
of the log. A file has the JSON files of the run, and the name, dtype and shape of each tensor.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import command

OLD_RUNS = Path(__file__).parent / "old_runs"


def write_run(folder, old):
    """Write the old run, with tensors of its names and shapes; all are fp32."""
    checkpoint = folder / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(old["config"]))
    (folder / "log.jsonl").write_text(old["log"])
    (checkpoint / "state.json").write_text(json.dumps(old["state"]))
    generator = torch.Generator().manual_seed(0)
    for name, listed in old["tensors"].items():
        tensors = {key: torch.zeros(shape) for key, (_, shape) in listed.items()}
        for key, tensor in tensors.items():
            if name == "optim":
                tensor.fill_(5 if key.endswith(".step") else 0)
            else:
                tensor.normal_(std=0.02, generator=generator)
        save_file(tensors, checkpoint / f"{name}.safetensors")
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    manifest = {name: {"size": len(x), "sha256": hashlib.sha256(x).hexdigest()} for name, x in files.items()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def images(tmp_path):
    """Images of the names that the old runs were trained on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in "ab":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i:02}.jpg")
    return tmp_path / "images"


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_run_of_an_earlier_version_is_resumed(verb, images, tmp_path, monkeypatch, capsys):
    old = json.loads((OLD_RUNS / f"{verb}.json").read_text())
    old["state"]["losses"] = [1000.0, 1000.0]  # of step 5; the next line of the log averages them
    run = tmp_path / "run"
    write_run(run, old)
    flags = {
        "preset": "tiny", "data_path": images, "output_dir": run, "batch_size": 4, "accum_iter": 2, "epochs": 4,
        "warmup_epochs": 1, "num_workers": 0, "dtype": "fp32", "decoder": "pil", "log_every": 4, "save_every": 1000,
        "ema_decay": 0.9,
    }  # fmt: skip
    done = command(monkeypatch, capsys, verb, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()))
    assert done.returncode == 0, done.stderr
    assert f"resuming {run} at step 5 of 12" in done.stdout
    before = [json.loads(line) for line in old["log"].splitlines()]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines[: len(before)] == before
    losses = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}
    assert list(losses) == [4, 8, 12]
    assert 250 < losses[8] < 260  # two of eight micro-batches
    for name, listed in old["tensors"].items():
        tensors = load_file(run / "checkpoints" / "step-00000012" / f"{name}.safetensors")
        assert {key: list(x.shape) for key, x in tensors.items()} == {key: shape for key, (_, shape) in listed.items()}


def test_resuming_an_old_run_with_another_configuration_is_an_error(images, tmp_path, monkeypatch, capsys):
    old = json.loads((OLD_RUNS / "pretrain.json").read_text())
    write_run(tmp_path / "run", old)
    words = (
        "--preset",
        "tiny",
        "--data-path",
        images,
        "--output-dir",
        tmp_path / "run",
        "--batch-size",
        8,
        "--seed",
        1,
    )
    done = command(monkeypatch, capsys, "pretrain", *words)
    assert (done.returncode, "seed: 0 in the run, 1 now" in done.stderr) == (2, True)
