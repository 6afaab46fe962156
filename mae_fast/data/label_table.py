"""Images with several labels each, which a CSV file holds."""

import copy
import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .folders import data_root, some
from .sources import Source, check_classes, open_split

logger = logging.getLogger(__name__)

VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": 0}


@dataclass(frozen=True)
class LabelTable:
    """Which labels images have.

    Attributes:
        path: of the file.
        classes: the names of the labels.
        rows: by the image's name, 1 for each label that it has, else 0.
    """

    path: Path
    classes: tuple[str, ...]
    rows: dict[str, tuple[int, ...]]

    def apply(self, source: Source, classes: Sequence[str] | None = None) -> Source:
        """``source`` with these labels. Images are found by their path below ``source.root`` or below its parent.

        Args:
            classes: other names for the labels, or another order; those without a column are 0.

        Raises:
            UserError: if an image has no row, or a label is not among ``classes``.
        """
        classes = self.classes if classes is None else tuple(classes)
        check_classes(self.classes, classes, f"{self.path}", "the run")
        columns = [self.classes.index(name) if name in self.classes else None for name in classes]
        rows, missing = [], []
        for name in source.names:
            row = self.rows.get(name, self.rows.get(f"{source.root.name}/{name}"))
            if row is None:
                missing.append(name)
            else:
                rows.append(tuple(0 if i is None else row[i] for i in columns))
        if missing:
            raise UserError(
                f"{len(missing)} of {len(source)} images in {source.root} have no row in {self.path}: {some(missing)}",
                f"its first column must hold paths below {source.root} or {source.root.parent}; it holds "
                f"{some(list(self.rows))}",
            )
        made = copy.copy(source)
        made.__dict__.pop("fingerprint", None)  # of other labels
        made.labels, made.classes = tuple(rows), tuple(classes)
        return made


def read_label_table(path: Path) -> LabelTable:
    """Read a CSV file with a header. Its first column is the image.

    With two columns, the second lists the image's labels, separated by ``|``, ``;`` or ``,``. With more columns, each
    is a label: 1 if the image has it, 0 or nothing if not.

    Raises:
        UserError: if it is no such file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *lines = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--multi-label {path} cannot be read as CSV ({error})", "give a file with a header") from error
    fields: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 2):
        if line and len(line) != len(header):
            raise UserError(f"{path}, line {number}: {len(line)} columns, the header has {len(header)}", "mend it")
        if line and line[0] in fields:
            raise UserError(f"{path}, line {number}: {line[0]} has a row already", "give each image one row")
        if line:
            fields[line[0]] = [field.strip() for field in line[1:]]
    if len(header) == 2:
        lists = {name: {*filter(None, map(str.strip, re.split(r"[|;,]", row[0])))} for name, row in fields.items()}
        classes = tuple(sorted(set().union(*lists.values())))
        rows = {name: tuple(int(label in labels) for label in classes) for name, labels in lists.items()}
    else:
        classes = tuple(name.strip() for name in header[1:])
        for name, row in fields.items():
            if wrong := [field for field in row if field not in VALUES]:
                raise UserError(f"{path}: {name} has the value {wrong[0]!r}", "give 1, 0 or nothing for each label")
        rows = {name: tuple(VALUES[field] for field in row) for name, row in fields.items()}
    if len(classes) < 2:
        raise UserError(
            f"{path} has {len(classes)} labels",
            "give a header, a column of images, and a column for each of two or more labels or one that lists them",
        )
    return LabelTable(path, classes, rows)


def multi_labelled(path: Path, table: Path) -> tuple[Source, Source]:
    """The images in the splits "train" and "val" below ``path``, with the labels in ``table``.

    Raises:
        UserError: if a split is missing, or an image has no labels.
    """
    root, labels = data_root(path), read_label_table(table)
    train, val = (labels.apply(open_split(root, split)) for split in ("train", "val"))
    logger.info(f"{table}: {len(labels.classes)} labels: {some(labels.classes)}")
    if not_used := len(labels.rows) - len(train) - len(val):
        logger.info(f"{table}: {not_used} rows are of other images")
    return train, val
