"""The command line does not print warnings and messages of other libraries."""

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


def test_other_libraries_print_nothing():
    assert run("-c", VERB).stderr == "mae-fast: warning: ours\n"


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_warnings_of_other_libraries_can_be_enabled(how):
    done = run("-W", "default", "-c", VERB) if how == "flag" else run("-c", VERB, PYTHONWARNINGS="default")
    assert "noise of Python" in done.stderr
    assert "noise of sklearn" in done.stderr


def test_worker_processes_print_nothing(tmp_path):
    noisy = f"""{NOISE}
class Noisy:
    def __getitems__(self, keys):
        make_noise()
        return keys
"""
    (tmp_path / "noise.py").write_text(noisy.replace('logging.getLogger("mae_fast.x").warning("ours")', ""))
    (tmp_path / "main.py").write_text(WORKER)
    done = run(tmp_path / "main.py", TORCH_LOGS="-all")  # the value that the command line sets
    assert (done.stdout, done.stderr) == ("[0] [1]\n", "")


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_one_step_schedule_prints_no_warning(kind, caplog):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.5)
    schedule = Schedule(optimizer, kind=kind, warmup_steps=0, total_steps=1)
    assert schedule.set(0) == 0.5
    assert caplog.records == []
    assert logging.getLogger("timm.scheduler").level == logging.NOTSET


def test_run_of_one_step_prints_only_our_lines(tmp_path):
    for i in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    flags = "--preset tiny --device cpu --batch-size 4 --epochs 1 --warmup-epochs 0 --num-workers 1"
    words = f"{flags} --data-path {tmp_path}/images --output-dir {tmp_path}/run --image-decoder pil".split()
    done = run("-m", "mae_fast", "pretrain", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 epochs = 1 steps" in done.stdout


def test_table_text_displays_nothing_in_a_notebook(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("an output of its own"))
    assert "class" in table_text(Table("class"))
