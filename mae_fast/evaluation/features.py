"""Writes the features of images to a file: NumPy's .npy with a table of names beside it, or Parquet.

Shapes: N images, D width, h x w grid of patches.
"""

import csv
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.folders import data_root, entries, split_folder
from ..data.loader import Batch
from ..data.sources import Files, Source, open_source
from ..errors import UserError
from ..files import atomic_write, part_of
from ..models.features import block_numbers
from ..weights.create import LoadedModel, Model
from .encoding import LoadOptions, usable_images

logger = logging.getLogger(__name__)

ROW_GROUP = 32 * 2**20  # bytes of features in a row group of a Parquet file


@dataclass(frozen=True)
class FeatureOptions(LoadOptions):
    """Which features.

    Attributes:
        pool: "cls": the class token [D]. "mean": the mean of the patch tokens [D]. "map": all patches [D, h, w].
        layers: the outputs of these blocks, before the last norm; negative numbers count from the last. Empty:
            the features after the last norm.
    """

    pool: Literal["cls", "mean", "map"] = "mean"
    layers: Sequence[int] = ()


@dataclass(frozen=True)
class FeatureFile:
    """What was written.

    Attributes:
        path: the file with the features.
        shape: of all features: [N, D] or [N, D, h, w]; with several layers [N, layers, ...].
        skipped: images that could not be used and have no row.
    """

    path: Path
    shape: tuple[int, ...]
    skipped: int


def open_data(path: Path) -> Source:
    """The images at ``path``: a file, a folder, class folders, shards, or a saved dataset.

    Raises:
        UserError: if there are none, or the folder holds a training and a validation set.
    """
    if path.is_file() and path.suffix != ".tar":
        return Files(path.parent, [path.name])
    root = data_root(path)
    splits = [folder for split in ("train", "val") if (folder := split_folder(root, split))]
    if len(splits) == 2 or (splits and len(entries(root)[1]) == 1):  # else a class may have such a name
        found = " and ".join(f"{split.name}/" for split in splits)
        raise UserError(f"{root} holds {found}", f"give {' or '.join(map(str, splits))}")
    return open_source(path)


def write_features(
    loaded: LoadedModel, source: Source, output: Path, options: FeatureOptions = FeatureOptions()
) -> FeatureFile:
    """Write the features of all images of ``source`` that can be used, in its order, as fp32.

    One batch is in memory at a time. A failure leaves the file that was there before, if any, and no part of a new one.

    Args:
        output: a .npy file, which gets a table of names beside it (``names_file``); or a .parquet file.

    Raises:
        UserError: on anything that the user has to change.
    """
    encoder = loaded.model
    try:
        layers = block_numbers(options.layers, len(encoder.blocks), "--layers")
    except ValueError as error:
        raise UserError(str(error)) from error
    row = _row_shape(encoder, options.pool, layers)
    _check_output(output, source, 4 * len(source) * math.prod(row))
    writing = _parquet if output.suffix == ".parquet" else _npy
    count = 0
    with writing(output, source, row, layers) as add, torch.inference_mode():
        for batch in usable_images(loaded, source, options):
            add(batch.ids.tolist(), _encode(encoder, batch, options.pool, layers))
            count += len(batch.ids)
    skipped = len(source) - count
    left_out = f"; {skipped:,} images cannot be used and have no row" if skipped else ""
    beside = f", names in {names_file(output)}" if output.suffix == ".npy" else ""
    logger.info(f"wrote features {[count, *row]} to {output}{beside}{left_out}")
    return FeatureFile(output, (count, *row), skipped)


def names_file(output: Path) -> Path:
    """The table beside a .npy file: a line for each row, with the image and, where there are labels, its class."""
    return output.with_suffix(".names.csv")


def _row_shape(encoder: Model, pool: str, layers: Sequence[int]) -> tuple[int, ...]:
    width = encoder.cls_token.shape[2]
    row = (width, *encoder.patch_embed.grid_size) if pool == "map" else (width,)
    return (len(layers), *row) if len(layers) > 1 else row


def _encode(encoder: Model, batch: Batch, pool: Literal["cls", "mean", "map"], layers: Sequence[int]) -> np.ndarray:
    """fp32 [N, ...]."""
    found = encoder.forward_features(batch.images, layers=layers or None, pool=pool)
    if not isinstance(found, Tensor):
        found = torch.stack(found, 1) if len(found) > 1 else found[0]
    features: np.ndarray = found.float().cpu().numpy()
    return features


