"""One case of a benchmark, and the grid of them that flags ask for."""

from dataclasses import dataclass
from itertools import product

from ..errors import UserError
from .contenders import IMAGE_SIZE, OURS, PATCH, TASKS

MASKED = ("train", "reconstruct")  # tasks that remove patches


@dataclass(frozen=True)
class Case:
    """What is measured: one task of one model, and where.

    Attributes:
        image_size: side of the square images in pixels.
        mask_ratio: share of patches that are removed, where a task removes some.
    """

    task: str
    model: str
    batch: int
    dtype: str
    image_size: int
    mask_ratio: float = 0.75
    device: str = "cpu"

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

    def contenders(self, rivals: tuple[str, ...]) -> list[str]:
        """Ours first, then those who stand for ``rivals``."""
        mine = list(OURS[:1] if self.task != "train" else OURS[:2] if self.device == "cpu" else OURS)
        return mine + [name for rival, name in TASKS[self.task].items() if rival in rivals]


def grid(
    tasks: tuple[str, ...],
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    batches: tuple[int, ...],
    image_sizes: tuple[int, ...],
    mask_ratios: tuple[float, ...],
    device: str,
) -> list[Case]:
    """Every combination, each once: a mask ratio is of no matter where nothing is masked.

    Args:
        image_sizes: none: each model's own.

    Raises:
        UserError: if a size is no multiple of a model's patch, or a ratio leaves no patch visible, or none removed.
    """
    cases: dict[Case, None] = {}
    for task, model, dtype, batch in product(tasks, models, dtypes, batches):
        for size, ratio in product(image_sizes or (IMAGE_SIZE[model],), mask_ratios if task in MASKED else (0.75,)):
            if size < PATCH[model] or size % PATCH[model]:
                raise UserError(f"--image-sizes {size}: {model} takes multiples of its patches' {PATCH[model]} pixels")
            patches = (size // PATCH[model]) ** 2
            if not 0 < ratio < 1 or not 0 < int(patches * (1 - ratio)) < patches:
                raise UserError(f"--mask-ratios {ratio:g} leaves no patch of {patches} visible, or none removed")
            cases[Case(task, model, batch, dtype, size, ratio, device)] = None
    return list(cases)
