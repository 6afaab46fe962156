"""Scores frozen, mean-pooled features with a logistic regression, beside an untrained encoder and raw pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.loader import centred_image
from ..data.sources import Source, labelled
from ..errors import UserError
from ..models import mae, vit
from ..models.sizes import VIT_CONFIGS
from ..weights.create import Model, load_run


@dataclass(frozen=True)
class Score:
    """The share of held-out images that are classified correctly: over all images, and as the mean over classes."""

    accuracy: float
    balanced: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} (balanced {self.balanced:.3f})"


def logreg_probe(run: Path, data_path: Path, ema: bool = False) -> dict[str, Score]:
    """Fit on ``data_path/train``, score on ``data_path/val``: the run's encoder, an untrained one and raw pixels.

    Args:
        ema: use the averaged weights of the run.

    Raises:
        UserError: if the two folders do not have the same class folders, or scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise UserError("the probe needs scikit-learn", "pip install 'mae_fast[report]'") from error
    train, val = labelled(data_path)
    trained, checkpoint = load_run(run, ema)
    torch.manual_seed(0)
    settings = checkpoint.state["model"]
    untrained: Model = (vit if settings["name"] in VIT_CONFIGS else mae).build(**settings).eval()
    pixels = [_pixels(source, trained) for source in (train, val)]
    components = min(trained.cls_token.shape[2], len(train) - 1)
    candidates: dict[str, tuple[Callable[[Tensor], Tensor], list[Any]]] = {
        "pre-trained encoder": (partial(_mean_features, trained), []),
        "untrained encoder": (partial(_mean_features, untrained), []),
        # Reduced to the width of the features: a fit on thousands of pixels takes minutes.
        f"raw pixels ({components} principal components)": (
            lambda images: images.flatten(1).float() / 255,
            [PCA(components, random_state=0)],
        ),
    }
    scores = {}
    for name, (extract, reduction) in candidates.items():
        fitted, held_out = (torch.cat([extract(x) for x in torch.split(part, 128)]).numpy() for part in pixels)
        classifier = make_pipeline(*reduction, StandardScaler(), LogisticRegression(max_iter=1000))
        predictions = classifier.fit(fitted, train.labels).predict(held_out)
        accuracy = float((predictions == np.array(val.labels)).mean())
        scores[name] = Score(accuracy, float(balanced_accuracy_score(val.labels, predictions)))
    return scores


def _pixels(source: Source, model: Model) -> Tensor:
    size = model.patch_embed.img_size
    return torch.stack([centred_image(source, i, size, model.in_chans) for i in range(len(source))])


@torch.inference_mode()
def _mean_features(model: Model, images: Tensor) -> Tensor:
    features = model.forward_features(images, pool="mean")
    assert isinstance(features, Tensor)
    return features
