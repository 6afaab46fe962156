from .op import attention as attention
