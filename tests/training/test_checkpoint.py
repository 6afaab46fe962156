"""Checkpoints: exact round trip, damage found, nothing lost by a failed save."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from mae_fast.errors import UserError
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw


def save(folder, step, model, optimizer, state):
    return checkpoint.write(folder, checkpoint.snapshot(step, model, optimizer, state))


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = adamw(model, lr=0.1 / 3, weight_decay=0.05)
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def same(a: dict, b: dict) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer, {"note": "x"})
    other, other_optimizer = trained(seed=1)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert (found.step, found.state["note"]) == (3, "x")
    found.load_model(other)
    found.load_optimizer(other, other_optimizer)
    assert same(model.state_dict(), other.state_dict())
    for ours, theirs in zip(optimizer.param_groups, other_optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            assert same(optimizer.state[p], other_optimizer.state[q])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (1, 2, 3, 10):
        save(tmp_path, step, model, optimizer, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.OPTIM, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_damage_is_found_and_the_previous_one_taken(tmp_path: Path, file: str, damage: str) -> None:
    model, optimizer = trained()
    for step in (1, 2):
        save(tmp_path, step, model, optimizer, {})
    victim = tmp_path / "step-00000002" / file
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        # in a hexadecimal digit of the manifest, so that it stays JSON
        place = content.index(b"sha256") + 12 if file == checkpoint.MANIFEST else len(content) // 2
        content[place] ^= 1
        victim.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    skipped: list[str] = []
    found = checkpoint.newest(tmp_path, skipped.append)
    assert found is not None
    assert found.step == 1
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]
    with pytest.raises(UserError, match=r"damaged|no usable"):
        checkpoint.find(tmp_path / "step-00000002", pytest.fail)


@pytest.mark.parametrize("failing", ["save_file", "_fsync", "_digest"])
def test_a_failed_save_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer, {})

    def full_disk(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, full_disk)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2, model, optimizer, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1


def test_a_leftover_of_a_kill_is_ignored_and_replaced(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / ".tmp-step-00000001").mkdir()
    (tmp_path / ".tmp-step-00000001" / checkpoint.MODEL).write_bytes(b"half")
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    save(tmp_path, 1, model, optimizer, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_manifest_covers_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *trained(), {})
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    assert {*manifest, checkpoint.MANIFEST} == {p.name for p in path.iterdir()}
