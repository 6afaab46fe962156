"""The specification of ``random_masking`` in plain torch. N images, L patches, K = num_keep kept."""

import torch
from torch import Tensor

from ..autograd import is_exporting


def random_masking_reference(noise: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The ONNX exporters do not support stable=True, but the sort of ONNX is stable.
    ids_shuffle = noise.argsort(dim=1) if is_exporting() else noise.argsort(dim=1, stable=True)  # [N, L]
    ids_restore = ids_shuffle.argsort(dim=1)  # [N, L]
    mask = torch.ones(noise.shape, dtype=torch.float32, device=noise.device)  # [N, L]
    mask[:, :num_keep] = 0
    mask = mask.gather(1, ids_restore)
    ids_keep, ids_removed = ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep:]  # [N, K], [N, L-K]
    return ids_keep.clone(), ids_removed.clone(), ids_restore, mask
