"""Finds splits, class folders and images in a folder. Ambiguous folders are errors. Ignored files are counted."""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .decode import BadImage, read_header

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".npy", ".dcm"}
)
# Folders of Synology, macOS archives, Windows and file systems. Other hidden names start with a dot.
HIDDEN = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found"})
ONE_KIND = "give a folder with one kind"
IGNORED = frozenset({"thumbs.db", "desktop.ini", "bad.jsonl", "pack.json"})  # left out without a message
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
TEST = ("test", "testing")  # used if there is no val
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
SAMPLE = 16  # number of files without an extension that are opened
MAX_WRAPPERS = 3  # folders around the one with the splits


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        names: paths relative to the folder.
        labels: for each image, an index into ``classes``. None without class folders.
        left_out: the other content of the folder, as a phrase. Empty if there is none.
    """

    names: list[str]
    labels: list[int] | None
    classes: list[str]
    left_out: str


@dataclass
class _Walk:
    """Lists images, and counts everything else.

    Attributes:
        bare: whether files without an extension are images, instead of those with one of ``EXTENSIONS``.
    """

    bare: bool = False
    hidden: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    def files(self, names: Iterable[str]) -> list[str]:
        """The images among the files of a folder, sorted."""
        found = []
        for name in sorted(names):
            extension = os.path.splitext(name)[1].lower()
            is_image = not extension if self.bare else extension in EXTENSIONS
            if is_hidden(name):
                if extension in EXTENSIONS:
                    self.hidden.append(name)
            elif is_image:
                found.append(name)
            elif name.lower().removesuffix(".part") not in IGNORED:
                self.others[extension or "no extension"] += 1
        return found

    def folders(self, parent: str | Path, names: Iterable[str], start: str | Path = "") -> list[str]:
        """The folders in ``parent`` that are not hidden, sorted.

        Links to a folder that contains the link or ``start`` are left out: they would repeat images of other classes.
        """
        found: list[str] = []
        for name in sorted(names):
            path = os.path.join(parent, name)
            if is_hidden(name):
                self.hidden.append(name)
            elif os.path.islink(path) and _leads_up(path, start or parent):
                self.links.append(os.path.join(os.path.basename(parent), name))
            else:
                found.append(name)
        return found

    def below(self, folder: str) -> Iterator[str]:
        """The paths of the images below ``folder``."""
        seen = set()  # resolved folders, because a link may lead to a parent

        def fail(error: OSError) -> None:
            raise error

        for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = self.folders(parent, folders, start=folder)
            yield from (os.path.join(parent, name) for name in self.files(files))

    def listing(self, folder: Path, nested: bool, mixed: bool) -> Listing:
        """The images in ``folder`` or in its class folders. For the arguments and errors, see ``list_images``."""
        if nested:
            paths = self.below(os.fspath(folder))
            return Listing(sorted(os.path.relpath(path, folder) for path in paths), None, [], str(self))
        files, folders = entries(folder)
        pictures, folders = self.files(files), self.folders(folder, folders)
        if pictures:
            classes_too = _with_images(folder, folders, self.bare)
            kinds = {"picture": pictures, "class folder": classes_too}
            if classes_too and mixed:
                logger.warning(f"{folder} has {_phrase(kinds)}: all images are read, without labels")
                return _Walk(self.bare).listing(folder, nested=True, mixed=False)
            refuse_mixture(folder, kinds, f"{ONE_KIND}; pre-training reads both")
            return Listing(pictures, None, [], str(self))
        names: list[str] = []
        labels: list[int] = []
        classes: list[str] = []
        for name in folders:
            found = list(self.below(os.path.join(folder, name)))
            if not found:
                self.empty.append(name)
                continue
            names += [os.path.relpath(path, folder) for path in found]
            labels += [len(classes)] * len(found)
            classes.append(name)
        return Listing(names, labels, classes, str(self))

    def __str__(self) -> str:
        """The files and folders that are left out, as a phrase."""
        parts = []
        if self.hidden:
            parts.append(f"{_count(len(self.hidden), 'hidden name')} ({some(self.hidden)})")
        if self.others:
            listed = ", ".join(f"{ending}: {count}" for ending, count in self.others.most_common(5))
            parts.append(f"{_count(self.others.total(), 'other file')} ({listed})")
        if self.empty:
            parts.append(f"{_count(len(self.empty), 'folder')} without images ({some(self.empty)})")
        if self.links:
            parts.append(f"{_count(len(self.links), 'link')} to a parent folder ({some(self.links)})")
        return ", ".join(parts)


def _leads_up(link: str, start: str | Path) -> bool:
    """Whether a link leads to ``start``, or to a folder that contains the link or ``start``."""
    target = os.path.realpath(link)
    holders = {os.path.realpath(x) for x in (os.path.dirname(link), start, os.path.dirname(os.path.abspath(start)))}
    return any(os.path.commonpath([target, holder]) == target for holder in holders)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out: its name starts with a dot, or is one that operating systems add."""
    return name.startswith(".") or name.lower() in HIDDEN


