"""CONTRIBUTING.md: the files and names in it exist, and its example op works."""

import re
from pathlib import Path
from typing import Any

import op_cases
import pytest
import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def test_named_files_exist():
    paths = set(re.findall(r"(?:mae_fast|csrc|tests|benchmarks|docs)/[\w/.]*\w", TEXT))
    assert len(paths) > 10
    assert not [path for path in paths if "scale_images" not in path and not (ROOT / path).exists()]
    targets = set(re.findall(r"make ([a-z-]+)[` \n]", TEXT))
    assert targets >= {"install", "test", "check", "sanitize", "bench-ops"}
    makefile = (ROOT / "Makefile").read_text()
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("tests/support.py", ["def assert_no_worse_than_eager"]),
        ("tests/op_cases.py", ["def compare", "def laid_out", "def randn", "FLOATING =", "LAYOUTS ="]),
        ("mae_fast/errors.py", ["class UserError"]),
        ("tests/gpu_proof/budget.py", ["def _see_none"]),
        ("benchmarks/ops/problems.py", ["class Problem:", "def _in_blocks", "low = ", "rows, hidden = "]),
        ("csrc/cpu/simd.h", ["#define MAE_KERNEL", "void parallel_kernel", "Wide<T> widen", "narrow(", "read_all"]),
        ("csrc/common.h", ["#define MAE_CHECK_VALUE", "void dispatch_floating"]),
    ],
)
def test_names_in_the_text_exist(file, names):
    text = (ROOT / file).read_text()
    assert not [name for name in names if name not in text]


def test_the_example_op_passes_its_tests():
    names: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor, "Any": Any, "pytest": pytest, **vars(op_cases)}
    for block in PYTHON[:3]:  # reference, contract, tests
        exec(block, names)
    test = names["test_values_and_gradients"]
    (layouts, dtypes, shapes) = (mark.args[1] for mark in reversed(test.pytestmark))
    assert (len(layouts), len(dtypes), len(shapes)) == (4, 4, 5)
    for layout, dtype, shape in ((a, b, c) for a in layouts for b in dtypes for c in shapes):
        test(shape, dtype, layout)
    names["test_opcheck"]()
    with pytest.raises(ValueError, match=r"scale must be \[N\] for x \[N, T, D\], got \[3\], \[2, 4, 5\]"):
        names["scale_images"](torch.zeros(2, 4, 5), torch.zeros(3))
