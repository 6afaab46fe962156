"""Metrics of all tasks by torchmetrics. It is imported only when used, as the import takes seconds."""

import warnings

from torch import Tensor


def count_in_top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """The number of rows of ``scores`` [N, classes] whose label [N] is among the ``k`` highest, an integer scalar."""
    from torchmetrics.functional.classification import multiclass_stat_scores

    num_classes = scores.shape[1]
    true_positives: Tensor = multiclass_stat_scores(
        scores, labels, num_classes, average="micro", top_k=min(k, num_classes), validate_args=False
    )[0]
    return true_positives


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision [classes] of ``scores`` [N, classes] for ``labels`` [N, classes], 0 or 1; NaN without a 1."""
    from torchmetrics.functional.classification import multilabel_average_precision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about labels without a 1
        found: Tensor = multilabel_average_precision(scores, labels, scores.shape[1], average=None, validate_args=False)
    return found.where(labels.any(0), float("nan"))


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """Confusion matrix [labels, predictions] of counts, without labels that are ``ignore_index``."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predictions, labels, num_classes, ignore_index=ignore_index, validate_args=False)
