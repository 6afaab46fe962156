"""The compiled libraries need nothing that the oldest torch lacks: one build loads under each torch since then."""

import shutil
import subprocess
from pathlib import Path

import pytest

import mae_fast

LIBRARIES = sorted(Path(mae_fast.__file__).parent.glob("_*.abi3.so"))
FLOOR = {line for line in Path(__file__).with_name("torch_2_10_symbols.txt").read_text().split("\n") if line[:1] != "#"}
pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils"),
    pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.partition(".")[0]),
]


def undefined(library):
    """Type and name of each symbol that the library takes from others; libraries with versions append theirs."""
    found = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split() for line in found.stdout.splitlines()]


def test_symbols_are_those_of_the_oldest_torch(library):
    needed = {name for kind, name in undefined(library) if kind == "U" and "@" not in name}
    assert len(needed & FLOOR) > 20
    assert not {name for name in needed - FLOOR if not name.startswith("Py")}


def test_what_torch_does_not_promise_is_weak(library):
    weak = [name for kind, name in undefined(library) if kind == "w" and not name.startswith(("_ITM_", "__"))]
    assert len(weak) == (2 if library.name.startswith("_C.") else 0), weak
    assert all("brgemm" in name for name in weak)
