from .op import adamw_step as adamw_step
from .op import adamw_steps as adamw_steps
from .op import gradient_norm as gradient_norm
