"""``mae-fast demo`` with a few training steps on random images of the size of Fashion-MNIST."""

import re
from pathlib import Path

import pytest
from idx_files import make_idx_files

from mae_fast.cli import demos
from mae_fast.errors import UserError
from mae_fast.studies import fashion_mnist
from mae_fast.studies.common import final_figure


def test_demo_pretrains_draws_and_finetunes(tmp_path, monkeypatch, capsys, caplog):
    idx = tmp_path / "idx"
    make_idx_files(idx, monkeypatch, (300, 20))
    files = {path.name.removesuffix(".gz"): path for path in idx.iterdir()}
    monkeypatch.setattr(fashion_mnist, "fetch", lambda scratch: files)
    monkeypatch.setattr(demos, "DEMO_EPOCHS", 2)
    monkeypatch.setattr(demos, "DEMO_FINETUNE_EPOCHS", 1)
    caplog.set_level("INFO")
    folder = tmp_path / "demo"
    demos.demo([str(folder)])
    output = capsys.readouterr().out
    assert "Using Fashion-MNIST." in output
    assert (folder / "reconstruction.png").exists()
    assert len([*(folder / "labels-25/train").glob("*/*.png")]) == 250
    found = re.search(r"with 25 labels per class: (\S+) % from MAE weights, (\S+) % from random weights\.", output)
    assert [float(x) for x in found.groups()] == [final_figure(folder / f"finetuned-{x}") for x in ("MAE", "random")]
    caplog.clear()
    demos.demo([str(folder)])
    assert caplog.text.count("is finished") == 3, "nothing is trained twice"
    assert found[0] in capsys.readouterr().out


def no_download(folder: Path) -> None:
    raise fashion_mnist.DownloadError("Fashion-MNIST cannot be downloaded (apt: no network)")


@pytest.fixture
def verbs(monkeypatch):
    """The commands that the demo runs. Only 'data fashion-mnist' is executed, without a download."""
    lines = []
    build = demos.data

    def data(words):
        if words[0] == "fashion-mnist":
            return build(words)
        lines.append(["data", *words])
        (Path(words[1]) / "val" / "croplands").mkdir(parents=True, exist_ok=True)

    data.__name__ = "data"
    monkeypatch.setattr(demos, "data", data)
    monkeypatch.setattr(fashion_mnist, "fetch", no_download)
    for name in ("pretrain", "reconstruct", "logreg_probe", "finetune"):

        def verb(words, name=name):
            lines.append([name, *words])

        verb.__name__ = name
        monkeypatch.setattr(demos, name, verb)
    return lines


@pytest.mark.parametrize(("earlier", "reason"), [(False, "no network"), (True, "/data.")])
def test_demo_falls_back_to_satellite_tiles(earlier, reason, verbs, tmp_path, capsys):
    if earlier:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/demo.json").write_text("{}")
    demos.demo([str(tmp_path)])
    assert [line[0] for line in verbs] == ["data", "pretrain", "reconstruct", "logreg_probe"]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Using "))
    assert "satellite tiles" in line
    assert reason in line


def test_other_content_in_the_folder_is_an_error(verbs, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/photo.jpg").write_text("")
    with pytest.raises(UserError, match="is not a fashion-mnist dataset"):
        demos.demo([str(tmp_path)])
    assert not verbs
