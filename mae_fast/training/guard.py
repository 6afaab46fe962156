"""Steps whose gradients are not finite: they are left out, written down, and many of them end the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UserError

ROLL_BACK_AFTER = 5  # such steps in a row: then the weights are to blame, not an image
ROLL_BACKS = 3  # then the run ends
KEPT_WEIGHTS = 3  # files of weights of such steps


def gradient_norm(model: nn.Module) -> Tensor:
    """The L2 norm of all gradients, whole ones, scalar on the model's device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class Guard:
    """Takes the optimiser's steps, but for those of gradients that are not finite.

    On a GPU that is decided there, and the host learns of it at the next step, so that no step waits for it.

    Args:
        folder: for ``step-<step>.json`` of each such step and the weights it had; None: this process writes nothing.
        roll_back: called when the weights are to blame.
        tell: called with a line for each such step.

    Attributes:
        bad_steps: such steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: Path | None,
        roll_back: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder
        self.roll_back, self.tell = roll_back, tell
        self.bad_steps: set[int] = set()
        self.in_a_row = self.roll_backs = 0
        self.last: tuple[Tensor, dict[str, Any]] | None = None

    def step(self, about: dict[str, Any], clip: float | None = None) -> None:
        """Take a step with the gradients as they are, scaled to a norm of at most ``clip``; ``about``: any JSON."""
        self.settle()
        norm = gradient_norm(self.model)
        bad = ~norm.isfinite()
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, norm)
        if norm.is_cuda:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # torch's fused step heeds it
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.last = bad, about

    def settle(self) -> None:
        """Learn how the last step went.

        Raises:
            UserError: after too many that were not finite.
        """
        last, self.last = self.last, None
        if last is None or not last[0]:
            self.in_a_row = 0 if last else self.in_a_row
            return
        self.in_a_row += 1
        step = last[1]["step"]
        self.bad_steps.add(step)
        self._write(step, last[1])
        self.tell(f"step {step} left out: its gradients are not finite")
        if self.in_a_row == ROLL_BACK_AFTER:
            if self.roll_backs == ROLL_BACKS:
                raise UserError(
                    f"the gradients of step {step} and {ROLL_BACK_AFTER - 1} before it are not finite, and going back "
                    f"to good weights has not helped {ROLL_BACKS} times; lower --lr, or look at the steps' images"
                )
            self.roll_backs += 1
            self.in_a_row = 0
            self.roll_back()

    def _write(self, step: int, about: dict[str, Any]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        weights = self.folder / f"step-{step:08d}.safetensors"
        if self.in_a_row == 1 and len(list(self.folder.glob("*.safetensors"))) < KEPT_WEIGHTS:
            state = self.model.state_dict()
            if not any(isinstance(x, DTensor) for x in state.values()):
                save_file({name: x.detach().cpu().contiguous() for name, x in state.items()}, weights)
        about = about | {"weights": weights.name if weights.exists() else None}
        (self.folder / f"step-{step:08d}.json").write_text(json.dumps(about, indent=1))
