"""The counts behind the metrics of all tasks, by torchmetrics, whose import takes seconds."""

from torch import Tensor


def count_in_top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many rows of ``scores`` [N, classes] have their label [N] among the ``k`` highest, as an integer tensor."""
    from torchmetrics.functional.classification import multiclass_stat_scores

    num_classes = scores.shape[1]
    true_positives: Tensor = multiclass_stat_scores(
        scores, labels, num_classes, average="micro", top_k=min(k, num_classes), validate_args=False
    )[0]
    return true_positives


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """How often each class (rows) was taken for each class (columns), without labels that are ``ignore_index``."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predictions, labels, num_classes, ignore_index=ignore_index, validate_args=False)
