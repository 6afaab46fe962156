"""Random IDX files that are accepted as Fashion-MNIST."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from mae_fast.studies import fashion_mnist

Content = dict[str, tuple[np.ndarray, np.ndarray]]


def make_idx_files(folder: Path, patch: pytest.MonkeyPatch, counts: tuple[int, int] = (20, 10)) -> Content:
    """Write random images of ten classes, and patch the expected checksums.

    Returns:
        Images uint8 [count, 28, 28] and labels uint8 [count] of "train" and "t10k". "train" is compressed.
    """
    rng, content = np.random.default_rng(0), {}
    folder.mkdir()
    for theirs, count in zip(("train", "t10k"), counts, strict=True):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        content[theirs] = images, labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            name = f"{theirs}-{kind}-ubyte"
            patch.setitem(fashion_mnist.CONTENT, name, hashlib.sha256(array.tobytes()).hexdigest())
            if theirs == "train":
                (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
            else:
                (folder / name).write_bytes(header + array.tobytes())
    return content
