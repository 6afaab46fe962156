"""Labels of images in a CSV file: one class per image, or several labels."""

import copy
import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from .folders import EXTENSIONS, data_root, some
from .sources import Source, check_classes, match_classes, open_split

logger = logging.getLogger(__name__)

Row = TypeVar("Row")
VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": 0}


@dataclass(frozen=True)
class LabelTable:
    """Images with several labels.

    Attributes:
        path: path of the file.
        classes: names of the labels.
        rows: image name -> 0 or 1 for each label.
    """

    path: Path
    classes: tuple[str, ...]
    rows: dict[str, tuple[int, ...]]

    def apply(self, source: Source, classes: Sequence[str] | None = None) -> Source:
        """``source`` with these labels. Images are found by their path below ``source.root`` or below its parent.

        Args:
            classes: the classes of the result. Those without a column are 0. None: the classes of this table.

        Raises:
            UserError: if an image has no row, or a label of the table is not among ``classes``.
        """
        classes = self.classes if classes is None else tuple(classes)
        check_classes(self.classes, classes, f"{self.path}", "the run")
        columns = [self.classes.index(name) if name in self.classes else None for name in classes]
        rows = [tuple(0 if i is None else row[i] for i in columns) for row in _of_images(self.rows, source, self.path)]
        if not any(map(any, rows)):
            logger.warning(f"{self.path}: no image in {source.root} has a label, so its mAP is nan")
        return _with_labels(source, rows, classes)


def _key_of(rows: Mapping[str, object], source: Source, name: str) -> str | None:
    """The key in ``rows`` of an image of ``source``. None if it has no row."""
    return next((key for key in (name, f"{source.root.name}/{name}") if key in rows), None)


def _of_images(rows: Mapping[str, Row], source: Source, path: Path) -> list[Row]:
    """The row of each image of ``source``. Raises ``UserError`` if an image has none."""
    keys = [_key_of(rows, source, name) for name in source.names]
    if missing := [name for name, key in zip(source.names, keys, strict=True) if key is None]:
        raise UserError(
            f"{len(missing)} of {len(source)} images in {source.root} have no row in {path}: {some(missing)}",
            f"give paths relative to {source.root} or {source.root.parent} in the first column, which has "
            f"{some(list(rows))}",
        )
    return [rows[key] for key in keys if key is not None]


def _with_labels(source: Source, labels: Sequence[Any], classes: Sequence[str]) -> Source:
    made = copy.copy(source)
    made.__dict__.pop("fingerprint", None)  # computed from the old labels
    made.labels, made.classes = tuple(labels), tuple(classes)
    return made


def classified(source: Source, table: Path, classes: Sequence[str], owner: str) -> Source:
    """``source`` with the class that the CSV file ``table`` gives each image. Images are found as by ``LabelTable``.

    The file has a header and two columns: the image and its class.

    Args:
        classes: the classes of the result.
        owner: name of the owner of ``classes``, for messages.

    Raises:
        UserError: if the file is not such a table, an image has no row or no class, or one that is not in ``classes``.
    """
    made = _with_classes(source, _read_classes(table), table)
    match_classes(made, classes, owner)
    return made


def _read_classes(table: Path) -> dict[str, str]:
    """Image name -> class, from a CSV file. Raises ``UserError`` unless it has two columns."""
    header, fields = _read_csv(table)
    if len(header) != 2:
        raise UserError(
            f"{table} has the columns {some(header)}, but --labels needs two: the image and its class",
            "for several labels per image, give the file to --multi-label",
        )
    return {name: row[0] for name, row in fields.items()}


def _with_classes(source: Source, rows: Mapping[str, str], table: Path) -> Source:
    """``source`` with the classes in ``rows``, sorted. Raises ``UserError`` if an image has no row or no class."""
    names = _of_images(rows, source, table)
    if "" in names:
        raise UserError(f"{table}: {source.names[names.index('')]} has no class", "give each image a class")
    found = sorted({*names})
    numbers = {name: i for i, name in enumerate(found)}
    return _with_labels(source, [numbers[name] for name in names], found)


def class_labelled(path: Path, table: Path) -> tuple[Source, Source]:
    """The images at any depth in the splits "train" and "val" below ``path``, with the classes in ``table``.

    Raises:
        UserError: as ``classified``; if a split is missing, or if "train" has less than two classes.
    """
    root, rows = data_root(path), _read_classes(table)
    train, val = (_with_classes(open_split(root, split, nested=True), rows, table) for split in ("train", "val"))
    if len(train.classes) < 2:
        raise UserError(f"{table}: all images in {train.root} have the class {train.classes[0]}", "give two or more")
    match_classes(val, train.classes, f"{train.root}")
    logger.info(f"{table}: {len(train.classes)} classes: {some(train.classes)}")
    _check_rows(rows, train, val, table)
    return train, val


