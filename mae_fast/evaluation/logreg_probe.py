"""Score frozen, mean-pooled features by logistic regression, and compare with an untrained encoder and raw pixels."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.sources import Source, labelled
from ..weights.create import LoadedModel, Model, load_encoder
from .encoding import LoadOptions, gather, usable_images
from .logistic import fit_logistic
from .metrics import confusion_matrix

RAW_SIDE = 32  # pixels: the raw-pixel baseline scales larger images down to this side
PCA_IMAGES = 10_000  # images to fit the principal components to


@dataclass(frozen=True)
class Score:
    """Accuracy on the held-out images: over all images, and balanced, as the mean over classes."""

    accuracy: float
    balanced: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} (balanced {self.balanced:.3f})"


@dataclass(frozen=True)
class _Encoded:
    """The inputs of the three classifiers for N images.

    Attributes:
        trained, untrained: features [N, D] of the two encoders.
        pixels: uint8 [N, values], scaled down to ``RAW_SIDE``.
        labels: int64 [N].
    """

    trained: Tensor
    untrained: Tensor
    pixels: Tensor
    labels: Tensor


def logreg_probe(
    weights: str, data_path: Path, model: str | None = None, options: LoadOptions | None = None, ema: bool = False
) -> dict[str, Score]:
    """Fit classifiers on ``data_path/train`` and score them on ``data_path/val``.

    They use the features of the encoder, those of an untrained encoder, and raw pixels. Each image is read once. Only
    features and reduced pixels are kept in memory.

    Args:
        weights: weights of any origin, see ``load_encoder``.
        model: name of the encoder, needed if the weights do not determine its sizes.
        ema: use the averaged weights of the run.

    Raises:
        UserError: if the two folders do not have the same class folders, there are no such weights, or too many images
            cannot be used.
    """
    options = options or LoadOptions()
    train, val = labelled(data_path)
    loaded = load_encoder(weights, model, ema)
    untrained = _untrained(loaded.model)
    seen, held_out = (_encode(loaded, untrained, source, options) for source in (train, val))
    components = min(seen.trained.shape[1], len(seen.labels) - 1, seen.pixels.shape[1])
    centre, axes = _principal_components(seen.pixels, components)

    def reduced(pixels: Tensor) -> Tensor:
        return torch.cat([(part.float() / 255 - centre) @ axes for part in torch.split(pixels, 1024)])

    scores = {}
    for name, fitted, judged in (
        ("pre-trained encoder", seen.trained, held_out.trained),
        ("untrained encoder", seen.untrained, held_out.untrained),
        # Reduced to at most the width of the features, so that the comparison is fair and fast.
        (f"raw pixels ({components} principal components)", reduced(seen.pixels), reduced(held_out.pixels)),
    ):
        predictions = fit_logistic(fitted, seen.labels, len(train.classes)).predict(judged)
        scores[name] = _score(predictions, held_out.labels, len(train.classes))
    return scores


def _untrained(model: Model) -> Model:
    """A copy with the initial weights of a new model after ``torch.manual_seed(0)``."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        fresh.initialize_weights()
    return fresh.eval()


@torch.no_grad()
def _encode(loaded: LoadedModel, untrained: Model, source: Source, options: LoadOptions) -> _Encoded:
    """Encode all usable images of ``source``. The result is on the CPU."""
    untrained.to(options.torch_device())

    def encoded() -> Iterator[tuple[Tensor, ...]]:
        for batch in usable_images(loaded, source, options, crop_pct=1.0):
            assert batch.labels is not None
            features = [encoder.forward_features(batch.images, pool="mean") for encoder in (loaded.model, untrained)]
            pixels = batch.images.permute(0, 3, 1, 2).float()
            height, width = (min(side, RAW_SIDE) for side in pixels.shape[2:])
            pixels = F.adaptive_avg_pool2d(pixels, (height, width)).round().byte()
            yield tuple(x for x in (*features, pixels.flatten(1), batch.labels) if isinstance(x, Tensor))

    return _Encoded(*gather(encoded(), len(source)))


def _principal_components(pixels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean [values] of pixels [N, values] in 0..1, and their first principal axes [values, count]."""
    some = pixels[:: -(-len(pixels) // PCA_IMAGES)].float() / 255
    centre = some.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank(some - centre, min(count, len(some)), center=False, niter=8)
    return centre, axes


def _score(predictions: Tensor, labels: Tensor, num_classes: int) -> Score:
    counts = confusion_matrix(predictions, labels, num_classes).double()
    of_class = counts.sum(1)
    recall = counts.diagonal()[of_class > 0] / of_class[of_class > 0]
    return Score((counts.diagonal().sum() / counts.sum()).item(), recall.mean().item())
