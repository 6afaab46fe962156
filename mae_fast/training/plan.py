"""The stages, epochs and steps of a run."""

from dataclasses import dataclass

from ..data.sources import Source
from ..errors import UserError
from .config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive epochs with the same image size and the same number of images per step.

    Attributes:
        size: height and width of the images, in pixels.
        batch_size: images per process and micro-batch.
        images_per_step: images of all processes and micro-batches.
        first_epoch: number of the first epoch, from 0.
        first_step: number of the first step in the run, from 0.
    """

    size: tuple[int, int]
    batch_size: int
    images_per_step: int
    first_epoch: int
    epochs: int
    first_step: int
    steps_per_epoch: int

    @property
    def last_step(self) -> int:
        """Number of steps of the run up to the end of this stage."""
        return self.first_step + self.epochs * self.steps_per_epoch

    @property
    def pixels_per_step(self) -> int:
        """Pixels of all images of a step. Time and memory of a step are roughly proportional to it."""
        return self.images_per_step * self.size[0] * self.size[1]

    def __str__(self) -> str:
        height, width = self.size
        return f"images of {height} x {width} pixels, {self.images_per_step} per step"


@dataclass(frozen=True)
class Plan:
    """The stages of a run. Without a resolution schedule, there is a single one."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, config: RunConfig, size: tuple[int, int], source: Source, world: int = 1) -> "Plan":
        """The plan of a run. The last images of an epoch are dropped if they do not fill a step.

        Args:
            size: height and width of the model's images.
            world: the number of processes.

        Raises:
            UserError: if the source has fewer images than a step.
        """
        stages: list[Stage] = []
        first_epoch = first_step = 0
        for stage_size, epochs, batch_size in config.image_stages(size):
            images_per_step = batch_size * config.accum_iter * world
            steps_per_epoch = len(source) * config.crops_per_image // images_per_step
            if steps_per_epoch == 0:
                several = bool(stages) or epochs < config.epochs
                where = f" in the stage of {stage_size[0]} x {stage_size[1]} pixels" if several else ""
                raise UserError(
                    f"{source.root} holds {len(source)} images, fewer than one step of {images_per_step}{where}",
                    "lower --batch-size, or its BATCH in --resolution-schedule, or --accum-iter"
                    if several
                    else "lower --batch-size or --accum-iter",
                )
            stage = Stage(
                size=stage_size,
                batch_size=batch_size,
                images_per_step=images_per_step,
                first_epoch=first_epoch,
                epochs=epochs,
                first_step=first_step,
                steps_per_epoch=steps_per_epoch,
            )
            stages.append(stage)
            first_epoch, first_step = first_epoch + epochs, stage.last_step
        return cls(tuple(stages))

    @property
    def total_steps(self) -> int:
        """Number of steps of all stages."""
        return self.stages[-1].last_step

    @property
    def largest(self) -> Stage:
        """The stage whose steps take the most memory."""
        return max(self.stages, key=lambda stage: (stage.pixels_per_step, stage.size))

    def stage(self, step: int) -> Stage:
        """The stage of step number ``step``, from 0; after the last step, the last stage."""
        return next((stage for stage in self.stages if step < stage.last_step), self.stages[-1])

    def epochs_and_steps(self, step: int) -> tuple[int, int]:
        """Number of whole epochs in the first ``step`` steps, and number of steps after them."""
        stage = self.stage(step)
        epochs, steps = divmod(step - stage.first_step, stage.steps_per_epoch)
        return stage.first_epoch + epochs, steps

    def epoch(self, step: int) -> float:
        """Number of epochs in the first ``step`` steps, as a fraction."""
        epochs, steps = self.epochs_and_steps(step)
        return epochs + steps / self.stage(step).steps_per_epoch

    def step_of_epoch(self, epochs: int) -> int:
        """Number of steps of the first ``epochs`` epochs."""
        stage = next(x for x in self.stages if epochs <= x.first_epoch + x.epochs)
        return stage.first_step + (epochs - stage.first_epoch) * stage.steps_per_epoch

    def position(self, step: int) -> float:
        """Position in the learning rate schedule: ``epoch(step)`` in units of steps of the last stage.

        Without a resolution schedule, it is exactly ``step``.
        """
        stage, per_epoch = self.stage(step), self.stages[-1].steps_per_epoch
        return stage.first_epoch * per_epoch + (step - stage.first_step) * per_epoch / stage.steps_per_epoch

    def images(self, step: int) -> int:
        """Number of images in the first ``step`` steps. Each crop of an image counts."""
        return sum(steps * stage.images_per_step for steps, stage in self._steps_of_stages(step))

    def pixels(self, step: int) -> int:
        """Number of pixels of all images in the first ``step`` steps."""
        return sum(steps * stage.pixels_per_step for steps, stage in self._steps_of_stages(step))

    def _steps_of_stages(self, step: int) -> list[tuple[int, Stage]]:
        """The stages of the first ``step`` steps, each with its number of these steps."""
        return [(min(max(step, x.first_step), x.last_step) - x.first_step, x) for x in self.stages]
