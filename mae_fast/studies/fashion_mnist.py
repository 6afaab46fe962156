"""Fashion-MNIST (Xiao et al., 2017): 70,000 grey pictures of clothes, 28 x 28 pixels, in ten classes. MIT licence.

The four IDX files come from a folder, from Debian's package, or from torchvision's download.
"""

import gzip
import hashlib
import io
import logging
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError, first_line
from .demo_data import Pixels, build_once

logger = logging.getLogger(__name__)

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot",
)  # fmt: skip
PACKAGE = "dataset-fashion-mnist"  # of Debian and its relatives
SPLITS = {"train": "train", "val": "t10k"}  # our name, and the name in the file names
# SHA-256 of the pixels and labels, without the files' headers.
CONTENT = {
    "train-images-idx3-ubyte": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "train-labels-idx1-ubyte": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "t10k-images-idx3-ubyte": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "t10k-labels-idx1-ubyte": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
Counts = dict[str, dict[str, int]]


class DownloadError(UserError):
    """The files cannot be downloaded."""


def build_fashion_mnist(root: Path, source: Path | None = None) -> Counts:
    """Make ``root/{train,val}/<class>/<number>.png``, completely or not at all, unless the dataset exists.

    Args:
        source: folder with the four IDX files, with or without gzip. None: download them.

    Returns:
        The number of images of each class in each split.

    Raises:
        DownloadError: if the files cannot be downloaded.
        UserError: if one of the files is missing in ``source``, or ``root`` contains something else.
    """

    def fill(folder: Path, scratch: Path) -> Counts:
        files = _find(source) if source else fetch(scratch)
        for split, theirs in SPLITS.items():
            images = _read(files, f"{theirs}-images-idx3-ubyte").reshape(-1, 28, 28)
            _write(folder / split, images, _read(files, f"{theirs}-labels-idx1-ubyte"))
        return _found(folder)

    counts: Counts = build_once(root, "fashion-mnist", {"content": CONTENT}, fill, _found)
    return counts


def fetch(folder: Path) -> dict[str, Path]:
    """Download the IDX files into ``folder``: from Debian's package if apt has it, else with torchvision.

    Raises:
        DownloadError: if neither works.
    """
    reasons = []
    ways: dict[str, Callable[[Path], Path]] = {"apt": _from_debian, "torchvision": _from_torchvision}
    for name, download in ways.items():
        try:
            files = _find(download(folder))
            for each in files:
                _read(files, each)
            return files
        except Exception as error:  # downloads fail in many ways
            reasons.append(f"{name}: {first_line(error)}")
    raise DownloadError(
        f"Fashion-MNIST cannot be downloaded ({'; '.join(reasons)})",
        "give a folder with the four IDX files: mae-fast data fashion-mnist DIRECTORY --source FOLDER",
    )


def _from_debian(folder: Path) -> Path:
    """Download and unpack the Debian package, without root permissions."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise UserError("apt-get or dpkg-deb is not installed")
    _run(["apt-get", "download", PACKAGE], folder)
    (package,) = folder.glob(f"{PACKAGE}_*.deb")
    _run(["dpkg-deb", "-x", package.name, "unpacked"], folder)
    return folder / "unpacked/usr/share/datasets/fashion-mnist"


def _run(words: list[str], folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise UserError(f"{words[0]} failed: {lines[-1] if lines else f'status {done.returncode}'}")


def _from_torchvision(folder: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(folder, download=True)
    return folder / "FashionMNIST/raw"


def _find(folder: Path) -> dict[str, Path]:
    """The four files in ``folder``, by their names without .gz."""
    found = {name: path for name in CONTENT for path in (folder / f"{name}.gz", folder / name) if path.is_file()}
    if missing := [name for name in CONTENT if name not in found]:
        raise UserError(f"{folder} does not contain {', '.join(missing)}", "give a folder with the four IDX files")
    return found


def _read(files: dict[str, Path], name: str) -> Pixels:
    """The bytes of an IDX file after its header. Their checksum must be that of the published file."""
    data, header = files[name].read_bytes(), 16 if "images" in name else 8
    try:
        content = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)[header:]
    except (OSError, EOFError) as error:
        raise UserError(f"{files[name]} is damaged ({error})", "download it again") from error
    if hashlib.sha256(content).hexdigest() != CONTENT[name]:
        raise UserError(f"{files[name]} differs from the published file (SHA-256)", "download it again")
    return np.frombuffer(content, np.uint8)


def _write(folder: Path, images: Pixels, labels: Pixels) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        png = io.BytesIO()  # one write per file
        Image.fromarray(image).save(png, "PNG")
        (folder / CLASSES[label] / f"{i:05}.png").write_bytes(png.getvalue())


def _found(root: Path) -> Counts:
    counts: Counts = {}
    for split in SPLITS:
        counted = Counter(path.parent.name for path in (root / split).glob("*/*.png"))
        counts[split] = {name: counted[name] for name in CLASSES}
    return counts
