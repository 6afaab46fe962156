"""Sources of encoded images: folders, tar shards, Hugging Face datasets. All have random access."""

import hashlib
import json
import logging
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .decode import MAX_BYTES, BadImage
from .folders import (
    EXTENSIONS,
    choose_folder,
    data_root,
    entries,
    is_hidden,
    list_images,
    pictures_in,
    refuse_mixture,
    refuse_several_splits,
    some,
    split_folder,
)

logger = logging.getLogger(__name__)

MAX_CLASSES = 1_000_000
# Names of a label column, and prefixes of its dtype.
LABELS = ("label", "labels", "class", "class_name", "category", "target")
LABEL_TYPES = ("int", "uint", "string", "large_string", "bool")
PACKED = "pack.json"  # the source and settings of shards, written by ``mae_fast.data.pack``


class Source:
    """Encoded images in a fixed order.

    Attributes:
        root: path of the source, for messages and for the files beside it.
        names: names of the images.
        labels: for each image, an index into ``classes``; multi-label: a 0/1 vector. None without labels.
        classes: names of the classes.
        chosen: whether the images are a selection of those in ``root``, in another order. The results of a check are
            then looked up by name.
        left_out: the other content of the folder, as a phrase. Empty if there is none.
        unlabelled: the reason why there are no labels.
    """

    chosen = False
    left_out = ""
    unlabelled = "its images have no labels"

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None = None, classes: Sequence[str] = ()
    ) -> None:
        self.root, self.names, self.classes = root, tuple(names), tuple(classes)
        self.labels: tuple[Any, ...] | None = None if labels is None else tuple(labels)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names and labels, in order."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(name.encode(errors="surrogateescape") + b"\0")
        digest.update(repr(self.labels).encode())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """Read an encoded image.

        Raises:
            BadImage: if it cannot be read.
        """
        raise NotImplementedError


class Files(Source):
    """One file per image. Names are paths relative to ``root``."""

    def read(self, index: int) -> bytes:
        path = os.path.join(self.root, self.names[index])
        try:
            # Without O_NONBLOCK, opening a named pipe would block.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise BadImage("unreadable", "no regular file")
                _check_size(found.st_size)
                return file.read()
        except OSError as error:
            raise BadImage("unreadable", error.strerror or str(error)) from error


class Shards(Source):
    """Images in tar files, in the layout of WebDataset: ``key.jpg`` and, with labels, ``key.cls`` beside it.

    The offset of each image is looked up once, so that images can be read in any order.
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
            raise UserError(f"{root}: {len(known)} of {len(labels)} images have a label (.cls)", "add the others")
        classes = [str(i) for i in range(max(known) + 1)] if known else []
        packed = read_packed(root)
        if packed:
            classes = packed["classes"]
            if len(shards) < packed["shards"]:
                raise UserError(
                    f"{root} has {len(shards)} of {packed['shards']} shards: packing is not finished",
                    "run 'mae-fast data pack' again",
                )
        super().__init__(root, names, known or None, classes)
        self.unlabelled = "its shards have no labels (.cls)"
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
    """A ``datasets.Dataset`` of images. Decoding by ``datasets`` is disabled, and nothing is copied.

    Labels are a column with the feature ``ClassLabel``, or a column of integers or strings with a name in ``LABELS``.
    In the second case, the values are the names of the classes.

    Args:
        dataset: a dataset with one column of feature ``Image``.
    """

    def __init__(self, dataset: Any, root: Path | None = None) -> None:
        import datasets

        images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise UserError(f"the dataset needs one column of images, but has {images} among {list(dataset.features)}")
        self.column = images[0]
        alone = dataset.with_format(None).select_columns(self.column)
        self.dataset = alone.cast_column(self.column, datasets.Image(decode=False))
        labels, classes, self.unlabelled = _labels(dataset)
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


def _labels(dataset: Any) -> tuple[list[int] | None, list[str], str]:
    """Labels and classes of a ``datasets.Dataset``, or None, no class, and the reason."""
    import datasets

    columns = {name: feature for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)}
    if not columns:
        columns = {
            name: feature
            for name, feature in dataset.features.items()
            if name.lower() in LABELS and isinstance(feature, datasets.Value) and feature.dtype.startswith(LABEL_TYPES)
        }
    chosen = sorted(columns)
    if len(columns) > 1:
        chosen = [name for name in columns if name.lower() in ("label", "labels")]
    if len(chosen) != 1:
        among = sorted(columns) or f"{list(dataset.features)}, none of feature ClassLabel or named {', '.join(LABELS)}"
        return None, [], f"the column of labels is ambiguous or missing: {among}"
    (column,) = chosen
    values = list(dataset.with_format(None)[column])
    feature = columns[column]
    known = isinstance(feature, datasets.ClassLabel)
    if missing := sum(value is None or (isinstance(value, int) and value < 0) for value in values):
        return None, [], f"{missing} of {len(values)} rows have no {column}"
    if known:
        return values, list(feature.names), ""
    numbers = {value: i for i, value in enumerate(sorted(set(values)))}
    return [numbers[value] for value in values], [str(value) for value in numbers], ""


def read_packed(folder: Path) -> dict[str, Any] | None:
    """The description of the shards in ``folder`` that ``mae_fast.data.pack`` wrote. None without one.

    Raises:
        UserError: if it is damaged.
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


