"""The MAE kernels: each op in a folder of its own, contract in ``op.py``, specification in ``reference.py``."""

from . import native as native  # loads the compiled kernels, which register themselves
