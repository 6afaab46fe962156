"""Progress and rates of training, with a patched clock."""

from types import SimpleNamespace

import pytest

from mae_fast.training import progress
from mae_fast.training.plan import Plan, Stage
from mae_fast.training.progress import Progress

STAGE = Stage(
    size=(8, 8), batch_size=4, images_per_step=4, first_epoch=0, epochs=2, first_step=0, steps_per_epoch=5
)  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.seconds)
    return now


def test_a_notebook_shows_one_line_that_changes_in_place(clock, monkeypatch):
    texts = []
    handle = SimpleNamespace(update=lambda data, raw: texts.append(data["text/plain"]))
    monkeypatch.setattr("IPython.display.display", lambda data, raw, display_id: handle)
    monkeypatch.setattr(progress, "Console", lambda: SimpleNamespace(is_jupyter=True))
    shown = Progress(Plan((STAGE,)), 0)
    for step in range(1, 11):
        clock.seconds += 0.2
        shown.update(step, 1e-3, 0.5 if step == 4 else None, skipped=0)
    assert [text.split("lr")[0] for text in texts] == [
        "epoch   0.20  step 1/10  loss -  ",
        "epoch   0.80  step 4/10  loss 0.5000  ",
        "epoch   1.40  step 7/10  loss 0.5000  ",
        "epoch   2.00  step 10/10  loss 0.5000  ",
    ]


def test_rates_do_not_count_pauses(clock):
    shown = Progress(Plan((STAGE,)), 0, quiet=True)
    with shown.waiting():
        clock.seconds += 1
    clock.seconds += 1
    with shown.paused():
        clock.seconds += 50
    assert (shown.images_per_s(5), shown.share_waiting()) == (20 / 2, 0.5)
    clock.seconds += 2
    assert (shown.images_per_s(10), shown.share_waiting()) == (40 / 4, 0.25)
