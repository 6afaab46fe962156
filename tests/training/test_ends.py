"""Runs that cannot go on, and signals that end them: saved, with the documented status, and no process is left."""

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
from run_matrix import GRACE, alive, command_of, gone, log

DRIVER = Path(__file__).parents[1] / "hanging.py"
LIMIT = 60  # seconds to get to where a run hangs


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.jpg")
    return root


def words(verb: str, data: Path, run: Path, **flags: object) -> list[str]:
    flags = {"data-path": data, "output-dir": run, "batch-size": 8, "epochs": 3, "warmup-epochs": 1} | {
        "dtype": "fp32", "log-every": 1, "save-every": 1000, "preset": "tiny",
    } | flags  # fmt: skip
    return [verb, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]


def start(words: list[str], hang: str = "none:0:", launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, str(DRIVER), *words],
        env={**os.environ, "HANG": hang, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """What is printed up to a line that has ``pattern``."""
    assert process.stdout
    read = ""
    for line in process.stdout:
        read += line
        if re.search(pattern, line):
            return read
    raise AssertionError(read)


def assert_none_is_left(session: int) -> None:
    """No process of the session; the fork server may take a moment, as it ends after its last worker."""
    assert gone(session, None, GRACE), [command_of(pid) for pid in alive(session)]


def ended(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for the end, within ``seconds``; the rest of the output. Fails if a process is left."""
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        raise AssertionError(f"does not end: {process.communicate()[0]}") from None
    assert_none_is_left(process.pid)
    assert "Traceback" not in output
    return output


def finish(words: list[str]) -> str:
    process = start(words)
    output = ended(process, 2 * LIMIT)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def whole(jpegs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The log of a fine-tuning run that nothing ends: 9 steps, an evaluation after each three."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(words("finetune", jpegs, run, num_workers=0))
    assert [line["step"] for line in log(run)] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]
    return log(run)


@pytest.mark.parametrize(
    ("hang", "num_workers", "number", "status", "steps"),
    [
        ("sleep:40:train", 2, "SIGTERM", 143, (2, 5)),  # threads; where both of them hang is theirs to decide
        ("lock:44:train", 0, "SIGTERM", 143, (5, 5)),  # the main thread, and only a thread of ours learns of it
        ("lock:4:val", 2, "SIGHUP", 143, (3, 3)),  # processes, in the first evaluation
        ("sleep:20:val", 0, "SIGINT", 130, (6, 6)),  # the main thread, in the second evaluation
    ],
    ids=["threads", "main thread", "evaluation", "evaluation in the main thread"],
)
def test_a_hanging_loader_is_left_and_the_run_goes_on_as_if_nothing_had_been(
    jpegs: Path,
    tmp_path: Path,
    whole: list[dict[str, object]],
    hang: str,
    num_workers: int,
    number: str,
    status: int,
    steps: tuple[int, int],
) -> None:
    line = words("finetune", jpegs, tmp_path / "run", num_workers=num_workers)
    process = start(line, hang)
    until(process, "^hanging$")
    time.sleep(1)
    process.send_signal(signal.Signals[number])
    output = ended(process, LIMIT)
    assert process.returncode == status, output
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert steps[0] <= int(saved.name.removeprefix("step-")) <= steps[1]
    assert f"resuming {tmp_path / 'run'} at step {int(saved.name.removeprefix('step-'))} " in finish(line)
    assert log(tmp_path / "run") == whole


@pytest.mark.parametrize(
    "number", ["SIGTERM", "SIGINT", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("SIGHUP", "SIGUSR1"))]
)
def test_a_signal_to_the_process_group_saves(jpegs: Path, tmp_path: Path, number: str) -> None:
    """As schedulers and terminals send it: to loader processes, too."""
    line = words("pretrain", jpegs, tmp_path / "run", num_workers=2, image_decoder="pil", epochs=1000)
    process = start(line)
    until(process, "step 4/")
    os.killpg(process.pid, signal.Signals[number])
    output = ended(process, LIMIT)
    assert process.returncode == (130 if number == "SIGINT" else 143), output
    step = int(re.search(r"saving .* at step (\d+): run the same line again", output)[1])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:08}"]


def test_a_loader_process_that_hangs_in_a_library_is_killed(jpegs: Path, tmp_path: Path) -> None:
    line = words("pretrain", jpegs, tmp_path / "run", num_workers=2, image_decoder="pil", accum_iter=2, batch_size=4)
    process = start(line, "lock:18:train")
    until(process, "^hanging$")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output = ended(process, LIMIT)
    assert process.returncode == 130, output
    assert "saving" in output


def test_a_dead_loader_process_ends_the_run_with_a_save_and_one_message(jpegs: Path, tmp_path: Path) -> None:
    line = words("pretrain", jpegs, tmp_path / "run", num_workers=2, image_decoder="pil")
    process = start(line, "kill:16:train")
    output = ended(process, LIMIT)
    assert process.returncode == 2, output
    (message,) = re.findall("error: .*", output)
    assert "SIGKILL" in message
    assert str(jpegs) in message
    assert "--num-workers" in output
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name >= "step-00000001"  # batches that were ready are lost


def test_a_signal_before_the_first_step_ends_at_once(jpegs: Path, tmp_path: Path) -> None:
    process = start(words("pretrain", jpegs, tmp_path / "run", num_workers=2, image_decoder="pil"), "sleep:0:train")
    until(process, "^hanging$")
    os.killpg(process.pid, signal.SIGTERM)
    output = ended(process, LIMIT)
    assert process.returncode == 143, output
    assert "at step 0" in output
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("hang", ["lock:20:train", "lock:6:val"])
def test_several_processes_of_which_one_hangs_end(jpegs: Path, tmp_path: Path, hang: str) -> None:
    line = words("finetune", jpegs, tmp_path / "run", num_workers=1, batch_size=4, save_every=2)
    process = start(line, hang, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
    until(process, "^hanging$")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    try:
        output = process.communicate(timeout=25)[0]
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert "SIGTERM: the process has not answered for 2 s" in output
    assert_none_is_left(process.pid)
    assert "step-00000002" in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


def test_several_processes_leave_an_evaluation_together(jpegs: Path, tmp_path: Path) -> None:
    """A signal to one of them is enough; the evaluation is done when the run goes on."""
    line = words("finetune", jpegs, tmp_path / "run", num_workers=0, batch_size=1, epochs=1, warmup_epochs=0)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(line, "pause:2:val", launcher)
    output = until(process, "^hanging$")
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(child), signal.SIGTERM)
    output += process.communicate(timeout=30)[0]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((saved / "state.json").read_text())["to_evaluate"], output
    assert not [line for line in log(tmp_path / "run") if "val_loss" in line]
    with start(line, launcher=launcher) as again:
        output = again.communicate()[0]
    assert again.returncode == 0, output
    assert [line["step"] for line in log(tmp_path / "run") if "val_loss" in line] == [12]
    assert "to_evaluate" not in json.loads((saved / "state.json").read_text())
