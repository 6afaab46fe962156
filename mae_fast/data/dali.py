"""JPEG windows by NVIDIA DALI, which decodes only the window. Pillow decodes all other formats.

CPU: DALI's window, then torch's uint8 bicubic (DALI's own on a CPU takes four times as long). GPU: hardware and
CUDA decoding, resize and flip in one DALI pipeline, whose output torch takes over without a copy.
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
    """DALI's pipeline, from encoded images to the windows that hold their crops, or to the crops.

    Inputs, one per image: ``encoded`` uint8 [bytes]; ``start`` and ``shape`` int32 [2], the window; with ``crops``, for
    each of them ``start0``, ``shape0`` in the window and ``flip0`` ... Outputs: windows, uint8 [h, w, C]; or
    ``repeats`` times crops, uint8 [H, W, C] each.

    Args:
        decode_on: "mixed" (CPU and GPU) or "cpu"; what follows runs where the decoded window is.
    """
    import nvidia.dali

    dali: Any = nvidia.dali  # mypy sees other types in it than DALI takes and returns
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
            jpeg_fancy_upsampling=True,  # as Pillow and every CPU decoder
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
    """In a forked child: leave the parent's pipelines alone for good, as their destructor would never return."""
    for decoder in list(_decoders):
        for pipeline in decoder.idle:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline))
        decoder.idle = []


@cache
def _abandon_pipelines_in_forks() -> None:
    os.register_at_fork(after_in_child=_abandon_pipelines)


def bounding_box(windows: list[tuple[Box, bool]]) -> Box:
    """The smallest window that holds all of them."""
    top, left = min(box[0] for box, _ in windows), min(box[1] for box, _ in windows)
    bottom = max(box[0] + box[2] for box, _ in windows)
    return top, left, bottom - top, max(box[1] + box[3] for box, _ in windows) - left


class DaliDecoder:
    """Decodes with DALI the files that it decodes as Pillow does: whole JPEG files with the wanted channels.

    A pipeline that has met a bad image is dead: Pillow then says of the whole batch what is good, and the next batch
    gets a new pipeline.

    Any number of threads may call it: each call takes an idle pipeline, or builds one. Pipelines are not kept in
    ``threading.local``: a forked child destroys the thread-local objects of its parent's threads, and the destructor
    of a pipeline waits for DALI's own threads, which the child does not have.
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
                f"DALI cannot be used ({error})", "pip install 'mae_fast[dali]', or --image-decoder pil"
            ) from error
        self.pixels, self.size, self.max_batch, self.repeats = pixels, size, max_batch, repeats
        self.device_id = device_id  # of the GPU; None: a CPU
        self.crops = device_id is not None  # whether DALI resizes, too
        self.idle: list[Any] = []  # pipelines that no thread uses now
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
            warnings.warn(f"DALI failed at a batch that Pillow decodes: {error}", stacklevel=2)
        return found

    def _takes(self, image: Encoded) -> bool:
        header = image.header
        assert header is not None
        modes = {1: ("L",), 3: ("L", "RGB")}.get(self.pixels.channels, ())
        return header.format == "JPEG" and header.whole and not header.turned and header.mode in modes

    def _run(self, images: Sequence[Encoded], out: Sequence[Tensor]) -> str | None:
        """Decode all of them, or say why that failed."""
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
        """Write what a pipeline has made of ``images`` to ``out``. The pipeline's next batch goes over it."""
        if self.crops:
            for r in range(self.repeats):
                for crops, crop in zip(out, from_dlpack(found[r].as_tensor()), strict=True):
                    crops[r] = crop
            if self.device_id is not None:  # DALI writes its next batch over this one
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
        """All of them, [H, W] or [H, W, C]."""
        assert image.header is not None
        if image.header.format == "NPY":  # a cache's, most likely: then they lie there as they are wanted
            pixels = npy_pixels(image.data)
            if pixels.dtype == np.uint8 and (pixels.shape[2] if pixels.ndim == 3 else 1) == self.pixels.channels:
                return pixels
        found = decode(image.data, self.pixels)
        return found.permute(1, 2, 0).numpy() if isinstance(found, Tensor) else np.asarray(found)


def resize(pixels: Tensor, top: int, left: int, image: Encoded, out: Tensor) -> None:
    """The windows of ``image`` from ``pixels`` [H, W, C], which begin at (top, left) of the image, into ``out``."""
    for crop, ((y, x, h, w), flip) in zip(out, image.windows, strict=True):
        window = pixels[y - top : y - top + h, x - left : x - left + w].permute(2, 0, 1)[None]
        made = crop if crop.device == window.device else torch.empty(crop.shape, dtype=torch.uint8)
        # What F.interpolate(mode="bicubic", antialias=True) calls. It has no ``out``, and returns channels first, which
        # takes half as long again to undo.
        torch.ops.aten._upsample_bicubic2d_aa.out(
            window, crop.shape[:2], False, None, None, out=made.permute(2, 0, 1)[None]
        )
        if flip:
            crop.copy_(made.flip(1))
        elif made is not crop:
            crop.copy_(made)
