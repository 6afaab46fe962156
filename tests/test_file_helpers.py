"""Atomic file writes."""

import signal
import subprocess
import sys

import pytest

from mae_fast.files import atomic_write


def test_an_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")

    def fail():
        with atomic_write(path) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [x.name for x in tmp_path.iterdir()] == ["config.json"]
    assert path.read_text() == "old"
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [x.name for x in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_unfinished_file(tmp_path, number):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mae_fast.__main__ import _end\n"
        "from mae_fast.files import atomic_write\n"
        f"signal.signal(signal.{number}, _end)\n"
        "with atomic_write(Path(sys.argv[1])) as part:\n"
        "    part.write_text('new')\n"
        f"    os.kill(os.getpid(), signal.{number})\n"
    )
    process = subprocess.run([sys.executable, "-c", code, tmp_path / "x.npy"])
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_an_error_about_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: .*x\.png'"), atomic_write(tmp_path / "x.png"):
        raise OSError(28, "No space left on device")
