"""The folder of a run: its lock, and its errors if images, classes or epochs have changed."""

import errno
import fcntl
import gzip
import json
import socket
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from support import one_thread  # noqa: F401

from mae_fast.data.sources import Files, Source, open_source
from mae_fast.errors import UserError
from mae_fast.training import config as configs
from mae_fast.training.checkpoint import Saver, Snapshot
from mae_fast.training.run_dir import RunFolder
from mae_fast.training.tasks.classify import linprobe
from mae_fast.training.tasks.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_workers": 0, "image_decoder": "pil", "device": "cpu", "dtype": "fp32", "log_every": 1}


def folder(path: Path, **sources: Source) -> RunFolder:
    return RunFolder(path, {}, sources)


def source(*names: str, classes: tuple[str, ...] = ("a", "b"), labels: list[int] | None = None) -> Files:
    return Files(Path("data"), names, labels or [0] * len(names), classes)


def settings(**sources: Source) -> dict[str, str]:
    return {name: of.fingerprint[:16] for name, of in sources.items()}


def difference(tmp_path: Path, before: Source, now: Source) -> UserError:
    folder(tmp_path, images=before).open(settings(images=before))
    with pytest.raises(UserError) as caught:
        folder(tmp_path, images=now).check(settings(images=now))
    return caught.value


def test_new_and_missing_images_are_named(tmp_path: Path) -> None:
    before = source("a/1.jpg", "a/2.jpg", "b/1.jpg")
    error = difference(tmp_path, before, source("a/1.jpg", "b/1.jpg", "b/2.jpg", *(f"b/x{i}.jpg" for i in range(9))))
    assert "3 images in the run, 12 now, 10 new (b/2.jpg, b/x0.jpg, b/x1.jpg, b/x2.jpg, b/x3.jpg, ...)" in error.message
    assert "1 missing (a/2.jpg)" in error.message
    assert error.hint is not None
    assert "restore the images" in error.hint


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (source("a/1.jpg", labels=[1]), "other labels"),
        (source("a/1.jpg", labels=[1], classes=("b", "c")), "classes a, b in the run, b, c now"),
    ],
)
def test_other_labels_are_named(tmp_path: Path, now: Source, expected: str) -> None:
    assert expected in difference(tmp_path, source("a/1.jpg"), now).message


def test_a_run_without_a_list_of_images_reports_the_number_of_images(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"images": "of an earlier version"}))
    (tmp_path / "._1.jpg").write_bytes(b"x")
    now = open_source(tmp_path)
    with pytest.raises(UserError, match=r"checksum .* differs; there are 2 images now; skipped now.*\._1\.jpg"):
        folder(run, images=now).check(settings(images=now))


def test_an_old_run_gets_its_list_when_it_is_resumed(tmp_path: Path) -> None:
    images = source("a/1.jpg")
    folder(tmp_path, images=images).open(settings(images=images))
    (tmp_path / "images.json.gz").unlink()
    folder(tmp_path, images=images).open(settings(images=images))
    with gzip.open(tmp_path / "images.json.gz", "rt") as file:
        assert json.load(file)["images"]["names"] == ["a/1.jpg"]


def pretraining(images: Path, run: Path, **flags: object) -> configs.PretrainConfig:
    return configs.PretrainConfig.with_preset(
        "tiny", **{"batch_size": 20, "warmup_epochs": 0, **SMALL, **flags, "data_path": images, "output_dir": run}
    )


def test_epochs_may_change_and_the_schedule_follows(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A finished run continues with the learning rates of the longer schedule, from its current step."""
    pretrain(pretraining(images, tmp_path / "long", epochs=4))
    pretrain(pretraining(images, tmp_path / "run", epochs=2))
    caplog.clear()
    assert pretrain(pretraining(images, tmp_path / "run", epochs=4)).step == 8
    assert "4 epochs instead of 2. From epoch 2 on, the learning rate follows the cosine schedule" in caplog.text
    rates = {}
    for name in ("long", "run"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        rates[name] = {line["step"]: line["train_lr"] for line in lines}
    assert [rates["run"][step] for step in (5, 6, 7, 8)] == [rates["long"][step] for step in (5, 6, 7, 8)]
    assert rates["run"][4] < rates["long"][4]
    caplog.clear()
    assert (
        pretrain(pretraining(images, tmp_path / "run", epochs=4)).step == 8
    )  # the run now has the new number of epochs
    assert "instead of" not in caplog.text
    with pytest.raises(UserError, match=r"--epochs 3: .*run has already done 4 epochs; give 4 or more"):
        pretrain(pretraining(images, tmp_path / "run", epochs=3))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 4


def test_a_run_is_not_resumed_with_classes_of_other_names(labelled_images: Path, tmp_path: Path) -> None:
    """The labels of shards may be the same although the names of their classes change."""
    flags = {**SMALL, "batch_size": 24, "epochs": 1, "warmup_epochs": 0, "output_dir": tmp_path / "run"}
    config = configs.LinprobeConfig.with_preset("tiny", data_path=labelled_images, **flags)
    save = Saver.save

    def renamed(self: Saver, saved: Snapshot, *rest: object) -> None:
        saved.state["classes"] = ["x", "y", "z"]
        save(self, saved, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", renamed)
        linprobe(config)
    with pytest.raises(UserError, match="has the classes x, y, z, but the images now have b, g, r"):
        linprobe(config)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_locks_the_folder_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def missing(*_: object) -> None:
        raise OSError(number, "no flock")

    monkeypatch.setattr(fcntl, "flock", missing)
    run = folder(tmp_path)
    run.open({})
    assert "has no flock" in caplog.text
    with pytest.raises(
        UserError, match=r"is in use by process \d+ on .*; wait until it ends.*if that process is gone, rem"
    ):
        folder(tmp_path).open({})
    run.close()
    again = folder(tmp_path)
    again.open({})
    again.close()


def test_the_lock_file_of_an_ended_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no flock")

    monkeypatch.setattr(fcntl, "flock", missing)
    run = folder(tmp_path)
    run.open({})
    mark = Path(run.lock.lock_file)
    gone = subprocess.Popen(["true"])
    gone.wait()
    content = mark.read_text().splitlines()
    run.close()
    mark.write_text("\n".join([str(gone.pid), socket.gethostname(), *content[2:]]) + "\n")
    again = folder(tmp_path)
    again.open({})
    again.close()


def test_other_errors_of_the_lock_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(UserError, match="cannot be used"):
        folder(tmp_path).open({})