def _parts(name: str) -> list[str]:
    """The folders and the file name in the name of a tar member."""
    return [part for part in name.split("/") if part not in (".", "..")]


def _index_shard(shard: Path) -> list[tuple[str, int, int, int | None]]:
    """(name, offset, size, label) of each image in a tar file."""
    images: list[tuple[str, str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                key = f"{folder}/{stem}"
                if not member.isreg() or member.issparse() or any(map(is_hidden, _parts(member.name))):
                    continue
                if os.path.splitext(file)[1].lower() in EXTENSIONS:
                    images.append((key, member.name, member.offset_data, member.size))
                elif ending == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[key] = int(content.read(20))
                    if not 0 <= labels[key] < MAX_CLASSES:
                        raise ValueError(f"label {labels[key]} of {member.name}, which is not in 0..{MAX_CLASSES - 1}")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(
            f"{shard} cannot be read as an uncompressed tar of images ({error})", "write it again"
        ) from error
    return [(name, offset, size, labels.get(key)) for key, name, offset, size in images]


def open_source(path: Path, split: str | None = None, mixed: bool = False) -> Source:
    """The images at ``path``, or in its sub-folder for ``split`` ("train" or "val") if there is one.

    ``path`` is a tar file, a folder of tar files, a folder written by ``datasets.Dataset.save_to_disk``, or a folder of
    images. The folder of a split may have any usual spelling (``folders.split_folder``). If "val" is missing, "train"
    is used. Ignored content of the folder is logged. ``mixed``: see ``folders.list_images``.

    Raises:
        UserError: if ``path`` does not exist, is a file other than a tar file, has no image, or is ambiguous.
    """
    with _readable(path):
        return _open_source(choose_folder(data_root(path), split) if split else path, mixed=mixed)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Context that turns an ``OSError`` of a folder or file into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror})") from error


def labelled(path: Path) -> tuple[Source, Source]:
    """The images in the splits "train" and "val" below ``path``, labelled with the classes of "train".

    Classes are matched by name. Classes without an image in "val" are logged.

    Raises:
        UserError: if a split is missing or has no labels, if "train" has less than two classes, or if "val" has a class
            that "train" does not have.
    """
    root = data_root(path)
    train, val = (open_split(root, split) for split in ("train", "val"))
    for source in (train, val):
        if source.labels is None:
            raise UserError(
                f"{path} must hold train/ and val/ with the same class folders, but {source.root} has no classes: "
                f"{source.unlabelled}"
            )
    if len(train.classes) < 2:
        raise UserError(
            f"{train.root} has {len(train)} images of one class, {train.classes[0]}{_folders_in(train)}",
            "give images of two or more classes, in one folder per class",
        )
    match_classes(val, train.classes, f"{train.root}")
    return train, val


def open_held_out(path: Path, nested: bool = False) -> Source:
    """The images in the split "val" below ``path``, or in ``path`` if it has no splits.

    Args:
        nested: as in ``open_split``.

    Raises:
        UserError: if the folder has no images.
    """
    root = data_root(path)
    with _readable(root):
        whole = root.exists() and not any(split_folder(root, split) for split in ("train", "val"))
        return _open_source(root, nested) if whole else open_split(root, "val", nested)


def held_out_source(path: Path, classes: Sequence[str], owner: str) -> Source:
    """``open_held_out``, labelled with ``classes``.

    Args:
        owner: name of the owner of ``classes``, for messages.

    Raises:
        UserError: if the folder has no images, or if they have no labels or other classes.
    """
    source = open_held_out(path)
    if source.labels is None:
        raise UserError(f"{source.root} has no classes: {source.unlabelled}", "give images in class folders")
    match_classes(source, classes, owner)
    return source


