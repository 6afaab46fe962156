"""Find the images of a source that cannot be used, once; training skips those listed in ``bad.jsonl``."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..errors import UserError
from ..files import atomic_write
from .datasets import MapDataset
from .decode import BANDS, DICOM, BadImage, Header, check_bands, decode, read_header
from .loader import by_ranges
from .pixel_format import RGB, PixelFormat
from .raw import BYTES_ONLY
from .segmentation import SegmentationDataset
from .sources import Source

PER_TASK = 256  # images

Found = list[tuple[int, BadImage]]


def bad_file(source: Source) -> Path:
    """The path of the list of a source's bad images, which training reads: in its folder, or beside its tar."""
    root = source.root
    return root.with_name(f"{root.name}.bad.jsonl") if root.is_file() else root / "bad.jsonl"


class _Looks(Dataset[Found]):
    """The bad ones of a range of images. Pixels are read where the header does not show whether they can be used.

    Of images with masks, every pixel is read.
    """

    def __init__(self, source: Source, pixels: PixelFormat, every_pixel: bool) -> None:
        self.source, self.pixels, self.every_pixel = source, pixels, every_pixel

    def __getitems__(self, indices: range) -> Found:
        found = []
        for i in indices:
            try:
                if isinstance(self.source, SegmentationDataset):
                    self.source.pair(i, self.pixels)
                    continue
                data = self.source.read(i)
                header = read_header(data)
                check_bands(header, self.pixels)
                if self.every_pixel or not header.whole or not _fits(header, self.pixels):
                    decode(data, self.pixels)
            except BadImage as bad:
                found.append((i, bad.bare()))
        return found


def _fits(header: Header, pixels: PixelFormat) -> bool:
    """Whether the header shows that values have the dtype of ``pixels``, or become it."""
    if header.format == "NPY":  # whose decoding costs nothing
        return False
    if pixels.is_plain and header.format not in (BANDS, DICOM):
        return header.mode[0] not in "IF"
    of_pillow = "uint8" if header.format in BYTES_ONLY else "uint16" if header.mode.startswith("I;16") else header.mode
    if pixels.dtype == "float32":  # whose values could be infinite only if they are floats
        return not header.mode.startswith(("F", "float"))
    return pixels.dtype == of_pillow or (pixels.dtype == "float16" and of_pillow == "uint8")


