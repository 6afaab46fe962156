"""Sources of encoded images: folders, tar shards, Hugging Face datasets. All have random access."""

import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .decode import MAX_BYTES, BadImage

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".npy"})

MAX_CLASSES = 1_000_000
PACKED = "pack.json"  # written by ``mae_fast.data.pack`` beside its shards: their source and settings


class Source:
    """Encoded images in a fixed order.

    Attributes:
        root: its path, for messages and for files that are kept beside it.
        names: of each image.
        labels: of each image, an index of ``classes``; None where there are none.
        classes: their names.
        chosen: whether they are some of the images in ``root``, in an order of their own; what a check of all has found
            is then looked up by name.
    """

    chosen = False

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None = None, classes: Sequence[str] = ()
    ) -> None:
        self.root, self.names, self.classes = root, tuple(names), tuple(classes)
        self.labels = None if labels is None else tuple(labels)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """Of the list of images: SHA-256 of names and labels, in order."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(name.encode(errors="surrogateescape") + b"\0")
        digest.update(repr(self.labels).encode())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            BadImage: if it cannot be read.
        """
        raise NotImplementedError


class Files(Source):
    """One file per image; names are paths below ``root``."""

    def read(self, index: int) -> bytes:
        path = os.path.join(self.root, self.names[index])
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for its writer.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise BadImage("unreadable", "no regular file")
                _check_size(found.st_size)
                return file.read()
        except OSError as error:
            raise BadImage("unreadable", error.strerror or str(error)) from error


class Shards(Source):
    """Images in tar files, in WebDataset's layout: ``key.jpg`` and, with labels, ``key.cls`` beside it.

    The place of every image is looked up once, so that shards are read in any order, like files.
    """

    def __init__(self, root: Path, shards: Sequence[Path]) -> None:
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        labels: list[int | None] = []
        for number, shard in enumerate(shards):
            found = _index_shard(shard)
            names += [f"{shard.name}/{name}" for name, *_ in found]
            places += [(number, offset, size) for _, offset, size, _ in found]
            labels += [label for *_, label in found]
        known = [label for label in labels if label is not None]
        if known and len(known) < len(labels):
            raise UserError(f"{root}: {len(known)} of {len(labels)} images have a label (.cls)", "give all of them one")
        classes = [str(i) for i in range(max(known) + 1)] if known else []
        packed = read_packed(root)
        if packed:
            classes = packed["classes"]
            if len(shards) < packed["shards"]:
                raise UserError(
                    f"{root} holds {len(shards)} of {packed['shards']} shards: the line that packs it has "
                    "not come to its end",
                    "run it again",
                )
        super().__init__(root, names, known or None, classes)
        self.shards = tuple(shards)
        self.places = np.array(places, np.int64).reshape(-1, 3)

    def read(self, index: int) -> bytes:
        shard, offset, size = self.places[index].tolist()
        try:
            _check_size(size)
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BadImage("unreadable", error.strerror or str(error)) from error
        if len(data) < size:
            raise BadImage("unreadable", f"{self.shards[shard].name} ends inside it")
        return data


class HuggingFace(Source):
    """A ``datasets.Dataset`` of images, which it keeps encoded. Hub-side decoding is switched off, nothing is copied.

    Args:
        dataset: with a column of feature ``Image``, and with labels if it has a column of feature ``ClassLabel``.
    """

    def __init__(self, dataset: Any, root: Path | None = None) -> None:
        import datasets

        of = {
            kind: [n for n, f in dataset.features.items() if isinstance(f, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        }
        if len(of[datasets.Image]) != 1:
            raise UserError(
                f"the dataset needs one column of images, it has {of[datasets.Image]} among {list(dataset.features)}"
            )
        self.column = of[datasets.Image][0]
        alone = dataset.with_format(None).select_columns(self.column)
        self.dataset = alone.cast_column(self.column, datasets.Image(decode=False))
        labels, classes = None, ()
        if of[datasets.ClassLabel]:
            column = of[datasets.ClassLabel][0]
            labels, classes = dataset.with_format(None)[column][:], dataset.features[column].names
            if None in labels:
                raise UserError(f"the dataset has rows without {column}", "give all of them one, or drop the column")
        places = [f"{i:09}" for i in range(len(dataset))]
        super().__init__(root or Path(f"dataset {dataset._fingerprint}"), places, labels, classes)

    @cached_property
    def fingerprint(self) -> str:
        return str(self.dataset._fingerprint)

    def read(self, index: int) -> bytes:
        image = self.dataset[index][self.column]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise BadImage("empty", "None")
        if image["bytes"] is not None:
            _check_size(len(image["bytes"]))
            return bytes(image["bytes"])
        return Files(Path("/"), [os.path.abspath(image["path"])]).read(0)


def read_packed(folder: Path) -> dict[str, Any] | None:
    """The description that ``mae_fast.data.pack`` wrote of the shards in ``folder``; None if it did not write them.

    Raises:
        UserError: if that is damaged.
    """
    path = folder / PACKED
    if not path.is_file():
        return None
    try:
        found = dict(json.loads(path.read_text()))
        return found if {"shards", "classes"} <= found.keys() else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})", f"remove {folder} and pack again") from error


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise BadImage("too large", f"{size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f}")


