from .op import Backend as Backend
from .op import attention as attention
from .op import each_sequence as each_sequence
