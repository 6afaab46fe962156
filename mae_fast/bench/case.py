"""Benchmark cases, and grids of cases."""

from dataclasses import dataclass
from itertools import product

from ..errors import UserError
from .contenders import IMAGE_SIZE, OURS, PATCH, TASKS, predicting

MASKED = ("train", "reconstruct")  # tasks that remove patches


@dataclass(frozen=True)
class Case:
    """One task of one model on one device.

    Attributes:
        image_size: side of the square images in pixels.
        mask_ratio: share of removed patches, for tasks that mask.
        predict_ratios: predict ratios of additional training steps of ours.
    """

    task: str
    model: str
    batch: int
    dtype: str
    image_size: int
    mask_ratio: float = 0.75
    device: str = "cpu"
    predict_ratios: tuple[float, ...] = ()

    @property
    def bf16(self) -> bool:
        return self.dtype == "bf16"

    @property
    def trains(self) -> bool:
        return self.task in ("train", "finetune")

    def __str__(self) -> str:
        size = "" if self.image_size == IMAGE_SIZE[self.model] else f" {self.image_size} px"
        ratio = "" if self.mask_ratio == 0.75 else f" mask {self.mask_ratio:g}"
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.task} {self.model} batch {self.batch} {self.dtype}{size}{ratio}{where}"

    def contenders(self, baselines: tuple[str, ...]) -> list[str]:
        """The names of the contenders: ours first, then those of ``baselines`` that support the task."""
        mine = list(OURS[:1] if self.task != "train" else OURS[:2] if self.device == "cpu" else OURS)
        mine += [f"{OURS[0]} {predicting(ratio)}" for ratio in self.predict_ratios]
        return mine + [name for baseline, name in TASKS[self.task].items() if baseline in baselines]


@dataclass(frozen=True)
class Grid:
    """All combinations of these settings. Without ``image_sizes``, images have the default size of each model."""

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    image_sizes: tuple[int, ...]
    mask_ratios: tuple[float, ...]
    device: str
    predict_ratios: tuple[float, ...] = ()

    def cases(self) -> list[Case]:
        """All cases, without duplicates. Tasks without masks ignore the mask ratio.

        Raises:
            UserError: if an image size is not a multiple of the patch size, a mask ratio removes no patch or all
                patches, or a predict ratio is out of range.
        """
        for ratio in self.predict_ratios:
            if not 0 < ratio <= 1:
                raise UserError(f"--predict-ratios {ratio:g} is out of range", "give shares above 0 and up to 1")
        # Our ordinary step has predict ratio 1.
        fewer = tuple(dict.fromkeys(ratio for ratio in self.predict_ratios if ratio < 1))
        found: dict[Case, None] = {}
        for task, model, dtype, batch in product(self.tasks, self.models, self.dtypes, self.batches):
            sizes = self.image_sizes or (IMAGE_SIZE[model],)
            for size, ratio in product(sizes, self.mask_ratios if task in MASKED else (0.75,)):
                patch = PATCH[model]
                if size < patch or size % patch:
                    raise UserError(
                        f"--image-sizes {size} is not a multiple of the patch size of {model}",
                        f"give a multiple of {patch}",
                    )
                patches = (size // patch) ** 2
                if not 0 < ratio < 1 or not 0 < int(patches * (1 - ratio)) < patches:
                    raise UserError(
                        f"--mask-ratios {ratio:g} removes none or all of {patches} patches",
                        "give a ratio above 0 and below 1 that keeps and removes at least one patch",
                    )
                predicted = fewer if task == "train" else ()
                found[Case(task, model, batch, dtype, size, ratio, self.device, predicted)] = None
        return list(found)
