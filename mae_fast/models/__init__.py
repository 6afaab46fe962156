"""The models, as plain ``nn.Module`` classes."""

from .dense import DenseEncoder as DenseEncoder
from .dense import SimpleFeaturePyramid as SimpleFeaturePyramid
from .mae import CONFIGS as CONFIGS
from .mae import MaskedAutoencoderViT as MaskedAutoencoderViT
from .mae import build as build
from .vit import VisionTransformer as VisionTransformer
