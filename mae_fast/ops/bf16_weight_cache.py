"""bf16 copies of weights. The optimizer's step writes them, so that matrix products need not cast the weights."""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# weight -> its copy, and the version of the weight at that time
_copies: MutableMapping[Tensor, tuple[Tensor, int]] = WeakIdKeyDictionary()


def keep_copy(weight: Tensor, copy: Tensor) -> None:
    """Use ``copy`` in place of a cast of ``weight`` until ``weight`` is modified in place."""
    _copies[weight] = copy, weight._version


def working_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``, without a gradient: the stored copy if it is up to date, else a new cast.

    A write through ``weight.data`` cannot be detected. Call ``drop_copy`` after it.
    """
    if weight in _copies:
        copy, version = _copies[weight]
        if version == weight._version and copy.dtype == dtype and copy.shape == weight.shape:
            return copy
    return weight.detach().to(dtype)


def drop_copy(weight: Tensor) -> None:
    """Delete the copy of ``weight``."""
    _copies.pop(weight, None)
