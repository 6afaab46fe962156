from .op import add_layer_norm as add_layer_norm
