"""Decodes windows of JPEG files with NVIDIA DALI, which decodes only the window. Pillow decodes all other formats.

On a CPU, DALI decodes the window and torch resizes it (uint8 bicubic, four times as fast as DALI's). On a GPU, one DALI
pipeline decodes, resizes and flips, and torch uses its output without a copy.
"""

import ctypes
import os
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..errors import UserError
from .decode import BadImage, Encoded, decode, npy_pixels
from .pixel_format import PixelFormat
from .rng import Box


def graph(
    size: tuple[int, int],
    channels: int,
    repeats: int,
    max_batch: int,
    decode_on: str,
    device_id: int | None,
    crops: bool,
) -> Any:
    """Build DALI's pipeline, from encoded images to windows or to the crops in them.

    Inputs for each image are ``encoded``, uint8 [bytes], and the window, ``start`` and ``shape``, int32 [2]. With
    ``crops``, there are also ``start0`` and ``shape0`` in the window and ``flip0`` for the first crop, and so on.
    Outputs are windows, uint8 [h, w, C], or ``repeats`` crops, uint8 [H, W, C].

    Args:
        decode_on: "mixed" (CPU and GPU) or "cpu". Later operators run on the device of the decoded window.
    """
    import nvidia.dali

    dali: Any = nvidia.dali  # DALI's type annotations are wrong
    fn, types = dali.fn, dali.types

    def pair(name: str) -> Any:
        return fn.external_source(name=name, dtype=types.INT32, ndim=1)

    pipeline = dali.Pipeline(max_batch, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        window = fn.decoders.image_slice(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            device=decode_on,
            start=pair("start"),
            shape=pair("shape"),
            axis_names="HW",
            output_type=types.GRAY if channels == 1 else types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as Pillow and all CPU decoders
            **({"hw_decoder_load": 0.65} if decode_on == "mixed" else {}),
        )
        outputs = [window]
        if crops:
            outputs = []
            for r in range(repeats):
                crop = fn.slice(window, start=pair(f"start{r}"), shape=pair(f"shape{r}"), axis_names="HW")
                crop = fn.resize(crop, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
                flip = fn.external_source(name=f"flip{r}", dtype=types.INT32, ndim=0)
                outputs.append(fn.flip(crop, horizontal=flip))
        pipeline.set_outputs(*outputs)
    return pipeline


_decoders: "weakref.WeakSet[DaliDecoder]" = weakref.WeakSet()


def _abandon_pipelines() -> None:
    """In a forked child, keep the parent's pipelines alive, because their destructors would not return."""
    for decoder in list(_decoders):
        for pipeline in decoder.idle:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline))
        decoder.idle = []


@cache
def _abandon_pipelines_in_forks() -> None:
    os.register_at_fork(after_in_child=_abandon_pipelines)


def bounding_box(windows: list[tuple[Box, bool]]) -> Box:
    """The smallest window that contains all windows."""
    top, left = min(box[0] for box, _ in windows), min(box[1] for box, _ in windows)
    bottom = max(box[0] + box[2] for box, _ in windows)
    return top, left, bottom - top, max(box[1] + box[3] for box, _ in windows) - left


