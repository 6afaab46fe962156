"""Principal components of patches as a target: the row "PCA" of the paper's Table 1d.

Shapes: N images, L patches, R predicted patches per image, P values per patch (channel fastest), n components.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ...ops.autocast import autocast_dtype
from ...ops.embed_visible import embed_visible
from ...ops.patches import is_raw, patchify, standardise


class PcaTarget(nn.Module):
    """Coefficients (patch - centre) @ basis, for the ``components`` directions of largest variance.

    ``centre`` [P] and ``basis`` [P, n] are buffers. They are zero until ``fit`` is called.

    Raises:
        ValueError: unless there are 1 to P components.
    """

    centre: Tensor
    basis: Tensor

    def __init__(self, patch: tuple[int, int], in_chans: int, components: int = 96) -> None:
        super().__init__()
        values = patch[0] * patch[1] * in_chans
        if not 1 <= components <= values:
            raise ValueError(f"a patch of {values} values has 1 to {values} components, got {components}")
        self.patch, self.size = patch, components
        self.register_buffer("centre", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(values, components))

    @torch.no_grad()
    def fit(self, count: Tensor, total: Tensor, products: Tensor) -> float:
        """Compute centre and basis from the ``moments`` of patches. Return the share of variance that is kept."""
        if not count:
            raise ValueError("principal components need at least one patch")
        centre = total / count
        variances, directions = torch.linalg.eigh(products / count - centre.outer(centre))
        self.centre.copy_(centre)
        self.basis.copy_(directions.flip(1)[:, : self.size])
        return float(variances[-self.size :].sum() / variances.sum().clamp(min=torch.finfo(torch.float64).tiny))

    def moments(self, batches: Iterable[Tensor], mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count [], sum [P] and sum of outer products [P, P] of all patches of raw images [N, H, W, C].

        They are in fp64 on the CPU. The outer products of a batch are computed in fp32.
        """
        values = len(self.centre)
        count, total, products = (torch.zeros(s, dtype=torch.float64) for s in ((), (values,), (values, values)))
        for images in batches:
            rows = patchify(standardise(images, mean.to(images.device), std.to(images.device)), self.patch)
            rows = rows.flatten(0, 1).float()  # [N * L, P]
            count += len(rows)
            total += rows.sum(0, dtype=torch.float64).cpu()
            products += (rows.T @ rows).double().cpu()
        return count, total, products

    @torch.no_grad()
    def forward(self, images: Tensor, ids: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Coefficients [N, R, n] of the patches ``ids`` [N, R].

        ``embed_visible`` computes them: it gathers patches and multiplies them with a matrix.

        Args:
            images: floating [N, C, H, W], standardised, or raw pixels [N, H, W, C].
            mean, std: [C], used for raw pixels only.
        """
        (p, q), n = self.patch, self.size
        weight = self.basis.T.reshape(n, p, q, -1).permute(0, 3, 1, 2).contiguous()  # [n, C, p, q]
        num_patches = images[0].numel() // len(self.centre)
        zeros = weight.new_zeros(1, 1 + num_patches, n)
        stats = (mean, std) if is_raw(images, len(self.centre) // (p * q)) else ()
        on = autocast_dtype(images.device.type)  # torch.autocast raises on the meta device, even with enabled=False
        with torch.autocast(images.device.type, enabled=False) if on else nullcontext():
            bias = -(self.centre @ self.basis)
            tokens: Tensor = embed_visible(images, ids, weight, bias, zeros, zeros[:, :1], *stats)
        return tokens[:, 1:]

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor, ids: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Mean squared error of coefficients ``pred`` [N, R, n] on removed patches, weighted by ``mask`` [N, R]."""
        per_patch: Tensor = (pred - self(images, ids, mean, std)).square().mean(-1)
        weights = mask.to(per_patch.dtype)
        return (per_patch * weights).sum() / weights.sum()

    def pixels(self, pred: Tensor) -> Tensor:
        """Standardised patches [N, L, P] of coefficients [N, L, n]: centre + pred @ basis^T."""
        patches: Tensor = pred.to(self.basis.dtype) @ self.basis.T + self.centre
        return patches