def check(
    source: Source, output: Path | None = None, pixels: PixelFormat = RGB, every_pixel: bool = False, workers: int = 0
) -> dict[int, BadImage]:
    """Look at every image of ``source``, in ``workers`` processes, and write the bad ones to ``output``.

    An interrupted check resumes. The file is JSON lines: a header, then each bad image.

    Args:
        output: ``bad_file`` of the source if None.
        every_pixel: decode all images, not only those whose headers do not show whether they can be used.

    Raises:
        UserError: if the file cannot be written.
    """
    path = output or bad_file(source)
    part = path.with_name(path.name + ".part")  # becomes ``path`` when all is done
    about = {
        "fingerprint": source.fingerprint,
        "images": len(source),
        **_wanted(pixels),
        "every_pixel": every_pixel,
    }
    if path.exists() and "fingerprint" not in next(iter(_lines(path)), {}):
        raise UserError(f"{path} is no list of bad images", "move it, or give another place by --output")
    done, lines = _unfinished(part, about)
    bad = _images(lines)
    looks = by_ranges(_Looks(source, pixels, every_pixel), range(done, len(source)), PER_TASK, workers)
    try:
        with atomic_write(part) as begun:
            begun.write_text("".join(json.dumps(line) + "\n" for line in (about, *lines)))
        with part.open("a") as file:
            for indices, found in looks:
                for i, image in found:
                    line = {"index": i, "name": source.names[i], "reason": image.reason, "detail": image.detail}
                    file.write(json.dumps(line) + "\n")
                bad.update(found)
                file.write(json.dumps({"checked": indices.stop}) + "\n")
                file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror})",
            "give another place by --output, and that to training by --bad-list",
        ) from error
    return bad


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file up to the first that is none: a kill may cut the last one short."""
    lines: list[dict[str, Any]] = []
    try:
        content = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "give another list") from error
    for text in content.splitlines():
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError):
            break
    return lines


def _unfinished(part: Path, about: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """How many images an interrupted check had looked at, and its lines about them."""
    lines = _lines(part) if part.exists() else []
    ends = [i for i, line in enumerate(lines) if "checked" in line]
    if lines[:1] != [about] or not ends:
        return 0, []
    return lines[ends[-1]]["checked"], lines[1 : ends[-1] + 1]


def _images(lines: list[dict[str, Any]]) -> dict[int, BadImage]:
    return {line["index"]: BadImage(line["reason"], line["detail"]) for line in lines if "reason" in line}


def _wanted(pixels: PixelFormat) -> dict[str, Any]:
    """What decides which images can be used, JSON; of 8-bit pictures the channels alone."""
    plain = pixels.dtype == "uint8" and not pixels.bands
    return {"channels": pixels.channels, **({} if plain else {"pixels": pixels.dtype, "bands": list(pixels.bands)})}


def known_bad(source: Source, pixels: PixelFormat = RGB, path: Path | None = None) -> dict[int, BadImage]:
    """The bad images that the last check of ``source`` listed in ``path`` or ``bad_file``; none without a check.

    Raises:
        UserError: if the images are others than those that were checked, or were checked for others than
            ``pixels``.
    """
    if path is None:
        path = bad_file(source)
        if not path.exists():
            return {}
    lines = _lines(path)
    if not lines or (lines[0].get("fingerprint") != source.fingerprint and not source.chosen):
        raise UserError(
            f"{path} tells of other images than are there now",
            f"run mae-fast data check {source.root} again, or remove the file",
        )
    checked = {name: lines[0][name] for name in ("channels", "pixels", "bands") if name in lines[0]}
    if checked != (wanted := _wanted(pixels)):
        flags = f"--in-chans {pixels.channels}" + f" --bands {','.join(map(str, pixels.bands))}" * bool(pixels.bands)
        raise UserError(
            f"{path} tells what cannot be read as {checked}, {wanted} is wanted",
            f"run mae-fast data check {source.root} {flags}, or remove the file",
        )
    if source.chosen:
        places = {name: i for i, name in enumerate(source.names)}
        lines = [{**line, "index": places[line["name"]]} for line in lines if line.get("name") in places]
    return _images(lines)


def bands_hint(source: Source, places: Iterable[int], pixels: PixelFormat, weights: bool = False) -> str | None:
    """The flags to give if each of the images at ``places`` has other bands than ``pixels``; None if one does not.

    Args:
        weights: whether ``pixels`` are those of weights.
    """
    found = []
    for i in places:
        try:
            header = read_header(source.read(i))
        except BadImage:
            return None
        try:
            check_bands(header, pixels)
        except BadImage:
            found.append(header)
        else:
            return None
    if not found or any(header.pages > 1 for header in found):  # the message about pages says what to do
        return None
    if isinstance(source, MapDataset) and all(header.bands > header.width for header in found):
        return "give tensors as [C, H, W] and arrays as [H, W, C]"
    fewest = min(header.bands for header in found)
    some = ",".join(str(band) for band in range(1, min(3, fewest) + 1))
    by_bands = f"--bands {some}{',...' if fewest > 3 else ''} selects bands"
    if pixels.bands or any(header.bands != fewest for header in found):
        return by_bands
    if weights:
        have = f"images have {fewest} band{'s' * (fewest != 1)}, the weights {pixels.channels}"
        return f"{have}: --in-chans {fewest} adapts the weights, {by_bands}"
    return f"--in-chans {fewest} takes all bands, {by_bands}"


def summary(source: Source, bad: dict[int, BadImage], seconds: float) -> str:
    """The result of a check, as lines, with an example of each reason."""
    counts = Counter(image.reason for image in bad.values())
    examples = {image.reason: f"{source.names[i]!r}: {image.detail}" for i, image in reversed(bad.items())}
    rate = len(source) / max(seconds, 1e-9)
    lines = [f"{len(source)} images, {rate:.0f} a second: {len(source) - len(bad)} ok, {len(bad)} bad"]
    lines += [f"  {reason}: {count}, such as {examples[reason]}" for reason, count in sorted(counts.items())]
    return "\n".join(lines)
