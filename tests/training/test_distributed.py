"""Several processes, started for real by torchrun on this machine: the same run, however many they are."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
IMAGES = 48
STEPS = 12  # of 8 images, in two epochs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((36, 40), Image.Resampling.BICUBIC).save(root / f"{i:02}.png")
    return root


def command(images: Path, run: Path, world: int, *words: str) -> list[str]:
    start = ["torch.distributed.run", "--nproc-per-node", str(world), "--master-port", "0", "--rdzv-backend", "c10d"]
    start += ["--rdzv-endpoint", "localhost:0"]
    start = start if world > 1 else []
    flags = {"data-path": images, "output-dir": run, "batch-size": 8 // world, "epochs": 2, "warmup-epochs": 0}
    flags |= {"log-every": 1, "save-every": 5, "num-workers": 0, "dtype": "fp32", "decoder": "pil"}
    line = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    modules = ["-m", *start, "-m", "mae_fast"] if start else ["-m", "mae_fast"]
    return [sys.executable, *modules, "pretrain", "--preset", "tiny", *line, *words]


def train(images: Path, run: Path, world: int = 1, *words: str) -> str:
    line = command(images, run, world, *words)
    done = subprocess.run(line, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["train_loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("alone")
    train(images, run)
    return losses(run)


@pytest.fixture(scope="module")
def two(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    found = {}
    for strategy in ("ddp", "fsdp"):
        run = tmp_path_factory.mktemp(strategy)
        output = train(images, run, 2, "--strategy", strategy)
        assert len(re.findall("step 12/12", output)) == 1  # one of them prints
        found[strategy] = losses(run)
    return found


def test_two_processes_train_as_one(alone: list[float], two: dict[str, list[float]]) -> None:
    np.testing.assert_allclose(two["ddp"], alone, rtol=1e-6)


def test_shards_train_as_copies(two: dict[str, list[float]]) -> None:
    assert two["fsdp"] == two["ddp"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_accumulation_is_the_same_in_two_processes(
    images: Path, tmp_path: Path, alone: list[float], strategy: str
) -> None:
    train(images, tmp_path, 2, "--strategy", strategy, "--batch-size", "2", "--accum-iter", "2")
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-6)


def until(process: subprocess.Popen[str], words: str) -> None:
    """Read the output until a line holds ``words``."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"no {words!r} in the output")


def test_one_to_two_to_one_process(images: Path, tmp_path: Path, alone: list[float]) -> None:
    for world, strategy, step in ((1, "ddp", 2), (2, "fsdp", 5), (2, "ddp", 8)):
        line = command(images, tmp_path, world, "--strategy", strategy)
        with subprocess.Popen(line, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            until(process, f"step {step}/")
            process.send_signal(signal.SIGTERM)
            until(process, "saving")
        assert process.returncode == (143 if world == 1 else 1)  # torchrun says 1 whatever its processes say
    output = train(images, tmp_path)
    assert "resuming" in output
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-6)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_a_dead_process_ends_the_job(images: Path, tmp_path: Path) -> None:
    line = command(images, tmp_path / "run", 2)
    with subprocess.Popen(line, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        until(process, "step 6/")
        workers = children(process.pid)
        assert len(workers) == 2
        start = time.monotonic()
        os.kill(max(workers), signal.SIGKILL)
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode != 0
    assert time.monotonic() - start < 30
    assert re.search(r"rank\s*: 1 .*\n.*\n.*exitcode\s*: -9|rank: 1", output), output
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_signals_save_and_the_same_line_goes_on(
    images: Path, tmp_path: Path, alone: list[float], number: str, status: int
) -> None:
    line = command(images, tmp_path, 1, "--log-every", "1", "--save-every", "1000")
    with subprocess.Popen(line, env=ENV, stdout=subprocess.PIPE, text=True) as process:
        until(process, "step 3/")
        process.send_signal(signal.Signals[number])
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == status
    saved = int(re.search(r"at step (\d+): run the same line again", output)[1])
    assert saved <= 3 + 1 + output.count("/12")  # at most one more step than it was told of
    train(images, tmp_path, 1, "--save-every", "1000")
    assert losses(tmp_path) == alone


def test_second_ctrl_c_quits_at_once(images: Path, tmp_path: Path) -> None:
    """Even where a step takes for ever."""
    code = (
        "import signal, sys, time\n"
        "from mae_fast.training.signals import Signals\n"
        "with Signals():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        until(p, "ready")
        start = time.monotonic()
        p.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert p.poll() is None
        p.send_signal(signal.SIGINT)
        p.wait()
    assert p.returncode != 0
    assert time.monotonic() - start < 5