def some(names: Sequence[str]) -> str:
    """The first names, as text."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the files and of the folders in ``folder``."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as found:
        for entry in found:  # entry.is_dir() raises on cyclic links
            (folders if os.path.isdir(entry.path) else files).append(entry.name)
    return files, folders


def list_images(folder: Path, nested: bool = False, mixed: bool = False) -> Listing:
    """The images below ``folder``.

    Sub-folders are classes (as in torchvision's ``ImageFolder``, sorted by name). A folder with images directly in it
    has no labels. If no file has one of ``EXTENSIONS``, files without an extension are images if a sample of them is.

    Args:
        nested: read images at any depth, sorted by path, without classes.
        mixed: read a folder with images beside sub-folders as if ``nested``, with a warning.

    Raises:
        UserError: if the folder does not exist, is a file, or has no images; or, unless ``nested`` or ``mixed``, if it
            has images beside class folders.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        hint = "unpack it" if folder.suffix.lower() in ARCHIVES else "give a folder of images or of class folders"
        raise UserError(f"image folder {folder} {what}", hint)
    walk = _Walk()
    listing = walk.listing(folder, nested, mixed)
    if listing.names:
        _report_case(folder, listing.classes)
        return listing
    if walk.others["no extension"]:
        bare = _Walk(bare=True).listing(folder, nested, mixed)
        if _are_images(folder, bare.names):
            return bare
    found = f": found {walk}" if str(walk) else ""
    raise UserError(f"no images in {folder} or its sub-folders{found}", _advice(walk.others))


def images_below(folder: Path) -> list[str]:
    """The paths of the images below ``folder``, at any depth, sorted.

    Raises:
        UserError: if the folder has no images.
    """
    return list_images(folder, nested=True).names


def _are_images(folder: Path, names: Sequence[str]) -> bool:
    """Whether all files of a sample are images."""
    try:
        for name in names[:: -(-len(names) // SAMPLE)]:
            read_header((folder / name).read_bytes())
    except (BadImage, OSError):
        return False
    return True


def _advice(others: Mapping[str, int]) -> str:
    """The hint for a folder that has only these files."""
    if any(ending in others for ending in ARCHIVES):
        return "unpack the archives, or give a folder of uncompressed .tar shards"
    if ".parquet" in others or ".arrow" in others:
        return "load it with datasets.load_dataset and write it with save_to_disk"
    if others:
        return f"convert them to one of {', '.join(sorted(EXTENSIONS))}"
    return f"give one with {', '.join(sorted(EXTENSIONS))}"


def images_in(folder: Path) -> tuple[list[str], str]:
    """The names of the images directly in ``folder``, sorted, and its other files, as a phrase."""
    walk = _Walk()
    return walk.files(entries(folder)[0]), str(walk)


def _with_images(folder: Path, names: Iterable[str], bare: bool = False) -> list[str]:
    """The sub-folders with at least one image."""
    return [name for name in names if any(True for _ in _Walk(bare).below(os.path.join(folder, name)))]


def pictures_in(folder: Path) -> dict[str, list[str]]:
    """The images and class folders in ``folder``, by kind, for ``refuse_mixture``."""
    files, folders = entries(folder)
    walk = _Walk()
    return {"picture": walk.files(files), "class folder": _with_images(folder, walk.folders(folder, folders))}


def refuse_mixture(folder: Path, kinds: Mapping[str, Sequence[str]], hint: str = ONE_KIND) -> None:
    """Raise ``UserError`` if ``folder`` has more than one kind of data. ``kinds``: the names of each kind."""
    if sum(map(bool, kinds.values())) > 1:
        raise UserError(f"{folder} has {_phrase(kinds)}, but only one kind can be read", hint)


def _phrase(kinds: Mapping[str, Sequence[str]]) -> str:
    """The number and the first names of each kind of data in a folder."""
    return " beside ".join(f"{_count(len(names), kind)} ({some(names)})" for kind, names in kinds.items() if names)


def refuse_several_splits(folder: Path, names: Sequence[str]) -> None:
    """Raise ``UserError`` if tar shards are named after several splits, such as train-000.tar and val-000.tar."""
    of: dict[str, str] = {}  # one shard of each split
    for name in names:
        words = {*re.split("[^a-z]+", name.lower())}
        for split, spellings in {**SPLITS, "test": TEST}.items():
            if words & {*spellings}:
                of.setdefault(split, name)
    if len(of) > 1:
        raise UserError(
            f"{folder} has tar shards of several splits: {', '.join(of.values())}",
            f"move each split to its own folder, such as {folder / 'train'}",
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _report_case(folder: Path, classes: Iterable[str]) -> None:
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        spellings[name.lower()].append(name)
    for names in spellings.values():
        if len(names) > 1:
            logger.warning(f"{folder}: {' and '.join(names)} differ only in case, and are different classes")


def split_folder(path: Path, split: str) -> Path | None:
    """The folder of a split ("train" or "val") below ``path``, in any of its usual spellings. None if there is none.

    If ``path`` has no "val", a "test" beside "train" is used.

    Raises:
        UserError: if several folders could be the split.
    """
    found = _split_names(path, SPLITS[split])
    if not found and split == "val" and _split_names(path, SPLITS["train"]):
        found = _split_names(path, TEST)
        if len(found) == 1:
            logger.info(f"{path} has no val/: using {found[0]}/")
    if len(found) > 1:
        raise UserError(
            f"{path} has {' and '.join(f'{name}/' for name in found)}, and each could be the {split} split",
            "rename or move all but one of them",
        )
    return path / found[0] if found else None


def _split_names(path: Path, spellings: Sequence[str]) -> list[str]:
    """The sub-folders whose names are among the ``spellings``, in any case."""
    return sorted(name for name in entries(path)[1] if name.lower() in spellings) if path.is_dir() else []


def choose_folder(path: Path, split: str) -> Path:
    """The folder of ``split`` below ``path``, else that of "train", else ``path``.

    Raises:
        UserError: if several folders could be the split; if ``split`` is "train", and there is only "val" or "test"; or
            if "train" could be one of several class folders.
    """
    folder = split_folder(path, split) or split_folder(path, "train")
    held_out = _split_names(path, SPLITS["val"] + TEST)
    if split == "train" and folder is None and held_out:
        raise UserError(
            f"{path} has {held_out[0]}/ but no train/: it could be a split or a class",
            f"give {path / held_out[0]} to read only that folder, or move the images for training to {path / 'train'}",
        )
    if folder is None or folder.name.lower() not in SPLITS["train"] or held_out:
        return folder or path
    others = [name for name in pictures_in(path)["class folder"] if name != folder.name]
    if others and pictures_in(folder)["picture"] and any(pictures_in(path / name)["picture"] for name in others):
        raise UserError(
            f"{path} has {folder.name}/ beside other image folders ({some(others)}): it could be a split or a class",
            f"give {folder} to read only that folder, or move all class folders to {path / 'train'}",
        )
    return folder


def data_root(path: Path) -> Path:
    """The folder with the splits: ``path``, or the only folder in it if ``path`` has nothing else."""
    root = path
    for _ in range(MAX_WRAPPERS):
        if not root.is_dir() or _split_names(root, SPLITS["train"]):
            break
        files, folders = entries(root)
        folders = [name for name in folders if not is_hidden(name)]
        if len(folders) != 1 or _Walk().files(files):
            break
        root = root / folders[0]
    if root != path and _split_names(root, SPLITS["train"]):
        logger.info(f"{path}: using {root.relative_to(path)}/ with the splits")
        return root
    return path
