"""What the command line prints is ours: warnings and messages of other libraries stay off the console."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.table import Table

from mae_fast.console import table_text
from mae_fast.training.optim import Schedule

NOISE = """
import logging, sys, warnings

def make_noise(*_):
    import torch
    warnings.warn("noise of Python")
    warnings.warn("noise of sklearn", RuntimeWarning)
    logging.getLogger("timm.scheduler").warning("noise of timm")
    logging.getLogger("torch.utils").warning("noise of torch")
    torch.tensor([1.0]).new_empty(0).std()  # torch warns from C++
    logging.getLogger("mae_fast.x").warning("ours")
"""
VERB = (
    NOISE
    + """
from mae_fast.cli import VERBS, main
VERBS["doctor"] = make_noise
sys.argv = ["mae-fast", "doctor"]
main()
"""
)
WORKER = """
from mae_fast.data.workers import by_processes
from noise import Noisy

if __name__ == "__main__":
    print(*by_processes(Noisy(), [[0], [1]], 1))
"""


def run(*words, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("TORCH_LOGS", "PYTHONWARNINGS")}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env={**environment, **variables}
    )


def test_other_libraries_are_silent():
    assert run("-c", VERB).stderr == "mae-fast: warning: ours\n"


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_their_warnings_can_be_shown(how):
    told = run("-W", "default", "-c", VERB) if how == "flag" else run("-c", VERB, PYTHONWARNINGS="default")
    assert "noise of Python" in told.stderr
    assert "noise of sklearn" in told.stderr


def test_worker_processes_are_silent(tmp_path):
    noisy = f"""{NOISE}
class Noisy:
    def __getitems__(self, keys):
        make_noise()
        return keys
"""
    (tmp_path / "noise.py").write_text(noisy.replace('logging.getLogger("mae_fast.x").warning("ours")', ""))
    (tmp_path / "main.py").write_text(WORKER)
    told = run(tmp_path / "main.py", TORCH_LOGS="-all")  # as the command line sets it
    assert (told.stdout, told.stderr) == ("[0] [1]\n", "")


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_schedule_of_one_step_is_silent(kind, caplog):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.5)
    schedule = Schedule(optimizer, kind=kind, warmup_steps=0, total_steps=1)
    assert schedule.set(0) == 0.5
    assert caplog.records == []
    assert logging.getLogger("timm.scheduler").level == logging.NOTSET


def test_a_run_of_one_step_prints_its_own_lines(tmp_path):
    for i in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    flags = "--preset tiny --device cpu --batch-size 4 --epochs 1 --warmup-epochs 0 --num-workers 1"
    words = f"{flags} --data-path {tmp_path}/images --output-dir {tmp_path}/run --image-decoder pil".split()
    told = run("-m", "mae_fast", "pretrain", *words)
    assert (told.returncode, told.stderr) == (0, "")
    assert "1 epochs = 1 steps" in told.stdout


def test_a_table_as_text_shows_nothing_in_a_notebook(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("an output of its own"))
    assert "class" in table_text(Table("class"))
