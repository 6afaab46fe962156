"""FLOPs of a step, counted by torch on the eager model without computing anything."""

from torch.utils.flop_counter import FlopCounterMode

from .case import Case
from .contenders import EAGER, build, images, noise


def flops(case: Case) -> float:
    """Of one image: the products and the attention of the published model; a contender that saves some of them is as
    much faster. A multiply-add is two, the optimiser is left out."""
    x, masks = (made(case.model, 1, case.image_size).to("meta") for made in (images, noise))
    step = build(EAGER.get(case.task, "reference"), case.model, x, False, case.task, masks, case.mask_ratio)
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())
