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
    """Whether to autocast to bf16: asked for, or ``auto`` on a device with bf16 matrix instructions."""
    if dtype != "auto":
        return dtype == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Task(ABC):
    """A model, its data and its loss.

    Attributes:
        config: the run's configuration, with what the task has settled in it.
        source: the images to train on.
        val: the held-out images; None if there are none.
        model: on its device, with its initial weights.
        size: height and width of the model's images, in pixels.
        pixels: what decoded pixels become: the model's channels.
        settings: JSON that must be the same when the run is resumed, besides the configuration.
        state: JSON that describes the model in a checkpoint.
        title: the run's title in messages.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        schedule: how the learning rate falls, as in ``optim.Schedule``.
        metric_names: the numbers that ``evaluation`` gives.
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
        """The optimizer of the model's trained weights."""

    @abstractmethod
    def batches(self, source: Source, loader: LoaderConfig) -> Iterator[Batch]:
        """Training batches of ``source``."""

    @abstractmethod
    def inputs(self, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor]:
        """The inputs of ``loss``: images, and noise or targets. ``micro_step``: the batch's number in the run."""

    @abstractmethod
    def loss(self, model: Any, images: Tensor, other: Tensor) -> Tensor:
        """Scalar. ``model`` is the task's own, perhaps in shards."""

    def prepare(self, batches: Iterator[Batch], dist: DistContext) -> None:  # noqa: B027
        """Look at one epoch's batches before the first step of a new run. A resumed run skips this."""

    def drawing(self) -> Callable[[], Any] | None:
        """A function that draws a picture for the trackers. All processes call it."""
        return None

    def evaluation(self) -> Callable[[], dict[str, Any]] | None:
        """A function that evaluates the current model: numbers by name, and perhaps a table. All processes call it."""
        return None

    def summary(self, metrics: Mapping[str, Any]) -> str:
        """A text about the metrics of the last evaluation, to show at the end of the run."""
        return ""


def evaluation_loader(config: RunConfig, dist: DistContext, size: tuple[int, int], pixels: PixelFormat) -> LoaderConfig:
    """How this process loads its share of held-out images."""
    return LoaderConfig(
        size=size,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        rank=dist.rank,
        world=dist.world,
        pixels=pixels,
    )


def with_exif_of(config: Config, start: str | Path | None) -> Config:
    """``config`` with the EXIF setting of the run that is resumed, or else of the run that the weights are of.

    A flag that the user has given stays.

    Args:
        start: where the weights are from.
    """
    if config.was_given("exif"):
        return config
    for path in (config.output_dir, start):
        if path and (folder := run_folder(Path(path))):
            exif = bool(read_config(folder).get("exif", False))
            if exif != config.exif:
                how = "turned as their EXIF orientation says" if exif else "left as they are stored"
                logger.info(f"images are {how}, as in {folder}; --exif or --no-exif changes that")
            return config.model_copy(update={"exif": exif})
    return config


def evaluation_config(config: Config, run: Path, model: str, size: int) -> Config:
    """``config`` with the settings that an evaluation takes from the trained ``run``: image size and EXIF setting.

    The pixels are the run's, too, see ``pixels.pixels_of_run``.

    Raises:
        UserError: if the user has given other ones, or other weights.
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
            own = "reads images in its own way" if name in PIXEL_FLAGS else f"has {value}"
            raise UserError(f"{flag} {given}: {run}, which is evaluated, {own}", f"leave {flag} out")
    return with_exif_of(config, run).model_copy(update={"input_size": size})


def held_out(batches: Iterator[AnyBatch], source: Source, config: RunConfig, dist: DistContext) -> Iterator[AnyBatch]:
    """The batches of an evaluation of ``source``. Bad images are counted; a signal ends it in all processes.

    Raises:
        Stop: after a signal.
        UserError: if too many images cannot be used.
    """
    skipped = Skipped(source, config.max_bad_fraction)
    for batch in dist.until_stopped(batches):
        skipped.add(batch)
        yield batch
