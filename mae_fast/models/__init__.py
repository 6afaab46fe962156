"""The models, as ordinary ``nn.Module`` classes.

They are imported on first use, because ``sizes`` and ``flops`` work without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dense import DenseEncoder as DenseEncoder
    from .dense import SimpleFeaturePyramid as SimpleFeaturePyramid
    from .mae import MaskedAutoencoderViT as MaskedAutoencoderViT
    from .mae import build as build
    from .rollout import AttentionMaps as AttentionMaps
    from .rollout import attention_maps as attention_maps
    from .vit import VisionTransformer as VisionTransformer

_MODULES = {
    "DenseEncoder": "dense",
    "SimpleFeaturePyramid": "dense",
    "MaskedAutoencoderViT": "mae",
    "build": "mae",
    "AttentionMaps": "rollout",
    "attention_maps": "rollout",
    "VisionTransformer": "vit",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
