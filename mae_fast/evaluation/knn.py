"""Classify images by the k nearest neighbours of their frozen features, without training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.sources import Source, labelled
from ..errors import UserError
from ..weights.create import LoadedModel, load_encoder
from .encoding import LoadOptions, gather, usable_images
from .metrics import count_in_top_k

SIMILARITIES = 2**26  # computed at a time


@dataclass(frozen=True)
class KnnOptions(LoadOptions):
    """Options of the k-NN classifier.

    Attributes:
        k: the number of neighbours that vote.
        temperature: the temperature of the votes, see ``knn_votes``.
        pool: the features, "cls": the class token; "mean": the mean of the patch tokens.
    """

    k: int = 20
    temperature: float = 0.07
    pool: Literal["cls", "mean"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"--k {self.k} is out of range", "give 1 or more")
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature:g} is out of range", "give more than 0")


@dataclass(frozen=True)
class KnnAccuracy:
    """Top-1 and top-5 accuracy of the votes of ``k`` neighbours, as shares of ``images``."""

    top1: float
    top5: float
    images: int
    k: int

    def __str__(self) -> str:
        return f"{self.k} nearest neighbours: top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, of {self.images} images"


def knn(
    weights: str, data_path: Path, model: str | None = None, options: KnnOptions = KnnOptions(), ema: bool = False
) -> KnnAccuracy:
    """Classify the images in ``data_path/val`` by their neighbours in ``data_path/train``.

    Args:
        weights: weights of any origin, see ``load_encoder``.
        model: name of the encoder, needed if the weights do not determine its sizes.
        ema: use the averaged weights of the run.

    Raises:
        UserError: if the two folders do not have the same class folders, there are no such weights, or too many images
            cannot be used.
    """
    train, val = labelled(data_path)
    loaded = load_encoder(weights, model, ema)
    features, labels = _features(loaded, train, options)
    queries, truth = _features(loaded, val, options)
    k = min(options.k, len(features))
    votes = knn_votes(queries, features, labels, len(train.classes), k, options.temperature)
    top1, top5 = (int(count_in_top_k(votes, truth, n)) / len(truth) for n in (1, 5))
    return KnnAccuracy(top1, top5, len(truth), k)


@torch.no_grad()
def _features(loaded: LoadedModel, source: Source, options: KnnOptions) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of all usable images, on the CPU."""

    def encoded() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in usable_images(loaded, source, options):
            found = loaded.model.forward_features(batch.images, pool=options.pool)
            assert isinstance(found, Tensor)
            assert batch.labels is not None
            yield found, batch.labels

    features, labels = gather(encoded(), len(source))
    return features, labels


def knn_votes(
    queries: Tensor, features: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float = 0.07
) -> Tensor:
    """Votes [M, num_classes] of the ``k`` nearest neighbours of ``queries`` [M, D] among ``features`` [N, D].

    A neighbour with cosine similarity s votes for its label [N] with a weight proportional to exp(s / temperature)
    (Wu et al., CVPR 2018).
    """
    features = F.normalize(features, dim=1)
    votes = []
    for part in torch.split(F.normalize(queries, dim=1), max(1, SIMILARITIES // len(features))):
        similarity, nearest = (part @ features.T).topk(k)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        votes.append(part.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)
