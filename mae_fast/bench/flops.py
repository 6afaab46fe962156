"""FLOPs of benchmark steps."""

from ..models.flops import Sizes, block_flops, linear_flops, train_flops
from ..models.sizes import MAE_ALIASES, MAE_CONFIGS
from .case import Case
from .contenders import MODELS


def flops(case: Case, predict_ratio: float = 1.0) -> float:
    """FLOPs per image of the published model in eager torch: matrix products and attention, without the optimizer.

    This is the count for all contenders, even those that compute less. It does not include gradients of the pixels.
    """
    sizes = Sizes.of_config(MAE_CONFIGS[MAE_ALIASES[MODELS[case.model]]], case.image_size)
    embedding = linear_flops(sizes.patches, sizes.values, sizes.width)
    if case.task == "train":
        return train_flops(sizes, case.mask_ratio, predict_ratio=predict_ratio).total - embedding
    if case.task == "reconstruct":
        return train_flops(sizes, case.mask_ratio).total / 3
    blocks = block_flops(1 + sizes.patches, sizes.width, sizes.depth, sizes.mlp_ratio).total
    if case.task == "infer":
        return blocks + embedding
    head = linear_flops(1, sizes.width, 1000)
    return 3 * (blocks + head) + 2 * embedding
