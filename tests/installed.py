"""Run the README's drop-in example with an installed wheel: ``python tests/installed.py``, outside of .venv."""

import re
from pathlib import Path

import torch

import mae_fast
from mae_fast.ops.native import cpu_isa, cuda_error, native_error

ROOT = Path(__file__).parents[1]
assert Path(mae_fast.__file__).parents[1] != ROOT, "this is the source tree, not an installed wheel"
assert native_error() is None, native_error()

example = re.search(r"start:drop-in\] -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
names = {"imgs": torch.randn(2, 3, 224, 224)}
exec(example, names)
names["loss"].backward()
assert names["loss"].isfinite()
assert names["mask"].sum() == 2 * 147
print(f"mae_fast {mae_fast.__version__}, torch {torch.__version__}, kernels for {cpu_isa()}: loss {names['loss']:.4f}")
print(f"CUDA C++ kernels: {cuda_error() or 'loaded'}")
