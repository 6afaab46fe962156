"""Runs with ``--predict-ratio``: they resume exactly, and only with the same ratio."""

import json
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import load_file

from mae_fast.weights import run_reader

RATIO = {"predict-ratio": 0.5}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    return [line["train_loss"] for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run_reader.find_checkpoint(run).path / run_reader.MODEL)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    launch.finish(launch.words(images, folder / "run", **RATIO), folder / "output")
    return folder / "run"


def test_a_killed_run_resumes_bit_for_bit(images: Path, whole: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    line = launch.words(images, run, **RATIO)
    process = launch.start(line, output)
    launch.until(output, lambda text: "step 5/10" in text, process)
    process.kill()
    launch.join(process)
    launch.finish(line, output)
    assert losses(run) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(x, expected[name]) for name, x in weights(run).items())
    assert json.loads((run / "config.json").read_text())["predict_ratio"] == 0.5


def test_resuming_with_another_ratio_is_an_error(images: Path, whole: Path, tmp_path: Path) -> None:
    launch.finish(launch.words(images, tmp_path / "run"), tmp_path / "output")
    assert losses(tmp_path / "run") != losses(whole)
    process = launch.start(launch.words(images, whole, **{"predict-ratio": 0.25}), tmp_path / "refused")
    assert launch.join(process) == 2
    assert "predict_ratio: 0.5 in the run, 0.25 now" in (tmp_path / "refused").read_text()