def match_classes(source: Source, classes: Sequence[str], owner: str) -> None:
    """Number the labels of ``source`` as in ``classes``, by name. Classes without an image are logged.

    Args:
        owner: name of the owner of ``classes``, for messages.

    Raises:
        UserError: if ``source`` has classes that are not in ``classes``.
    """
    assert source.labels is not None
    check_classes(source.classes, classes, f"{source.root}", owner)
    if tuple(classes) != source.classes:
        _ = source.fingerprint  # cached with the original labels
        places = {name: i for i, name in enumerate(classes)}
        numbers = [places[name] for name in source.classes]
        source.labels, source.classes = tuple(numbers[i] for i in source.labels), tuple(classes)


def check_classes(found: Sequence[str], classes: Sequence[str], place: str, owner: str) -> None:
    """Raise ``UserError`` if ``place`` has classes that ``owner`` does not have. Log the classes that are missing."""
    for names, of in ((found, place), (classes, owner)):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{of} has several classes with the name {some(twice)}", "give each class its own name")
    if other := [name for name in found if name not in {*classes}]:
        raise UserError(
            f"{place} has classes that {owner} does not have: {some(other)}; {owner} has {len(classes)} classes: "
            f"{some(classes)}",
            "classes are matched by name: rename them, or give images of the same classes",
        )
    if missing := [name for name in classes if name not in {*found}]:
        count = f"{len(classes) - len(missing)} of the {len(classes)}"
        logger.info(f"{place} has {count} classes of {owner}; it does not have {some(missing)}")


def open_split(root: Path, split: str, nested: bool = False) -> Source:
    """The images of a split below ``root``.

    Args:
        nested: read images at any depth. Folders in the split are not classes.

    Raises:
        UserError: if the folder has no images.
    """
    with _readable(root):
        folder = split_folder(root, split)
        if folder is None:
            there = root.is_dir()
            found = f"; {root} has {some(sorted(entries(root)[1]))}" if there else ""
            raise UserError(
                f"image folder {root / split if there else root} does not exist{found}",
                "give a folder with train/ and val/",
            )
        return _open_source(folder, nested)


def _folders_in(source: Source) -> str:
    """A phrase that names the sub-folders of the only class folder of ``source``."""
    folder = source.root / source.classes[0]
    below = sorted(name for name in entries(folder)[1] if not is_hidden(name)) if folder.is_dir() else []
    return f" (its folder contains {some(below)})" if below else ""


def _open_source(folder: Path, nested: bool = False, mixed: bool = False) -> Source:
    if folder.is_file() and folder.suffix == ".tar":
        return _checked(Shards(folder, [folder]))
    shards, saved = [], False
    if folder.is_dir():
        names = sorted(entries(folder)[0])
        shards = [folder / name for name in names if name.endswith(".tar") and not is_hidden(name)]
        shards = [path for path in shards if path.is_file()]
        saved = {"dataset_info.json", "state.json"} <= {*names}
        if "dataset_dict.json" in names:
            splits = some(sorted(entries(folder)[1]))
            raise UserError(f"{folder} is a saved DatasetDict with {splits}", "give one of these folders")
    if shards or saved:
        kinds = {"tar shard": [path.name for path in shards], "saved dataset": ["state.json"] * saved}
        refuse_mixture(folder, {**kinds, **pictures_in(folder)})
        refuse_several_splits(folder, [path.name for path in shards])
        return _checked(Shards(folder, shards) if shards else _load_saved(folder))
    found = list_images(folder, nested, mixed)
    source = Files(folder, found.names, found.labels, found.classes)
    source.unlabelled, source.left_out = f"it has images ({some(found.names)}), but no class folders", found.left_out
    if found.left_out:
        logger.info(f"{folder}: left out {found.left_out}")
    return source


def _checked(source: Source) -> Source:
    if not len(source):
        raise UserError(f"no images in {source.root}", f"give a folder with {', '.join(sorted(EXTENSIONS))}")
    return source


def _load_saved(folder: Path) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{folder} needs the Python package datasets", "pip install datasets") from error
    try:
        dataset = datasets.load_from_disk(folder)
    except Exception as error:  # many types, if a file is missing or damaged
        raise UserError(f"{folder} cannot be read as a saved dataset ({type(error).__name__}: {error})") from error
    return HuggingFace(dataset, folder)
