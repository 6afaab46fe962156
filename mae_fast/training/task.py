"""The interface of a training task."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..data.loader import Batch, LoaderConfig, Skipped
from ..data.pixel_format import PixelFormat
from ..data.sources import Source
from ..errors import UserError
from ..weights.run_reader import read_config, run_folder
from .config import PIXEL_FLAGS, Config, RunConfig
from .distributed import DistContext

logger = logging.getLogger(__name__)

AnyBatch = TypeVar("AnyBatch", bound=Batch)


def use_bf16(dtype: str, device: torch.device) -> bool:
    """Whether to autocast to bf16: if ``dtype`` is "bf16", or "auto" and the device has bf16 matrix instructions."""
    if dtype != "auto":
        return dtype == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Task(ABC):
    """A model, its data and its loss.

    Attributes:
        config: the run's configuration, with values that the task has determined.
        source: the images to train on.
        val: the held-out images; None if there are none.
        model: the model with its initial weights, on its device.
        size: height and width of the model's images, in pixels.
        pixels: the format of decoded pixels.
        settings: JSON that must not change when the run is resumed, in addition to the configuration.
        state: JSON that describes the model in a checkpoint.
        title: the title of the run in messages.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        schedule: the learning rate schedule, the ``kind`` of ``optim.Schedule``.
        metric_names: names of the metrics that ``evaluation`` returns.
    """

    config: RunConfig
    source: Source
    val: Any = None
    model: Any
    size: tuple[int, int]
    pixels: PixelFormat
    settings: dict[str, Any]
    state: dict[str, Any]
    title: str
    eval_every: int = 1
    schedule: Literal["cosine", "linear", "step"] = "cosine"
    metric_names: tuple[str, ...] = ()

    @abstractmethod
    def optimizer(self, lr: float, working_dtype: torch.dtype | None) -> torch.optim.Optimizer:
        """Create the optimizer of the model's trained weights."""

    @abstractmethod
    def batches(self, source: Source, loader: LoaderConfig) -> Iterator[Batch]:
        """Iterate over training batches of ``source``."""

    @abstractmethod
    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        """The inputs of ``loss``: images, and noise or targets. ``micro_step``: the batch's number in the run."""

    @abstractmethod
    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        """The scalar loss. ``model`` is the task's model, which may be sharded."""

    def prepare(self, batches: Iterator[Batch], dist: DistContext) -> None:  # noqa: B027
        """Process the batches of one epoch before the first step of a new run. Resumed runs do not call it."""

    def drawing(self) -> Callable[[], Any] | None:
        """A function that draws a picture for the trackers, or None. All processes must call the function."""
        return None

    def evaluation(self) -> Callable[[], dict[str, Any]] | None:
        """A function that evaluates the current model, or None. It returns metrics by name, and optionally a table.

        All processes must call the function.
        """
        return None

    def summary(self, metrics: Mapping[str, Any]) -> str:
        """A text about the metrics of the last evaluation, shown at the end of the run."""
        return ""


def evaluation_loader(config: RunConfig, dist: DistContext, size: tuple[int, int], pixels: PixelFormat) -> LoaderConfig:
    """The loader configuration for this process's share of held-out images."""
    return LoaderConfig(
        size=size,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        rank=dist.rank,
        world=dist.world,
        pixels=pixels,
    )


def with_exif_of(config: Config, start: str | Path | None) -> Config:
    """``config`` with the EXIF setting of the resumed run, else of the run that the weights belong to.

    A flag that the user has given has priority.

    Args:
        start: the origin of the weights.
    """
    if config.was_given("exif"):
        return config
    for path in (config.output_dir, start):
        if path and (folder := run_folder(Path(path))):
            exif = bool(read_config(folder).get("exif", False))
            if exif != config.exif:
                how = "rotated by their EXIF orientation" if exif else "not rotated by their EXIF orientation"
                logger.info(f"images are {how}, as in {folder}; --exif or --no-exif changes that")
            return config.model_copy(update={"exif": exif})
    return config


def evaluation_config(config: Config, run: Path, model: str, size: int) -> Config:
    """``config`` with the image size and EXIF setting of the trained ``run``, for an evaluation.

    ``pixels.pixels_of_run`` has the pixel settings of the run.

    Raises:
        UserError: if the user has given other settings or other weights.
    """
    folder = run_folder(run)
    saved = read_config(folder) if folder else {}
    expected: dict[str, Any] = {"model": model, "input_size": size} | {name: saved.get(name) for name in PIXEL_FLAGS}
    if run == config.output_dir:
        expected["weights"] = saved.get("weights")
    for name, value in expected.items():
        given = getattr(config, name)
        if config.was_given(name) and given != value:
            flag = f"--{name.replace('_', '-')}"
            own = "has its own pixel settings" if name in PIXEL_FLAGS else f"has {value}"
            raise UserError(f"{flag} {given}: the evaluated run {run} {own}", f"leave {flag} out")
    return with_exif_of(config, run).model_copy(update={"input_size": size})


def held_out(batches: Iterator[AnyBatch], source: Source, config: RunConfig, dist: DistContext) -> Iterator[AnyBatch]:
    """Iterate over the batches of an evaluation of ``source``, and count bad images.

    Raises:
        Stop: in all processes, after a signal.
        UserError: if too many images cannot be used.
    """
    skipped = Skipped(source, config.max_bad_fraction)
    for batch in dist.until_stopped(batches):
        skipped.add(batch)
        yield batch
