"""Plots of the logs of runs."""

import json

import pytest
from PIL import Image
from support import command

from mae_fast.errors import UserError
from mae_fast.studies import plot_runs as plot_module
from mae_fast.studies.plot_runs import draw, plot_runs

LOG = [
    {"step": 1, "epoch": 0, "train_loss": 1.5, "train_lr": 0.1, "images_per_s": 9.0},
    {"step": 2, "epoch": 0, "train_loss": None, "train_lr": 0.2, "images_per_s": 9.0},
    {"step": 2, "epoch": 0, "val_loss": 0.7, "val_acc1": 50.0, "val_acc1_ema": 60.0, "per_class": []},
    {"step": 3, "epoch": 1, "train_loss": 0.5, "train_lr": 0.1, "images_per_s": 9.0},
]
BARE = [{"step": 5, "epoch": 0, "train_loss": 2.0, "train_lr": 0.3}]


@pytest.fixture
def run(tmp_path):
    """A run in progress. The last line of its log is incomplete."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LOG) + '{"step": 4, "tra')
    return folder


def test_one_panel_per_metric_and_one_curve_per_run():
    figure = draw({"one": LOG, "two": BARE})
    panels = {axis.get_ylabel(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == ["training loss", "held-out loss", "learning rate", "top-1 accuracy, %"]
    assert {axis.get_xlabel() for axis in panels.values()} == {"optimizer step"}
    curves = {name: [line.get_xydata().tolist() for line in axis.lines] for name, axis in panels.items()}
    assert curves["learning rate"] == [[[1, 0.1], [2, 0.2], [3, 0.1]], [[5, 0.3]]]
    assert curves["held-out loss"] == [[[2, 0.7]]]
    five = draw(
        {"five": [{"step": 1, "train_loss": 1.0, "train_lr": 0.1, "val_loss": 1.0, "val_a": 1.0, "val_b": 1.0}]}
    )
    assert [axis.get_visible() for axis in five.axes] == [True] * 5 + [False]
    assert curves["top-1 accuracy, %"] == [[[2, 50]], [[2, 60]]]
    first, gap, last = curves["training loss"][0]
    assert (first, last) == ([1, 1.5], [3, 0.5])
    assert gap[1] != gap[1]  # NaN: the loss was not finite
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two", "averaged weights"]


def test_x_axis_can_be_epochs_images_or_steps():
    small, large = ([line | {"epochs": line["step"] / n, "images": 64 * line["step"]} for line in LOG] for n in (1, 4))
    for x, label, last in (("epochs", "epochs", 3 / 4), ("images", "images seen", 192), ("steps", "optimizer step", 3)):
        axis = draw({"small": small, "large": large}, x).axes[0]
        assert axis.get_xlabel() == label
        assert axis.lines[1].get_xdata()[-1] == last
    with pytest.raises(UserError, match="--x images: the log of one"):
        draw({"small": small, "one": LOG}, "images")


@pytest.mark.parametrize("epochs", [True, False])
def test_default_x_axis_is_epochs_if_all_runs_have_them(run, tmp_path, monkeypatch, epochs):
    drawn = []
    monkeypatch.setattr(plot_module, "draw", lambda logs, x: drawn.append(x) or draw(logs, x))
    other = tmp_path / "other"
    other.mkdir()
    place = {"epochs": 0.5, "images": 8} if epochs else {}
    (other / "log.jsonl").write_text(json.dumps(BARE[0] | {"epochs": 0.5, "images": 8}))
    (run / "log.jsonl").write_text("".join(f"{json.dumps(line | place)}\n" for line in LOG))
    plot_runs([run, other], tmp_path / "x.png")
    assert drawn == ["epochs" if epochs else "steps"]


def test_loss_curve_has_a_gap_between_image_sizes():
    log = [{"step": i, "train_loss": 1 / i, "img_size": size} for i, size in enumerate((16, 16, [24, 16], 32, 32), 1)]
    axis = draw({"run": log}).axes[0]
    steps = [x if y == y else None for x, y in axis.lines[0].get_xydata().tolist()]
    assert steps == [None, 1, 2, None, 3, None, 4, 5]
    assert [(text.get_text(), text.xy[0]) for text in axis.texts] == [("16 px", 1), ("24 x 16 px", 3), ("32 px", 4)]


def test_plot_command_writes_a_file(run, tmp_path, monkeypatch, capsys):
    for name, kind in (("runs.png", "PNG"), ("runs.jpg", "JPEG"), ("runs.webp", "WEBP")):
        done = command(monkeypatch, capsys, "plot", run, "--output", tmp_path / "new" / name)
        assert done.returncode == 0, done.stderr
        assert Image.open(tmp_path / "new" / name).format == kind


def test_wrong_arguments_are_refused(run, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.jsonl").write_text("")
    for runs, output, message in (
        ([], "a.png", "no run is given"),
        ([tmp_path], "a.png", r"has no log\.jsonl"),
        ([tmp_path / "new"], "a.png", "is empty"),
        ([run], "a.gif", r"--output .*a\.gif"),
    ):
        with pytest.raises(UserError, match=message):
            plot_runs(runs, tmp_path / output)
    assert not (tmp_path / "a.png").exists()
