"""A case of a benchmark, and grids of cases."""

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
        mask_ratio: share of patches that are removed, if the task removes some.
        predict_ratios: shares of the removed patches that further training steps of ours predict.
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
        """Ours first, then those of ``baselines`` that can do the task."""
        mine = list(OURS[:1] if self.task != "train" else OURS[:2] if self.device == "cpu" else OURS)
        mine += [f"{OURS[0]} {predicting(ratio)}" for ratio in self.predict_ratios]
        return mine + [name for baseline, name in TASKS[self.task].items() if baseline in baselines]


@dataclass(frozen=True)
class Grid:
    """Cases to measure: every combination of these. Without ``image_sizes``, images have each model's own size."""

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    image_sizes: tuple[int, ...]
    mask_ratios: tuple[float, ...]
    device: str
    predict_ratios: tuple[float, ...] = ()

    def cases(self) -> list[Case]:
        """Each case once; the mask ratio makes no difference to a task that does not mask.

        Raises:
            UserError: if a size is not a multiple of a model's patch size, a ratio keeps or removes no patch, or a
                predict ratio is out of range.
        """
        for ratio in self.predict_ratios:
            if not 0 < ratio <= 1:
                raise UserError(f"--predict-ratios {ratio:g} is out of range", "give shares above 0 and up to 1")
        fewer = tuple(
            dict.fromkeys(ratio for ratio in self.predict_ratios if ratio < 1)
        )  # our step itself is that of 1
        found: dict[Case, None] = {}
        for task, model, dtype, batch in product(self.tasks, self.models, self.dtypes, self.batches):
            sizes = self.image_sizes or (IMAGE_SIZE[model],)
            for size, ratio in product(sizes, self.mask_ratios if task in MASKED else (0.75,)):
                patch = PATCH[model]
                if size < patch or size % patch:
                    raise UserError(f"--image-sizes {size}: {model} takes multiples of its patches' {patch} pixels")
                patches = (size // patch) ** 2
                if not 0 < ratio < 1 or not 0 < int(patches * (1 - ratio)) < patches:
                    raise UserError(f"--mask-ratios {ratio:g} leaves no patch of {patches} visible, or none removed")
                predicted = fewer if task == "train" else ()
                found[Case(task, model, batch, dtype, size, ratio, self.device, predicted)] = None
        return list(found)
