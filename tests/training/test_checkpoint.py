"""Checkpoints: exact round trip, detection of damage, nothing lost by a failed save."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mae_fast.errors import UserError
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw
from mae_fast.weights import run_reader


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
    found = run_reader.newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state["note"]) == (3, "x")
    found.load(other, other_optimizer, {})
    assert same(model.state_dict(), other.state_dict())
    for ours, theirs in zip(optimizer.param_groups, other_optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            assert same(optimizer.state[p], other_optimizer.state[q])


def test_the_same_weights_and_record_are_the_same_bytes(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {"model": {"name": "vit"}, "classes": ["a", "b"], "mask_ratio": 0.5}
    digests = set()
    for i in range(8):
        path = save(tmp_path / str(i), 1, model, optimizer, state)
        digests.add(json.loads((path / "manifest.json").read_text())["model.safetensors"]["sha256"])
    assert len(digests) == 1


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (1, 2, 3, 10):
        save(tmp_path, step, model, optimizer, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("file", [run_reader.MODEL, run_reader.OPTIM, run_reader.STATE, run_reader.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    model, optimizer = trained()
    for step in (1, 2):
        save(tmp_path, step, model, optimizer, {})
    victim = tmp_path / "step-00000002" / file
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        # in a hexadecimal digit of the manifest, so that it stays JSON
        place = content.index(b"sha256") + 12 if file == run_reader.MANIFEST else len(content) // 2
        content[place] ^= 1
        victim.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    found = run_reader.newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    (skipped,) = caplog.records
    assert skipped.levelname == "WARNING"
    assert "step-00000002" in skipped.getMessage()
    with pytest.raises(UserError, match=r"damaged|no usable"):
        run_reader.find_checkpoint(tmp_path / "step-00000002")


@pytest.mark.parametrize("failing", ["save_file", "_fsync", "sha256"])
def test_a_failed_save_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer, {})

    def full_disk(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, full_disk)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2, model, optimizer, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    found = run_reader.newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_leftover_of_a_kill_is_ignored_and_replaced(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / ".tmp-step-00000001").mkdir()
    (tmp_path / ".tmp-step-00000001" / run_reader.MODEL).write_bytes(b"half")
    assert run_reader.newest_checkpoint(tmp_path) is None
    save(tmp_path, 1, model, optimizer, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_manifest_covers_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *trained(), {})
    manifest = json.loads((path / run_reader.MANIFEST).read_text())
    assert {*manifest, run_reader.MANIFEST} == {p.name for p in path.iterdir()}


def test_every_flipped_bit_and_every_truncation_is_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *trained(), {})
    assert isinstance(run_reader.read_checkpoint(path), run_reader.Checkpoint)
    rng = np.random.default_rng(0)
    for name in (run_reader.MODEL, run_reader.OPTIM, run_reader.STATE, run_reader.MANIFEST):
        whole = (path / name).read_bytes()
        for _ in range(75):
            broken = bytearray(whole)
            broken[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            (path / name).write_bytes(broken)
            same_manifest = name == run_reader.MANIFEST and json.loads(whole) == _read(broken)
            assert isinstance(run_reader.read_checkpoint(path), str) or same_manifest, (name, bytes(broken))
        for length in rng.integers(0, len(whole), 50).tolist():
            (path / name).write_bytes(whole[:length])
            assert isinstance(run_reader.read_checkpoint(path), str), (name, length)
        (path / name).write_bytes(whole)
    assert isinstance(run_reader.read_checkpoint(path), run_reader.Checkpoint)


def _read(text: bytearray) -> object:
    """Parse a damaged manifest. A flipped bit in white space may not change the result."""
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    """The disk is full at each page of a save."""
    model, optimizer = trained()
    save(small_disk, 1, model, optimizer, {})
    needed = sum(-(-path.stat().st_size // 4096) for path in (small_disk / "step-00000001").iterdir())
    free = os.statvfs(small_disk).f_bavail
    failures = 0
    for pages in range(needed):
        (small_disk / "ballast").write_bytes(bytes(4096 * (free - pages)))
        saver = checkpoint.Saver(small_disk)
        saver.save(checkpoint.snapshot(2, model, optimizer, {}))
        with pytest.raises(UserError, match=r"cannot write a checkpoint to .* free disk space"):
            saver.close()
        failures += 1
        assert [path.name for path in small_disk.iterdir() if path.is_dir()] == ["step-00000001"]
        found = run_reader.newest_checkpoint(small_disk)
        assert found is not None
        assert found.step == 1
        (small_disk / "ballast").unlink()
    assert failures == needed > 3
    save(small_disk, 2, model, optimizer, {})
    assert run_reader.newest_checkpoint(small_disk).step == 2


def test_a_failed_save_is_logged_and_the_next_one_may_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = trained()
    saver = checkpoint.Saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        saver.save(checkpoint.snapshot(1, model, optimizer, {}))
        saver.wait()
    (message,) = caplog.messages
    assert "Input/output error" in message
    saver.save(checkpoint.snapshot(2, model, optimizer, {}))
    saver.close()
    assert run_reader.newest_checkpoint(tmp_path).step == 2


def test_training_does_not_change_a_snapshot(tmp_path: Path) -> None:
    """Training continues while the snapshot is written."""
    model, optimizer = trained()
    expected = {name: p.detach().clone() for name, p in model.state_dict().items()}
    saved = checkpoint.snapshot(1, model, optimizer, {})
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert all(torch.equal(saved.tensors[run_reader.MODEL][name], p) for name, p in expected.items())
    assert not any(torch.equal(p, expected[name]) for name, p in model.state_dict().items())


def test_the_newest_good_checkpoint_is_kept(tmp_path: Path) -> None:
    """A checkpoint is good if its weights and the gradients of the next step are finite."""
    model, optimizer = trained()
    for step in range(1, 6):
        checkpoint.write(tmp_path, checkpoint.snapshot(step, model, optimizer, {}), {4, 5, 6})
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "4", "5"]
    found = run_reader.newest_checkpoint(tmp_path, {4, 5, 6})
    assert found is not None
    assert found.step == 2
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    for step in range(7, 10):
        save(tmp_path, step, model, optimizer, {})
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["5", "8", "9"]


BOMB = "[" * 200_000
FOREIGN = {
    "a path outside": {run_reader.MANIFEST: '{"../../x": {"size": 1, "sha256": "0"}}'},
    "an absolute path": {run_reader.MANIFEST: '{"/etc/passwd": {"size": 1, "sha256": "0"}}'},
    "an empty name": {run_reader.MANIFEST: '{"": {"size": 1, "sha256": "0"}}'},
    "a name with a null": {run_reader.MANIFEST: '{"a\\u0000b": {"size": 1, "sha256": "0"}}'},
    "a deep manifest": {run_reader.MANIFEST: BOMB},
    "a list": {run_reader.MANIFEST: "[]"},
    "a number": {run_reader.MANIFEST: "1"},
    "a manifest that is no text": {run_reader.MANIFEST: b"\xff\xfe"},
    "entries that are none": {run_reader.MANIFEST: json.dumps(dict.fromkeys(["x", run_reader.MODEL], 3))},
    "a deep state": {run_reader.STATE: BOMB},
    "a state that is a list": {run_reader.STATE: "[3]"},
    "a step that is text": {run_reader.STATE: '{"step": "3"}'},
    "an endless step": {run_reader.STATE: '{"step": 1e999}'},
    "no step": {run_reader.STATE: "{}"},
    "a header of 2^40": {run_reader.MODEL: (2**40).to_bytes(8, "little") + b"{}"},
    "pickled weights": {run_reader.MODEL: b"\x80\x04\x95cposix\nsystem\n(S'touch sentinel'\ntR."},
    "a link": {run_reader.MODEL: Path("/dev/zero")},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_malicious_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Their manifests match their files."""
    monkeypatch.chdir(tmp_path)
    model, optimizer = trained()
    path = save(tmp_path, 3, model, optimizer, {})
    for file, content in FOREIGN[name].items():
        (path / file).unlink()
        if isinstance(content, Path):
            (path / file).symlink_to(content)
        else:
            (path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    if run_reader.MANIFEST not in FOREIGN[name] and name != "a link":
        files = {file: (path / file).read_bytes() for file in (run_reader.MODEL, run_reader.OPTIM, run_reader.STATE)}
        manifest = {file: {"size": len(x), "sha256": hashlib.sha256(x).hexdigest()} for file, x in files.items()}
        (path / run_reader.MANIFEST).write_text(json.dumps(manifest))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"is damaged|do not fit"):
        run_reader.find_checkpoint(path).load_model(model)
    assert time.monotonic() - started < 2
    assert not (tmp_path / "sentinel").exists()
