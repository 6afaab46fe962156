"""Evaluate a masked autoencoder during training: held-out loss, and accuracy of its frozen features.

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

Loss = Callable[[Tensor, Tensor], Tensor]  # (images [N, H, W, C], their indices in the source [N]) -> scalar


class OnlineEvaluation:
    """The evaluations of ``--val-loss`` and ``--online-eval``.

    They do not change weights, gradients or random states.

    Attributes:
        metric_names: names of the metrics that a call returns.
    """

    def __init__(self, config: PretrainConfig, dist: DistContext) -> None:
        self.config, self.dist = config, dist
        self.bf16 = use_bf16(config.dtype, dist.device)
        self.val = open_split(data_root(_folder(config)), "val") if config.val_loss else None
        self.labelled = _labelled(config) if config.online_eval else None
        names = {"val_loss": self.val, "val_acc1": self.labelled}
        self.metric_names = tuple(name for name, source in names.items() if source)

    def __call__(self, model: Any, loss: Loss, loader: LoaderConfig) -> dict[str, float]:
        """The metrics of ``model``. All processes must call it, each with a ``loader`` of its share."""
        metrics = {}
        if self.labelled:
            metrics["val_acc1"] = self.accuracy(*self.labelled, model, loader)
        if self.val:
            metrics["val_loss"] = self.mean_loss(self.val, loss, loader)
        return metrics

    def mean_loss(self, val: Source, loss: Loss, loader: LoaderConfig) -> float:
        """The mean of the losses of the batches, weighted by their numbers of images.

        This is the mean loss of the images, unless pixels are missing, as the loss of a batch is a mean over patches.
        """
        sums = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of images
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

        Rank 0 fits and scores it on the features of all processes.
        """
        known, queries = (self._features(source, model, loader) for source in (train, val))
        counts = torch.zeros(2, dtype=torch.int64)  # of correct and of all images
        if self.dist.first:
            right = _predict(self.config.online_eval, *known, queries[0], len(train.classes)) == queries[1]
            counts += torch.tensor([int(right.sum()), len(right)])
        correct, images = self.dist.total(counts).tolist()
        return float(100 * correct / images)

    def _features(self, source: Source, model: Any, loader: LoaderConfig) -> tuple[Tensor, Tensor]:
        """Features fp32 [N, D] and labels [N] of all images in order, in rank 0; empty in other processes."""

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
        """Batches of this process's share of ``source``, on the device, with their numbers of images.

        Batches without images are skipped. If the weights are sharded, such a batch is a blank image instead, because
        other processes need this process's shards.
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
    """Predict the classes [M] of ``queries`` [M, D] from ``features`` [N, D] and their labels [N]."""
    if kind == "linear":
        return fit_logistic(features, labels, num_classes).predict(queries)
    options = KnnOptions()
    k = min(options.k, len(features))
    return knn_votes(queries, features, labels, num_classes, k, options.temperature).argmax(1)


def _folder(config: PretrainConfig) -> Path:
    if not config.eval_data and config.dataset("train") is not None:
        raise UserError("--val-loss and --online-eval need a folder of images", "give it by --eval-data")
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
        hint = f"run 'mae-fast data check {source.root}' to see why"
        raise UserError(f"no image of {source.root} can be used", hint)
