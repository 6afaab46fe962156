"""Reads ``.pth`` files with objects of other packages beside the tensors, without importing or running their code."""

import mmap
import pickle
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import _utils

# The only names that a pickle may import. They build tensors and plain values.
ALLOWED: dict[str, Any] = {
    f"{x.__module__}.{x.__qualname__}": x
    for x in (
        OrderedDict,
        defaultdict,
        Namespace,  # of the published checkpoints
        _utils._rebuild_parameter,
        _utils._rebuild_tensor,
        _utils._rebuild_tensor_v2,
    )
}
# Opcodes that import through the process's extension registry and can bypass ``find_class``.
REFUSED = pickle.EXT1 + pickle.EXT2 + pickle.EXT4


class Stub:
    """Replaces a class, function or object of another package. The operations of a pickle have no effect on it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        return object.__new__(Stub)  # ``cls`` may be an instance that replaces a nested class

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Do nothing."""

    extend = add = append


class _Unpickler(pickle._Unpickler):
    """The standard library's Python unpickler, with a ``Stub`` for every name that is not in ``ALLOWED``.

    torch adds ``persistent_load``, which reads the tensors' storages.
    """

    stubbed: set[str]
    stack: list[Any]  # set by the base class, as are the next two
    append: Any
    read: Any

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        self.stubbed.add(full)
        return Stub

    def load_build(self) -> None:
        """Set the attributes of a ``Namespace``. Do nothing for other objects."""
        state = self.stack.pop()
        if type(self.stack[-1]) is Namespace and type(state) is dict:
            vars(self.stack[-1]).update(state)

    def load_binpersid(self) -> None:
        """Load a storage. References to modules with source code become a ``Stub``: torch would import them."""
        reference = self.stack.pop()
        is_storage = type(reference) is tuple and reference[:1] == ("storage",)
        self.append(self.persistent_load(reference) if is_storage else Stub)

    def load_bytearray8(self) -> None:
        """Load as bytes. A bytearray would be allocated with the length that a malicious file claims."""
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if code not in REFUSED},
        pickle.BUILD[0]: load_build,
        pickle.BINPERSID[0]: load_binpersid,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def load_with_stubs(path: Path, is_zip: bool) -> tuple[Any, set[str]]:
    """The content of a file of ``torch.save``, on the CPU, and the names that were replaced by a ``Stub``.

    Args:
        path: a file that ``torch.load(weights_only=True)`` refused with ``UnpicklingError``. This excludes TorchScript
            archives and tar files, which torch would read without this unpickler.
        is_zip: whether it is in the format of torch 1.6 and newer.

    Raises:
        Exception: of many types, if the file is damaged.
    """
    stubbed: set[str] = set()
    unpickler = type("Unpickler", (_Unpickler,), {"stubbed": stubbed})
    module: Any = SimpleNamespace(
        __name__=__name__, Unpickler=unpickler, load=lambda file, **options: unpickler(file, **options).load()
    )
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": False, "pickle_module": module}
    if is_zip:
        return torch.load(path, mmap=True, encoding="latin1", **options), stubbed
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return torch.load(content, encoding="latin1", **options), stubbed  # type: ignore[arg-type]