def _check_output(output: Path, source: Source, size: int) -> None:
    """Make the folder of ``output``. Raise ``UserError`` if ``size`` bytes cannot be written there."""
    if output.suffix not in (".npy", ".parquet"):
        raise UserError(
            f"--output {output}: the format is unknown",
            f"give a name that ends in .npy or .parquet, such as {output.with_suffix('.npy')}",
        )
    if output.is_dir():
        raise UserError(f"--output {output} is a folder", f"give a file's name, such as {output / 'features.npy'}")
    _check_no_folders(output)
    place = output.resolve()
    if len(source) == 1 and place == (source.root / source.names[0]).resolve():
        raise UserError(f"--output {output} is the image", "give another name")
    if len(source) > 1 and source.root.is_dir() and place.is_relative_to(source.root.resolve()):
        raise UserError(f"--output {output} is in the folder of the images", "give a place outside of it")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if size > free:
        raise UserError(
            f"--output {output} needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free", "give another place"
        )


def _check_no_folders(output: Path) -> None:
    """Raise ``UserError`` if a folder has the name of a file to be written."""
    targets = [output, names_file(output)] if output.suffix == ".npy" else [output]
    for path in (*targets, *map(part_of, targets)):
        if path.is_dir():
            raise UserError(
                f"--output {output} needs the name {path}, which is a folder", "move it, or give another name"
            )


Add = Callable[[list[int], np.ndarray], None]  # the places of images in their source, and their features [N, ...]


@contextmanager
def _npy(output: Path, source: Source, row: tuple[int, ...], layers: Sequence[int]) -> Iterator[Add]:
    """Writes rows to a .npy file and to its table. The number of rows enters the header at the end."""
    count = 0
    with (
        atomic_write(names_file(output)) as names_part,
        atomic_write(output) as part,
        part.open("wb") as file,
        names_part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as text,
    ):
        table = csv.writer(text)
        table.writerow(["image", "label", "class"][: 1 if source.labels is None else 3])

        def write_header() -> None:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, *row)}
            np.lib.format.write_array_header_1_0(file, header)  # of the same length for any number of rows

        def add(ids: list[int], features: np.ndarray) -> None:
            nonlocal count
            file.write(np.ascontiguousarray(features, "<f4").data)
            for i in ids:
                labels = () if source.labels is None else (source.labels[i], source.classes[source.labels[i]])
                table.writerow([source.names[i], *labels])
            count += len(ids)

        write_header()
        yield add
        file.seek(0)
        write_header()
        text.flush()
        os.fsync(text.fileno())  # both files are complete before one of them gets its name
        _check_no_folders(output)


@contextmanager
def _parquet(output: Path, source: Source, row: tuple[int, ...], layers: Sequence[int]) -> Iterator[Add]:
    """Writes rows to a Parquet file: image, label, class, and a column of features for each layer."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        hint = "pip install 'mae_fast[data]', or give a .npy file"
        raise UserError(f"--output {output} needs pyarrow", hint) from error
    several = len(layers) > 1
    shape = row[1:] if several else row
    size = math.prod(shape)
    fields = [pyarrow.field("image", pyarrow.string())]
    if source.labels is not None:
        fields += [pyarrow.field("label", pyarrow.int64()), pyarrow.field("class", pyarrow.string())]
    columns = [f"layer_{i}" for i in layers] if several else ["features"]
    vector, about = pyarrow.list_(pyarrow.float32(), size), {"shape": json.dumps(shape)}
    schema = pyarrow.schema([*fields, *(pyarrow.field(name, vector, metadata=about) for name in columns)])
    pending: list[tuple[list[int], np.ndarray]] = []

    with atomic_write(output) as part, ParquetWriter(part, schema) as writer:

        def flush() -> None:
            ids = [i for some, _ in pending for i in some]
            features = np.concatenate([x for _, x in pending])
            # Parquet's strings are UTF-8, file names may be anything.
            names = [source.names[i].encode(errors="surrogateescape").decode(errors="backslashreplace") for i in ids]
            arrays = [pyarrow.array(names)]
            if source.labels is not None:
                labels = [source.labels[i] for i in ids]
                arrays += [pyarrow.array(labels), pyarrow.array([source.classes[label] for label in labels])]
            for k in range(len(columns)):
                values = np.ascontiguousarray(features[:, k] if several else features).reshape(-1)
                arrays.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), size))
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            pending.clear()

        def add(ids: list[int], features: np.ndarray) -> None:
            pending.append((ids, features))
            if sum(x.nbytes for _, x in pending) >= ROW_GROUP:
                flush()

        yield add
        if pending:
            flush()
