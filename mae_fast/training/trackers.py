"""The trackers of a run: its log, TensorBoard, Weights & Biases."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError, first_line
from .run_dir import RunFolder


class Track:
    """Sends scalars and pictures of a run to the trackers; the log always gets the scalars.

    Args:
        config: the configuration of the run, for Weights & Biases.
        step: the step from which the run resumes. TensorBoard hides entries of later steps, as they are written again.

    Raises:
        UserError: if a library is missing, or Weights & Biases refuses the run.
    """

    def __init__(self, run: RunFolder, log_dir: Path | None, wandb: str | None, config: dict[str, Any], step: int):
        self.run = run
        self.board: Any = None
        self.wandb: Any = None
        if log_dir is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--log-dir needs TensorBoard", "pip install 'mae_fast[track]'") from error
            self.board = SummaryWriter(str(log_dir), purge_step=step + 1)
        if wandb is not None:
            try:
                import wandb as library
            except ImportError as error:
                raise UserError("--wandb needs Weights & Biases", "pip install wandb") from error
            name = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16]  # the same when the run resumes
            try:
                self.wandb = library.init(project=wandb, id=name, resume="allow", dir=str(run.path), config=config)
            except library.errors.Error as error:
                raise UserError(
                    f"--wandb {wandb}: {first_line(error)}",
                    "log in with 'wandb login', or set the environment variable WANDB_MODE=offline",
                ) from error

    @property
    def wants_pictures(self) -> bool:
        """Whether a tracker shows pictures."""
        return bool(self.board or self.wandb)

    def scalars(self, entry: dict[str, Any]) -> None:
        """Write a line of the log, and send its numbers to the trackers as scalars at ``entry["step"]``."""
        self.run.log(entry)
        curves = {name: x for name, x in entry.items() if name != "step" and isinstance(x, int | float)}
        if self.board:
            for name, value in curves.items():
                self.board.add_scalar(name, value, entry["step"])
        if self.wandb:
            self.wandb.log(curves, step=entry["step"])

    def picture(self, step: int, image: Image.Image) -> None:
        """Send a picture of reconstructions to the trackers."""
        if self.board:
            self.board.add_image("reconstructions", np.asarray(image), step, dataformats="HWC")
        if self.wandb:
            import wandb as library

            self.wandb.log({"reconstructions": library.Image(image)}, step=step)

    def close(self) -> None:
        """Flush and close the trackers."""
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()
