"""Multinomial logistic regression on features in memory.

Shapes: N rows, D features, K classes.
"""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .encoding import PROGRESS_EVERY

logger = logging.getLogger(__name__)

MAX_EVALUATIONS = 2000


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted classifier. It standardises its input features."""

    mean: Tensor  # [D]
    std: Tensor  # [D]
    weight: Tensor  # [D, K]
    bias: Tensor  # [K]

    def predict(self, features: Tensor) -> Tensor:
        """The most likely class [N] for each of the features [N, D]."""
        return (_standardised(features, self.mean, self.std) @ self.weight + self.bias).argmax(1)


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, penalty: float = 1.0) -> LogisticRegression:
    """Minimise the summed cross-entropy on standardised features plus ``penalty / 2`` times the squared norm of the
    weights.

    scikit-learn's ``LogisticRegression(C=1 / penalty)`` after ``StandardScaler`` minimises the same function (for two
    classes, with ``C=2 / penalty``), also by L-BFGS. Features are strongly correlated, so that L-BFGS would take
    thousands of steps. Here it runs in coordinates in which the initial Hessian is the identity. The minimum is the
    same.

    Args:
        features: [N, D].
        labels: [N], int64.
    """
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, 1)
    x = _standardised(features, mean, std)
    curvature = (1 - 1 / num_classes) / num_classes  # p (1 - p) for p = 1 / num_classes, the initial probability
    decay = penalty / len(x)  # penalty of the mean loss
    values, axes = torch.linalg.eigh((x.T @ x / len(x)).double())
    scale = (curvature * values.clamp(min=0) + decay).rsqrt()
    to_weight = (axes * scale).to(x)  # [D, D]
    x = x @ to_weight
    decays = (decay * scale**2).to(x)[:, None]  # [D, 1]
    weight = x.new_zeros(x.shape[1], num_classes, requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_EVALUATIONS, max_eval=MAX_EVALUATIONS, history_size=20,
        tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip
    start = last = time.perf_counter()
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations, last
        optimizer.zero_grad()
        loss: Tensor = F.cross_entropy(x @ weight + bias, labels) + (decays * weight.square()).sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        evaluations += 1
        now = time.perf_counter()
        if now - last >= PROGRESS_EVERY:
            last = now
            logger.info(f"logistic regression: {evaluations} passes in {now - start:.0f} s, loss {loss.item():.5f}")
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LogisticRegression(mean, std, to_weight @ weight.detach(), bias.detach())


def _standardised(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (features - mean) / std
