"""Converts weights between the layouts of libraries: ``convert(weights, detect(weights), "timm")``.

The layouts are "ours" (as published), "timm", "transformers" (its files, and 4.x in memory), "transformers5" (5.x in
memory), "lightly" and "mmpretrain". Encoders in checkpoints of DINO and MoCo v3 are read as "ours".
"""

from .convert import Converted as Converted
from .convert import convert as convert
from .convert import detect as detect
from .layouts import LAYOUTS as LAYOUTS
