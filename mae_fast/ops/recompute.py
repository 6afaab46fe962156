"""Save memory: recompute cheap values in the backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .autograd import needs_torch_ops


def recomputing(value: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """Context in which autograd does not save ``value``. The backward calls ``compute()`` instead.

    Use it for values that take one pass over memory. It has an effect on CPUs only, and none under torch.compile, which
    plans its own recomputation, or under ``torch.func``, which does not allow hooks on saved tensors.
    """
    if (
        torch.compiler.is_compiling()
        or needs_torch_ops()
        or value.device.type != "cpu"
        or not (torch.is_grad_enabled() and value.requires_grad)
    ):
        return nullcontext()
    storage, size = value.untyped_storage()._cdata, value.numel()  # fake tensors have this, but no data_ptr

    def pack(saved: Tensor) -> Tensor | torch.Size:
        is_value = saved.numel() == size and saved.is_contiguous() and saved.untyped_storage()._cdata == storage
        return saved.shape if is_value else saved

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return compute().view(kept) if isinstance(kept, torch.Size) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