def _index_shard(shard: Path) -> list[tuple[str, int, int, int | None]]:
    """Name, offset, size and label of every image of a tar file."""
    images: list[tuple[str, str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                key = f"{folder}/{stem}"
                if not member.isreg() or member.issparse():
                    continue
                if os.path.splitext(file)[1].lower() in EXTENSIONS:
                    images.append((key, member.name, member.offset_data, member.size))
                elif ending == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[key] = int(content.read(20))
                    if not 0 <= labels[key] < MAX_CLASSES:
                        raise ValueError(f"label {labels[key]} of {member.name}, beyond 0 to {MAX_CLASSES - 1}")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(
            f"{shard} cannot be read as an uncompressed tar of images ({error})", "write it again"
        ) from error
    return [(name, offset, size, labels.get(key)) for key, name, offset, size in images]


def open_source(path: Path, split: str | None = None) -> Source:
    """The images at ``path``, or in its sub-folder ``split`` if there is one.

    A tar file or a folder of them; a folder that ``datasets.Dataset.save_to_disk`` wrote; a folder of images.

    Raises:
        UserError: if the folder is missing, is a file, or holds no image.
    """
    folder = path / split if split and (path / split).is_dir() else path
    try:
        return _open_source(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror})") from error


def labelled(path: Path) -> tuple[Source, Source]:
    """The images in ``train`` and in ``val`` below ``path``, labelled with the same classes.

    Raises:
        UserError: if one of them is missing, has no labels, or has other classes.
    """
    train, val = open_source(path / "train"), open_source(path / "val")
    if isinstance(val, Shards) and train.classes[: len(val.classes)] == val.classes:
        val.classes = train.classes  # of classes that are numbers alone, val need not hold the last ones
    if train.labels is None or val.labels is None or train.classes != val.classes:
        only = [_some(sorted({*a.classes} - {*b.classes})) for a, b in ((train, val), (val, train))]
        raise UserError(
            f"{path} must hold train/ and val/ with the same class folders, in the same order, got "
            f"{len(train.classes)} and {len(val.classes)} classes, in train/ alone: {only[0]}, in val/ alone: {only[1]}"
        )
    return train, val


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"


def _open_source(folder: Path) -> Source:
    if folder.is_file() and folder.suffix == ".tar":
        source: Source = Shards(folder, [folder])
    elif shards := sorted(path for path in folder.glob("*.tar") if path.is_file()):
        source = Shards(folder, shards)
    elif (folder / "dataset_info.json").exists() and (folder / "state.json").exists():
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"{folder} needs datasets", "pip install datasets") from error
        try:
            dataset = datasets.load_from_disk(folder)
        except Exception as error:  # of many kinds, when a file of it is missing or damaged
            raise UserError(f"{folder} cannot be read as a saved dataset ({type(error).__name__}: {error})") from error
        source = HuggingFace(dataset, folder)
    else:
        return image_folder(folder)
    if not len(source):
        raise UserError(f"no images in {folder}", f"give a folder with {', '.join(sorted(EXTENSIONS))}")
    return source


def _images_below(folder: str) -> list[str]:
    found = []
    seen = set()  # folders by what they are, not by name: a link may lead back up

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        found += [os.path.join(parent, f) for f in sorted(files) if os.path.splitext(f)[1].lower() in EXTENSIONS]
    return found


def image_folder(folder: Path) -> Source:
    """The images below ``folder``.

    Sub-folders are classes (as in torchvision's ``ImageFolder``, sorted by name); a folder that holds images directly
    is flat and has no labels.

    Raises:
        UserError: if the folder is missing, is a file, or holds no image.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"image folder {folder} {what}", "give a folder of images or of class folders")
    with os.scandir(folder) as entries:
        listed = sorted((e.name, os.path.isdir(e.path)) for e in entries)  # e.is_dir() raises on links in a circle
    flat = [n for n, d in listed if not d and os.path.splitext(n)[1].lower() in EXTENSIONS]
    if flat:
        return Files(folder, flat)
    names: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    for name in (n for n, d in listed if d):
        found = _images_below(os.path.join(folder, name))
        if found:
            names += [os.path.relpath(path, folder) for path in found]
            labels += [len(classes)] * len(found)
            classes.append(name)
    if not names:
        raise UserError(
            f"no images in {folder} or its sub-folders",
            f"give one with {', '.join(sorted(EXTENSIONS))}",
        )
    return Files(folder, names, labels, classes)
