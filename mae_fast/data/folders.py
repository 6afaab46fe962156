"""Finds splits, class folders and images in a folder. What is ambiguous is refused, what is left out is counted."""

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
# Folders that systems add: Synology, macOS archives, Windows, file systems. Other hidden names begin with a dot.
HIDDEN = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found"})
IGNORED = frozenset({"thumbs.db", "desktop.ini", "bad.jsonl", "pack.json"})  # neither images nor worth a word
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
TEST = ("test", "testing")  # stands in for a missing val
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
SAMPLE = 16  # files without an extension that are looked into
MAX_WRAPPERS = 3  # folders around the one with the splits


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        names: paths below the folder.
        labels: of each image, an index of ``classes``; None in a folder without class folders.
        left_out: what else the folder holds, as a phrase; empty if nothing.
    """

    names: list[str]
    labels: list[int] | None
    classes: list[str]
    left_out: str


@dataclass
class _Walk:
    """Lists images, and counts everything else.

    Attributes:
        bare: whether images are the files without an extension, instead of those with one of ``EXTENSIONS``.
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

        A link to a folder that holds the link, or ``start``, is left out: it would repeat images of other classes.
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
        seen = set()  # folders by what they are, not by name: a link may lead back up

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

    def listing(self, folder: Path, nested: bool = False) -> Listing:
        """The images in ``folder``, or in its class folders; ``nested``: those at any depth, without classes.

        Raises:
            UserError: if it holds both, unless ``nested``.
        """
        if nested:
            paths = self.below(os.fspath(folder))
            return Listing(sorted(os.path.relpath(path, folder) for path in paths), None, [], str(self))
        files, folders = entries(folder)
        pictures, folders = self.files(files), self.folders(folder, folders)
        if pictures:
            refuse_mixture(folder, {"picture": pictures, "class folder": _with_images(folder, folders, self.bare)})
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
        """What is left out, as a phrase."""
        told = []
        if self.hidden:
            told.append(f"{_count(len(self.hidden), 'hidden name')} ({some(self.hidden)})")
        if self.others:
            listed = ", ".join(f"{ending}: {count}" for ending, count in self.others.most_common(5))
            told.append(f"{_count(self.others.total(), 'other file')} ({listed})")
        if self.empty:
            told.append(f"{_count(len(self.empty), 'folder')} without images ({some(self.empty)})")
        if self.links:
            told.append(f"{_count(len(self.links), 'link')} to a parent folder ({some(self.links)})")
        return ", ".join(told)


def _leads_up(link: str, start: str | Path) -> bool:
    """Whether a link leads to a folder that holds it, or to ``start`` or a folder that holds ``start``."""
    target = os.path.realpath(link)
    holders = {os.path.realpath(x) for x in (os.path.dirname(link), start, os.path.dirname(os.path.abspath(start)))}
    return any(os.path.commonpath([target, holder]) == target for holder in holders)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out: it begins with a dot, or a system has put it there."""
    return name.startswith(".") or name.lower() in HIDDEN


def some(names: Sequence[str]) -> str:
    """The first of the names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the files and of the folders in ``folder``."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as found:
        for entry in found:  # not entry.is_dir(), which raises on links in a circle
            (folders if os.path.isdir(entry.path) else files).append(entry.name)
    return files, folders


