"""Runs of several processes, started by torchrun on this machine: the result does not depend on their number."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import launch
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from mae_fast.weights import run_reader

STEPS = 50
RUN = {"epochs": 10, "save_every": 10, "ema_decay": 0.9}
TWO = RUN | {"batch_size": 2, "accum_iter": 2}  # for two processes
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(words: list[str], *options: str) -> list[str]:
    options = options or ("--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "mae_fast", *words]


def begin(line: list[str], **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(line, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read and return the output up to a line with ``pattern``."""
    assert process.stdout is not None
    read = []
    for line in process.stdout:
        read.append(line)
        if re.search(pattern, line):
            return "".join(read)
    raise AssertionError("".join(read))


def train(words: list[str]) -> str:
    with begin(torchrun(words)) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["train_loss"] for line in lines]


def tensors(run: Path) -> dict[str, np.ndarray]:
    found = run_reader.find_checkpoint(run)
    assert found.step == STEPS
    files = (run_reader.MODEL, run_reader.OPTIM, run_reader.EMA)
    return {f"{file} {name}": x.numpy() for file in files for name, x in load_file(found.path / file).items()}


def workers(process: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("alone")
    launch.finish(launch.words(images, folder / "run", **RUN), folder / "output")
    return losses(folder / "run")


@pytest.fixture(scope="module")
def two(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two processes with two micro-batches per step each."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        folder = tmp_path_factory.mktemp(strategy)
        found[strategy] = folder / "run"
        output = train(launch.words(images, folder / "run", **TWO, strategy=strategy, log_dir=folder / "board"))
        assert len(re.findall(f"step {STEPS}/{STEPS}", output)) == 1  # only one process prints
    return found


def test_two_processes_train_as_one(alone: list[float], two: dict[str, Path]) -> None:
    assert len(alone) == STEPS
    np.testing.assert_allclose(losses(two["ddp"]), alone, rtol=1e-6)


@pytest.mark.exhaustive
def test_two_processes_with_compiled_steps_train_as_one(images: Path, tmp_path: Path, alone: list[float]) -> None:
    output = train(launch.words(images, tmp_path, **TWO, execution="compile"))
    assert "steps are eager" not in output
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)


def test_fsdp_trains_as_ddp(two: dict[str, Path]) -> None:
    # FSDP changes the type of the blocks, so the last one computes all patches. Results are equal up to rounding.
    np.testing.assert_allclose(losses(two["fsdp"]), losses(two["ddp"]), rtol=1e-6)
    ours, theirs = tensors(two["fsdp"]), tensors(two["ddp"])
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        known = np.ones(len(x) if x.ndim else 1, bool)
        if name.endswith("attn.qkv.bias"):  # the key's gradient is truly 0, and AdamW amplifies its rounding errors
            known[len(x) // 3 : 2 * len(x) // 3] = False
        pairs = (np.atleast_1d(y)[known] for y in (x, theirs[name]))
        np.testing.assert_allclose(*pairs, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_with_a_predict_ratio_train_as_one(images: Path, tmp_path: Path, strategy: str) -> None:
    few = {"epochs": 2, "predict_ratio": 0.5}
    launch.finish(launch.words(images, tmp_path / "one", **few), tmp_path / "output")
    train(launch.words(images, tmp_path / "two", **few, batch_size=4, strategy=strategy))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)


def test_fsdp_draws_the_pictures_of_ddp(two: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = [EventAccumulator(str(run.parent / "board"), {"images": 0}).Reload() for run in two.values()]
    ours, theirs = (board.Images("reconstructions") for board in boards)
    assert [event.step for event in ours] == [event.step for event in theirs] == [10, 20, 30, 40, 50]
    for pair in zip(ours, theirs, strict=True):
        one, other = (np.asarray(Image.open(BytesIO(event.encoded_image_string)), np.int16) for event in pair)
        assert np.abs(one - other).max() <= 1  # the weights are equal up to rounding


def test_a_run_resumes_with_another_number_of_processes(images: Path, tmp_path: Path, alone: list[float]) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    first = launch.start(launch.words(images, run, **RUN), output)
    launch.until(output, lambda text: "step 5/" in text, first)
    first.terminate()
    assert launch.join(first) == 143
    for strategy, step in (("fsdp", 15), ("ddp", 30)):
        with begin(torchrun(launch.words(images, run, **TWO, strategy=strategy))) as process:
            until(process, f"step {step}/")
            process.send_signal(signal.SIGTERM)
            until(process, "saving")
            process.communicate()  # without a reader of its last output, its status would be 120
        assert process.returncode == 1  # the status of torchrun, whatever that of its processes
    assert "resuming" in launch.finish(launch.words(images, run, **RUN), output)
    np.testing.assert_allclose(losses(run), alone, rtol=1e-6)


def test_a_dead_process_restarts_the_job_then_ends_it(images: Path, tmp_path: Path, two: dict[str, Path]) -> None:
    """The restarted job continues exactly, as often as ``--max-restarts`` allows."""
    line = torchrun(launch.words(images, tmp_path, **TWO | {"save_every": 2}))
    with begin([*line[:3], "--max-restarts=1", *line[3:]]) as process:
        until(process, "step 4/")
        os.kill(max(workers(process)), signal.SIGKILL)
        assert "resuming" in until(process, "step 10/")
        killed = workers(process)
        assert len(killed) == 2
        start = time.monotonic()
        os.kill(max(killed), signal.SIGKILL)
        output = process.communicate()[0]
    assert process.returncode == 1
    assert time.monotonic() - start < 30
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", output), output
    assert not any(Path(f"/proc/{worker}").exists() for worker in killed)
    found = losses(tmp_path)
    assert 9 <= len(found) < STEPS
    assert found == losses(two["ddp"])[: len(found)]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Addresses of two connected hosts, which are the network namespaces ``mae_fast0`` and ``mae_fast1``."""
    if not shutil.which("ip"):
        pytest.skip("two hosts need the command ip")

    def ip(words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *words.split()], check=check, capture_output=True, text=True)

    made = ip("netns add mae_fast0", check=False)
    if made.returncode:
        pytest.skip(f"two hosts need network namespaces: {made.stderr.strip()}")
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        ip("netns add mae_fast1")
        ip("link add cable0 netns mae_fast0 type veth peer name cable1 netns mae_fast1")
        for i, address in enumerate(addresses):
            ip(f"-n mae_fast{i} addr add {address}/24 dev cable{i}")
            ip(f"-n mae_fast{i} link set cable{i} up")
            ip(f"-n mae_fast{i} link set lo up")
        yield addresses
    finally:
        for i in range(2):
            ip(f"netns del mae_fast{i}", check=False)


def test_two_hosts_train_as_one_and_restart_together(
    images: Path, tmp_path: Path, two: dict[str, Path], hosts: list[str]
) -> None:
    words = launch.words(images, tmp_path, **TWO | {"save_every": 2})
    shared = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-id=mae_fast", "--rdzv-backend=c10d")
    shared += (f"--rdzv-endpoint={hosts[0]}:29400",)
    processes = []
    for i, address in enumerate(hosts):
        own = (f"--local-addr={address}", f"--rdzv-conf=is_host={int(i == 0)}")  # both have this host name
        line = torchrun(words, *shared, *own)
        inside = ["ip", "netns", "exec", f"mae_fast{i}", "env", f"GLOO_SOCKET_IFNAME=cable{i}"]
        processes.append(begin([*inside, *line]))
    with processes[0], processes[1]:
        first = until(processes[0], "step 4/")
        os.kill(workers(processes[1])[0], signal.SIGKILL)
        outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], first + "\n".join(outputs)
    assert sum("resuming" in output for output in outputs) == 1
    assert losses(tmp_path) == losses(two["ddp"])


@pytest.mark.parametrize(
    ("number", "status"),
    [("SIGTERM", 143), pytest.param("SIGUSR1", 143, marks=pytest.mark.exhaustive), ("SIGINT", 130)],
)
def test_signals_save_and_the_same_line_resumes(
    images: Path, tmp_path: Path, alone: list[float], number: str, status: int
) -> None:
    words = launch.words(images, tmp_path / "run", **RUN | {"save_every": 1000})
    output = tmp_path / "output"
    process = launch.start(words, output)
    seen = launch.until(output, lambda text: "step 3/" in text, process)
    os.kill(process.pid, signal.Signals[number])
    ended = launch.join(process)
    text = output.read_text()
    assert ended == status
    saved = int(re.search(r"at step (\d+): run the same command again", text)[1])
    assert saved <= 1 + text.count(f"/{STEPS} ") < STEPS, seen  # at most one more step than the output shows
    assert f"resuming {tmp_path / 'run'} at step {saved} " in launch.finish(words, output)
    assert losses(tmp_path / "run") == alone


def test_second_ctrl_c_quits_at_once() -> None:
    """Even if a step never ends."""
    code = (
        "import signal, sys, time\n"
        "from mae_fast.training.signals import Signals\n"
        "with Signals():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with begin([sys.executable, "-c", code]) as process:
        until(process, "ready")
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)  # ignored, as it may be the same one, forwarded by a wrapper
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait()
    assert process.returncode != 0
    assert time.monotonic() - start < 5


def classify_words(verb: str, images: Path, run: Path, **changes: object) -> list[str]:
    flags = {"data-path": images, "output-dir": run, "batch-size": 24, "epochs": 2, "warmup-epochs": 0} | {
        "log-every": 1, "num-workers": 0, "dtype": "fp32", "image-decoder": "pil", "device": "cpu",
    }  # fmt: skip
    return [verb, "--preset", "tiny", *(f"--{name}={value}" for name, value in (flags | changes).items())]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_fine_tune_as_one(labelled_images: Path, tmp_path: Path, strategy: str) -> None:
    """Losses and metrics of the validation images equal those of one process, also with averaged weights."""
    same = {
        "reprob": 0.0,
        "lr": 5e-4,
        "ema-decay": 0.5,
        "keep-best": "val_loss_ema",
    }  # random erasing differs between processes
    if strategy == "ddp":
        metric, more = "val_balanced_acc", {"sampler": "balanced", "class-weights": "balanced"}
    else:
        metric, more = "val_map", {"multi-label": tmp_path / "labels.csv"}
        names = [path.relative_to(labelled_images) for path in sorted(labelled_images.rglob("*.jpg"))]
        rows = [f"{name},{'r' if name.parts[1] == 'r' else 'b|g'}\n" for name in names]
        (tmp_path / "labels.csv").write_text("".join(["image,labels\n", *rows]))
    entries = {}
    for name, run, extra in (("one", launch.finish, {}), ("two", None, {"batch-size": 12, "strategy": strategy})):
        words = classify_words("finetune", labelled_images, tmp_path / name, **same, **more, **extra)
        if run:
            run(words, tmp_path / "output")
        else:
            train(words)
        entries[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    for key in ("train_loss", "val_loss", metric, "val_loss_ema"):
        ours, theirs = ([entry[key] for entry in entries[name] if key in entry] for name in ("two", "one"))
        assert len(ours) == len(theirs) > 0
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, err_msg=key)
    assert len({run_reader.find_checkpoint(tmp_path / name / "checkpoints" / "best").step for name in entries}) == 1


def test_two_processes_probe(labelled_images: Path, tmp_path: Path) -> None:
    """There are more processes than batches to evaluate. Features are cached, and processes share each batch."""
    words = classify_words("linprobe", labelled_images, tmp_path / "run", **{"batch-size": 36, "epochs": 3})
    output = train([*words, "--cache-features"])
    assert "epoch 3: val_loss" in output
    # Both evaluate with the batch norm of rank 0, which is saved.
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    launch.finish([*words, "--eval-only", "--predictions", str(tmp_path / "table.csv")], tmp_path / "output")
    assert f"val_loss {logged['val_loss']:.4g}," in (tmp_path / "output").read_text()
    assert run_reader.find_checkpoint(tmp_path / "run").step == 3
