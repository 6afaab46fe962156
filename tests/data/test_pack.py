"""Shards of smaller copies, and the cache of decoded images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from batches import training_batches
from PIL import Image

from mae_fast.cli import main
from mae_fast.data import cache
from mae_fast.data import pack as module
from mae_fast.data.cache import Cached
from mae_fast.data.decode import BadImage, decode, read_header
from mae_fast.data.pack import pack
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.sources import Source, open_source
from mae_fast.errors import UserError

OPTIONS = {"size": (32, 32), "channels": 3, "num_patches": 4, "batch_size": 4, "epochs": 2, "seed": 0}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for i in range(11):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        data = b"broken" if i == 7 else zoo.encoded(zoo.photo(60 + 10 * i, 90, seed=i), ("JPEG", "PNG")[i % 3 == 0])
        (folder / f"{i:02}.jpg").write_bytes(data)
    return open_source(tmp_path / "images")


def test_pack_writes_smaller_copies(source: Source, tmp_path: Path) -> None:
    bad = pack(source, tmp_path / "packed", side=72, per_shard=4)
    assert [source.names[i] for i in bad] == ["b/07.jpg"]
    shards = sorted(path.name for path in (tmp_path / "packed").glob("*.tar*"))
    assert shards == ["000000.tar", "000001.tar", "000002.tar"]
    packed = open_source(tmp_path / "packed")
    left = [i for i in range(len(source)) if i not in bad]
    assert packed.labels == tuple(source.labels[i] for i in left)
    assert packed.classes == source.classes
    for j, i in enumerate(left):
        before, after = (Image.open(io.BytesIO(s.read(k))).convert("RGB") for s, k in ((source, i), (packed, j)))
        assert min(after.size) == min(72, *before.size)
        expected = np.asarray(before.resize(after.size, Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(expected - np.asarray(after)).mean() < 6
        if min(before.size) <= 72 and before.format == "JPEG":
            assert source.read(i) == packed.read(j)


def test_an_interrupted_pack_resumes(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed", side=72, per_shard=4)
    middle = tmp_path / "packed" / "000001.tar"
    whole, other = middle.read_bytes(), (tmp_path / "packed" / "000000.tar").stat().st_mtime_ns
    middle.rename(middle.with_suffix(".tar.part"))
    middle.with_suffix(".tar.part").write_bytes(whole[:1000])
    pack(source, tmp_path / "packed", side=72, per_shard=4, workers=1)
    assert middle.read_bytes() == whole
    assert (tmp_path / "packed" / "000000.tar").stat().st_mtime_ns == other
    with pytest.raises(UserError, match="other images or sizes"):
        pack(source, tmp_path / "packed", side=64, per_shard=4)
    with pytest.raises(UserError, match="not empty"):
        pack(source, source.root)


def test_16_bit_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "x.npy", np.ones((40, 40, 3), np.uint16))
    monkeypatch.setattr("sys.argv", ["mae-fast", "data", "pack", str(tmp_path / "images"), str(tmp_path / "packed")])
    with pytest.raises(SystemExit):
        main()
    assert "has uint16 images" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_the_command_packs_a_folder(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mae-fast", "data", "pack", str(source.root), str(tmp_path / "packed")])
    main()
    first, original, packed = capsys.readouterr().out.splitlines()
    assert first.startswith("11 images: 10 packed, 1 ")
    assert original.startswith("original: ")
    assert packed.startswith("packed: ")


@pytest.mark.parametrize("exif", [False, True])
def test_exif_orientation_is_applied_only_on_request(tmp_path: Path, exif: bool) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "turned.jpg").write_bytes(zoo.orientation(6))
    source = open_source(tmp_path / "images")
    pack(source, tmp_path / "packed", side=256, exif=exif)
    upright = np.asarray(decode(zoo.orientation(6), PixelFormat(exif=exif))).astype(int)
    for copies in (open_source(tmp_path / "packed"), Cached(source, PixelFormat(exif=exif))):
        found = np.asarray(decode(copies.read(0), PixelFormat(exif=exif)))
        assert found.shape == upright.shape
        assert np.abs(found - upright).mean() < 6


def test_shards_appear_only_when_they_are_complete(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = module._Smaller._smaller

    def interrupted(self: module._Smaller, index: int) -> bytes | BadImage:
        if index == 6:
            raise KeyboardInterrupt
        return smaller(self, index)

    monkeypatch.setattr(module._Smaller, "_smaller", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "packed", per_shard=4)
    assert [path.name for path in (tmp_path / "packed").glob("*.tar")] == ["000000.tar"]


@pytest.mark.parametrize("channels", [1, 3])
def test_cached_images_equal_the_originals(source: Source, channels: int) -> None:
    cached = Cached(source, PixelFormat(channels=channels))
    options = OPTIONS | {"channels": channels}
    for a, b in zip(training_batches(source, **options), training_batches(cached, **options), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ids, b.ids)
        assert [(i, str(x)) for i, x in a.skipped] == [(i, str(x)) for i, x in b.skipped]


def test_a_cache_that_does_not_fit_into_memory_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_memory", lambda: 90000)
    with pytest.raises(UserError, match=r"do not fit into .* GB.*--cache"):
        Cached(source)


def test_an_incomplete_pack_is_refused_for_training(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed", per_shard=4)
    (tmp_path / "packed" / "000002.tar").unlink()
    with pytest.raises(UserError, match=r"2 of 3 shards.*again"):
        open_source(tmp_path / "packed")
    pack(source, tmp_path / "packed", per_shard=4)
    assert len(open_source(tmp_path / "packed")) == 10


def test_a_damaged_pack_json_is_refused(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed", per_shard=4)
    (tmp_path / "packed" / "pack.json").write_text('{"fing')
    for act in (lambda: open_source(tmp_path / "packed"), lambda: pack(source, tmp_path / "packed", per_shard=4)):
        with pytest.raises(UserError, match=r"pack.json is damaged"):
            act()


def test_copies_have_no_exif_orientation(tmp_path: Path) -> None:
    """Otherwise a later --exif would rotate some of the copies."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "turned.jpg").write_bytes(zoo.orientation(6))
    (tmp_path / "images" / "cmyk.jpg").write_bytes(zoo.GOOD["cmyk.jpg"])
    pack(open_source(tmp_path / "images"), tmp_path / "packed")
    for i in range(2):
        header = read_header(open_source(tmp_path / "packed").read(i), exif=True)
        assert (header.mode, header.turned) == ("RGB", False)


@pytest.mark.parametrize(
    "words", [["--per-shard", "0"], ["--size", "0"], ["--quality", "100"], ["--num-workers", "-1"]], ids=" ".join
)
def test_bad_flags_are_named(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["mae-fast", "data", "pack", str(source.root), str(tmp_path / "packed"), *words])
    with pytest.raises(SystemExit):
        main()
    assert words[0] in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()
