"""Runs that are killed many times: each resumes exactly.

``make torture`` uses ``--kills N`` and ``--every-operation`` for more kills than the default.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import launch
import pytest
import torch
from launch import words
from run_matrix import GRACE, gone
from safetensors.torch import load_file

from mae_fast.data.workers import END_SIGNALS
from mae_fast.weights import run_reader

STEPS = 10
NUMBERS = [errno.EIO, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EMFILE]


def curve(run: Path) -> list[str]:
    """The losses, bit for bit."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [float(line["train_loss"]).hex() for line in lines]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    path = run_reader.find_checkpoint(run).path
    names = (run_reader.MODEL, run_reader.OPTIM, run_reader.EMA)
    return {f"{file} {name}": x for file in names for name, x in load_file(path / file).items()}


def same(run: Path, whole: Path) -> bool:
    ours, theirs = tensors(run), tensors(whole)
    return curve(run) == curve(whole) and ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    launch.finish(words(images, run.with_name("first")), run.with_name("first.txt"))  # starts the server, too
    started = time.monotonic()
    launch.finish(words(images, run), run.with_suffix(".txt"), root=run)
    assert len(curve(run)) == STEPS
    run.with_suffix(".seconds").write_text(str(time.monotonic() - started))
    return run


def test_kills_at_any_time_change_nothing(
    images: Path, whole: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Runs get SIGKILL after random times and are resumed, with and without a worker process, two runs in parallel."""
    kills = pytestconfig.getoption("kills")
    seconds = float(whole.with_suffix(".seconds").read_text())

    def chain(number: int, count: int) -> Counter[str]:
        rng, done, runs = random.Random(number), Counter(), 0
        while done["kills"] < count:
            run = tmp_path / f"{number}-{runs}"
            runs += 1
            output = run.with_suffix(".txt")
            for attempt in range(100):
                process = launch.start(words(images, run, num_workers=attempt % 2), output)
                status = launch.join(process, rng.uniform(0, seconds) if done["kills"] < count else None)
                if status is None:
                    process.kill()
                    launch.join(process)
                    done["kills"] += 1
                    done["in a save"] += any((run / "checkpoints").glob(".tmp-*"))
                    continue
                assert status == 0, output.read_text()
                break
            assert same(run, whole)
            done["runs"] += 1
        return done

    with ThreadPoolExecutor(2) as pool:
        total = sum(pool.map(chain, range(2), (kills // 2, kills - kills // 2)), Counter())
    print(f"\n{total['kills']} kills in {total['runs']} runs, {total['in a save']} in a save: 0 differ")
    assert total["kills"] == kills


def test_signals_to_the_process_group_lose_no_step(
    images: Path, whole: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Process groups get signals after random times, as from schedulers and terminals; two runs in parallel.

    There are half as many signals as ``--kills``. Each run saves the steps that it has logged, and resumes exactly.
    """
    count = max(2, pytestconfig.getoption("kills") // 2)
    seconds = float(whole.with_suffix(".seconds").read_text())

    def one(run: Path, rng: random.Random, workers: int) -> tuple[int | None, int]:
        """The exit status, None after a signal, and the number of logged steps that are not saved."""
        output = run.with_name(f"{run.name}-{rng.random()}.txt")
        process = launch.start(words(images, run, num_workers=workers, save_every=1000), output)
        status = launch.join(process, rng.uniform(0.1, (1 + workers) * seconds))
        if status is None:
            number = rng.choice(END_SIGNALS)
            with suppress(ProcessLookupError):  # the run may have just ended
                os.killpg(process.pid, number)
            status = launch.join(process)
            text = output.read_text()
            logged = max(map(int, re.findall(r"step (\d+)/", text)), default=0)
            step = max((int(x.name[5:]) for x in (run / "checkpoints").glob("step-*")), default=0)
            finished = step == STEPS and status == 0
            assert finished or status == (130 if number == signal.SIGINT else 143), text
            assert not re.search("Traceback|error", text), text
            assert gone(process.pid, None, GRACE), text
            return (0 if finished else None), max(0, logged - step)
        assert status == 0, output.read_text()
        return status, 0

    def chain(number: int, count: int) -> Counter[str]:
        rng, done, runs = random.Random(number), Counter(), 0
        while done["signals"] < count:
            run = tmp_path / f"{number}-{runs}"
            runs += 1
            for attempt in range(100):
                status, lost = one(run, rng, 2 * (attempt % 2))
                done["signals"] += status is None
                done["lost steps"] += lost
                if status == 0:
                    break
            assert same(run, whole)
        return done

    with ThreadPoolExecutor(2) as pool:
        total = sum(pool.map(chain, range(2), (count // 2, count - count // 2)), Counter())
    print(f"\n{total['signals']} signals to process groups: {total['lost steps']} logged steps lost, 0 runs differ")
    assert total["signals"] >= count
    assert not total["lost steps"]


def test_kills_during_the_imports_change_nothing(images: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for delay in (0.3, 2.0):
        line = [sys.executable, "-m", "mae_fast", *words(images, run)]
        with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
            time.sleep(delay)
            process.kill()
    launch.finish(words(images, run), tmp_path / "output")
    assert same(run, whole)


def operations(whole: Path) -> list[str]:
    return Path(f"{whole.with_suffix('.txt')}.operations").read_text().splitlines()


def test_kills_at_operations_on_files_change_nothing(
    images: Path, whole: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Kills at a third of the kinds of file operations in a save that also removes an older checkpoint.

    With ``--every-operation``, at every file operation of the run.
    """
    names = operations(whole)
    every = [*range(1, len(names) + 1)]
    if not pytestconfig.getoption("every_operation"):
        starts = [i for i, name in enumerate(names, 1) if name.startswith("os.mkdir /checkpoints/.tmp-")]
        kinds = {re.sub(r"\d{8}", "N", names[i - 1]): i for i in range(starts[3], starts[4])}
        every = list(kinds.values())[::3]
    assert len(every) >= 4

    def at(number: int) -> None:
        run = tmp_path / str(number)
        output = run.with_suffix(".txt")
        process = launch.start(words(images, run), output, root=run, fault=(number, 0))
        assert launch.join(process) == -9, output.read_text()
        launch.finish(words(images, run), output)
        assert same(run, whole), names[number - 1]
        assert not any((run / "checkpoints").glob(".tmp-*"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(at, every))
    print(f"\n{len(every)} operations of {len(names)} killed at: 0 differ")


@pytest.mark.parametrize("number", NUMBERS)
def test_failing_file_operations_give_one_message_and_lose_nothing(
    images: Path, whole: Path, tmp_path: Path, number: int, pytestconfig: pytest.Config
) -> None:
    """If a file operation fails, the run continues, or stops with a message that names it and can be resumed."""
    names = operations(whole)
    first = {re.sub(r"\d{8}", "N", name): i for i, name in reversed([*enumerate(names, 1)])}
    every = (
        range(1, len(names) + 1)
        if pytestconfig.getoption("every_operation")
        else [*first.values()][NUMBERS.index(number) :: 2 * len(NUMBERS)]
    )

    def at(place: int) -> str:
        run = tmp_path / str(place)
        output = run.with_suffix(".txt")
        process = launch.start(words(images, run), output, root=run, fault=(place, number))
        status = launch.join(process)
        text = output.read_text()
        assert status in (0, 2), (names[place - 1], text)
        assert "Traceback" not in text, names[place - 1]
        if status == 2:
            assert len(re.findall("^error: ", text, re.M)) == 1
            assert str(run) in re.split("^error: ", text, flags=re.M)[1], text
        launch.finish(words(images, run), output)
        assert same(run, whole), names[place - 1]
        return "stopped" if status else "went on"

    with ThreadPoolExecutor(2) as pool:
        print("\n", errno.errorcode[number], Counter(pool.map(at, every)))


@pytest.mark.parametrize(
    "checkpoints", [0.5, 2.3, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in (1.5, 2.9))]
)
def test_a_full_disk_loses_nothing(images: Path, whole: Path, tmp_path: Path, checkpoints: float) -> None:
    """The file system has room for ``checkpoints`` checkpoints. With more room, the same command resumes."""
    size = sum(path.stat().st_size for path in run_reader.find_checkpoint(whole).path.iterdir())
    disk, output = tmp_path / "disk", tmp_path / "output"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", disk, "-o"]
    mounted = subprocess.run([*mount, f"size={int(size * checkpoints)}"], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    try:
        process = launch.start(words(images, disk / "run"), output)
        assert launch.join(process) == 2
        text = output.read_text()
        assert "Traceback" not in text
        ((error, fix),) = re.findall("error: (.*)\nhint: (.*)", text)
        assert error.startswith(f"cannot write a checkpoint to {disk / 'run' / 'checkpoints'} (")
        assert "No space left on device" in error
        assert fix == "free disk space, or check the disk"
        assert not any((disk / "run" / "checkpoints").glob(".tmp-*"))
        assert len([*(disk / "run" / "checkpoints").iterdir()]) == int(checkpoints)
        subprocess.run([*mount, f"remount,size={size * 4}"], check=True)
        assert ("resuming" in launch.finish(words(images, disk / "run"), output)) == (checkpoints > 1)
        assert same(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_deleted_folder_ends_the_run_with_one_message(images: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    process = launch.start(words(images, run, epochs=100), output)
    launch.until(output, lambda text: "step 3/" in text, process)
    shutil.rmtree(run.rename(tmp_path / "deleted"))  # rename first, so that a save cannot interfere
    status = launch.join(process)
    text = output.read_text()
    assert status == 2, text
    assert "Traceback" not in text
    assert str(run) in re.split("^error: ", text, flags=re.M)[1]


def test_memory_files_and_threads_do_not_leak(images: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Over 400 steps and 20 checkpoints (2000 and 100 with ``--every-operation``), none of them grow."""
    steps = 2000 if pytestconfig.getoption("every_operation") else 400
    output = tmp_path / "output"
    changes = {"batch_size": 2, "epochs": steps // 20, "log_every": 10, "save_every": 20, "num_workers": 1}
    process = launch.start(words(images, tmp_path / "run", **changes), output)

    def used(step: int) -> tuple[int, int, int]:
        launch.until(output, lambda text: f"step {step}/" in text, process)
        samples = []
        for _ in range(10):  # the minimum, as a save has files open
            status = dict(re.findall(r"(\w+):\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()))
            samples.append((int(status["VmRSS"]), len(os.listdir(f"/proc/{process.pid}/fd")), int(status["Threads"])))
            time.sleep(0.02)
        memory, files, threads = (min(values) for values in zip(*samples, strict=True))
        return memory, files, threads

    first, last = steps * 3 // 10 + 10, steps - 50
    before, after = used(first), used(last)
    assert launch.join(process) == 0
    slope = (after[0] - before[0]) / (last - first)
    print(f"\n{slope:.2f} KiB a step; {after[1]} open files, {after[2]} threads")
    # Leaking the tensors of checkpoints would add 1000 KiB per step. The allocator grows by 1 MiB at times, so that few
    # steps allow no tighter bound.
    assert slope < (1 if steps == 2000 else 10)
    assert before[1:] == after[1:]
