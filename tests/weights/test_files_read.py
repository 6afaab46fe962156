"""Weights from files of unknown origin: valid files are read, others are refused, and no code in them runs."""

import argparse
import collections
import copyreg
import enum
import io
import json
import os
import pathlib
import pickle
import resource
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from mae_fast.errors import UserError
from mae_fast.weights.files import LEGACY_STARTS, STATE_DICTS, load_weights, load_weights_and_metadata

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
    """Pickled as a call of ``function``."""

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


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_code_in_a_pickle_is_not_run(tmp_path: Path, call: str, place: str, new_format: bool) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "x.pth"
    content = PLACES[place](CALLS[call](str(sentinel)))
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    if place in ("alone", "in the model"):
        assert "has no state dict" in refused(path, sentinel)
    else:
        assert load_weights(path).keys() == GOOD.keys()
        assert not sentinel.exists()


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


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    """The file has one megabyte and would unpack to one gigabyte."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    assert "compressed" in refused(path, tmp_path / "sentinel")


class Plain:
    """An object of another package, with attributes."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class Slotted:
    """An object without ``__dict__``: its pickled state is a tuple."""

    __slots__ = ("x",)

    def __init__(self, x: object) -> None:
        self.x = x


class Set(set):
    """A set of another package."""


class Outer:
    """A class with a nested class."""

    class Inner:
        """A nested class."""


class Mapping(dict):
    """A dictionary of another package."""


class Sequence(list):
    """A list of another package."""


class Color(enum.Enum):
    """An enumeration of another package."""

    RED = 1