class DaliDecoder:
    """Decodes the files that DALI decodes like Pillow: complete JPEG files with the required channels.

    A pipeline is unusable after a bad image. Pillow then decodes the whole batch to find the good images, and the next
    batch gets a new pipeline.

    It is thread-safe: each call takes an idle pipeline, or builds one. Pipelines are not kept in ``threading.local``,
    because a forked child destroys the thread-local objects of its parent's threads. The destructor of a pipeline would
    then wait for DALI's threads, which the child does not have.
    """

    def __init__(
        self,
        pixels: PixelFormat,
        size: tuple[int, int],
        max_batch: int,
        repeats: int = 1,
        device_id: int | None = None,
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"DALI cannot be used ({error})", "pip install 'mae_fast[dali]', or use --image-decoder pil"
            ) from error
        self.pixels, self.size, self.max_batch, self.repeats = pixels, size, max_batch, repeats
        self.device_id = device_id  # index of the GPU; None: decode on the CPU
        self.crops = device_id is not None  # whether DALI also resizes
        self.idle: list[Any] = []  # pipelines that no thread is using
        _decoders.add(self)
        _abandon_pipelines_in_forks()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "idle": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _decoders.add(self)
        _abandon_pipelines_in_forks()

    def __call__(self, images: Sequence[Encoded], out: Sequence[Tensor]) -> list[BadImage | None]:
        by_dali = [i for i, image in enumerate(images) if self._takes(image)]
        error = self._run([images[i] for i in by_dali], [out[i] for i in by_dali]) if by_dali else None
        done = set() if error else set(by_dali)
        found = [None if i in done else self._by_pillow(*pair) for i, pair in enumerate(zip(images, out, strict=True))]
        if error and not any(found[i] for i in by_dali):
            warnings.warn(f"DALI failed on a batch that Pillow can decode: {error}", stacklevel=2)
        return found

    def _takes(self, image: Encoded) -> bool:
        header = image.header
        assert header is not None
        modes = {1: ("L",), 3: ("L", "RGB")}.get(self.pixels.channels, ())
        return header.format == "JPEG" and header.whole and not header.turned and header.mode in modes

    def _run(self, images: Sequence[Encoded], out: Sequence[Tensor]) -> str | None:
        """Decode all images. Return the error message if that fails."""
        try:
            pipeline = self.idle.pop()
        except IndexError:
            decode_on = "cpu" if self.device_id is None else "mixed"
            pipeline = graph(
                self.size, self.pixels.channels, self.repeats, self.max_batch, decode_on, self.device_id, self.crops
            )
        windows = [bounding_box(image.windows) for image in images]
        pipeline.feed_input("encoded", [np.frombuffer(image.data, np.uint8) for image in images])
        pipeline.feed_input("start", np.array([box[:2] for box in windows], np.int32))
        pipeline.feed_input("shape", np.array([box[2:] for box in windows], np.int32))
        if self.crops:
            for r in range(self.repeats):
                boxes = [image.windows[r][0] for image in images]
                starts = [(b[0] - w[0], b[1] - w[1]) for b, w in zip(boxes, windows, strict=True)]
                pipeline.feed_input(f"start{r}", np.array(starts, np.int32))
                pipeline.feed_input(f"shape{r}", np.array([box[2:] for box in boxes], np.int32))
                pipeline.feed_input(f"flip{r}", np.array([image.windows[r][1] for image in images], np.int32))
        try:
            found = pipeline.run()
        except RuntimeError as error:
            return str(error)
        self._take(found, images, windows, out)
        self.idle.append(pipeline)
        return None

    def _take(self, found: Any, images: Sequence[Encoded], windows: Sequence[Box], out: Sequence[Tensor]) -> None:
        """Copy the output of a pipeline to ``out``. The pipeline's next batch will overwrite it."""
        if self.crops:
            for r in range(self.repeats):
                for crops, crop in zip(out, from_dlpack(found[r].as_tensor()), strict=True):
                    crops[r] = crop
            if self.device_id is not None:  # DALI will overwrite this batch with the next one
                torch.cuda.current_stream(self.device_id).synchronize()
            return
        for image, (top, left, _, _), pixels, crops in zip(images, windows, found[0], out, strict=True):
            resize(from_dlpack(pixels), top, left, image, crops)

    def _by_pillow(self, image: Encoded, crops: Tensor) -> BadImage | None:
        try:
            pixels = self._pixels(image)
        except BadImage as bad:
            return bad.bare()
        top, left, height, width = bounding_box(image.windows)
        window = np.array(pixels[top : top + height, left : left + width])
        resize(torch.from_numpy(window if window.ndim == 3 else window[:, :, None]), top, left, image, crops)
        return None

    def _pixels(self, image: Encoded) -> np.ndarray:
        """All pixels of an image, [H, W] or [H, W, C]."""
        assert image.header is not None
        if image.header.format == "NPY":  # as from a cache: no conversion is needed
            pixels = npy_pixels(image.data)
            if pixels.dtype == np.uint8 and (pixels.shape[2] if pixels.ndim == 3 else 1) == self.pixels.channels:
                return pixels
        found = decode(image.data, self.pixels)
        return found.permute(1, 2, 0).numpy() if isinstance(found, Tensor) else np.asarray(found)


def resize(pixels: Tensor, top: int, left: int, image: Encoded, out: Tensor) -> None:
    """Write resized windows of ``image`` to ``out``. ``pixels`` [H, W, C] begin at (top, left) of the image."""
    for crop, ((y, x, h, w), flip) in zip(out, image.windows, strict=True):
        window = pixels[y - top : y - top + h, x - left : x - left + w].permute(2, 0, 1)[None]
        made = crop if crop.device == window.device else torch.empty(crop.shape, dtype=torch.uint8)
        # F.interpolate(mode="bicubic", antialias=True) calls this op, but has no ``out`` and returns channels first.
        # Converting that takes 50 % more time.
        torch.ops.aten._upsample_bicubic2d_aa.out(
            window, crop.shape[:2], False, None, None, out=made.permute(2, 0, 1)[None]
        )
        if flip:
            crop.copy_(made.flip(1))
        elif made is not crop:
            crop.copy_(made)
