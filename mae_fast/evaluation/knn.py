"""Classifies by the k nearest neighbours of frozen features, without any training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.loader import LoaderConfig, Skipped, evaluation_batches
from ..data.sources import Source, labelled
from ..errors import UserError
from ..weights.create import Model, create_model, load_run
from .metrics import count_in_top_k


@dataclass(frozen=True)
class KnnOptions:
    """How to classify.

    Attributes:
        k: the number of neighbours that vote.
        temperature: of the votes; see ``knn_votes``.
        pool: the features: the class token, or the mean of the patch tokens.
    """

    k: int = 20
    temperature: float = 0.07
    pool: Literal["cls", "mean"] = "mean"
    batch_size: int = 64
    num_workers: int = 0


@dataclass(frozen=True)
class KnnAccuracy:
    """The shares of ``images`` whose class has the most votes of ``k`` neighbours, or is among the first five."""

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
        weights: a run; or, with ``model``, anything that ``create_model`` accepts.
        model: the factory of the encoder, needed if ``weights`` is not a run.
        ema: use the averaged weights of the run.

    Raises:
        UserError: if the two folders do not have the same class folders, or there are no such weights.
    """
    train, val = labelled(data_path)
    if options.k < 1 or not options.temperature > 0:
        raise UserError(f"--k must be 1 or more and --temperature above 0, got {options.k} and {options.temperature:g}")
    if model and ema:
        raise UserError("--ema: only a run has averaged weights", "leave --model out")
    encoder = create_model(model, weights) if model else load_run(Path(weights), ema)[0]
    encoder.eval()
    features, labels = _features(encoder, train, options)
    queries, truth = _features(encoder, val, options)
    k = min(options.k, len(features))
    votes = knn_votes(queries, features, labels, len(train.classes), k, options.temperature)
    top1, top5 = (int(count_in_top_k(votes, truth, n)) / len(truth) for n in (1, 5))
    return KnnAccuracy(top1, top5, len(truth), k)


@torch.inference_mode()
def _features(encoder: Model, source: Source, options: KnnOptions) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of all images that can be read."""
    features, labels = [], []
    skipped = Skipped(source, 0.01)
    loader = LoaderConfig(
        size=encoder.patch_embed.img_size,
        channels=encoder.in_chans,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    for batch in evaluation_batches(source, loader):
        skipped.add(batch)
        found = encoder.forward_features(batch.images, pool=options.pool)
        assert isinstance(found, Tensor)
        assert batch.labels is not None
        features.append(found)
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


def knn_votes(
    queries: Tensor, features: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float = 0.07
) -> Tensor:
    """Votes [M, num_classes] of the ``k`` nearest neighbours of ``queries`` [M, D] among ``features`` [N, D].

    A neighbour with cosine similarity s votes for its label [N] with a weight proportional to exp(s / temperature)
    (Wu et al., CVPR 2018).
    """
    features = F.normalize(features, dim=1)
    votes = []
    for part in torch.split(F.normalize(queries, dim=1), 1024):
        similarity, nearest = (part @ features.T).topk(k)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest, so none overflows
        votes.append(part.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)
