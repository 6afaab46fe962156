"""A quick probe: logistic regression on frozen, mean-pooled features, beside an untrained encoder and raw pixels."""

from collections.abc import Callable
from dataclasses import dataclass
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
    """Share of held-out images classified right, over all images and as the mean over classes (balanced)."""

    accuracy: float
    balanced: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} (balanced {self.balanced:.3f})"


@torch.inference_mode()
def _mean_features(model: Model, images: Tensor) -> Tensor:
    features = model.forward_features(images, pool="mean")
    assert isinstance(features, Tensor)
    return features


def _pixels(source: Source, model: Model) -> Tensor:
    size = model.patch_embed.img_size
    return torch.stack([centred_image(source, i, size, model.in_chans) for i in range(len(source))])


def probe(run: Path, data_path: Path, ema: bool = False) -> dict[str, Score]:
    """Fit on ``data_path/train``, score on ``data_path/val``, for the run's encoder, an untrained one and raw pixels.

    ``ema``: the run's averaged weights.

    Raises:
        UserError: without class folders of the same names in both, or without scikit-learn.
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
    trained, found = load_run(run, ema)
    torch.manual_seed(0)
    about = found.state["model"]
    untrained: Model = (vit if about["name"] in VIT_CONFIGS else mae).build(**about).eval()
    pixels = [_pixels(source, trained) for source in (train, val)]

    def features(extract: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
        return [torch.cat([extract(chunk) for chunk in torch.split(images, 128)]).numpy() for images in pixels]

    width = trained.cls_token.shape[2]
    components = min(width, len(train) - 1)
    candidates: dict[str, tuple[Callable[[Tensor], Tensor], list[Any]]] = {
        "pre-trained encoder": (lambda images: _mean_features(trained, images), []),
        "untrained encoder": (lambda images: _mean_features(untrained, images), []),
        # As many numbers per image as the features have: thousands of pixels take minutes to fit.
        f"raw pixels ({components} principal components)": (
            lambda images: images.flatten(1).float() / 255,
            [PCA(components, random_state=0)],
        ),
    }
    scores = {}
    for name, (extract, reduction) in candidates.items():
        fit, held_out = features(extract)
        classifier = make_pipeline(*reduction, StandardScaler(), LogisticRegression(max_iter=1000))
        classifier.fit(fit, train.labels)
        guess = classifier.predict(held_out)
        accuracy = float((guess == np.array(val.labels)).mean())
        scores[name] = Score(accuracy, float(balanced_accuracy_score(val.labels, guess)))
        print(f"probe on {name}: held-out accuracy {scores[name]}", flush=True)
    return scores
