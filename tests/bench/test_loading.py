"""Rates of the loader and the step, and the messages about the bottleneck."""

import json
import math
import time

import numpy as np
import pytest
from PIL import Image
from support import command, one_thread  # noqa: F401

from mae_fast.bench import loading
from mae_fast.bench.loading import Loading, Parts, verdict
from mae_fast.data.sources import open_source

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.full((40 + i, 90, 3), i, np.uint8)).save(folder / f"{i}.jpg")
    (folder / "bad.jpg").write_bytes(b"no image")
    return folder


def test_bench_command_with_data_path(monkeypatch, capsys, tmp_path, pictures):
    monkeypatch.setattr(loading, "LEAST_SECONDS", 0.05)
    words = (
        "--models",
        "tiny",
        "--batches",
        4,
        "--rounds",
        2,
        "--num-workers",
        0,
        "--image-decoder",
        "pil",
        "--device",
        "cpu",
    )
    result = command(monkeypatch, capsys, "bench", "--data-path", pictures, *words, "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "data.json").read_text())
    rates = found["images/s"]
    assert min(rates[name] for name in ("loader", "step", "both")) > 0
    assert 0 < rates["waiting"] < 1
    assert [len(rates) for rates in found["every"].values()] == [2] * 4
    assert found["bottleneck"][0] in result.stdout
    for name, label in (("loader", "loader alone"), ("step", "step alone"), ("both", "both, as")):
        [line] = [line for line in result.stdout.splitlines() if line.startswith(label)]
        assert f"{rates[name]:.1f} images/s" in line
    assert "batches of 4" in result.stdout


def test_invalid_flags_are_refused(monkeypatch, capsys, tmp_path, pictures):
    def refusal(*words):
        result = command(monkeypatch, capsys, "bench", "--device", "cpu", "--output-dir", tmp_path / "out", *words)
        assert result.returncode == 2
        return result.stderr

    data = ("--data-path", pictures, "--models", "tiny")
    assert "fewer than a batch of 64" in refusal(*data, "--batches", 64)
    assert "--models" in refusal(*data, "large")
    assert "--batches" in refusal(*data, "--batches", 4, 8)
    assert "multiple of crops_per_image" in refusal(*data, "--batches", 4, "--crops-per-image", 3)
    assert "does not exist" in refusal("--data-path", tmp_path / "nowhere", "--models", "tiny")
    assert "--rounds 0" in refusal("--rounds", 0)
    assert "--batches 0" in refusal("--batches", 0)
    assert "--minutes 0" in refusal("--minutes", 0)
    assert "multiple of 14" in refusal("--models", "huge", "--image-sizes", 225)
    assert not (tmp_path / "out").exists()


class Slow:
    """A slow loader."""

    def __init__(self, batch, seconds):
        self.batch, self.seconds = batch, seconds

    def __iter__(self):
        while True:
            time.sleep(self.seconds)
            yield self.batch


@pytest.mark.parametrize(("load", "step", "waiting"), [(0.02, 0.005, 0.8), (0.005, 0.02, 0.2)])
def test_rates(monkeypatch, load, step, waiting):
    monkeypatch.setattr(loading, "LEAST_SECONDS", 0.3)
    parts = object.__new__(Parts)
    parts.config = type("Config", (), {"num_workers": 3})
    batch = type("Batch", (), {"images": range(5)})
    taken = []

    def take(batch):
        taken.append(batch)
        time.sleep(step)

    parts._step = take
    batches = iter(Slow(batch, load))
    alone, _ = parts._rate(batches, step=False)
    assert not taken
    assert 0.5 * 5 / load < alone < 1.01 * 5 / load
    both, waited = parts._rate(batches, step=True)
    assert 0.5 * 5 / (load + step) < both < 1.01 * 5 / (load + step)
    assert waited == pytest.approx(waiting, abs=0.15)


def test_a_round_measures_loader_step_and_both():
    """The loader alone, the step on one batch, and both. The first batch or step of each part does not count."""
    parts = object.__new__(Parts)
    stepped, seen = [], []
    parts._step = stepped.append
    parts._batches = lambda seed: (f"{seed}-{i}" for i in range(9))

    def rate(batches, step):
        seen.append((step, next(batches), next(batches), list(stepped)))
        return float(len(seen)), len(seen) / 10

    parts._rate = rate
    assert parts.round(3) == {"loader": 1.0, "step": 2.0, "both": 3.0, "waiting": 0.3}
    assert seen == [
        (False, "3-1", "3-2", []),
        (True, "3-0", "3-0", ["3-0"]),
        (True, "1003-1", "1003-2", ["3-0", "1003-0"]),
    ]


def found(loader, step, both, waiting=0.0):
    return {"loader": loader, "step": step, "both": both, "waiting": waiting}


def test_bottleneck_and_hints(monkeypatch):
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda pid: range(8))
    lines, hints = verdict(found(500, 100, 95, 0.03), Loading(), "pil", "", 500, 224)
    assert lines[0].startswith("bottleneck: the step; ")
    assert "5.0" in lines[0]
    assert "95%" in lines[1]
    assert "3%" in lines[1]
    assert (len(lines), hints) == (2, [])

    lines, hints = verdict(found(50, 100, 40, 0.6), Loading(), "pil", "no module", 500, 224)
    assert lines[0].startswith("bottleneck: the loader; ")
    assert "50%" in lines[0]
    assert "80%" in lines[1]
    assert [hint.split()[0] for hint in hints] == ["pip", "--num-workers", "--cache,", "mae-fast", "--crops-per-image"]
    assert "no module" in hints[0]
    assert hints[1] == "--num-workers 8"
    assert "500 pixels" in hints[3]

    tried = Loading(num_workers=8, cache=True, repeats=4)
    assert verdict(found(50, 100, 40), tried, "dali", "", 300, 224)[1] == []
    assert verdict(found(50, 100, 40), tried, "pil", "", math.nan, 224)[1] == ["--image-decoder dali"]

    lines, hints = verdict(found(120, 100, 60, 0.02), Loading(), "dali", "", 300, 224)  # more workers take more cores
    assert lines[0].startswith("bottleneck: the step")
    assert "compete for the cores" in lines[2]
    assert [hint.split()[0] for hint in hints] == ["--cache,", "--crops-per-image"]


def test_shorter_side(pictures):
    assert loading.shorter_side(open_source(pictures)) == 43.5
    for file in pictures.iterdir():
        file.write_bytes(b"no image")
    assert math.isnan(loading.shorter_side(open_source(pictures)))
