"""Weights from files of unknown origin: what is good is read, what is not runs nothing and is refused in a line."""

import argparse
import json
import os
import pickle
import resource
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mae_fast.errors import UserError
from mae_fast.weights.files import load_weights

GOOD = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("form", ["safetensors", "plain", "published", "state_dict"])
def test_good_files_are_read_exactly(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth")
    if form == "safetensors":
        save_file(GOOD, path)
    else:
        published = {"model": GOOD, "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
        torch.save({"plain": GOOD, "published": published, "state_dict": {"state_dict": GOOD}}[form], path)
    found = load_weights(path)
    assert found.keys() == GOOD.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in GOOD.items())


class Call:
    """Unpickled by a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> object:
        return self.call


CALLS = {
    "mkdir": lambda s: Call(os.mkdir, s),
    "system": lambda s: Call(os.system, f"mkdir {s}"),
    "eval": lambda s: Call(eval, f"__import__('os').mkdir({s!r})"),
    "exec": lambda s: Call(exec, f"import os; os.mkdir({s!r})"),
    "getattr": lambda s: Call(getattr, s, "join"),
    "load": lambda s: Call(torch.load, s),
    "open": lambda s: Call(open, s, "w"),
}
PLACES = {
    "alone": lambda x: x,
    "in the model": lambda x: {"model": {"a": x}},
    "in the optimizer": lambda x: {"model": GOOD, "optimizer": x},
    "in the arguments": lambda x: {"model": GOOD, "args": argparse.Namespace(x=x)},
}


def refused(path: Path, sentinel: Path) -> str:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError) as caught:
        load_weights(path)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert not sentinel.exists()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_code_in_a_pickle_is_not_run(tmp_path: Path, call: str, place: str) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "x.pth"
    torch.save(PLACES[place](CALLS[call](str(sentinel))), path)
    assert "would run code" in refused(path, sentinel)


def header(entries: object, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


F32 = {"dtype": "F32", "shape": [2]}
FILES = {
    "raw pickle.pth": pickle.dumps(Call(os.mkdir, "sentinel")),
    "empty.pth": b"",
    "text.pth": b"<html>404</html>",
    "header of 2^40.safetensors": header({}, 2**40),
    "header of 2^63.safetensors": header({}, 2**63),
    "overlap.safetensors": header({"a": {**F32, "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [4, 12]}}),
    "beyond its end.safetensors": header({"a": {**F32, "data_offsets": [0, 2**40]}}),
    "huge shape.safetensors": header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}),
    "no json.safetensors": struct.pack("<Q", 4) + b"{{{{",
    "deep.safetensors": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "empty.safetensors": b"",
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(FILES[name])
    refused(tmp_path / name, tmp_path / "sentinel")


def test_bomb_is_refused(tmp_path: Path) -> None:
    """A file of a megabyte that would unpack to one gigabyte."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    assert "compressed" in refused(path, tmp_path / "sentinel")


@pytest.mark.parametrize("what", [[1, 2], {"model": 3}, {"a": "text"}, GOOD["a.bias"]])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, what: object) -> None:
    torch.save(what, tmp_path / "x.pth")
    assert "no state dict" in refused(tmp_path / "x.pth", tmp_path / "sentinel")


def test_missing_and_cut_files_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.pth", tmp_path / "sentinel")
    refused(tmp_path / "none.safetensors", tmp_path / "sentinel")
    torch.save(GOOD, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "x.pth").write_bytes(whole[:length])
        refused(tmp_path / "x.pth", tmp_path / "sentinel")
