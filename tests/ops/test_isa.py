"""The C++ kernels with each instruction set of this CPU, selected by ``ONEDNN_MAX_CPU_ISA``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mae_fast.ops.native import cpu_isa, has_native
from mae_fast.ops.registry import ops

HERE = Path(__file__).parent
LEVELS = ("baseline", "avx2", "avx512")
LIMITS = {"baseline": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}
# Tests of values, gradients and exactness. The dispatcher contracts do not depend on the instruction set.
CHOSEN = "(values_and_gradients and contiguous) or gather_is_exact or mixed_dtypes or uint8 or equals_reference"


@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    if LEVELS.index(level) > LEVELS.index(cpu_isa()) and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        pytest.skip(f"this processor has {cpu_isa()} only")
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": LIMITS[level], "OMP_NUM_THREADS": "1"}
    asked = "from mae_fast.ops.native import cpu_isa; print(cpu_isa())"
    assert subprocess.check_output([sys.executable, "-c", asked], env=env, text=True).strip() == level
    files = [f"test_{op.name}.py" for op in ops() if any(has_native(schema, "CPU") for schema in op.schemas)]
    assert files
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN, *files]
    result = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
