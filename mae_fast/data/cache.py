"""Keeps the pixels of a small dataset in memory, decoded once."""

import io
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UserError
from ..memory import free_memory
from .decode import BadImage, decode
from .pixel_format import RGB, PixelFormat
from .sources import Source

PER_TASK = 64  # images


class Cached(Source):
    """The images of ``source``, decoded once and kept in memory in the .npy format.

    Worker processes map the same anonymous memory file, so there is only one copy of the pixels.

    Raises:
        UserError: if the images do not fit into 80 % of the free memory.
    """

    def __init__(self, source: Source, pixels: PixelFormat = RGB, threads: int = 1) -> None:
        super().__init__(source.root, source.names, source.labels, source.classes)
        self.bad: dict[int, BadImage] = {}
        self.ends = [0]  # offsets in the file: the start of the first image, and the end of each image

        def one(index: int) -> bytes | BadImage:
            try:
                image = decode(source.read(index), pixels)
            except BadImage as bad:
                return bad.bare()
            file = io.BytesIO()
            np.save(file, image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image))
            return file.getvalue()

        room = 0.8 * free_memory()
        file = os.fdopen(os.memfd_create("mae_fast.cache"), "wb")
        with file, ThreadPoolExecutor(max(1, threads)) as pool:
            for start in range(0, len(source), PER_TASK):
                indices = range(start, min(start + PER_TASK, len(source)))
                for i, image in zip(indices, pool.map(one, indices), strict=True):
                    if isinstance(image, BadImage):
                        self.bad[i] = image
                    else:
                        file.write(image)
                    self.ends.append(file.tell())
                if file.tell() > room:
                    raise UserError(
                        f"the pixels of {source.root} do not fit into {room / 1e9:.1f} GB, 80 % of the free memory: "
                        f"{indices.stop} of {len(source)} images take {file.tell() / 1e9:.1f} GB",
                        "leave out --cache, or make smaller copies with 'mae-fast data pack'",
                    )
            file.flush()
            self._map(os.dup(file.fileno()))

    def _map(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.pixels = mmap.mmap(descriptor, self.ends[-1], prot=mmap.PROT_READ) if self.ends[-1] else b""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pixels": None, "descriptor": DupFd(self.descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map(state["descriptor"].detach())

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, index: int) -> bytes:
        if index in self.bad:
            raise self.bad[index].bare()
        return self.pixels[self.ends[index] : self.ends[index + 1]]
