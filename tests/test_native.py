import re
from pathlib import Path

import pytest

from mae_fast.ops._native import has_native, native_error

FILES = sorted(Path(__file__).parents[1].glob("csrc/cpu/*.cpp"))
CPU_OPS = [op for path in FILES for op in re.findall(r'm\.impl\("(\w+)"', path.read_text())]


def test_extension_is_loaded():
    assert native_error() is None
    assert {path.stem for path in FILES} == {"random_masking", "embed_visible", "decoder_tokens", "masked_loss"}
    assert len(CPU_OPS) == 9  # backwards included


@pytest.mark.parametrize("op", CPU_OPS)
def test_every_kernel_in_csrc_is_registered(op):
    assert has_native(op, "CPU")


def test_unknown_op_has_no_kernel():
    assert not has_native("no_such_op", "CPU")
    assert not has_native("no_such_op", "CUDA")
