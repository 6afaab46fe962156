"""Targets that a masked autoencoder may predict instead of pixels.

A target is a module with ``size``, the number of values to predict per patch, and ``loss(images, pred, mask, ids, mean,
std)``. Its buffers and weights are part of the model's state dict.
"""

from collections.abc import Mapping
from typing import Any

from .pca import PcaTarget as PcaTarget
from .tokens import TokenTarget as TokenTarget

Target = PcaTarget | TokenTarget


def build_target(config: Mapping[str, Any], patch: tuple[int, int], in_chans: int) -> Target:
    """Build a target.

    Args:
        config: {"kind": "pca", "components": n}, or {"kind": "dvae", ...} with arguments of ``targets.dvae.Tokenizer``.
        patch: height and width of a patch.

    Raises:
        ValueError: if the kind is unknown, or sizes do not fit.
    """
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind == "pca":
        return PcaTarget(patch, in_chans, **arguments)
    if kind == "dvae":
        from .dvae import Tokenizer

        return TokenTarget(Tokenizer(**arguments), patch)
    raise ValueError(f"target must be of kind 'pca' or 'dvae', got {kind!r}")
