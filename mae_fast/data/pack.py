"""Writes smaller copies of images to tar shards, so that epochs read and decode less."""

import contextlib
import io
import json
import tarfile
import time
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from ..errors import UserError
from ..files import atomic_write
from .decode import BadImage, decode, read_header
from .loader import LoaderConfig, by_ranges, training_batches
from .pixel_format import PixelFormat
from .sources import PACKED, Source, read_packed

PER_TASK = 64  # images

Packed = list[tuple[int, bytes | BadImage]]


class _Smaller(Dataset[Packed]):
    def __init__(self, source: Source, side: int, quality: int, exif: bool) -> None:
        self.source, self.side, self.quality, self.exif = source, side, quality, exif

    def __getitems__(self, indices: range) -> Packed:
        return [(i, self._smaller(i)) for i in indices]

    def _smaller(self, index: int) -> bytes | BadImage:
        try:
            data = self.source.read(index)
            image = decode(data, PixelFormat(exif=self.exif))
        except BadImage as bad:
            return bad.bare()
        assert isinstance(image, Image.Image)
        header = read_header(data, exif=True)
        as_wanted = header.format == "JPEG" and header.mode in ("L", "RGB") and not header.turned
        if as_wanted and min(image.size) <= self.side:
            return data  # encoding again would only lose quality
        scale = min(1.0, self.side / min(image.size))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        file = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=self.quality)
        return file.getvalue()


def pack(
    source: Source,
    output: Path,
    side: int = 256,
    quality: int = 92,
    per_shard: int = 10_000,
    exif: bool = False,
    workers: int = 0,
) -> dict[int, BadImage]:
    """Write ``source`` as WebDataset shards of RGB JPEGs with a shorter side of at most ``side``. Return bad images.

    Complete shards are not written again, so an interrupted pack resumes.

    Raises:
        UserError: if ``output`` has other files, or cannot be written.
    """
    about = {
        "fingerprint": source.fingerprint,
        "side": side,
        "quality": quality,
        "per_shard": per_shard,
        "exif": exif,
        "classes": list(source.classes),
        "shards": -(-len(source) // per_shard),
    }
    known = output / PACKED
    bad: dict[int, BadImage] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        if known.exists() and read_packed(output) != about:
            raise UserError(f"{output} has shards of other images or sizes", "delete the folder, or choose another")
        if not known.exists() and any(path.name != PACKED + ".part" for path in output.iterdir()):
            raise UserError(f"{output} is not empty", "choose another folder")
        if not known.exists():
            with atomic_write(known) as part:
                part.write_text(json.dumps(about))
        for number, first in enumerate(range(0, len(source), per_shard)):
            path = output / f"{number:06}.tar"
            if path.exists():
                continue
            indices = range(first, min(first + per_shard, len(source)))
            smaller = by_ranges(_Smaller(source, side, quality, exif), indices, PER_TASK, workers)
            with atomic_write(path) as part, tarfile.open(part, "w") as tar:
                for _, packed in smaller:
                    for i, data in packed:
                        if isinstance(data, BadImage):
                            bad[i] = data
                            continue
                        _add(tar, f"{i:09}.jpg", data)
                        if source.labels is not None:
                            _add(tar, f"{i:09}.cls", str(source.labels[i]).encode())
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror})", "choose another folder") from error
    return bad


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def rate(source: Source, batch_size: int = 64, batches: int = 4) -> float:
    """Images per second that one process loads and augments at 224 pixels."""
    batch_size = min(batch_size, len(source))
    loader = LoaderConfig(size=(224, 224), batch_size=batch_size, epochs=batches + 1)
    found = training_batches(source, loader, num_patches=196)
    next(found)  # warm up
    start = time.perf_counter()
    for _ in range(batches):
        next(found)
    return batches * batch_size / (time.perf_counter() - start)


def size_of_all(source: Source) -> int:
    """The size in bytes of all readable encoded images."""
    total = 0
    for i in range(len(source)):
        with contextlib.suppress(BadImage):
            total += len(source.read(i))
    return total
