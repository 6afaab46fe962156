"""``data check``: it reports every image, an interrupted check resumes, and training skips the listed images."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zoo
from batches import training_batches
from PIL import Image

from mae_fast.cli import main
from mae_fast.data import check as module
from mae_fast.data.check import bad_file, bands_hint, check, known_bad
from mae_fast.data.decode import BadImage, decode
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.sources import Files, Source, open_source
from mae_fast.errors import UserError


@pytest.fixture
def animals(tmp_path: Path) -> Source:
    zoo.make(tmp_path)
    source = open_source(tmp_path)
    (tmp_path / "deleted_meanwhile.jpg").unlink()
    return source


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every_pixel", [False, True])
def test_all_bad_images_are_found(animals: Source, workers: int, every_pixel: bool) -> None:
    found = check(animals, every_pixel=every_pixel, workers=workers)
    bad = {name for name in animals.names if name in zoo.BAD or name in zoo.ODD}
    missed = bad - {animals.names[i] for i in found}
    assert {animals.names[i] for i in found} <= bad
    # Images with an intact end that are broken inside are found only by decoding all pixels.
    assert missed == (set() if every_pixel else {n for n in bad if n in MISSED})
    for i, image in found.items():
        expected = zoo.BAD.get(animals.names[i], (b"", "unreadable"))[1]
        assert not expected or image.reason == expected
    lines = [json.loads(line) for line in bad_file(animals).read_text().splitlines()]
    assert lines[-1] == {"checked": len(animals)}
    assert {i: str(image) for i, image in known_bad(animals).items()} == {i: str(image) for i, image in found.items()}


MISSED = {"cut.gif"}


def test_an_interrupted_check_resumes(animals: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PER_TASK", 10)
    expected = check(animals)
    complete = bad_file(animals).read_text()
    bad_file(animals).unlink()
    look, looks = module._BadImages.__getitems__, []

    def interrupted(self: module._BadImages, indices: range) -> module.Found:
        looks.append(indices)
        if len(looks) == 4:
            raise KeyboardInterrupt
        return look(self, indices)

    monkeypatch.setattr(module._BadImages, "__getitems__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(animals)
    assert not bad_file(animals).exists()
    part = bad_file(animals).with_name("bad.jsonl.part")
    part.write_text(part.read_text() + '{"index": 3')  # as after a kill
    found = check(animals)
    assert looks[4] == looks[3] == range(30, 40)
    assert {i: str(image) for i, image in found.items()} == {i: str(image) for i, image in expected.items()}
    assert bad_file(animals).read_text() == complete
    assert not part.exists()


def test_an_interrupted_check_of_other_images_starts_again(animals: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PER_TASK", 10)
    check(animals)
    part = bad_file(animals).with_name("bad.jsonl.part")
    bad_file(animals).rename(part)
    (animals.root / "00.jpg").write_bytes(b"")
    more = open_source(animals.root)
    assert "00.jpg" in [more.names[i] for i in check(more)]


def test_images_without_the_channels_are_bad(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(zoo.npy(zoo.photo()))
    source = open_source(tmp_path)
    assert check(source, pixels=PixelFormat(), every_pixel=True) == {}
    four = PixelFormat(channels=4)
    assert [bad.reason for bad in check(source, pixels=four, every_pixel=True).values()] == ["unsupported"]


def test_training_does_not_read_known_bad_images(animals: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"size": (32, 32), "channels": 3, "num_patches": 4, "batch_size": 8, "epochs": 2, "seed": 0}
    expected = list(training_batches(animals, **options))
    bad = check(animals, every_pixel=True)
    read = Files.read

    def watched(self: Files, index: int) -> bytes:
        assert index not in bad
        return read(self, index)

    monkeypatch.setattr(Files, "read", watched)
    for a, b in zip(expected, training_batches(animals, bad=known_bad(animals), **options), strict=True):
        assert a.images.equal(b.images)  # so a run may resume with a new list
        assert a.ids.equal(b.ids)
        assert [(i, str(x)) for i, x in a.skipped] == [(i, str(x)) for i, x in b.skipped]


def test_a_list_of_other_images_is_refused(animals: Source) -> None:
    check(animals)
    (animals.root / "new.jpg").write_bytes(zoo.jpeg())
    with pytest.raises(UserError, match="other images"):
        known_bad(open_source(animals.root))


def test_a_folder_that_cannot_be_written_is_named(animals: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output"):
        check(animals, output=tmp_path / "nowhere" / "bad.jsonl")


def test_the_command_writes_the_list(
    animals: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mae-fast", "data", "check", str(animals.root)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    output = capsys.readouterr()
    total, *reasons = output.out.splitlines()
    assert total.startswith(f"{len(animals) - 1} images")  # the deleted one was not listed again
    bad = int(total.split()[-2])
    assert sum(int(line.split(": ")[1].split(",")[0]) for line in reasons if line.startswith("  ")) == bad
    assert f"{bad} of {len(animals) - 1} images are unusable" in output.err
    monkeypatch.setattr("sys.argv", ["mae-fast", "data", "check", str(animals.root), "--max-bad-fraction", "1"])
    main()


def test_training_ends_after_100_bad_images_in_a_row(tmp_path: Path) -> None:
    """It does not search forever."""
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"nothing")
    batches = training_batches(
        open_source(tmp_path), size=(32, 32), channels=3, num_patches=4, batch_size=2, epochs=1, seed=0
    )
    with pytest.raises(UserError, match=r"100 images in a row cannot be used, the last .*not an image"):
        next(batches)


def test_the_message_of_a_bad_image_is_one_line() -> None:
    assert str(BadImage("broken", "x")) == "broken: x"


def test_memory_does_not_grow_with_bad_images(tmp_path: Path) -> None:
    """The traceback of a stored exception would keep all local variables alive."""
    data = zoo.encoded(zoo.photo(1500, 2000), "JPEG", quality=95)
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(data[: len(data) // 2] if i < 4 else data)
    source = open_source(tmp_path)
    bad = check(source)
    assert len(bad) == 4
    assert all(image.__traceback__ is None and image.__cause__ is None for image in bad.values())
    options = {"size": (8, 8), "channels": 3, "num_patches": 4, "batch_size": 8, "epochs": 3, "seed": 0}
    for known in (bad, {}):
        for batch in training_batches(source, bad=known, **options):
            assert len(batch.skipped) >= 4
            assert all(image.__traceback__ is None for _, image in batch.skipped)


def test_a_check_killed_while_resuming_loses_nothing(animals: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PER_TASK", 10)
    part = bad_file(animals).with_name("bad.jsonl.part")
    check(animals)
    lines = bad_file(animals).read_text().splitlines(keepends=True)
    bad_file(animals).unlink()
    half = "".join(lines[: next(i for i, line in enumerate(lines) if '"checked": 30' in line) + 1])
    part.write_text(half)

    def interrupted(self: module._BadImages, indices: range) -> module.Found:
        assert part.read_text() == half
        raise KeyboardInterrupt

    monkeypatch.setattr(module._BadImages, "__getitems__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(animals)
    assert part.read_text() == half


def test_a_list_for_other_channels_is_refused(animals: Source) -> None:
    check(animals, pixels=PixelFormat(channels=4))
    with pytest.raises(UserError, match=r"'channels': 4.*'channels': 3"):
        known_bad(animals)


def test_a_file_of_the_user_is_not_overwritten(animals: Source, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="not a list of bad images"):
        check(animals, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "precious"
    check(animals, tmp_path / "list.jsonl")
    assert known_bad(animals, PixelFormat(), tmp_path / "list.jsonl")
    assert not bad_file(animals).exists()


def test_each_tar_file_has_its_own_list(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.addfile(tarfile.TarInfo("x.jpg"))
        source = open_source(tmp_path / name)
        assert check(source)
        assert bad_file(source) == tmp_path / f"{name}.bad.jsonl"
    assert known_bad(open_source(tmp_path)) == {}
    assert len(known_bad(open_source(tmp_path / "a.tar"))) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-workers", "-1"], "give 0 or more"),
        (["--in-chans", "0"], "give 1 or more"),
        (["--channels", "0"], "give 1 or more"),
    ],
)
def test_bad_flags_are_named(
    animals: Source,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["mae-fast", "data", "check", str(animals.root), *words])
    with pytest.raises(SystemExit):
        main()
    assert expected in capsys.readouterr().err


def test_a_folder_of_splits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    monkeypatch.setattr("sys.argv", ["mae-fast", "data", "check", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert f"give {tmp_path / 'train'}" in capsys.readouterr().err


FILES = {
    "grey.png": (20, 28), "colour.png": (20, 28, 3), "alpha.png": (20, 28, 4), "five.tif": (20, 28, 5),
    "pages.tif": (4, 20, 28), "grey.tif": (20, 28), "colour.npy": (20, 28, 3), "five.npy": (20, 28, 5),
}  # fmt: skip
WANTED = [
    *(PixelFormat(channels=channels) for channels in (1, 3, 4, 5)),
    *(PixelFormat(channels=channels, dtype="uint16") for channels in (1, 3, 4, 5)),
    PixelFormat(channels=1, dtype="float32"),
    PixelFormat(channels=2, bands=(2, 5)),
    PixelFormat(channels=3, dtype="uint16", bands=(2, 1, 3)),
]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_the_check_refuses_what_training_refuses(tmp_path: Path, dtype: str, wanted: PixelFormat) -> None:
    """Also for channels, pages and dtypes, with and without decoding."""
    for name, shape in FILES.items():
        values = np.full(shape, 200 if dtype == "uint8" else 3000, dtype)
        if name.endswith(".npy"):
            np.save(tmp_path / name, values)
        elif name.endswith(".tif"):
            pages = {"planarconfig": "contig"} if shape[0] == 20 and len(shape) == 3 else {}
            tifffile.imwrite(tmp_path / name, values, photometric="minisblack", **pages)
        elif dtype == "uint8" or len(shape) == 2:  # Pillow cannot write 16-bit colour
            Image.fromarray(values).save(tmp_path / name)
    source = open_source(tmp_path)
    refused = []
    for i in range(len(source)):
        try:
            decode(source.read(i), wanted)
        except BadImage:
            refused.append(i)
    assert sorted(check(source, pixels=wanted)) == refused


def test_the_command_accepts_the_16_bit_images_that_training_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.arange(5 * 20 * 20, dtype=np.uint16).reshape(20, 20, 5)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values[:, :, :2])
    words = ["mae-fast", "data", "check", str(tmp_path), "--bands", "5,1", "--every-pixel", "--max-bad-fraction", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", words)
        main()
    printed = capsys.readouterr().out
    assert "2 images" in printed
    assert "1 bad" in printed
    assert "unsupported: 1, such as 'b.npy': 2 bands" in printed
    assert "uint16 values of each channel: 4 to 1999; 0 to 1995" in printed
    wanted = PixelFormat(channels=2, dtype="uint16", bands=(5, 1))
    assert list(known_bad(open_source(tmp_path), wanted)) == [1]
    with pytest.raises(UserError, match=r"mae-fast data check .* --in-chans 3"):
        known_bad(open_source(tmp_path))


def checked(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["mae-fast", "data", "check", *words])
    main()


def test_the_hint_names_the_flags_for_other_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.zeros((20, 20, 8), np.uint16))
    with pytest.raises(SystemExit):
        checked(monkeypatch, str(tmp_path))
    assert "hint: --in-chans 8 takes all bands, --bands 1,2,3,... selects bands" in capsys.readouterr().err
    checked(monkeypatch, str(tmp_path), "--bands", "1-3,8")
    checked(monkeypatch, str(tmp_path), "--channels", "8")
    told = capsys.readouterr()
    assert "--channels is now called --in-chans" in told.out + told.err
    np.save(tmp_path / "c.npy", np.zeros((20, 20, 3), np.uint8))  # other images get another hint
    source, pixels = open_source(tmp_path), PixelFormat(channels=5, dtype="uint16")
    assert bands_hint(source, range(3), pixels) == "--bands 1,2,3 selects bands"
    assert bands_hint(source, range(3), PixelFormat()) is None


def test_printed_ranges_leave_missing_values_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.full((20, 20, 1), 7, np.uint16)
    values[:9] = 65535
    np.save(tmp_path / "a.npy", values)
    checked(monkeypatch, str(tmp_path), "--in-chans", "1", "--nodata", "65535")
    assert "uint16 values of each channel: 7 to 7" in capsys.readouterr().out
