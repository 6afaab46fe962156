"""Runs that fail or get a signal: they are saved, have the documented exit status, and leave no process behind."""

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
LIMIT = 60  # seconds until a run hangs


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


def start(
    words: list[str], hang: str = "none:0:", launcher: tuple[str, ...] = (), before: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, *launcher, str(DRIVER), *words],
        env={**os.environ, "HANG": hang, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read and return the output up to a line with ``pattern``."""
    assert process.stdout
    read = ""
    for line in process.stdout:
        read += line
        if re.search(pattern, line):
            return read
    raise AssertionError(read)


def assert_none_is_left(session: int) -> None:
    """Assert that the session has no process left. The fork server may take a moment, as it ends after its workers."""
    assert gone(session, None, GRACE), [command_of(pid) for pid in alive(session)]


def ended(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait up to ``seconds`` for the end and return the rest of the output. Fails if a process is left."""
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
    """The log of an uninterrupted fine-tuning run: 9 steps, with an evaluation every three steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(words("finetune", jpegs, run, num_workers=0))
    assert [line["step"] for line in log(run)] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]
    return log(run)


@pytest.mark.parametrize(
    ("hang", "num_workers", "number", "status", "steps"),
    [
        ("sleep:40:train", 2, "SIGTERM", 143, (2, 5)),  # loader threads; the step at which both hang varies
        # The main thread hangs, and only the thread of ``Signals`` gets the signal.
        pytest.param("lock:44:train", 0, "SIGTERM", 143, (5, 5), marks=pytest.mark.exhaustive),
        ("lock:4:val", 2, "SIGHUP", 143, (3, 3)),  # processes, in the first evaluation
        # The main thread hangs in the second evaluation.
        pytest.param("lock:20:val", 0, "SIGTERM", 143, (6, 6), marks=pytest.mark.exhaustive),
        pytest.param("sleep:20:val", 0, "SIGINT", 130, (6, 6), marks=pytest.mark.exhaustive),
    ],
    ids=["threads", "main thread", "evaluation", "evaluation in the main thread", "and in Python"],
)
def test_a_run_with_a_hanging_loader_ends_and_resumes_exactly(
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
    """Schedulers and terminals send signals to all processes, including loader processes."""
    line = words("pretrain", jpegs, tmp_path / "run", num_workers=2, image_decoder="pil", epochs=1000)
    process = start(line)
    until(process, "step 4/")
    os.killpg(process.pid, signal.Signals[number])
    output = ended(process, LIMIT)
    assert process.returncode == (130 if number == "SIGINT" else 143), output
    (step,) = map(int, re.findall(r"^saved .* at step (\d+): run the same command again", output, re.M))
    assert output.splitlines()[-1].startswith("saved ")
    assert not re.search("interrupted|error", output)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:08}"]


def test_a_forwarded_ctrl_c_does_not_lose_the_run(jpegs: Path, tmp_path: Path) -> None:
    """A wrapper forwards SIGINT to a process that has already got it from the terminal."""
    line = words("pretrain", jpegs, tmp_path / "run", num_workers=2, image_decoder="pil", epochs=1000)
    process = start(line)
    until(process, "step 4/")
    os.killpg(process.pid, signal.SIGINT)
    for wait in (0.001, 0.02, 0.2, 0.3):
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    output = ended(process, LIMIT)
    assert process.returncode == 130, output
    assert output.splitlines()[-1].startswith("saved ")
    assert not re.search("interrupted|error|Exception", output)
    assert len([*(tmp_path / "run" / "checkpoints").iterdir()]) == 1


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
    assert saved.name >= "step-00000001"  # batches that were already loaded are lost


def test_a_loader_process_that_dies_in_an_evaluation_ends_the_run_with_a_save(
    jpegs: Path, tmp_path: Path, whole: list[dict[str, object]]
) -> None:
    line = words("finetune", jpegs, tmp_path / "run", num_workers=2)
    process = start(line, "kill:2:val")
    output = ended(process, LIMIT)
    assert process.returncode == 2, output
    assert len(re.findall("^error: .*SIGKILL", output, re.M)) == 1
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == "step-00000003"
    assert json.loads((saved / "state.json").read_text())["to_evaluate"]
    finish(line)
    assert log(tmp_path / "run") == whole


def test_batches_larger_than_the_shared_memory_of_a_container_are_loaded(jpegs: Path, tmp_path: Path) -> None:
    """The shared memory is 100 KB. Two workers load four batches of 72 KB in advance."""
    mount = "mount -t tmpfs -o size=100k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    line = words("pretrain", jpegs, tmp_path / "run", num_workers=2, image_decoder="pil", batch_size=24, epochs=9)
    shell = f'{mount} && exec "$0" "$@"'
    process = start(line, launcher=(), before=("unshare", "-m", "sh", "-c", shell))
    output = ended(process, LIMIT)
    assert process.returncode == 0, output
    assert "step 9/9" in output


@pytest.mark.parametrize("stream", ["standard output", pytest.param("standard error", marks=pytest.mark.exhaustive)])
def test_training_continues_when_its_output_pipe_is_closed(jpegs: Path, tmp_path: Path, stream: str) -> None:
    """As in ``mae-fast pretrain ... | head -1``. The other stream gets one message about it."""
    pipes = [os.pipe(), os.pipe()]
    closed, read = pipes if stream == "standard output" else pipes[::-1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mae_fast", *words("pretrain", jpegs, tmp_path / "run", num_workers=0)],
        stdout=pipes[0][1], stderr=pipes[1][1], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for descriptor in (closed[0], closed[1], read[1]):
        os.close(descriptor)
    with open(read[0]) as file:
        output = file.read()
    assert process.wait(LIMIT) == 0
    assert "step-00000009" in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    if stream == "standard output":
        (message,) = output.splitlines()
        assert "standard output cannot be written to (Broken pipe): training continues and logs to" in message
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "verb", [["--help"], ["pretrain", "--help"], pytest.param(["doctor"], marks=pytest.mark.exhaustive)]
)
def test_other_verbs_end_quietly_when_their_output_pipe_is_closed(verb: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if verb == ["doctor"] else ""}
    line = [sys.executable, "-m", "mae_fast", *verb]
    process = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


def test_closed_standard_streams_are_replaced() -> None:
    """Otherwise a checkpoint could get their file descriptors, and then the output of libraries."""
    code = (
        "import os, sys; from mae_fast.__main__ import _open_standard_streams as f; f(); print(3); assert os.fstat(1)"
    )
    process = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -c '{code}' <&- >&-"], stderr=subprocess.PIPE, text=True
    )
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("number", ["SIGHUP", "SIGINT"])
def test_a_signal_during_the_imports_has_the_documented_status(number: str) -> None:
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        name == 'tyro' and os.kill(os.getpid(), signal.{number})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from mae_fast.__main__ import main\n"
        "main()\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    status = 130 if number == "SIGINT" else 143
    assert (process.returncode, process.stdout, process.stderr) == (status, "", f"mae-fast: ended by {number}\n")


def test_a_long_step_is_abandoned_after_a_signal_and_earlier_steps_are_saved() -> None:
    code = (
        "import os, signal, time\n"
        "from mae_fast.training import signals\n"
        "signals.GRACE = 0.3\n"
        "with signals.Signals() as caught:\n"
        "    with caught.guarded(lambda: print('saved', flush=True)):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('goes on', flush=True)\n"
        "        time.sleep(1000)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert (process.returncode, process.stdout) == (143, "goes on\nsaved\n")
    assert "SIGTERM: the process did not react for 0.3 s; saved without the unfinished step" in process.stderr


def test_a_signal_before_the_first_step_ends_at_once(jpegs: Path, tmp_path: Path) -> None:
    process = start(words("pretrain", jpegs, tmp_path / "run", num_workers=2, image_decoder="pil"), "sleep:5:train")
    until(process, "^hanging$")
    os.killpg(process.pid, signal.SIGTERM)
    output = ended(process, LIMIT)
    assert process.returncode == 143, output
    assert "at step 0" in output
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("hang", ["lock:20:train", pytest.param("lock:6:val", marks=pytest.mark.exhaustive)])
def test_several_processes_end_if_one_hangs(jpegs: Path, tmp_path: Path, hang: str) -> None:
    line = words("finetune", jpegs, tmp_path / "run", num_workers=1, batch_size=4, save_every=2)
    process = start(line, hang, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
    until(process, "^hanging$")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    try:
        output = process.communicate(timeout=25)[0]
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert "SIGTERM: the process did not react for 2 s; it ends without saving" in output
    assert_none_is_left(process.pid)
    assert "step-00000002" in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


def test_several_processes_leave_an_evaluation_together(jpegs: Path, tmp_path: Path) -> None:
    """A signal to one of them is enough. The resumed run does the evaluation."""
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


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("hang", ["kill:16:train", pytest.param("kill:2:val", marks=pytest.mark.exhaustive)])
def test_several_processes_save_together_when_a_loader_process_of_one_dies(
    jpegs: Path, tmp_path: Path, hang: str
) -> None:
    line = words("finetune", jpegs, tmp_path / "run", num_workers=1, batch_size=4, image_decoder="pil", epochs=50)
    with start([*line, "--aa=rand-m9"], hang, TORCHRUN) as process:
        assert process.stdout
        output = process.stdout.read()
    assert process.returncode == 1
    assert "error: a worker process that reads" in output
    assert len(re.findall("^saving", output, re.M)) == 1
    steps = [int(step) for step in re.findall(r"step (\d+)/", output)]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{max(steps):08}"]


@pytest.mark.parametrize("victim", ["torchrun", pytest.param("second", marks=pytest.mark.exhaustive)])
def test_several_processes_save_when_torchrun_or_one_of_them_is_killed(
    jpegs: Path, tmp_path: Path, victim: str
) -> None:
    line = words("pretrain", jpegs, tmp_path / "run", num_workers=0, batch_size=4, epochs=1000)
    process = start(line, launcher=TORCHRUN)
    output = until(process, "step 4/")
    ranks = [pid for pid in children(process.pid) if "pretrain" in command_of(pid)]
    os.kill(process.pid if victim == "torchrun" else ranks[1], signal.SIGKILL)
    output += process.communicate(timeout=LIMIT)[0]
    assert all(gone(rank, None, GRACE) for rank in ranks)
    steps = [int(step) for step in re.findall(r"step (\d+)/", output)]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) >= max(steps), output
    if victim == "second":
        assert output.count("error: lost the connection to another process") == 1
        assert "gloo" not in output