FOREIGN = {
    "namespace": argparse.Namespace(norm_pix_loss=True, output=pathlib.PosixPath("/x")),
    "path": pathlib.PosixPath("/x"),
    "numpy scalar": np.float64(3),
    "numpy array": np.arange(5.0),
    "numpy dtype": np.dtype("int16"),
    "omegaconf": OmegaConf.create({"model": {"depth": 12, "sizes": [1, 2]}, "lr": "${model.depth}"}),
    "counters": [collections.Counter("aab"), collections.deque([1]), collections.defaultdict(list, x=[1])],
    "containers": [Mapping(x=Plain(x=1)), Sequence([Slotted(1), 2]), Set([1]), {Color.RED: 1}, Outer.Inner()],
    "builtins": [{1, 2}, frozenset([1]), b"bytes", bytearray(b"bytes"), range(3), 3 + 4j, slice(1), len],
    "of torch": [torch.device("cpu"), torch.float32, torch.Size([1]), torch.nn.Linear(1, 1), torch.optim.SGD],
    "history": Plain(history={"loss": Plain(values=np.zeros((2, 2)), statistics={"mean": len})}),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_objects_beside_the_weights_are_left_out(
    tmp_path: Path, foreign: str, new_format: bool, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pth"
    content = {"message_hub": FOREIGN[foreign], "state_dict": GOOD, "args": argparse.Namespace(mask_ratio=0.6)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format, pickle_protocol=protocol)
    for kind in (Plain, Slotted, Set, Mapping, Sequence):
        monkeypatch.setattr(kind, "__new__", None)  # calling the class would fail
    weights, metadata = load_weights_and_metadata(path)
    assert weights.keys() == GOOD.keys()
    assert all(torch.equal(weights[name], x) and weights[name].dtype == x.dtype for name, x in GOOD.items())
    assert metadata["args"].mask_ratio == 0.6


def test_left_out_objects_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    torch.save({"model": GOOD, "hub": Plain(), "path": pathlib.PosixPath("/x")}, tmp_path / "x.pth")
    load_weights(tmp_path / "x.pth")
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'x.pth'}: left out objects of other packages, without running them: ")
    for name in ("test_files_read.Plain", f"{pathlib.PosixPath.__module__}.PosixPath"):
        assert name in message


@pytest.mark.parametrize("key", STATE_DICTS)
def test_state_dicts_under_any_usual_key_are_read(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    torch.save({"epoch": 3, key: GOOD}, tmp_path / "x.pth")
    assert load_weights(tmp_path / "x.pth").keys() == GOOD.keys()
    assert (f"reading the weights of {key}" in caplog.text) == (key not in ("model", "state_dict"))


def test_trained_weights_are_read_before_averages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    average = {name: x * 0 for name, x in GOOD.items()}
    torch.save({"state_dict_ema": average, "model_ema": average, "net": GOOD}, tmp_path / "x.pth")
    assert torch.equal(load_weights(tmp_path / "x.pth")["a.weight"], GOOD["a.weight"])
    assert "reading the weights of net, not of model_ema, state_dict_ema" in caplog.text


def test_entries_that_are_not_tensors_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    torch.save({"model": {**GOOD, "version": 3, "_extra_state": None}}, tmp_path / "x.pth")
    assert load_weights(tmp_path / "x.pth").keys() == GOOD.keys()
    assert "left out version, _extra_state: not tensors" in caplog.text


def test_a_dictionary_that_contains_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "x.pth")
    assert "no state dict" in refused(tmp_path / "x.pth", tmp_path / "sentinel")


def legacy(*parts: bytes) -> bytes:
    """A file in the format of torch before 1.6, with these pickles after its header."""
    header = [LEGACY_STARTS[0], pickle.dumps(1001, 2), pickle.dumps({}, 2)]
    return b"".join([*header, *parts])


def harmful(*opcodes: bytes) -> bytes:
    """A pickle of {"w": value}. The opcodes build the value, after a name that torch's unpickler refuses."""
    return b"\x80\2}X\1\0\0\0wcother\nname\n0" + b"".join(opcodes) + b"s."


def storage(numel: int, kind: bytes = b"storage") -> bytes:
    """A tensor with a storage of ``numel`` numbers. ``VIEW`` stands for the field that only legacy files have."""
    reference = b"(X" + struct.pack("<I", len(kind)) + kind + b"ctorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu"
    tail = b"K\0(K\4t(K\1t\x89ccollections\nOrderedDict\n)RtR"
    number = b"\x8a\x08" + struct.pack("<q", numel)
    return harmful(b"ctorch._utils\n_rebuild_tensor_v2\n(", reference, number, b"VIEWtQ", tail)


PICKLES = {
    "a huge storage": storage(2**50),
    "a storage beyond the end": storage(1 << 28) + pickle.dumps(["0"], 2) + struct.pack("<q", 1 << 28),
    "a negative storage": storage(-4),
    "a reference to a module": storage(4, b"module"),
    "a long bytearray": harmful(b"\x96" + struct.pack("<Q", 1 << 30)),
    "long bytes": harmful(b"\x8e" + struct.pack("<Q", 1 << 36)),
    "a huge memo index": harmful(b"Nr\xff\xff\xff\x7f"),
    "a call of bytearray": harmful(b"cbuiltins\nbytearray\n(\x8a\6\0\0\0\0\0\1tR"),
    "a changed function": harmful(b"ctorch._utils\n_rebuild_tensor_v2\n(}X\x0c\0\0\0__defaults__)stb"),
    "a loader within": harmful(b"ctorch.storage\n_load_from_bytes\n(X\1\0\0\0xtR"),
    "a path of attributes": harmful(b"X\2\0\0\0osX\6\0\0\0system\x93(X\4\0\0\0truetR"),
}


IN_ZIP_HARMLESS = ("a huge storage", "a storage beyond the end")  # storages cannot be larger than the file


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", PICKLES)
def test_harmful_pickles_are_refused(tmp_path: Path, name: str, form: str) -> None:
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    path = tmp_path / "x.pth"
    if form == "legacy":
        path.write_bytes(legacy(PICKLES[name].replace(b"VIEW", b"N")))
    else:
        torch.save(GOOD, path)
        with zipfile.ZipFile(path) as archive:
            files = {file.filename: archive.read(file) for file in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for file, content in files.items():
                pickled = PICKLES[name].replace(b"VIEW", b"")
                archive.writestr(file, pickled if file.endswith("data.pkl") else content)
    if form == "zip" and name in IN_ZIP_HARMLESS:
        assert len(load_weights(path)["w"]) == 4
    else:
        refused(path, tmp_path / "sentinel")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def test_the_extension_registry_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setitem(copyreg._extension_cache, 1, lambda: calls.append("called"))
    (tmp_path / "x.pth").write_bytes(legacy(harmful(b"\x82\1)R"), pickle.dumps([], 2)))
    refused(tmp_path / "x.pth", tmp_path / "sentinel")
    assert calls == []


def test_archives_of_torchscript_and_tar_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(GOOD, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/constants.pkl", b"")
    assert "TorchScript" in refused(path, tmp_path / "sentinel")
    for name in ("storages", LEGACY_STARTS[0].decode("latin1")):  # the second name makes it start like a legacy file
        with tarfile.open(path, "w", encoding="latin1") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        refused(path, tmp_path / "sentinel")


@pytest.mark.parametrize("form", ["meta", "sparse", "expanded"])
def test_tensors_without_their_own_values_are_refused(tmp_path: Path, form: str) -> None:
    tensor = {
        "meta": torch.empty(2, device="meta"),
        "sparse": torch.eye(2).to_sparse(),
        "expanded": torch.ones(1).expand(1 << 40),
    }[form]
    torch.save({"model": {**GOOD, "x": tensor}}, tmp_path / "x.pth")
    assert "x is not a dense tensor" in refused(tmp_path / "x.pth", tmp_path / "sentinel")


@pytest.mark.parametrize("what", [[1, 2], {"model": 3}, {"a": "text"}, GOOD["a.bias"]])
def test_content_that_is_not_a_state_dict_is_refused(tmp_path: Path, what: object) -> None:
    torch.save(what, tmp_path / "x.pth")
    assert "no state dict" in refused(tmp_path / "x.pth", tmp_path / "sentinel")


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_missing_and_truncated_files_are_refused(tmp_path: Path, new_format: bool) -> None:
    assert "No such file" in refused(tmp_path / "none.pth", tmp_path / "sentinel")
    refused(tmp_path / "none.safetensors", tmp_path / "sentinel")
    torch.save(GOOD, tmp_path / "x.pth", _use_new_zipfile_serialization=new_format)
    whole = (tmp_path / "x.pth").read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "x.pth").write_bytes(whole[:length])
        refused(tmp_path / "x.pth", tmp_path / "sentinel")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    bad = {"b.weight": torch.tensor([1.0, torch.nan]), "c.bias": torch.tensor([torch.inf], dtype=torch.bfloat16)}
    save_file(GOOD | bad, path)
    assert "NaN or infinite: in b.weight (2 of 4 tensors)" in refused(path, tmp_path / "sentinel")
    assert load_weights(path, finite=False).keys() == {*GOOD, *bad}
    torch.save({"model": GOOD | bad}, tmp_path / "x.pth")
    assert "NaN or infinite" in refused(tmp_path / "x.pth", tmp_path / "sentinel")


def test_integer_weights_are_refused_but_counters_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    counters = {"norm.num_batches_tracked": torch.tensor(3), "embeddings.position_ids": torch.arange(4)}
    torch.save(GOOD | counters, path)
    assert load_weights(path).keys() == {*GOOD, *counters}
    torch.save(GOOD | {"cls_token": torch.ones(1, 1, 2, dtype=torch.int8)}, path)
    assert "not floating point: cls_token is int8 (1 of 3 tensors)" in refused(path, tmp_path / "sentinel")


NO_WEIGHTS = {
    "an empty file": b"",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"\n<!DOCTYPE html><html>404</html>",
    "a text file": "Zugriff verweigert: für Gäste\n".encode() * 50,
    "cut off": b"PK\x03\x04" + bytes(1000),
}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_messages_name_the_kind_of_file(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(NO_WEIGHTS[kind])
    assert kind in refused(path, tmp_path / "sentinel")


def test_safetensors_may_have_any_file_name(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "x.pth")
    assert load_weights(tmp_path / "x.pth").keys() == GOOD.keys()


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_pickled_weights_named_safetensors_are_refused(tmp_path: Path, new_format: bool) -> None:
    torch.save(GOOD, tmp_path / "x.safetensors", _use_new_zipfile_serialization=new_format)
    assert "torch.save" in refused(tmp_path / "x.safetensors", tmp_path / "sentinel")


def test_a_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pth")
    assert "is not a file" in refused(tmp_path / "x.pth", tmp_path / "sentinel")
