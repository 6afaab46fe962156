"""A small set's pixels in memory, decoded once."""

import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import UserError
from .decode import BadImage, decode
from .sources import Source

PER_TASK = 64  # images


def free_memory() -> int:
    """Bytes that can be had without swapping, as Linux estimates them."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1]) * 1024


class Cached(Source):
    """The images of ``source``, decoded and kept as .npy, whose header is all there is left to read.

    Raises:
        UserError: if they do not fit into 80 % of the memory that is free.
    """

    def __init__(self, source: Source, channels: int = 3, exif: bool = False, threads: int = 1) -> None:
        super().__init__(source.root, source.names, source.labels, source.classes)
        self.images: list[bytes | BadImage] = []

        def one(index: int) -> bytes | BadImage:
            try:
                image = decode(source.read(index), channels, exif)
            except BadImage as bad:
                return bad.bare()
            file = io.BytesIO()
            np.save(file, image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image))
            return file.getvalue()

        room = 0.8 * free_memory()
        taken = 0
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for start in range(0, len(source), PER_TASK):
                indices = range(start, min(start + PER_TASK, len(source)))
                self.images += pool.map(one, indices)
                taken += sum(len(image) for image in self.images[start:] if isinstance(image, bytes))
                if taken > room:
                    raise UserError(
                        f"the pixels of {source.root} do not fit into {room / 1e9:.1f} GB, 80 % of the free memory: "
                        f"{indices.stop} of {len(source)} images take {taken / 1e9:.1f} GB; "
                        "leave out --cache, or make smaller copies by mae-fast data pack"
                    )

    def read(self, index: int) -> bytes:
        image = self.images[index]
        if isinstance(image, BadImage):
            raise image.bare()
        return image
