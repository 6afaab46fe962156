"""What can be trained. Modules are imported when they are needed: some take seconds."""

from importlib import import_module

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
    """The class of the task that ``config`` configures."""
    module, name = _TASKS[type(config).__name__]
    found: TaskType = getattr(import_module(f".{module}", __name__), name)
    return found
