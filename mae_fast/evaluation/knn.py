"""k nearest neighbours on frozen features: what a representation is worth without any training."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.loader import LoaderConfig, Skipped, evaluation_batches
from ..data.sources import Source, labelled
from ..errors import UserError
from ..weights.create import Model, create_model, load_run


def knn(
    weights: str,
    data_path: Path,
    model: str | None = None,
    k: int = 20,
    temperature: float = 0.07,
    pool: Literal["cls", "mean"] = "mean",
    batch_size: int = 64,
    num_workers: int = 0,
    ema: bool = False,
) -> tuple[float, float]:
    """Print and return the shares of ``data_path/val`` that ``knn_votes`` classifies right, top-1 and top-5, by their
    neighbours in ``data_path/train``.

    Args:
        weights: a run; or, with ``model``, anything that ``create_model`` takes.
        model: factory of the encoder, where the weights do not tell.
        pool: of the features: the class token, or the mean of the patch tokens.
        ema: the run's averaged weights.

    Raises:
        UserError: without class folders of the same names in both, or such weights.
    """
    train, val = labelled(data_path)
    if k < 1 or not temperature > 0:
        raise UserError(f"--k must be 1 or more and --temperature above 0, got {k} and {temperature:g}")
    if model and ema:
        raise UserError("--ema: only a run has averages", "leave --model out")
    encoder = create_model(model, weights) if model else load_run(Path(weights), ema)[0]
    encoder.eval()
    (known, labels), (asked, truth) = (
        _features(encoder, source, pool, batch_size, num_workers) for source in (train, val)
    )
    k = min(k, len(known))
    votes = knn_votes(asked, known, labels, len(train.classes), k, temperature)
    right = votes.topk(min(5, votes.shape[1])).indices == truth[:, None]
    top1, top5 = float(right[:, 0].double().mean()), float(right.any(1).double().mean())
    print(f"{k} nearest neighbours: top-1 {top1:.2%}, top-5 {top5:.2%}, of {len(truth)} images")
    return top1, top5


@torch.inference_mode()
def _features(
    encoder: Model, source: Source, pool: Literal["cls", "mean"], batch_size: int, num_workers: int
) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    size = encoder.patch_embed.img_size
    skipped = Skipped(source, 0.01)
    loader = LoaderConfig(size=size, channels=encoder.in_chans, batch_size=batch_size, num_workers=num_workers)
    for batch in evaluation_batches(source, loader):
        skipped.add(batch)
        found = encoder.forward_features(batch.images, pool=pool)
        assert isinstance(found, Tensor)
        assert batch.labels is not None
        features.append(found)
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


def knn_votes(
    asked: Tensor, known: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float = 0.07
) -> Tensor:
    """Of features [M, D], votes [M, num_classes] of their ``k`` nearest neighbours among ``known`` [n, D], by cosine
    similarity s: each votes for its label [n] in proportion to exp(s / temperature) (Wu et al., CVPR 2018)."""
    known = F.normalize(known, dim=1)
    votes = []
    for part in torch.split(F.normalize(asked, dim=1), 1024):
        similarity, nearest = (part @ known.T).topk(k)
        shares = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest one's, which is 1
        votes.append(part.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], shares))
    return torch.cat(votes)
