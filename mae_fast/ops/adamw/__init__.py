from .op import adamw_step as adamw_step
