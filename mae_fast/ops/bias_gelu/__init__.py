from .op import bias_gelu as bias_gelu
