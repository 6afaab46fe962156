"""Optimiser and learning rate of pre-training, from torch and timm."""

import torch
from torch import nn


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW, betas (0.9, 0.95), as published: 1-D parameters and biases are not decayed, tokens (3-D) are."""
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

    groups = param_groups_weight_decay(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


class WarmupCosine:
    """Linear warm-up from 0, then half a cosine down to ``min_lr``: a function of the optimiser step alone."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int, min_lr: float = 0.0
    ) -> None:
        from timm.scheduler import CosineLRScheduler  # type: ignore[attr-defined]

        self.optimizer = optimizer
        self.schedule = CosineLRScheduler(
            optimizer,
            t_initial=total_steps - warmup_steps,
            lr_min=min_lr,
            warmup_t=warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def set(self, step: int) -> float:
        """Set the learning rate of step number ``step`` (from 0) and return it."""
        self.schedule.step_update(step)
        return float(self.optimizer.param_groups[0]["lr"])
