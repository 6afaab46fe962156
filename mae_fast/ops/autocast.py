"""The dtype of autocast."""

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on ``device`` ("cpu", "cuda"), or ``None`` if it is off."""
    on = device != "meta" and torch.is_autocast_enabled(device)  # raises for meta
    return torch.get_autocast_dtype(device) if on else None
