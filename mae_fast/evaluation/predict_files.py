"""Write predictions for image files: a table of classes, masks, or objects in COCO's format; and pictures of them."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.decode import BadImage, decode
from ..data.folders import images_below
from ..data.loader import unusable_image
from ..data.segmentation import colours
from ..data.sources import Files, Source, open_source
from ..errors import UserError
from ..files import atomic_write
from .images import UnusableImages
from .predict import (
    Classification,
    ClassifierPredictor,
    DetectionPredictor,
    Detections,
    Segmentation,
    SegmentationPredictor,
    coco_results,
)

logger = logging.getLogger(__name__)

AnyPredictor = ClassifierPredictor | SegmentationPredictor | DetectionPredictor
ENDINGS = {"classifier": (".csv", ".parquet"), "segmentation": ("",), "detection": (".json",)}  # of the output
OPACITY = 0.5  # of masks over an image
DRAWN = 0.5  # minimum score of an object to draw


@dataclass(frozen=True)
class PredictOptions:
    """Options for predictions.

    Attributes:
        top_k: classes per image in the table.
        draw: folder for pictures of masks or objects over their images; None: no pictures.
        batch_size: images per batch; segmentation uses batches of 1.
        num_workers: processes that load images.
    """

    top_k: int = 5
    draw: Path | None = None
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self) -> None:
        least = {"top-k": (self.top_k, 1), "batch-size": (self.batch_size, 1), "num-workers": (self.num_workers, 0)}
        for name, (value, at_least) in least.items():
            if value < at_least:
                raise UserError(f"--{name} {value} is out of range", f"give {at_least} or more")


@dataclass(frozen=True)
class PredictionFile:
    """The result of ``predict_files``.

    Attributes:
        path: the table, the folder of masks, or the file of objects.
        count: number of images with a prediction.
        skipped: number of unusable images.
    """

    path: Path
    count: int
    skipped: int


def image_sources(paths: Sequence[Path]) -> list[Source]:
    """Open the images in files, nested folders, tar shards, saved datasets, and lists (.txt, one path per line).

    Paths in a list are relative to the folder of the list.

    Raises:
        UserError: if there are none, or if a list has no path of a file.
    """
    sources: list[Source] = []
    singles: list[str] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist", "give image files, folders or lists")
        if path.suffix.lower() == ".txt":
            hint = "give a text file with one path per line, relative to its folder"
            try:
                names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read ({error})", hint) from error
            if not any((path.parent / name).exists() for name in names):
                raise UserError(f"{path} is not a list of images: no line is the path of a file", hint)
            sources.append(Files(path.parent, names))
        elif path.is_dir():
            shards_or_saved = any(path.glob("*.tar")) or (path / "dataset_info.json").exists()
            sources.append(open_source(path) if shards_or_saved else Files(path, images_below(path)))
        elif path.suffix == ".tar":
            sources.append(open_source(path))
        else:
            singles.append(str(path))
    if singles:
        sources.append(Files(Path(), singles))
    if not any(map(len, sources)):
        raise UserError("no images are given", "give image files, folders or lists")
    return sources


def predict_files(
    predictor: AnyPredictor,
    images: Sequence[Path],
    output: Path | None = None,
    options: PredictOptions = PredictOptions(),
) -> PredictionFile:
    """Predict on image files, and write the results. Unusable images are skipped with a warning.

    Args:
        images: see ``image_sources``.
        output: for a classifier a .csv or .parquet file, for segmentation a new folder, for a detector a .json file.
            None: "predictions" with the suffix of the first of these formats.

    Raises:
        UserError: if an option is invalid, no image can be used, or the output cannot be written.
    """
    output = output or Path("predictions" + ENDINGS[predictor.kind][0])
    if (ending := output.suffix.lower()) not in (endings := ENDINGS[predictor.kind]):
        known = " or ".join(endings) if endings[0] else "a folder"
        raise UserError(f"--output {output}: a {predictor.kind} model does not write {ending}", f"give {known}")
    sources = image_sources(images)
    if options.draw and options.draw == output:
        raise UserError(f"--draw and --output are both {output}", "give different folders")
    for folder in [options.draw, output if predictor.kind == "segmentation" else None]:
        if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} already exists", "give a new folder, or remove it")
    found = _Found(predictor, sources, options)
    if isinstance(predictor, ClassifierPredictor):
        if options.draw:
            raise UserError("--draw needs a model of masks or objects, not a classifier", "leave it out")
        _write_table(found, output, predictor, options.top_k)
    elif isinstance(predictor, SegmentationPredictor):
        _write_masks(found, output)
    else:
        _write_objects(found, output, predictor)
    skipped = f"; unusable images: {found.unusable.count:,}" if found.unusable.count else ""
    pictures = f", pictures to {options.draw}" if options.draw else ""
    logger.info(f"wrote predictions for {found.count:,} images to {output}{pictures}{skipped}")
    if options.draw and isinstance(predictor, DetectionPredictor) and found.best_score < DRAWN:
        logger.warning(f"no object is drawn: the best score is {found.best_score:.2f}, but at least {DRAWN} is needed")
    return PredictionFile(output, found.count, found.unusable.count)


class _Found:
    """Iterates over the usable images of all sources and their predictions, and draws masks and objects if asked to."""

    def __init__(self, predictor: AnyPredictor, sources: Sequence[Source], options: PredictOptions) -> None:
        self.predictor, self.sources, self.options = predictor, sources, options
        self.unusable, self.count, self.best_score = UnusableImages(), 0, 0.0
        self.names = _own_names(sources)

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        """Yield the path of each image, a unique name for its output file, and its prediction."""
        options = self.options
        for k, source in enumerate(self.sources):
            for i, result in self.predictor.predictions(source, options.batch_size, options.num_workers):
                if isinstance(result, BadImage):
                    self.unusable.add(unusable_image(source, i, result))
                    continue
                self.count += 1
                name = self.names[k][i]
                if options.draw:
                    self._draw(source, i, result, options.draw / f"{name}.png")
                yield str(source.root / source.names[i]), name, result
        if not self.count:
            raise UserError("no image can be used: see the warnings above")

    def _draw(self, source: Source, index: int, result: Any, path: Path) -> None:
        shown = _shown(source.read(index), self.predictor)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(result, Segmentation):
            Image.blend(shown, Image.fromarray(colours(result.labels).numpy()), OPACITY).save(path)
        else:
            self.best_score = max([self.best_score, *result.scores.tolist()])
            _with_objects(shown, result.above(DRAWN)).save(path)


def _own_names(sources: Sequence[Source]) -> list[list[str]]:
    """A unique relative path without suffix for each image of each source.

    It is the path of the image in its source. If several images differ only in the suffix, it includes the suffix. If
    that is not unique either, it starts with the name of the source's folder.
    """

    def relative(name: str) -> PurePath:
        path = PurePath(name)
        return path if not path.is_absolute() and ".." not in path.parts else PurePath(path.name)

    whole = [(k, relative(name)) for k, source in enumerate(sources) for name in source.names]
    stems, names = Counter(str(path.with_suffix("")) for _, path in whole), Counter(str(path) for _, path in whole)
    made: list[list[str]] = [[] for _ in sources]
    taken: set[str] = set()
    for k, path in whole:
        name = str(path.with_suffix("")) if stems[str(path.with_suffix(""))] == 1 else str(path)
        if names[str(path)] > 1:
            name = str(PurePath(sources[k].root.name) / path)
        while name in taken:
            name += "_"
        taken.add(name)
        made[k].append(name)
    return made


def _shown(data: bytes, predictor: AnyPredictor) -> Image.Image:
    """An image in its original size, as RGB."""
    from ..models.reconstruction import as_rgb, as_shown

    made = predictor.preprocessing.pixels
    image = decode(data, made)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    raw = image.permute(1, 2, 0)[None].to(predictor.device)
    backbone = getattr(predictor.model, "net", predictor.model)
    rgb = as_rgb(as_shown(backbone, raw, made.clip)[0]).clamp(0, 1)
    return Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _with_objects(image: Image.Image, objects: Detections) -> Image.Image:
    """Draw boxes, masks, names and scores of objects over an image."""
    shades = colours(objects.labels).tolist()
    pixels = np.array(image, dtype=np.float32)
    for i, shade in enumerate(shades if objects.small_masks is not None else ()):
        there = objects.mask(i).numpy()
        pixels[there] = (1 - OPACITY) * pixels[there] + OPACITY * np.array(shade, dtype=np.float32)
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(max(12, min(image.size) // 40))
    width = max(1, min(image.size) // 200)
    for box, label, score, shade in zip(
        objects.boxes.tolist(), objects.labels.tolist(), objects.scores.tolist(), shades, strict=True
    ):
        colour = tuple(shade)
        draw.rectangle(box, outline=colour, width=width)
        text = f"{objects.classes[label]} {score:.2f}"
        left, top, right, bottom = draw.textbbox((box[0], box[1]), text, font=font)
        draw.rectangle((left, top, right, bottom), fill=colour)
        draw.text((box[0], box[1]), text, fill="white" if sum(shade) < 384 else "black", font=font)
    return drawn


def _write_table(found: _Found, output: Path, predictor: ClassifierPredictor, top_k: int) -> None:
    """Write a table with a row per image: its path, and the most likely classes with their probabilities.

    If images may have several labels: the labels with a probability of at least 0.5, and the probability of each class.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    top_k = min(top_k, len(predictor.classes))
    header = ["file", *(f"{what}_{k}" for k in range(1, top_k + 1) for what in ("class", "probability"))]
    if predictor.multi_label:
        header = ["file", "labels", *predictor.classes]

    def rows() -> Iterator[list[Any]]:
        result: Classification
        for path, _, result in found:
            if predictor.multi_label:
                yield [path, "|".join(result.labels), *result.probabilities.tolist()]
            else:
                yield [path, *(value for pair in result.top(top_k) for value in pair)]

    if output.suffix.lower() == ".parquet":
        _write_parquet(output, header, rows())
        return
    with (
        atomic_write(output) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.writer(file)
        table.writerow(header)
        for row in rows():
            table.writerow([f"{x:.6f}" if isinstance(x, float) else x for x in row])


def _write_parquet(output: Path, header: list[str], rows: Iterator[list[Any]]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "pip install 'mae_fast[data]', or give a .csv file"
        raise UserError(f"--output {output} needs pyarrow", hint) from error
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    # Parquet strings are UTF-8, but file names may be any bytes.
    paths = [path.encode(errors="surrogateescape").decode(errors="backslashreplace") for path in columns[0]]
    table = pyarrow.table(dict(zip(header, [paths, *map(list, columns[1:])], strict=True)))
    with atomic_write(output) as part:
        parquet.write_table(table, part)


def _write_masks(found: _Found, output: Path) -> None:
    """Write a palette PNG of class indices per image, and ``classes.csv`` with the names of the classes."""
    shades = colours(torch.arange(256))
    result: Segmentation
    written: list[tuple[str, str]] = []
    for image, name, result in found:
        mask = Image.fromarray(result.labels.numpy())
        mask.putpalette(shades.flatten().tolist())
        path = output / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            mask.save(part, "PNG")
        written.append((image, f"{name}.png"))
    with (output / "masks.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([("file", "mask"), *written])
    with (output / "classes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["value", "class", "red", "green", "blue"])
        table.writerows([i, name, *shades[i].tolist()] for i, name in enumerate(found.predictor.classes))


def _write_objects(found: _Found, output: Path, predictor: DetectionPredictor) -> None:
    """Write COCO results, with the path of the image as "file_name" in each. Image ids count from 1."""
    output.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    objects: Detections
    for number, (path, _, objects) in enumerate(found, start=1):
        categories = [predictor.category_ids[label] for label in objects.labels.tolist()]
        names = [predictor.classes[label] for label in objects.labels.tolist()]
        for result, name in zip(coco_results(objects, number, categories), names, strict=True):
            results.append({**result, "file_name": path, "category_name": name})
    with atomic_write(output) as part:
        part.write_text(json.dumps(results))
