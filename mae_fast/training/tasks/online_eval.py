"""Evaluates a masked autoencoder while it trains: held-out loss, and the accuracy of its frozen features.

Shapes: N images, D width, L patches.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.check import known_bad
from ...data.folders import data_root
from ...data.loader import Batch, LoaderConfig, evaluation_batches
from ...data.sources import Source, labelled, open_split
from ...errors import UserError
from ...evaluation.encoding import gather
from ...evaluation.knn import KnnOptions, knn_votes
from ...evaluation.logistic import fit_logistic
from ..config import PretrainConfig
from ..distributed import DistContext
from ..task import held_out, use_bf16

Loss = Callable[[Tensor, Tensor], Tensor]  # of images [N, H, W, C] and their places in the source [N]: scalar


class OnlineEvaluation:
    """The evaluations that ``--val-loss`` and ``--online-eval`` ask for.

    They change no weight, gradient or random state.

    Attributes:
        metric_names: of the numbers that a call gives.
    """

    def __init__(self, config: PretrainConfig, dist: DistContext) -> None:
        self.config, self.dist = config, dist
        self.bf16 = use_bf16(config.dtype, dist.device)
        self.val = open_split(data_root(_folder(config)), "val") if config.val_loss else None
        self.labelled = _labelled(config) if config.online_eval else None
        names = {"val_loss": self.val, "val_acc1": self.labelled}
        self.metric_names = tuple(name for name, source in names.items() if source)

    def __call__(self, model: Any, loss: Loss, loader: LoaderConfig) -> dict[str, float]:
        """The metrics of ``model``. All processes call it, each with a ``loader`` of its share."""
        metrics = {}
        if self.labelled:
            metrics["val_acc1"] = self.accuracy(*self.labelled, model, loader)
        if self.val:
            metrics["val_loss"] = self.mean_loss(self.val, loss, loader)
        return metrics

    def mean_loss(self, val: Source, loss: Loss, loader: LoaderConfig) -> float:
        """The mean of the batches' losses, weighted by their numbers of images.

        It is the mean of the images' losses, unless pixels are missing: a batch's loss is the mean over its patches.
        """
        sums = torch.zeros(2, dtype=torch.float64)  # of losses, and of images
        for batch, count in self._batches(val, loader):
            with torch.no_grad(), torch.autocast(self.dist.device.type, torch.bfloat16, enabled=self.bf16):
                value = loss(batch.images, batch.ids).item()
            if count:
                sums += torch.tensor([value * count, count], dtype=torch.float64)
        total, images = self.dist.total(sums).tolist()
        _check_usable(images, val)
        return float(total / images)

    def accuracy(self, train: Source, val: Source, model: Any, loader: LoaderConfig) -> float:
        """Top-1 accuracy in percent on ``val`` of a classifier of mean-pooled features, fitted to ``train``.

        The first process fits and scores it on the features of all processes.
        """
        known, queries = (self._features(source, model, loader) for source in (train, val))
        counts = torch.zeros(2, dtype=torch.int64)  # of correct and of all images
        if self.dist.first:
            right = _predict(self.config.online_eval, *known, queries[0], len(train.classes)) == queries[1]
            counts += torch.tensor([int(right.sum()), len(right)])
        correct, images = self.dist.total(counts).tolist()
        return float(100 * correct / images)

    def _features(self, source: Source, model: Any, loader: LoaderConfig) -> tuple[Tensor, Tensor]:
        """Features fp32 [N, D] and labels [N] of all images, in order, in the first process; empty in the others."""

        def encoded() -> Iterator[tuple[Tensor, Tensor]]:
            for batch, count in self._batches(source, loader):
                with torch.no_grad(), torch.autocast(self.dist.device.type, torch.bfloat16, enabled=self.bf16):
                    features = model.forward_features(batch.images, pool="mean").float()
                if count:
                    assert batch.labels is not None
                    yield features, batch.labels

        found = gather(encoded(), -(-len(source) // self.dist.world))
        _check_usable(self.dist.sum(len(found[0]) if found else 0), source)
        parts = self.dist.gather_on_first([found] if found else [])
        if not parts:
            return torch.empty(0), torch.empty(0)
        features, labels = (torch.cat(x).to(self.dist.device) for x in zip(*parts, strict=True))
        return features, labels

    def _batches(self, source: Source, loader: LoaderConfig) -> Iterator[tuple[Batch, int]]:
        """Batches of this process's share of ``source``, on the device, and their numbers of images.

        A batch without images is left out. If the weights are in shards, it is one blank image instead, as the other
        processes need this one's shards.
        """
        loader = replace(loader, bad=known_bad(source, loader.pixels))
        for batch in held_out(evaluation_batches(source, loader), source, self.config, self.dist):
            count = len(batch.ids)
            if count:
                yield batch.to(self.dist.device), count
            elif self.dist.world > 1 and self.config.strategy == "fsdp":
                blank = torch.zeros(1, *batch.images.shape[1:], dtype=batch.images.dtype)
                yield Batch(blank, torch.empty(1, 0), torch.zeros(1, dtype=torch.int64)).to(self.dist.device), 0


def _predict(kind: str | None, features: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    """Classes [M] of ``queries`` [M, D], by ``features`` [N, D] and their labels [N]."""
    if kind == "linear":
        return fit_logistic(features, labels, num_classes).predict(queries)
    options = KnnOptions()
    k = min(options.k, len(features))
    return knn_votes(queries, features, labels, num_classes, k, options.temperature).argmax(1)


def _folder(config: PretrainConfig) -> Path:
    if not config.eval_data and config.dataset("train") is not None:
        raise UserError("val_loss and online_eval need a folder of images", "give eval_data")
    return config.eval_data or config.data_path


def _labelled(config: PretrainConfig) -> tuple[Source, Source]:
    try:
        return labelled(_folder(config))
    except UserError as error:
        if config.eval_data:
            raise
        raise UserError(
            f"--online-eval {config.online_eval}: {error.message}", "give labelled images by --eval-data"
        ) from error


def _check_usable(images: float, source: Source) -> None:
    if not images:
        raise UserError(f"no image of {source.root} can be used", f"look at them by mae-fast data check {source.root}")
