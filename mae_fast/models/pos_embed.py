"""Sine-cosine position tables, and the resizing of position tables."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos_2d(width: int, grid: tuple[int, int], cls_token: bool = True) -> Tensor:
    """Position table [1, (1+)L, width] in fp32 for a ``grid`` of (rows, columns) patches, L = rows * columns.

    The first half of the vector encodes the column (x), the second the row (y), each as
    ``[sin(i * omega) | cos(i * omega)]`` with ``omega_k = 10000 ** (-k / (width / 4))``, k = 0 .. width/4 - 1,
    computed in fp64. The first row, that of the class token, is zero.

    Raises:
        ValueError: if ``width`` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sincos_2d: the width must be a multiple of 4, got {width}")
    rows, columns = grid
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (x, y)]  # [L, width/4] each
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    if cls_token:
        table = torch.cat([table.new_zeros(1, width), table])
    return table.float()[None]


def resize_pos_embed(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position table [1, 1+L, D] from grid ``old`` to ``new`` (rows, columns), except the class token's row.

    Bicubic, as in the published fine-tuning code: corners not aligned, no antialiasing.
    """
    if old == new:
        return table
    rows = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    rows = F.interpolate(rows, size=new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], rows.flatten(2).transpose(1, 2)], 1)
