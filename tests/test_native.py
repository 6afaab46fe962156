import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mae_fast.ops.native import has_kernel, has_native, native_error
from mae_fast.ops.registry import ops

CSRC = Path(__file__).parents[1] / "csrc"
FILES = {key: sorted((CSRC / key.lower()).glob("*.c*")) for key in ("CPU", "CUDA")}
KERNELS = {
    key: [(path.stem, kernel) for path in paths for kernel in re.findall(r'm\.impl\("(\w+)"', path.read_text())]
    for key, paths in FILES.items()
}


def test_extension_is_loaded():
    assert native_error() is None
    assert len(KERNELS["CPU"]) > 15
    assert KERNELS["CUDA"] == [("random_masking", "random_masking")]


@pytest.mark.parametrize(("file", "kernel"), KERNELS["CPU"])
def test_every_cpu_kernel_is_registered(file, kernel):
    assert has_native(kernel, "CPU")


def has_nvcc() -> bool:
    """Whether there is an nvcc of torch's major version of CUDA."""
    if not (shutil.which("nvcc") and torch.version.cuda):
        return False
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return f"release {torch.version.cuda.split('.')[0]}." in version


@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc and torch built for the same major version of CUDA")
@pytest.mark.parametrize(("file", "kernel"), KERNELS["CUDA"])
def test_every_cuda_kernel_is_registered(file, kernel):
    assert has_native(kernel, "CUDA")


@pytest.mark.parametrize("key", FILES)
def test_source_files_are_named_after_their_op(key):
    schemas = {op.name: op.schemas for op in ops()}
    assert {path.stem for path in FILES[key]} == {file for file, _ in KERNELS[key]}
    for file, kernel in KERNELS[key]:
        assert kernel in schemas[file]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_forward_and_backward_have_kernels_on_the_same_devices(device):
    schemas = [schema for op in ops() for schema in op.schemas]
    pairs = [schema for schema in schemas if f"{schema}_backward" in schemas]
    assert len(pairs) > 5
    for schema in pairs:
        assert has_kernel(schema, device) == has_kernel(f"{schema}_backward", device), schema


def test_every_folder_in_ops_is_an_op():
    folders = {path.parent.name for path in (CSRC.parent / "mae_fast" / "ops").glob("*/__init__.py")}
    assert {op.name for op in ops()} == folders
    for op in ops():
        source = (CSRC.parent / "mae_fast" / "ops" / op.name / "op.py").read_text()
        assert len(op.schemas) == source.count("library.define(")


def test_unknown_op_has_no_kernel():
    assert not has_native("no_such_op", "CPU")
    assert not has_native("no_such_op", "CUDA")
