"""Jobs in processes: their order, their results, and failures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_matrix import GRACE

from mae_fast.studies.jobs import Job, run_jobs


def answer(value):
    return {"value": value, "threads": torch.get_num_threads(), "process": os.getpid()}


def fail():
    raise ValueError("broken")


def test_a_job_runs_in_one_thread_after_its_dependencies(tmp_path):
    first = Job(tmp_path / "results" / "first.json", answer, (1,))
    second = Job(tmp_path / "results" / "second.json", answer, (2,), after=(first.path,))
    assert run_jobs([second, first], 2) == []
    found = [json.loads(job.path.read_text()) for job in (first, second)]
    assert [(each["value"], each["threads"]) for each in found] == [(1, 1), (2, 1)]
    assert len({os.getpid(), *(each["process"] for each in found)}) == 3
    assert first.path.stat().st_mtime_ns <= second.path.stat().st_mtime_ns


@pytest.mark.parametrize("processes", [0, 2])
def test_a_failed_job_stops_only_dependent_jobs(tmp_path, processes, caplog):
    bad = Job(tmp_path / "bad.json", fail)
    needs_it = Job(tmp_path / "needs_it.json", answer, (1,), after=(bad.path,))
    other = Job(tmp_path / "other.json", answer, (2,))
    assert run_jobs([bad, needs_it, other], processes) == ["bad", "needs_it"]
    assert json.loads(other.path.read_text())["value"] == 2
    assert not needs_it.path.exists()
    if not processes:
        assert "bad failed" in caplog.text
        assert "ValueError: broken" in caplog.text


def test_a_finished_job_is_not_repeated(tmp_path):
    job = Job(tmp_path / "job.json", answer, (1,))
    run_jobs([job], 0)
    job.path.write_text("7")
    run_jobs([job], 0)
    assert job.path.read_text() == "7"


def wait_forever(path):
    path.write_text(str(os.getpid()))
    time.sleep(1000)


def test_jobs_end_when_the_parent_process_is_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, *{sys.path!r}]\n"
        "from test_jobs import wait_forever\n"
        "from mae_fast.studies.jobs import Job, run_jobs\n"
        "folder = Path(sys.argv[1])\n"
        "run_jobs([Job(folder / 'job.json', wait_forever, (folder / 'pid',))], 1)\n"
    )
    pid = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as process:
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    deadline = time.monotonic() + GRACE
    while Path("/proc", pid.read_text()).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
