"""CONTRIBUTING.md: the files and names in it exist, and its example op works."""

import os
import re
import subprocess
import sys
import textwrap
from inspect import getsource, signature
from pathlib import Path
from typing import Any

import op_cases
import pytest
import torch
from ops import test_transforms as transforms

from benchmarks.ops import problems
from mae_fast.ops.autograd import needs_torch_ops
from mae_fast.ops.patches import check_tensor

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
REFERENCE, CONTRACT, TESTS, ENTRY, PROBLEM = (block for kind, block in BLOCKS if kind == "python")
TESTS_OF_TRANSFORMS = [test for name, test in vars(transforms).items() if name.startswith("test_")]
OF_AN_OP = [test for test in TESTS_OF_TRANSFORMS if "op" in signature(test).parameters]


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
        ("tests/ops/test_transforms.py", ["OPS = ", "DIFFERENTIABLE_TWICE = "]),
        ("tests/ops/test_isa.py", ["CHOSEN = ", "values_and_gradients and contiguous"]),
        ("tests/ops/test_triton.py", ["CHOSEN = ", "values_and_gradients and (contiguous", "def kernels_of", ">= 10"]),
        ("mae_fast/errors.py", ["class UserError"]),
        ("tests/gpu_proof/budget.py", ["def _see_none", "def _see_images"]),
        ("tests/gpu_proof/ptx_cases.py", ["def triton_cases"]),
        ("tests/gpu_proof/interpreter_cases.py", ["OTHERS = ", "FROM_IMAGES = "]),
        ("benchmarks/ops/problems.py", ["class Problem:", "def _in_blocks", "def made"]),
        ("csrc/cpu/simd.h", ["#define MAE_KERNEL", "void parallel_kernel", "Wide<T> widen", "narrow(", "read_all"]),
        ("csrc/common.h", ["#define MAE_CHECK_VALUE", "void dispatch_floating"]),
    ],
)
def test_names_in_the_text_exist(file, names):
    text = (ROOT / file).read_text()
    assert not [name for name in names if name not in text]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names that the example op defines, and its imports. An op can be registered only once per process."""
    names: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor, "Any": Any, "pytest": pytest, **vars(op_cases)}
    names |= {"check_tensor": check_tensor, "needs_torch_ops": needs_torch_ops}
    for block in (REFERENCE, CONTRACT, TESTS):
        exec(block, names)
    return names


def test_the_example_op_passes_its_tests(example):
    test = example["test_values_and_gradients"]
    (layouts, dtypes, shapes) = (mark.args[1] for mark in reversed(test.pytestmark))
    assert (len(layouts), len(dtypes), len(shapes)) == (4, 4, 8)
    for layout, dtype, shape in ((a, b, c) for a in layouts for b in dtypes for c in shapes):
        test(shape, dtype, layout)
    example["test_opcheck"]()
    with pytest.raises(ValueError, match=r"scale must be \[N\] for x \[N, T, D\], got \[3\], \[2, 4, 5\]"):
        example["scale_images"](torch.zeros(2, 4, 5), torch.zeros(3))


def test_enough_of_the_example_tests_run_in_the_interpreter(tmp_path):
    """``tests/ops/test_triton.py`` needs ten."""
    pytest.importorskip("triton")
    from ops.test_triton import CHOSEN

    file = tmp_path / "test_example.py"
    file.write_text(f"import pytest\nfrom op_cases import FLOATING, LAYOUTS\n\n{TESTS}")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "ops.conftest", "-k", CHOSEN, "--collect-only"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    found = subprocess.run([*command, "-q", str(file)], cwd=tmp_path, env=env, capture_output=True, text=True)
    chosen = [line for line in found.stdout.splitlines() if "::test_values_and_gradients[" in line]
    assert 10 <= len(chosen) <= 30, found.stdout + found.stderr


@pytest.mark.parametrize("test", OF_AN_OP, ids=lambda test: test.__name__)
def test_the_example_op_passes_the_tests_of_transforms(example, test, monkeypatch):
    assert len(OF_AN_OP) >= 6
    monkeypatch.setattr(transforms, "OPS", eval(f"{{{ENTRY}}}", example))
    monkeypatch.setattr(transforms, "DIFFERENTIABLE_TWICE", {"scale_images"})
    test("scale_images")


@pytest.mark.parametrize("dtype", problems.DTYPES)
def test_the_example_problem_agrees_with_its_eager_chain(example, dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)
    end = "    return found\n"
    source = getsource(problems._in_blocks)
    assert source.endswith(end)
    names = vars(problems) | {"scale_images": example["scale_images"]}
    exec(source.removesuffix(end) + textwrap.indent(PROBLEM, "    ") + end, names)
    (problem,) = (found for found in names["_in_blocks"](2, dtype, "decoder") if found.op == "scale_images")
    problem.gate()
    assert [len(result) for result in (problem.call(problem.eager)(), problem.call(problem.ours)())] == [2, 2]
    x, scale = problem.inputs
    assert problem.bytes_moved == 4 * x.nbytes  # input, output and both of their gradients
    assert scale.shape == x.shape[:1]
