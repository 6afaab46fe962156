"""The metrics of a classifier on held-out images: accuracies, and the recall and precision of each class."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...console import table_text
from ...errors import UserError
from ...evaluation.metrics import average_precisions, count_in_top_k
from ..distributed import DistContext

PER_CLASS = "per_class"  # key of the metrics per class
SHOWN = 20  # classes in a table


@torch.no_grad()
def accuracies(
    predictions: Iterator[tuple[Tensor, Tensor]], classes: Sequence[str], dist: DistContext
) -> dict[str, Any]:
    """Mean cross-entropy, and in percent: top-1 and balanced accuracy and, for more than five classes, top-5.

    Balanced accuracy is the mean recall of the classes that have images. ``per_class`` maps the name of each class to
    its number of images, recall and precision. These are None if they are 0 / 0.

    Args:
        predictions: logits [N, classes] and labels [N] of this process.

    Raises:
        UserError: if no image was evaluated.
    """
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(3, len(classes), dtype=torch.int64)
    for logits, labels in predictions:
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        sums += torch.stack([loss, count_in_top_k(logits, labels, 5)]).cpu()
        guesses = logits.argmax(1)
        for i, found in enumerate((labels, guesses, labels[guesses == labels])):
            counts[i] += found.bincount(minlength=len(classes)).cpu()
    total, five = (float(x) for x in dist.total(sums))
    images, guessed, hits = dist.total(counts).double()
    if not images.sum():
        raise UserError("no image of val/ can be used", "run 'mae-fast data check' to see why")
    recall = 100 * hits / images
    metrics: dict[str, Any] = {
        "val_loss": total / float(images.sum()),
        "val_acc1": 100 * float(hits.sum() / images.sum()),
        "val_balanced_acc": float(recall.nanmean()),
    }
    if len(classes) > 5:
        metrics["val_acc5"] = 100 * five / float(images.sum())
    columns = {"recall": recall, "precision": 100 * hits / guessed}
    metrics[PER_CLASS] = by_class(classes, images, columns)
    return metrics


@torch.no_grad()
def multi_label_metrics(
    predictions: Iterator[tuple[Tensor, Tensor]], classes: Sequence[str], dist: DistContext
) -> dict[str, Any]:
    """Mean binary cross-entropy, and mAP in percent, the mean over labels of the average precision.

    ``per_class`` maps each label to its number of images, its average precision, and its recall and precision for the
    predictions with a probability above 0.5. mAP ignores labels that no image has.

    Args:
        predictions: logits and labels (0 or 1) of this process, [N, classes] each.

    Raises:
        UserError: if no image was evaluated.
    """
    found = dist.gather([(logits.double().cpu(), labels.cpu()) for logits, labels in predictions])
    if not found:
        raise UserError("no image of val/ can be used", "run 'mae-fast data check' to see why")
    logits, labels = (torch.cat(each) for each in zip(*found, strict=True))
    guessed, ap = logits > 0, 100 * average_precisions(logits.sigmoid(), labels)
    hits, images = (guessed & labels.bool()).sum(0), labels.sum(0)
    columns = {"ap": ap, "recall": 100 * hits / images, "precision": 100 * hits / guessed.sum(0)}
    return {
        "val_loss": float(F.binary_cross_entropy_with_logits(logits, labels.double())),
        "val_map": float(ap.nanmean()),
        PER_CLASS: by_class(classes, images, columns),
    }


def by_class(classes: Sequence[str], images: Tensor, columns: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Class name -> its number of images and its value in each column [classes], with None for NaN."""
    return {
        name: {"count": int(images[i])} | {key: _rounded(float(values[i])) for key, values in columns.items()}
        for i, name in enumerate(classes)
    }


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 2)


def format_per_class(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a row per class. If there are more than 20 classes, it has those with the lowest recall."""
    from rich.markup import escape
    from rich.table import Table

    rows = list(figures.items())
    title = "classes"
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: row[1]["recall"] if row[1]["count"] else 101)[:SHOWN]
        title = f"the {SHOWN} of {len(figures)} classes with the lowest recall"
    table = Table("class", *rows[0][1], title=title)
    for name, values in rows:
        table.add_row(escape(name), *("-" if value is None else f"{value:g}" for value in values.values()))
    return table_text(table, 100)
