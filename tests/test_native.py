from pathlib import Path

import pytest

from mae_fast.ops._native import has_native, native_error

CPU_OPS = sorted(path.stem for path in Path(__file__).parents[1].glob("csrc/cpu/*.cpp"))


def test_extension_is_loaded():
    assert native_error() is None
    assert CPU_OPS


@pytest.mark.parametrize("op", CPU_OPS)
def test_cpp_file_registers_its_op(op):
    assert has_native(op, "CPU")


def test_unknown_op_has_no_kernel():
    assert not has_native("no_such_op", "CPU")
    assert not has_native("no_such_op", "CUDA")
