"""The MAE kernels: each op in a folder of its own, contract in ``op.py``, specification in ``reference.py``."""
