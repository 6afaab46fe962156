from .op import random_masking as random_masking
