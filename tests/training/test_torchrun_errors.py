"""A mistake of the user under torchrun: one message, from the first process."""

import os
import re
import subprocess
import sys
from datetime import timedelta

import launch
import pytest
from torch.distributed import TCPStore

from mae_fast.cli import torchrun
from mae_fast.errors import LostProcess, UserError

RUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
       "--rdzv-endpoint=localhost:0", "-m", "mae_fast")  # fmt: skip


@pytest.mark.parametrize("case", ["every process", "the first process"])
def test_one_message_is_printed_without_a_traceback(images, tmp_path, case):
    run = tmp_path / "run"
    words = launch.words(images, run, epochs=1, **{"warmup-epochs": 0})
    if case == "the first process":  # opens the folder; the others then lose their connection to it
        launch.finish(words, tmp_path / "output")
        words, message = [*words, "--batch-size=4", "--lr=1"], f"{run} belongs to a run with another configuration"
    else:
        words, message = [*words, "--data-path=nowhere"], "image folder nowhere does not exist"
    done = subprocess.run(
        [*RUN, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode
    ours = re.split(r"^[WE]\d{4} .*torch/distributed/elastic", done.stderr, maxsplit=1, flags=re.MULTILINE)
    assert len(ours) == 2, done.stderr  # what follows is torchrun's own report
    lines = ours[0].splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith(f"error: {message}")
    assert lines[1].startswith("hint: ")
    assert "[rank" not in done.stderr


def test_other_ranks_are_silent_if_rank_0_reports_the_error(monkeypatch):
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    flags = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    for name, value in flags.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torchrun, "WAIT", timedelta(seconds=1))
    monkeypatch.setattr(torchrun.signal, "signal", lambda *_: None)
    wrong = UserError("wrong", "mend it")
    monkeypatch.setenv("RANK", "1")
    assert not torchrun.is_reported_by_rank_0(wrong)  # rank 0 has not reported an error
    monkeypatch.setenv("RANK", "0")
    assert not torchrun.is_reported_by_rank_0(wrong)
    monkeypatch.setenv("RANK", "1")
    assert torchrun.is_reported_by_rank_0(UserError("wrong", "mend it"))
    assert torchrun.is_reported_by_rank_0(LostProcess())
    assert not torchrun.is_reported_by_rank_0(UserError("another"))
    monkeypatch.setenv("MASTER_PORT", "1")
    assert not torchrun.is_reported_by_rank_0(wrong)  # no store
