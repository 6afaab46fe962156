"""Write the features of images to a file: a .npy file with a CSV file of names, or a Parquet file.

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
    """Options for the features.

    Attributes:
        pool: "cls": the class token [D]. "mean": the mean of the patch tokens [D]. "map": all patches [D, h, w].
        layers: use the outputs of these blocks, before the last norm. Negative numbers count from the last block.
            Empty: use the features after the last norm.
    """

    pool: Literal["cls", "mean", "map"] = "mean"
    layers: Sequence[int] = ()


@dataclass(frozen=True)
class FeatureFile:
    """The result of ``write_features``.

    Attributes:
        path: the file with the features.
        shape: shape of all features, [N, D] or [N, D, h, w]; with several layers [N, layers, ...].
        skipped: number of unusable images, which have no row.
    """

    path: Path
    shape: tuple[int, ...]
    skipped: int


def open_data(path: Path) -> Source:
    """Open the images at ``path``: a file, a folder, class folders, shards, or a saved dataset.

    Raises:
        UserError: if there are none, or the folder contains a training and a validation set.
    """
    if path.is_file() and path.suffix != ".tar":
        return Files(path.parent, [path.name])
    root = data_root(path)
    splits = [folder for split in ("train", "val") if (folder := split_folder(root, split))]
    if len(splits) == 2 or (splits and len(entries(root)[1]) == 1):  # else it may be the name of a class
        found = " and ".join(f"{split.name}/" for split in splits)
        raise UserError(f"{root} contains {found}", f"give {' or '.join(map(str, splits))}")
    return open_source(path)


def write_features(
    loaded: LoadedModel, source: Source, output: Path, options: FeatureOptions = FeatureOptions()
) -> FeatureFile:
    """Write the features of all usable images of ``source``, in its order, as fp32.

    Only one batch is in memory at a time. After a failure, an existing file is unchanged and no partial file is left.

    Args:
        output: a .npy file, with the names in a CSV file beside it (``names_file``); or a .parquet file.

    Raises:
        UserError: if an option is invalid, no image can be used, or the file cannot be written.
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
    without_row = f"; unusable images, without a row: {skipped:,}" if skipped else ""
    beside = f", names in {names_file(output)}" if output.suffix == ".npy" else ""
    logger.info(f"wrote features {[count, *row]} to {output}{beside}{without_row}")
    return FeatureFile(output, (count, *row), skipped)


def names_file(output: Path) -> Path:
    """The CSV file beside a .npy file. It has a line per row: the image and, if there are labels, its class."""
    return output.with_suffix(".names.csv")


def _row_shape(encoder: Model, pool: str, layers: Sequence[int]) -> tuple[int, ...]:
    width = encoder.cls_token.shape[2]
    row = (width, *encoder.patch_embed.grid_size) if pool == "map" else (width,)
    return (len(layers), *row) if len(layers) > 1 else row


def _encode(encoder: Model, batch: Batch, pool: Literal["cls", "mean", "map"], layers: Sequence[int]) -> np.ndarray:
    """The features of a batch, fp32 [N, ...]."""
    found = encoder.forward_features(batch.images, layers=layers or None, pool=pool)
    if not isinstance(found, Tensor):
        found = torch.stack(found, 1) if len(found) > 1 else found[0]
    features: np.ndarray = found.float().cpu().numpy()
    return features


def _check_output(output: Path, source: Source, size: int) -> None:
    """Create the folder of ``output``. Raises ``UserError`` if ``size`` bytes cannot be written there."""
    if output.suffix not in (".npy", ".parquet"):
        raise UserError(
            f"--output {output}: unknown format",
            f"give a name that ends in .npy or .parquet, such as {output.with_suffix('.npy')}",
        )
    if output.is_dir():
        raise UserError(f"--output {output} is a folder", f"give the name of a file, such as {output / 'features.npy'}")
    _check_no_folders(output)
    place = output.resolve()
    if len(source) == 1 and place == (source.root / source.names[0]).resolve():
        raise UserError(f"--output {output} is the image", "give another name")
    if len(source) > 1 and source.root.is_dir() and place.is_relative_to(source.root.resolve()):
        raise UserError(f"--output {output} is in the folder of the images", "give another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if size > free:
        raise UserError(
            f"--output {output} needs {size / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free", "give another folder"
        )


def _check_no_folders(output: Path) -> None:
    """Raise ``UserError`` if a file to write has the name of a folder."""
    targets = [output, names_file(output)] if output.suffix == ".npy" else [output]
    for path in (*targets, *map(part_of, targets)):
        if path.is_dir():
            raise UserError(
                f"--output {output} needs to write {path}, which is a folder", "move it, or give another name"
            )


Add = Callable[[list[int], np.ndarray], None]  # (indices of images in their source, their features [N, ...])


@contextmanager
def _npy(output: Path, source: Source, row: tuple[int, ...], layers: Sequence[int]) -> Iterator[Add]:
    """Yield a function that adds rows to a .npy file and its CSV file. The header is completed at the end."""
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
            np.lib.format.write_array_header_1_0(file, header)  # its length does not depend on the number of rows

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
        os.fsync(text.fileno())  # complete both files before renaming one of them
        _check_no_folders(output)


@contextmanager
def _parquet(output: Path, source: Source, row: tuple[int, ...], layers: Sequence[int]) -> Iterator[Add]:
    """Yield a function that adds rows to a Parquet file: image, label, class, and the features of each layer."""
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
            # Parquet strings are UTF-8, but file names may be any bytes.
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
