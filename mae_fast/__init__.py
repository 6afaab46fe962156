"""Masked autoencoders (He et al., CVPR 2022) on fused kernels.

``import mae_fast as models_mae``, or ``as models_vit``, gives the factories and classes of facebookresearch/mae, under
their names. torch and the models are imported on first use. ``pretrain``, ``finetune``, ... are the commands of
``mae-fast`` as functions.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import attention as attention
    from .api import convert as convert
    from .api import detect as detect
    from .api import export as export
    from .api import features as features
    from .api import finetune as finetune
    from .api import knn as knn
    from .api import linprobe as linprobe
    from .api import load as load
    from .api import logreg_probe as logreg_probe
    from .api import predict as predict
    from .api import pretrain as pretrain
    from .api import reconstruct as reconstruct
    from .api import segment as segment
    from .api import train_dvae as train_dvae
    from .models.mae import MaskedAutoencoderViT as MaskedAutoencoderViT
    from .models.vit import VisionTransformer as VisionTransformer
    from .ops.patches import patchify as patchify
    from .ops.patches import unpatchify as unpatchify
    from .weights.create import create_model as create_model

__version__ = "0.2.0"  # the only definition of the version

_MODULES = {  # names that are imported on first use
    "MaskedAutoencoderViT": "mae_fast.models.mae",
    "VisionTransformer": "mae_fast.models.vit",
    "create_model": "mae_fast.weights.create",
    "patchify": "mae_fast.ops.patches",
    "unpatchify": "mae_fast.ops.patches",
}
_COMMANDS = (
    "attention", "convert", "detect", "export", "features", "finetune", "knn", "linprobe", "load", "logreg_probe",
    "predict", "pretrain", "reconstruct", "segment", "train_dvae",
)  # fmt: skip


def mae_vit_base_patch16_dec512d8b(**kwargs: Any) -> "MaskedAutoencoderViT":
    """ViT-B/16 encoder (768 wide, 12 blocks), decoder of 8 blocks, 512 wide. ``kwargs`` are passed to the class."""
    from .models.mae import build

    return build("mae_vit_base_patch16_dec512d8b", **kwargs)


def mae_vit_large_patch16_dec512d8b(**kwargs: Any) -> "MaskedAutoencoderViT":
    """ViT-L/16 encoder (1024 wide, 24 blocks), decoder of 8 blocks, 512 wide. ``kwargs`` are passed to the class."""
    from .models.mae import build

    return build("mae_vit_large_patch16_dec512d8b", **kwargs)


def mae_vit_huge_patch14_dec512d8b(**kwargs: Any) -> "MaskedAutoencoderViT":
    """ViT-H/14 encoder (1280 wide, 32 blocks), decoder of 8 blocks, 512 wide. ``kwargs`` are passed to the class."""
    from .models.mae import build

    return build("mae_vit_huge_patch14_dec512d8b", **kwargs)


def mae_vit_small_patch16_dec256d8b(**kwargs: Any) -> "MaskedAutoencoderViT":
    """ViT-S/16 encoder (384 wide, 12 blocks), decoder of 8 blocks, 256 wide; not in the paper."""
    from .models.mae import build

    return build("mae_vit_small_patch16_dec256d8b", **kwargs)


def mae_vit_tiny_patch16_dec128d8b(**kwargs: Any) -> "MaskedAutoencoderViT":
    """ViT-Ti/16 encoder (192 wide, 12 blocks), decoder of 8 blocks, 128 wide; not in the paper."""
    from .models.mae import build

    return build("mae_vit_tiny_patch16_dec128d8b", **kwargs)


def mae_vit_tiny_patch4_dec96d2b(**kwargs: Any) -> "MaskedAutoencoderViT":
    """Small model of the demo, for 32-pixel images on a CPU (128 wide, 4 blocks; decoder of 2 blocks, 96 wide)."""
    from .models.mae import build

    return build("mae_vit_tiny_patch4_dec96d2b", **kwargs)


mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b
mae_vit_small_patch16 = mae_vit_small_patch16_dec256d8b
mae_vit_tiny_patch16 = mae_vit_tiny_patch16_dec128d8b
mae_vit_tiny_patch4 = mae_vit_tiny_patch4_dec96d2b


def vit_base_patch16(**kwargs: Any) -> "VisionTransformer":
    """ViT-B/16 classifier (768 wide, 12 blocks). ``kwargs`` are passed to the class."""
    from .models.vit import build

    return build("vit_base_patch16", **kwargs)


def vit_large_patch16(**kwargs: Any) -> "VisionTransformer":
    """ViT-L/16 classifier (1024 wide, 24 blocks). ``kwargs`` are passed to the class."""
    from .models.vit import build

    return build("vit_large_patch16", **kwargs)


def vit_huge_patch14(**kwargs: Any) -> "VisionTransformer":
    """ViT-H/14 classifier (1280 wide, 32 blocks). ``kwargs`` are passed to the class."""
    from .models.vit import build

    return build("vit_huge_patch14", **kwargs)


def vit_small_patch16(**kwargs: Any) -> "VisionTransformer":
    """ViT-S/16 classifier (384 wide, 12 blocks); not in the paper."""
    from .models.vit import build

    return build("vit_small_patch16", **kwargs)


def vit_tiny_patch16(**kwargs: Any) -> "VisionTransformer":
    """ViT-Ti/16 classifier (192 wide, 12 blocks); not in the paper."""
    from .models.vit import build

    return build("vit_tiny_patch16", **kwargs)


def vit_tiny_patch4(**kwargs: Any) -> "VisionTransformer":
    """Small classifier of the demo, for 32-pixel images on a CPU (128 wide, 4 blocks)."""
    from .models.vit import build

    return build("vit_tiny_patch4", **kwargs)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_COMMANDS} - {"Any", "TYPE_CHECKING"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    if name in _COMMANDS:
        from .errors import train_packages

        with train_packages():
            from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'mae_fast' has no attribute {name!r}")
