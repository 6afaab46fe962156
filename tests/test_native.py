import re
import shutil
from pathlib import Path

import pytest
import torch

from mae_fast.ops.native import has_native, native_error

CSRC = Path(__file__).parents[1] / "csrc"
FILES = {key: sorted((CSRC / key.lower()).glob("*.c*")) for key in ("CPU", "CUDA")}
OPS = {
    key: [op for path in paths for op in re.findall(r'm\.impl\("(\w+)"', path.read_text())]
    for key, paths in FILES.items()
}


def test_extension_is_loaded():
    assert native_error() is None
    assert {path.stem for path in FILES["CPU"]} == {
        "random_masking",
        "embed_visible",
        "decoder_tokens",
        "masked_loss",
        "attention",
        "add_layer_norm",
        "bias_gelu",
        "linear",
        "adamw",
    }
    assert len(OPS["CPU"]) == 18  # backwards included
    assert OPS["CUDA"] == ["random_masking"]


@pytest.mark.parametrize("op", OPS["CPU"])
def test_every_kernel_in_csrc_is_registered(op):
    assert has_native(op, "CPU")


@pytest.mark.skipif(not (shutil.which("nvcc") and torch.version.cuda), reason="needs nvcc and a CUDA build of torch")
@pytest.mark.parametrize("op", OPS["CUDA"])
def test_every_cuda_kernel_is_registered(op):
    assert has_native(op, "CUDA")


def test_unknown_op_has_no_kernel():
    assert not has_native("no_such_op", "CPU")
    assert not has_native("no_such_op", "CUDA")
