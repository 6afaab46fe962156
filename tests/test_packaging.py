"""The sdist and the wheel, built with and without a compiler or torch."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mae_fast

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BUILD = ("-m", "build", "--no-isolation", "--outdir", "dist")
USE_OP = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # only what is under test
import mae_fast, torch
from mae_fast.ops.native import has_native
from mae_fast.ops.random_masking import random_masking
print(mae_fast.__file__, has_native("random_masking", "CPU"), random_masking(torch.rand(1, 4), 1)[3].sum().item())
"""


def run(*command, cwd, python=sys.executable, **env):
    env = {**os.environ, **env}
    return subprocess.run(
        [python, *command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def succeed(*command, **options):
    result = run(*command, **options)
    assert result.returncode == 0, result.stdout
    return result.stdout


def copy_tree(folder):
    """The source tree without build products."""
    products = (".?*_cache", ".git", ".venv", "__pycache__", "*.so", "*.egg-info", "build", "dist", "runs")
    return shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*products))


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with an sdist and the wheel built from it."""
    tree = copy_tree(tmp_path_factory.mktemp("package"))
    succeed(*BUILD, cwd=tree, CXXFLAGS="-O0")  # compiles faster; the speed of the kernels does not matter here
    return tree / "dist"


@pytest.fixture
def build_tools(tmp_path):
    """A folder with only the packages in [build-system] requires, as in an isolated build."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("setuptools", "_distutils_hack", "ninja"):
        (folder / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    return str(folder)


def test_sdist_contains_the_development_files(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for file in ("LICENSE", "Makefile", "constraints.txt", "csrc/common.h", "csrc/cpu/random_masking.cpp"):
        assert file in names
    assert {"tests/test_packaging.py", "mae_fast/py.typed", ".clang-format", ".ci/run"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_works_from_another_folder(dist, tmp_path):
    wheel = next(dist.glob("*.whl"))
    assert wheel.name.startswith(f"mae_fast-{mae_fast.__version__}-cp310-abi3-linux_")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mae_fast/py.typed", "mae_fast/_C.abi3.so", "mae_fast/ops/random_masking/op.py"} <= set(names)
    assert all(name.startswith("mae_fast") for name in names)

    site = tmp_path / "site"
    succeed("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    output = succeed("-c", USE_OP, cwd=tmp_path, PYTHONPATH=str(site))
    assert output.split() == [str(site / "mae_fast" / "__init__.py"), "True", "3.0"]


def test_extension_contains_no_machine_paths(dist):
    extension = zipfile.ZipFile(next(dist.glob("*.whl"))).read("mae_fast/_C.abi3.so")
    for folder in (ROOT, dist, sys.prefix):
        assert str(folder).encode() not in extension


def test_build_does_not_require_torch():
    tables = (ROOT / "pyproject.toml").read_text().split("\n[")
    requires = next(line for line in tables[0].splitlines() if line.startswith("requires"))
    assert "setuptools" in requires
    assert "torch" not in requires


@pytest.mark.exhaustive  # compiles all of csrc a second time
def test_isolated_build_compiles_against_the_installed_torch(tree, build_tools):
    hidden = {"cwd": tree, "PYTHONPATH": build_tools}  # with -S below, as pip's isolation does
    assert "No module named 'torch'" in run("-S", "-c", "import torch", **hidden).stdout
    succeed("-S", "setup.py", "build_ext", "--inplace", **hidden)
    assert (tree / "mae_fast" / "_C.abi3.so").exists()


def test_only_compiling_needs_torch(tree, build_tools, tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    bare = {"python": tmp_path / "bare" / "bin" / "python", "cwd": tree, "PYTHONPATH": build_tools}
    succeed("setup.py", "sdist", **bare)
    result = run("setup.py", "build_ext", **bare)
    assert result.returncode != 0
    assert "torch, which is not installed: pip install torch" in result.stdout.splitlines()[-1]


def test_without_compiler_the_wheel_is_pure_python(tree):
    output = succeed(*BUILD, "--wheel", cwd=tree, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert "warning: no C++ compiler" in output
    wheel = next((tree / "dist").iterdir())
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    output = succeed("-c", USE_OP, cwd=wheel.parent, PYTHONPATH=str(wheel))
    assert output.split() == [str(wheel / "mae_fast" / "__init__.py"), "False", "3.0"]


def test_compile_errors_fail_the_build(tree):
    with (tree / "csrc" / "module.cpp").open("a") as file:
        file.write("#error broken on purpose\n")
    result = run(*BUILD, "--wheel", cwd=tree)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout
    assert "csrc does not compile" in result.stdout
