"""The models, as plain ``nn.Module`` classes."""

from .mae import CONFIGS as CONFIGS
from .mae import MaskedAutoencoderViT as MaskedAutoencoderViT
from .mae import build as build
from .vit import VisionTransformer as VisionTransformer
