"""Metrics computed by hand, on data where similar metrics differ."""

import pytest
import torch

from mae_fast.evaluation.metrics import confusion_matrix, count_in_top_k


def test_top_1_and_top_5_of_eight_classes_differ():
    """Scores decrease from class 0 to class 7, so label n has rank n + 1."""
    scores = torch.arange(8.0, 0, -1).expand(6, 8)
    labels = torch.tensor([0, 0, 3, 4, 5, 7])
    assert [int(count_in_top_k(scores, labels, k)) for k in (1, 2, 4, 5, 6, 8, 9)] == [2, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("num_classes", [1, 2, 5, 6, 100])
@pytest.mark.parametrize("k", [1, 5])
def test_top_k_equals_sorted_scores(num_classes, k):
    generator = torch.Generator().manual_seed(num_classes)
    scores = torch.randn(200, num_classes, generator=generator)
    labels = torch.randint(num_classes, (200,), generator=generator)
    ranks = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert int(count_in_top_k(scores, labels, k)) == int((ranks < k).sum())


def test_rows_of_the_confusion_matrix_are_labels():
    labels, predictions = torch.tensor([0, 0, 0, 2, 255]), torch.tensor([0, 1, 1, 0, 1])
    found = confusion_matrix(predictions, labels, 4, ignore_index=255)
    assert found.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found.dtype == torch.int64
