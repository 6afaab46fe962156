"""Choose the patches to keep: sort the noise, keep the lowest.

Equals: two stable argsorts, slices, a scatter.

Shapes: N images, L patches, K = num_keep kept.
"""

import torch
from torch import Tensor

from ..autograd import needs_torch_ops
from ..patches import check_tensor
from .reference import random_masking_reference

torch.library.define(
    "mae_fast::random_masking",
    "(Tensor noise, int num_keep) -> (Tensor ids_keep, Tensor ids_removed, Tensor ids_restore, Tensor mask)",
)

# Any device: eager reference. CPU and CUDA: csrc/*/random_masking.* register themselves.
torch.library.impl("mae_fast::random_masking", "default", random_masking_reference)
# A permutation has no gradient: skipping autograd leaves the outputs without one.
torch.library.impl("mae_fast::random_masking", "Autograd", torch.library.fallthrough_kernel)


@torch.library.register_fake("mae_fast::random_masking")
def _(noise, num_keep):  # type: ignore[no-untyped-def]
    n, length = noise.shape
    return (
        noise.new_empty((n, num_keep), dtype=torch.int64),
        noise.new_empty((n, length - num_keep), dtype=torch.int64),
        noise.new_empty((n, length), dtype=torch.int64),
        noise.new_empty((n, length), dtype=torch.float32),
    )


def random_masking(noise: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same values as

        ids_shuffle = noise.argsort(dim=1, stable=True)                     # [N, L]
        ids_keep, ids_removed = ids_shuffle.split([K, L - K], dim=1)        # [N, K], [N, L-K]
        ids_restore = ids_shuffle.argsort(dim=1)                            # [N, L]
        mask = (ids_restore >= K).float()                                   # [N, L], 1 = removed, 0 = kept

    in one pass over each row. NaN sorts last. The results have no gradient, even if ``noise`` requires one.

    Args:
        noise: [N, L], float32 or float64, any strides.
        num_keep: K, the number of patches to keep in each image.

    Returns:
        ``ids_keep``, ``ids_removed`` and ``ids_restore``, int64, and ``mask``, float32.

    Raises:
        ValueError: if ``noise`` is not [N, L], not float32 or float64, or ``num_keep`` is not in 0..L.
    """
    check_tensor("random_masking: noise", noise)
    if noise.ndim != 2:
        raise ValueError(f"random_masking: noise must be [N, L], got {list(noise.shape)}")
    if noise.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"random_masking: noise must be float32 or float64, got {noise.dtype}")
    if not 0 <= num_keep <= noise.shape[1]:
        raise ValueError(f"random_masking: num_keep must be in 0..{noise.shape[1]}, got {num_keep}")
    op = random_masking_reference if needs_torch_ops() else torch.ops.mae_fast.random_masking
    ids_keep, ids_removed, ids_restore, mask = op(noise, num_keep)
    return ids_keep, ids_removed, ids_restore, mask
