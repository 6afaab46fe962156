"""Where images come from: a tree with one folder per class, or a flat folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Source:
    """Image files in a fixed order; ``labels`` index ``classes`` and are None for a flat folder."""

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


def _images_below(folder: str) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [os.path.join(parent, f) for f in sorted(files) if os.path.splitext(f)[1].lower() in EXTENSIONS]
    return found


def image_folder(root: Path, split: str | None = None) -> Source:
    """The images below ``root``, or below ``root/split`` where that folder exists.

    Sub-folders are classes (as in torchvision's ``ImageFolder``, sorted by name); a folder that holds images directly
    is flat and has no labels.

    Raises:
        UserError: if the folder is missing, is no folder, or holds no image.
    """
    folder = root / split if split and (root / split).is_dir() else root
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"image folder {folder} {what}; give a folder of images or of class folders")
    with os.scandir(folder) as entries:
        listed = sorted((e.name, e.is_dir()) for e in entries)
    flat = [os.path.join(folder, n) for n, d in listed if not d and os.path.splitext(n)[1].lower() in EXTENSIONS]
    if flat:
        return Source(folder, tuple(flat), None, ())
    paths: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    for name in (n for n, d in listed if d):
        found = _images_below(os.path.join(folder, name))
        if found:
            paths += found
            labels += [len(classes)] * len(found)
            classes.append(name)
    if not paths:
        raise UserError(f"no images in {folder} or its sub-folders; looked for {', '.join(sorted(EXTENSIONS))}")
    return Source(folder, tuple(paths), tuple(labels), tuple(classes))
