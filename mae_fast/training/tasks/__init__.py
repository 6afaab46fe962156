"""Training tasks. Their modules are imported on first use, as some imports take seconds."""

from importlib import import_module
from pathlib import Path
from typing import Any

from ...models.targets.dvae import NAME as DVAE_NAME
from ...weights.run_reader import find_checkpoint
from ...weights.trained import trained_model
from ..config import RunConfig
from ..trainer import TaskType

_TASKS = {
    "PretrainConfig": ("pretrain", "Pretraining"),
    "FinetuneConfig": ("classify", "Finetuning"),
    "LinprobeConfig": ("classify", "LinearProbing"),
    "SegmentConfig": ("segment", "Segmentation"),
    "DetectConfig": ("detect", "Detection"),
    "DvaeConfig": ("dvae", "DvaeTraining"),
}


def task_type(config: RunConfig) -> TaskType:
    """The task class of ``config``."""
    module, name = _TASKS[type(config).__name__]
    found: TaskType = getattr(import_module(f".{module}", __name__), name)
    return found


def load_model(run: Path, ema: bool = False) -> Any:
    """Load the model of a run's newest good checkpoint, in evaluation mode. ``ema``: with the averaged weights.

    Raises:
        UserError: if the checkpoint does not exist.
    """
    found = find_checkpoint(run)
    if found.state["model"]["name"] == DVAE_NAME:
        from .dvae import load_tokenizer

        return load_tokenizer(run)
    return trained_model(found, ema)
