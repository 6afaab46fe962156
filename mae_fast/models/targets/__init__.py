"""What a masked autoencoder predicts of a removed patch in place of its pixels.

A target is a module with ``size``, values predicted per patch, and ``loss(images, pred, mask, ids, mean, std)``. Its
buffers and weights are kept in the model's checkpoints.
"""

from collections.abc import Mapping
from typing import Any

from .pca import PcaTarget as PcaTarget
from .tokens import TokenTarget as TokenTarget

Target = PcaTarget | TokenTarget


def build_target(what: Mapping[str, Any], patch: tuple[int, int], in_chans: int) -> Target:
    """The target that ``what`` describes, JSON: {"kind": "pca", "components": n} or {"kind": "dvae", ...}, the rest
    being ``targets.dvae.Tokenizer``'s arguments.

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
