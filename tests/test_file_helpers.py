"""Files are written whole or not at all."""

import pytest

from mae_fast.files import atomic_write


def test_an_error_leaves_the_old_file(tmp_path):
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
