"""Skip and record steps with non-finite gradients, roll back after several in a row, and stop if that does not help."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..ops import adamw
from . import checkpoint
from .distributed import DistContext

logger = logging.getLogger(__name__)

ROLL_BACK_AFTER = 5  # non-finite steps in a row: the cause is then the weights and not an image
ROLL_BACKS = 3  # rollbacks before the run ends
KEPT_WEIGHTS = 3  # files with the weights of non-finite steps


def gradient_norm(model: nn.Module) -> Tensor:
    """The L2 norm of all gradients, over all shards, as a scalar on the model's device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer steps on a GPU and reads ``found_inf`` and ``grad_scale`` there."""
    on_gpu = optimizer.param_groups[0]["params"][0].is_cuda
    return on_gpu and getattr(optimizer, "_step_supports_amp_scaling", False)


def _fits_kernel(grads: list[Tensor]) -> bool:
    """Whether ``mae_fast::gradient_norm`` supports these gradients: no shards, fp32, contiguous, on one device."""
    plain = all(type(x) is Tensor and x.dtype == torch.float32 and x.is_contiguous() for x in grads)
    return bool(grads) and plain and all(x.device == grads[0].device for x in grads)


class _Flag:
    """A scalar copied to the host. Reading it waits only for the copy, not for later work of the GPU."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        if value.is_cuda:
            self.value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.there.record()

    def read(self) -> bool:
        if self.value.is_pinned():
            self.there.synchronize()
        return bool(self.value)


class NonFiniteGuard:
    """Takes optimizer steps and skips those with non-finite gradients.

    The GPU decides whether to skip a step. The host reads the decision at the next step, so that no step waits. Call
    ``resolve``, ``update`` and ``record`` in each step, in this order.

    Args:
        folder: gets a ``step-<step>.json`` for each non-finite step, and the weights of some.
        seed: the seed of the run.
        dist: all processes send their sample numbers, and shards of the weights, to rank 0, which writes.
        roll_back: called after ``ROLL_BACK_AFTER`` non-finite steps in a row.
        clip: the largest norm of the gradients; larger gradients are scaled down.
        state: the value of ``state()`` in the checkpoint that the run resumes from.

    Attributes:
        bad_steps: the non-finite steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        seed: int,
        dist: DistContext,
        roll_back: Callable[[], None],
        clip: float | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.folder, self.seed, self.dist = model, optimizer, folder, seed, dist
        self.roll_back, self.clip = roll_back, clip
        state = state or {}
        self.bad_steps: set[int] = set(state.get("bad_steps", ()))
        self.in_a_row, self.rows = int(state.get("in_a_row", 0)), int(state.get("rows", 0))
        self.roll_backs = int(state.get("roll_backs", 0))
        self.last: tuple[_Flag, int, list[int]] | None = None
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        # The buffers of batch norms, each with a copy of its value after the last good step.
        self.counts = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, as JSON."""
        counts = {"in_a_row": self.in_a_row, "rows": self.rows, "roll_backs": self.roll_backs}
        return {"bad_steps": sorted(self.bad_steps), **counts}

    def update(self) -> Tensor:
        """Take the optimizer's step with the current gradients, unless they are non-finite.

        If the step is skipped, the statistics of batch norms are restored. The call does not wait for a GPU.

        Returns:
            Whether the gradients were non-finite: a scalar tensor, bool or 0 and 1.
        """
        bad, grad_scale = self._clipped()
        for buffer, kept in self.counts:
            kept.copy_(torch.where(bad.bool(), kept, buffer))
            buffer.copy_(kept)
        if _skips_by_itself(self.optimizer):
            # As with torch's GradScaler: the fused step divides the gradients by grad_scale, or skips the update.
            self.optimizer.found_inf, self.optimizer.grad_scale = bad.float(), grad_scale  # type: ignore[attr-defined]
            try:
                self.optimizer.step()
            finally:
                del self.optimizer.found_inf, self.optimizer.grad_scale  # type: ignore[attr-defined]
        elif not bad:
            self.optimizer.step()
        return bad

    def _clipped(self) -> tuple[Tensor, Tensor | None]:
        """Whether the gradients are non-finite, and the number to divide them by, or None if they are clipped here."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if _skips_by_itself(self.optimizer) and _fits_kernel(grads):
            _, bad, grad_scale = adamw.gradient_norm(grads, self.clip)
            return bad, grad_scale if self.clip else None
        norm = gradient_norm(self.model)
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)
        return ~norm.isfinite(), None

    def record(self, bad: Tensor, step: int, ids: list[int]) -> None:
        """Store the result of ``update`` for step number ``step``, and this process's sample numbers in it."""
        self.last = _Flag(bad), step, ids

    def forget_unfinished_step(self) -> None:
        """Restore the statistics of batch norms after a forward pass without an update."""
        for buffer, kept in self.counts:
            buffer.copy_(kept)

    def resolve(self) -> None:
        """Read whether the last step was finite. If not, record it, and roll back after several in a row.

        Raises:
            UserError: if ``ROLL_BACKS`` rollbacks did not help.
        """
        last, self.last = self.last, None
        if last is None or not last[0].read():
            self.in_a_row = 0 if last else self.in_a_row
            return
        _, step, ids = last
        self.in_a_row += 1
        self.bad_steps.add(step)
        self._write(step, ids)
        if self.dist.first:
            logger.warning(f"step {step} skipped: its gradients are not finite")
        if self.in_a_row == ROLL_BACK_AFTER:
            if self.roll_backs == ROLL_BACKS:
                raise UserError(
                    f"the gradients of {ROLL_BACK_AFTER} steps up to step {step} are not finite, and {ROLL_BACKS} "
                    "rollbacks to earlier weights did not help",
                    f"lower --lr, or inspect the images: mae-fast debug-step {self.folder / _name(step)}.json",
                )
            self.roll_backs += 1
            self.in_a_row = 0
            self.roll_back()
            for buffer, kept in self.counts:
                kept.copy_(buffer)

    def _write(self, step: int, ids: list[int]) -> None:
        self.rows += self.in_a_row == 1
        weights = f"{_name(step - self.in_a_row + 1)}.safetensors"  # all steps of a row have the same weights
        ids = self.dist.gather(ids)
        tensors = checkpoint.weights(self.model) if self.in_a_row == 1 and self.rows <= KEPT_WEIGHTS else {}
        if not self.dist.first:
            return
        self.folder.mkdir(exist_ok=True)
        if tensors:
            save_file(tensors, self.folder / weights)
        kept = weights if (self.folder / weights).exists() else None
        about = {"step": step, "seed": self.seed, "ids": ids, "weights": kept}
        (self.folder / f"{_name(step)}.json").write_text(json.dumps(about, indent=1))


def _name(step: int) -> str:
    return f"step-{step:08d}"
