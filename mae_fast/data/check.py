"""Finds the images of a source that cannot be used. Training skips those that ``bad.jsonl`` lists."""

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
    """The default path of the list of bad images: in the folder of the source, or beside its tar file."""
    root = source.root
    return root.with_name(f"{root.name}.bad.jsonl") if root.is_file() else root / "bad.jsonl"


class _BadImages(Dataset[Found]):
    """Finds the bad images in a range. Pixels are decoded only if the header does not show whether they can be used.

    Images with masks are always decoded.
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
    """Whether the header shows that the values can be converted to the dtype of ``pixels``."""
    if header.format == "NPY":  # decoding is cheap
        return False
    if pixels.is_plain and header.format not in (BANDS, DICOM):
        return header.mode[0] not in "IF"
    of_pillow = "uint8" if header.format in BYTES_ONLY else "uint16" if header.mode.startswith("I;16") else header.mode
    if pixels.dtype == "float32":  # floats may be infinite, integers cannot
        return not header.mode.startswith(("F", "float"))
    return pixels.dtype == of_pillow or (pixels.dtype == "float16" and of_pillow == "uint8")


def check(
    source: Source, output: Path | None = None, pixels: PixelFormat = RGB, every_pixel: bool = False, workers: int = 0
) -> dict[int, BadImage]:
    """Check all images of ``source``, in ``workers`` processes, and list the bad ones in ``output``.

    An interrupted check resumes. The file is JSON lines: a header, then a line for each bad image.

    Args:
        output: path of the list. None: ``bad_file`` of the source.
        every_pixel: decode all images. By default, images are decoded only if the header is not enough.

    Raises:
        UserError: if the file cannot be written.
    """
    path = output or bad_file(source)
    part = path.with_name(path.name + ".part")  # renamed to ``path`` at the end
    about = {
        "fingerprint": source.fingerprint,
        "images": len(source),
        **_criteria(pixels),
        "every_pixel": every_pixel,
    }
    if path.exists() and "fingerprint" not in next(iter(_lines(path)), {}):
        raise UserError(f"{path} is not a list of bad images", "move it, or give another path with --output")
    done, lines = _unfinished(part, about)
    bad = _images(lines)
    results = by_ranges(_BadImages(source, pixels, every_pixel), range(done, len(source)), PER_TASK, workers)
    try:
        with atomic_write(part) as begun:
            begun.write_text("".join(json.dumps(line) + "\n" for line in (about, *lines)))
        with part.open("a") as file:
            for indices, found in results:
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
            "give another path with --output, and give it to training with --bad-list",
        ) from error
    return bad


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file, up to the first invalid one: a kill may have truncated the last line."""
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
    """The number of images that an interrupted check has completed, and its lines."""
    lines = _lines(part) if part.exists() else []
    ends = [i for i, line in enumerate(lines) if "checked" in line]
    if lines[:1] != [about] or not ends:
        return 0, []
    return lines[ends[-1]]["checked"], lines[1 : ends[-1] + 1]


def _images(lines: list[dict[str, Any]]) -> dict[int, BadImage]:
    return {line["index"]: BadImage(line["reason"], line["detail"], listed=True) for line in lines if "reason" in line}


def _criteria(pixels: PixelFormat) -> dict[str, Any]:
    """The part of a format that decides which images can be used, as JSON. For 8-bit images, only the channels."""
    plain = pixels.dtype == "uint8" and not pixels.bands
    return {"channels": pixels.channels, **({} if plain else {"pixels": pixels.dtype, "bands": list(pixels.bands)})}


def known_bad(source: Source, pixels: PixelFormat = RGB, path: Path | None = None) -> dict[int, BadImage]:
    """The bad images that ``path`` or ``bad_file`` lists. Empty if ``source`` was not checked.

    Raises:
        UserError: if the images have changed since the check, or the check was for another format than ``pixels``.
    """
    output, otherwise = (f" --output {path}", "leave --bad-list out") if path else ("", "remove the file")
    if path is None:
        path = bad_file(source)
        if not path.exists():
            return {}
    lines = _lines(path)
    if not lines or (lines[0].get("fingerprint") != source.fingerprint and not source.chosen):
        raise UserError(
            f"{path} was written for other images",
            f"run 'mae-fast data check {source.root}{output}' again, or {otherwise}",
        )
    checked = {name: lines[0][name] for name in ("channels", "pixels", "bands") if name in lines[0]}
    if checked != (wanted := _criteria(pixels)):
        flags = f"--in-chans {pixels.channels} --pixels {pixels.dtype}"
        flags += f" --bands {','.join(map(str, pixels.bands))}" * bool(pixels.bands)
        raise UserError(
            f"{path} was written for {checked}, but this run reads {wanted}",
            f"run 'mae-fast data check {source.root} {flags}{output}', or {otherwise}",
        )
    if source.chosen:
        places = {name: i for i, name in enumerate(source.names)}
        lines = [{**line, "index": places[line["name"]]} for line in lines if line.get("name") in places]
    return _images(lines)


def bands_hint(source: Source, places: Iterable[int], pixels: PixelFormat, weights: bool = False) -> str | None:
    """A hint with flags, if none of the images at ``places`` has the bands of ``pixels``. None if one of them has.

    Args:
        weights: whether ``pixels`` is the format of pre-trained weights.
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
    if not found or any(header.pages > 1 for header in found):  # the message about pages has its own hint
        return None
    if isinstance(source, MapDataset) and all(header.bands > header.width for header in found):
        return "give tensors as [C, H, W] and arrays as [H, W, C]"
    fewest = min(header.bands for header in found)
    some = ",".join(str(band) for band in range(1, min(3, fewest) + 1))
    by_bands = f"--bands {some}{',...' if fewest > 3 else ''} selects bands"
    if pixels.bands or any(header.bands != fewest for header in found):
        return by_bands
    if weights:
        have = f"images have {fewest} band{'s' * (fewest != 1)}, the weights have {pixels.channels}"
        return f"{have}: --in-chans {fewest} adapts the weights, {by_bands}"
    return f"--in-chans {fewest} takes all bands, {by_bands}"


def summary(source: Source, bad: dict[int, BadImage], seconds: float) -> str:
    """The result of a check as text, with an example of each reason."""
    counts = Counter(image.reason for image in bad.values())
    examples = {image.reason: f"{source.names[i]!r}: {image.detail}" for i, image in reversed(bad.items())}
    rate = len(source) / max(seconds, 1e-9)
    lines = [f"{len(source)} images, {rate:.0f} per second: {len(source) - len(bad)} ok, {len(bad)} bad"]
    lines += [f"  {reason}: {count}, such as {examples[reason]}" for reason, count in sorted(counts.items())]
    return "\n".join(lines)
