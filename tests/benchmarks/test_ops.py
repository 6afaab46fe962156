"""``python -m benchmarks.ops`` on two tiny problems."""

import json

import pytest
import torch

from benchmarks.ops import __main__ as command
from benchmarks.ops.problems import Problem


def run(monkeypatch, *words):
    inputs = (torch.ones(8, requires_grad=True),)
    found = [
        Problem("double", "tiny", "fp32", inputs, lambda x: x + x, lambda x: 2 * x, 1),
        Problem("square", "tiny", "fp32", inputs, lambda x: x * x, torch.square, 1),
    ]
    monkeypatch.setattr(command, "problems", lambda: found)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr("sys.argv", ["benchmarks.ops", *words])
    command.main()


def test_one_op_is_timed_with_its_ratios(monkeypatch, capsys, tmp_path):
    file = tmp_path / "ops.json"
    run(monkeypatch, "--op", "square", str(file))
    head, row, _ = capsys.readouterr().out.splitlines()
    assert head.split()[-4:] == ["vs", "eager", "vs", "compile"]
    assert row.startswith("square tiny fp32")
    assert all(word.endswith("x") and float(word[:-1]) > 0 for word in row.split()[-2:])
    assert [row["problem"] for row in json.loads(file.read_text())["rows"]] == ["square tiny fp32"]


def test_the_default_is_all_ops(monkeypatch, capsys):
    run(monkeypatch)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["double", "square"]


def test_an_unknown_op_is_an_error_with_the_names(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--op", "sqare")
    assert exit.value.code == 2
    assert "--op sqare: choose one of double, square" in capsys.readouterr().err
