from .op import mlp as mlp