def read_label_table(path: Path) -> LabelTable:
    """Read a CSV file with a header. The first column is the image.

    A single second column lists the labels of the image, separated by ``|``, ``;`` or ``,``. If there are more columns,
    or if all values are 0 or 1, each column is a label: 1 if the image has it, 0 or empty if not.

    Raises:
        UserError: if the file is not such a table.
    """
    header, fields = _read_csv(path)
    values = {field for row in fields.values() for field in row}
    if len(header) == 2 and not (values <= VALUES.keys() and values != {""}):
        lists = {name: {*filter(None, map(str.strip, re.split(r"[|;,]", row[0])))} for name, row in fields.items()}
        if wrong := [name for name, labels in lists.items() if any(label.lower() == "nan" for label in labels)]:
            raise UserError(
                f"{path}: {wrong[0]} has the label 'nan'", "leave the field of an image without labels empty"
            )
        classes = tuple(sorted(set().union(*lists.values())))
        rows = {name: tuple(int(label in labels) for label in classes) for name, labels in lists.items()}
    else:
        classes = tuple(header[1:])
        for name, row in fields.items():
            if wrong := [field for field in row if field not in VALUES]:
                raise UserError(f"{path}: {name} has the value {wrong[0]!r}", "give 1, 0 or an empty field")
        rows = {name: tuple(VALUES[field] for field in row) for name, row in fields.items()}
    if len(classes) < 2:
        raise UserError(
            f"{path} has {f'one label, {classes[0]}' if classes else 'no labels'}; two or more are needed",
            "give a column for each label, or one that lists them; for a single label, put the images with and without "
            "it into two class folders, and leave --multi-label out",
        )
    return LabelTable(path, classes, rows)


def _read_csv(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the columns, and image name -> the other fields of its row.

    Columns are separated by the first of ``,``, ``;`` and tab that the header contains.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            lines = list(csv.reader(file, delimiter=next((mark for mark in ",;\t" if mark in first), ",")))
    except FileNotFoundError as error:
        raise UserError(f"{path}, the file of labels, does not exist", "give another path") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})", "save it as UTF-8"
        ) from error
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error})", "give a file with a header") from error
    header = [name.strip() for name in lines[0]] if lines else []
    _check_header(path, header)
    fields: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], 2):
        if line and len(line) != len(header):
            raise UserError(f"{path}, line {number}: {len(line)} columns, the header has {len(header)}", "correct it")
        if line and line[0] in fields:
            raise UserError(f"{path}, line {number}: second row of {line[0]}", "give each image one row")
        if line:
            fields[line[0]] = [field.strip() for field in line[1:]]
    if not fields:
        raise UserError(f"{path} has no rows of images", "give a header, and a row for each image")
    return header, fields


def _check_header(path: Path, header: list[str]) -> None:
    """Raise ``UserError`` unless the header names all columns, once each."""
    if not any(header):
        raise UserError(f"{path} is empty, or its first line is", "give a header, and a row for each image")
    if os.path.splitext(header[0])[1].lower() in EXTENSIONS:
        raise UserError(
            f"{path} has no header: its first line is a row of the image {header[0]}",
            "add a first line such as file,cat,dog",
        )
    if "" in header:
        raise UserError(
            f"{path}: column {header.index('') + 1} has no name in the header",
            "name it; with pandas, use to_csv(index=False)",
        )
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f"{path} has several columns with the name {some(twice)}", "give each column its own name")


def multi_labelled(path: Path, table: Path) -> tuple[Source, Source]:
    """The images at any depth in the splits "train" and "val" below ``path``, with the labels in ``table``.

    Raises:
        UserError: if a split is missing, or an image has no row.
    """
    root, labels = data_root(path), read_label_table(table)
    train, val = (labels.apply(open_split(root, split, nested=True)) for split in ("train", "val"))
    logger.info(f"{table}: {len(labels.classes)} labels: {some(labels.classes)}")
    if all(sum(row) == 1 for row in labels.rows.values()):
        logger.warning(f"{table}: each image has one label; for classes that exclude each other, use --labels")
    _check_rows(labels.rows, train, val, table)
    return train, val


def _check_rows(rows: Mapping[str, object], train: Source, val: Source, table: Path) -> None:
    """Log rows that match images in both splits, and count those that match none."""
    of_train, of_val = ({_key_of(rows, source, name) for name in source.names} for source in (train, val))
    if both := [key for key in rows if key in of_train and key in of_val]:
        logger.warning(
            f"{table}: {len(both)} rows match images in both {train.root.name}/ and {val.root.name}/ "
            f"({some(both)}). Write {train.root.name}/{both[0]} and {val.root.name}/{both[0]} in the file to give each "
            "image its own labels"
        )
    if not_used := len(rows.keys() - of_train - of_val):
        logger.info(f"{table}: {not_used} rows match no image")