def list_images(folder: Path, nested: bool = False) -> Listing:
    """The images below ``folder``.

    Sub-folders are classes (as in torchvision's ``ImageFolder``, sorted by name); a folder that holds images directly
    is flat and has no labels. Where no file has an extension of ``EXTENSIONS``, files without one are images if a
    sample of them is.

    Args:
        nested: images may lie at any depth, sorted by path; there are no classes.

    Raises:
        UserError: if the folder is missing, is a file, holds no image, or, unless ``nested``, holds images beside class
            folders.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        hint = "unpack it" if folder.suffix.lower() in ARCHIVES else "give a folder of images or of class folders"
        raise UserError(f"image folder {folder} {what}", hint)
    walk = _Walk()
    listing = walk.listing(folder, nested)
    if listing.names:
        _report_case(folder, listing.classes)
        return listing
    if walk.others["no extension"]:
        bare = _Walk(bare=True).listing(folder, nested)
        if _are_images(folder, bare.names):
            return bare
    found = f": found {walk}" if str(walk) else ""
    raise UserError(f"no images in {folder} or its sub-folders{found}", _advice(walk.others))


def images_below(folder: Path) -> list[str]:
    """The paths of the images below ``folder``, of any nesting, sorted.

    Raises:
        UserError: if there are none.
    """
    return list_images(folder, nested=True).names


def _are_images(folder: Path, names: Sequence[str]) -> bool:
    """Whether all of a sample of the files are images."""
    try:
        for name in names[:: -(-len(names) // SAMPLE)]:
            read_header((folder / name).read_bytes())
    except (BadImage, OSError):
        return False
    return True


def _advice(others: Mapping[str, int]) -> str:
    """What to do about a folder that holds none but these files."""
    if any(ending in others for ending in ARCHIVES):
        return "unpack the archives, or give a folder of uncompressed .tar shards"
    if ".parquet" in others or ".arrow" in others:
        return "load it with datasets.load_dataset and write it with save_to_disk"
    if others:
        return f"convert them to one of {', '.join(sorted(EXTENSIONS))}"
    return f"give one with {', '.join(sorted(EXTENSIONS))}"


def images_in(folder: Path) -> tuple[list[str], str]:
    """The names of the images in ``folder`` itself, sorted, and what other files it holds, as a phrase."""
    walk = _Walk()
    return walk.files(entries(folder)[0]), str(walk)


def _with_images(folder: Path, names: Iterable[str], bare: bool = False) -> list[str]:
    """The sub-folders that hold an image."""
    return [name for name in names if any(True for _ in _Walk(bare).below(os.path.join(folder, name)))]


def pictures_in(folder: Path) -> dict[str, list[str]]:
    """The images and class folders in ``folder``, by kind, for ``refuse_mixture``."""
    files, folders = entries(folder)
    walk = _Walk()
    return {"picture": walk.files(files), "class folder": _with_images(folder, walk.folders(folder, folders))}


def refuse_mixture(folder: Path, kinds: Mapping[str, Sequence[str]]) -> None:
    """Raise ``UserError`` if ``folder`` holds more than one kind of data. ``kinds``: the names of each."""
    found = [f"{_count(len(names), kind)} ({some(names)})" for kind, names in kinds.items() if names]
    if len(found) > 1:
        raise UserError(
            f"{folder} holds {' beside '.join(found)}: only one kind can be read",
            "move the others out of it, or give a folder that holds one kind alone",
        )


def refuse_several_splits(folder: Path, names: Sequence[str]) -> None:
    """Raise ``UserError`` if tar shards are named after several splits, such as train-000.tar and val-000.tar."""
    of: dict[str, str] = {}  # a name for each split
    for name in names:
        words = {*re.split("[^a-z]+", name.lower())}
        for split, spellings in {**SPLITS, "test": TEST}.items():
            if words & {*spellings}:
                of.setdefault(split, name)
    if len(of) > 1:
        raise UserError(
            f"{folder} holds tar shards of several splits: {', '.join(of.values())}",
            f"put them into folders of their own, such as {folder / 'train'}",
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _report_case(folder: Path, classes: Iterable[str]) -> None:
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        spellings[name.lower()].append(name)
    for names in spellings.values():
        if len(names) > 1:
            logger.warning(f"{folder}: {' and '.join(names)} are different classes, although they differ only in case")


def split_folder(path: Path, split: str) -> Path | None:
    """The folder of a split ("train" or "val") below ``path``, in any of its usual spellings; None if there is none.

    Where ``path`` has no "val", a "test" beside "train" takes its place.

    Raises:
        UserError: if several folders may be meant.
    """
    found = _split_names(path, SPLITS[split])
    if not found and split == "val" and _split_names(path, SPLITS["train"]):
        found = _split_names(path, TEST)
        if len(found) == 1:
            logger.info(f"{path} has no val/: {found[0]}/ is used")
    if len(found) > 1:
        raise UserError(
            f"{path} holds {' and '.join(f'{name}/' for name in found)}, each of which may be the {split} split",
            "rename or move all but one of them",
        )
    return path / found[0] if found else None


def _split_names(path: Path, spellings: Sequence[str]) -> list[str]:
    """The sub-folders whose names are among the ``spellings``, in upper or lower case."""
    return sorted(name for name in entries(path)[1] if name.lower() in spellings) if path.is_dir() else []


def choose_folder(path: Path, split: str) -> Path:
    """The folder of ``split`` below ``path``, else that of "train", else ``path``.

    Raises:
        UserError: if several folders may be meant, if "train" is asked for and there is only "val" or "test", or if
            "train" may as well be one of several class folders.
    """
    folder = split_folder(path, split) or split_folder(path, "train")
    held_out = _split_names(path, SPLITS["val"] + TEST)
    if split == "train" and folder is None and held_out:
        raise UserError(
            f"{path} holds {held_out[0]}/ but no train/: a split or a class?",
            f"give {path / held_out[0]} to read that one alone; or put the images for training into {path / 'train'}",
        )
    if folder is None or folder.name.lower() not in SPLITS["train"] or held_out:
        return folder or path
    others = [name for name in pictures_in(path)["class folder"] if name != folder.name]
    if others and pictures_in(folder)["picture"] and any(pictures_in(path / name)["picture"] for name in others):
        raise UserError(
            f"{path} holds {folder.name}/ beside other folders of pictures ({some(others)}): a split or a class?",
            f"give {folder} to read that one alone; or move all class folders into {path / 'train'}",
        )
    return folder


def data_root(path: Path) -> Path:
    """``path``, or the folder in it with the splits, if ``path`` holds that one folder and nothing else."""
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
        logger.info(f"{path} holds {root.relative_to(path)}/ with the splits, which is used")
        return root
    return path
