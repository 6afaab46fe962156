"""Low-precision copies of weights, written by the optimiser's step so that no product has to cast its weight."""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..memory import raise_mmap_threshold

raise_mmap_threshold()  # of casts, which most processes make anew in each step

# weight -> its copy and the version of the weight that it was made of
_copies: MutableMapping[Tensor, tuple[Tensor, int]] = WeakIdKeyDictionary()


def keep_copy(weight: Tensor, copy: Tensor) -> None:
    """Let ``copy`` stand for ``weight`` until ``weight`` is written to in place."""
    _copies[weight] = copy, weight._version


def working_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``: the kept copy if it is of today's values, else a new cast; no gradient.

    A write through ``weight.data`` goes unnoticed: whoever does that calls ``drop_copy``.
    """
    if weight in _copies:
        copy, version = _copies[weight]
        if version == weight._version and copy.dtype == dtype and copy.shape == weight.shape:
            return copy
    return weight.detach().to(dtype)


def drop_copy(weight: Tensor) -> None:
    """Forget the copy of ``weight``."""
    _copies.pop(weight, None)
