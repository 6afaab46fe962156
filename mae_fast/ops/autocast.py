"""What autocast would do."""

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on ``device`` ("cpu", "cuda"), or ``None`` where it is off."""
    on = device != "meta" and torch.is_autocast_enabled(device)  # which refuses a meta device
    return torch.get_autocast_dtype(device) if on else None
