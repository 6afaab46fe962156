"""``mae-fast bench``: its flags are passed to the engine."""

import re

import pytest
from support import command

from mae_fast.bench import loading, report
from mae_fast.bench.contenders import MODELS, TASKS
from mae_fast.errors import UserError


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The arguments of ``run``, which is replaced and measures nothing."""
    seen = {}

    def run(cases, baselines, rounds, minutes, folder):
        seen.update(cases=cases, baselines=baselines, rounds=rounds, minutes=minutes, folder=folder)
        return {}

    monkeypatch.setattr(report, "run", run)
    monkeypatch.setattr(report, "read", lambda file: {})
    return seen


def test_flags_reach_the_engine(monkeypatch, capsys, asked, tmp_path):
    baselines = ("eager", "compile", "transformers", "timm")
    words = ("--tasks", *TASKS, "--models", *MODELS, "--dtypes", "bf16", "fp32", "--batches", 2, 3)
    words = (*words, "--baselines", *baselines)
    words = (*words, "--image-sizes", 112, 560, "--mask-ratios", 0.5, 0.25, "--rounds", 9, "--minutes", 7.5)
    result = command(monkeypatch, capsys, "bench", *words, "--output-dir", tmp_path, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    cases = asked.pop("cases")
    assert len(cases) == len(MODELS) * 2 * 2 * 2 * (2 * 2 + 2)  # two of the tasks mask
    assert {(case.task, case.model) for case in cases} == {(task, model) for task in TASKS for model in MODELS}
    assert {case.image_size for case in cases} == {112, 560}
    assert asked == {"baselines": baselines, "rounds": 9, "minutes": 7.5, "folder": tmp_path}
    assert {name for baselines in TASKS.values() for name in baselines} == set(baselines)
    assert (tmp_path / "table.md").exists()


@pytest.mark.parametrize(("bf16", "cuda"), [(True, False), (False, True)])
def test_default_grid(monkeypatch, capsys, asked, tmp_path, bf16, cuda):
    monkeypatch.setattr(report, "use_bf16", lambda dtype, device: bf16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert command(monkeypatch, capsys, "bench", "--output-dir", tmp_path).returncode == 0
    [case] = asked["cases"]
    assert str(case) == f"train base batch {64 if cuda else 16} {'bf16' if bf16 else 'fp32'}{' on cuda' * cuda}"
    assert case.device == ("cuda" if cuda else "cpu")


def test_device_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert report.chosen_device("auto") == report.chosen_device("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cpu"):
        report.chosen_device("cuda")


def test_table_is_written_without_matplotlib(monkeypatch, capsys, asked, tmp_path):
    def no_matplotlib(results, folder):
        raise UserError("pictures need matplotlib")

    monkeypatch.setattr(report, "draw", no_matplotlib)
    result = command(monkeypatch, capsys, "bench", "--output-dir", tmp_path, "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "mae-fast: warning: pictures need matplotlib\n")
    assert (tmp_path / "table.md").exists()


def test_former_flag_names_work_but_are_not_in_the_help(monkeypatch, capsys, asked, tmp_path):
    here = ("bench", "--output-dir", tmp_path, "--device", "cpu")
    assert command(monkeypatch, capsys, *here, "--rivals", "timm", "eager").returncode == 0
    assert asked["baselines"] == ("timm", "eager")
    loaded = []
    monkeypatch.setattr(loading, "loading", lambda *args: loaded.append(args))
    done = command(monkeypatch, capsys, *here, f"--data={tmp_path}", "--decoder", "pil", "--repeats=2")
    assert done.returncode == 0, done.stderr
    [(data, options, *_)] = loaded
    assert (data, options.decoder, options.repeats) == (tmp_path, "pil", 2)
    text = command(monkeypatch, capsys, "bench", "--help").stdout
    assert not re.search(r"--(rivals|data|decoder|repeats)\b(?!-)", text)
    assert "--data-path" in text
