"""Targets that a masked autoencoder may predict instead of pixels.

A target is a module with ``size``, the number of values to predict per patch, and ``loss(images, pred, mask, ids, mean,
std)``. Checkpoints of the model contain its buffers and weights.
"""

from collections.abc import Mapping
from typing import Any

from .pca import PcaTarget as PcaTarget
from .tokens import TokenTarget as TokenTarget

Target = PcaTarget | TokenTarget


def build_target(what: Mapping[str, Any], patch: tuple[int, int], in_chans: int) -> Target:
    """The target that ``what``, from JSON, describes.

    Args:
        what: {"kind": "pca", "components": n}, or {"kind": "dvae", ...} with arguments of ``targets.dvae.Tokenizer``.

    Raises:
        ValueError: on another kind, or sizes that do not fit.
    """
    words = dict(what)
    kind = words.pop("kind", None)
    if kind == "pca":
        return PcaTarget(patch, in_chans, **words)
    if kind == "dvae":
        from .dvae import Tokenizer

        return TokenTarget(Tokenizer(**words), patch)
    raise ValueError(f"target must be of kind 'pca' or 'dvae', got {kind!r}")
