"""The engine on the tiny model: who is timed beside whom, who may not be, what is kept and what is not run again."""

import pytest
from support import command, one_thread  # noqa: F401

from mae_fast.bench import child as children
from mae_fast.bench import engine
from mae_fast.bench.cell import Cell
from mae_fast.bench.child import Lacking, Worker
from mae_fast.bench.contenders import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")

CELL = Cell("train", "tiny", 4, "fp32", 32)


class InProcess:
    """A ``Child`` without a process: what it says is the worker's, or the test's."""

    made: list = []  # noqa: RUF012

    def __init__(self, name, cell, deadline):
        self.name, self.worker, self.closed = name, Worker(name, cell), False
        self.made.append(self)

    def ask(self, request):
        try:
            return getattr(self.worker, request)()
        except Exception as error:
            raise Lacking(children.one_line(error)) from error

    def close(self):
        self.closed = True


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(engine, "Child", InProcess)
    monkeypatch.setattr(children, "LEAST_SECONDS", 1e-9)
    monkeypatch.setattr(InProcess, "made", [])
    return InProcess


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_contenders_agree_and_are_timed(in_process, task, dtype):
    """All of them but those that compile, which takes half a minute."""
    rivals = ("eager", "transformers", "timm")
    cell = Cell(task, "tiny", 4, dtype, 32)
    found = engine.measure(cell, rivals, 1, 5, print)
    assert found["missing"] == {}
    assert list(found["rows"]) == cell.contenders(rivals)
    ours = found["rows"]["mae_fast"]
    assert ours["vs best rival"] == ours[f"vs {ours['best rival']}"]
    for row in found["rows"].values():
        assert 0 < row["above"] < row["peak"]
        assert row["images/s"] == pytest.approx(4e3 / row["ms"])
        assert row["products / step"] == pytest.approx(found["products ms"] / row["ms"])
    assert all(child.closed for child in in_process.made)
