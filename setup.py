"""Builds mae_fast/_C.abi3.so and, with nvcc, mae_fast/_cuda<major>.abi3.so from csrc with ninja.

All other settings are in pyproject.toml.

Without a C++ compiler, the package is installed as pure Python. With a compiler, a missing torch or a compile error is
an error.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CXX = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
HAS_COMPILER = sys.platform == "linux" and bool(CXX) and shutil.which(shlex.split(CXX)[0]) is not None
# The oldest torch that can load the compiled kernels, as in pyproject.toml. The default is the torch of the build.
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
BUILD = Path("build/native")  # kept between builds, so that only changed files are compiled
NINJA = """
builddir = build/native
rule cxx
  command = {cxx} -std=c++20 -O3 -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi {abi} {map} $
    {include} {cxxflags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cuda
  command = {nvcc} -std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,{map} -DUSE_CUDA {abi} {include} $
    -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=[sm_90,compute_90] $
    -Xptxas=--warn-on-spills -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared $in -o $out -Wl,--no-as-needed {libraries} $cuda
"""


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def find_torch() -> Path:
    """The folder of the installed torch, even if pip's build isolation hides it."""
    spec = find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    # pip's build isolation hides the environment by PYTHONPATH, so a new interpreter that ignores it finds torch.
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    origin = subprocess.check_output([sys.executable, "-E", "-c", code], text=True).strip()
    if not origin:
        raise PlatformError("mae_fast is compiled against torch, which is not installed: pip install torch")
    return Path(origin).parent


def find_cuda(torch: Path) -> tuple[str, str, list[str]]:
    """nvcc, its major version and its linker flags; "" and [] if nvcc or a CUDA build of torch is missing."""
    nvcc, torch_cuda = shutil.which("nvcc"), runpy.run_path(str(torch / "version.py"))["cuda"]
    if not nvcc or not torch_cuda:
        return "", "", []
    # nvcc on the PATH may be a wrapper outside of its toolkit, so ask it for the libraries.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    major, flags = re.search(r"__CUDACC_VER_MAJOR__=(\d+)", plan), re.search(r"LIBRARIES=(.*)", plan)
    if not major or not flags or major[1] != torch_cuda.split(".")[0]:
        warn(f"the CUDA kernels are not built: {nvcc} must be from CUDA {torch_cuda}, as torch")
        return "", "", []
    return nvcc, major[1], [*shlex.split(flags[1]), "-ltorch_cuda", "-lc10_cuda", "-lcudart"]


def copy_library(library: Path, folder: Path) -> None:
    (folder / library.name).unlink(missing_ok=True)  # do not overwrite a file that a running process has mapped
    shutil.copy2(library, folder)


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        sources = ["csrc/module.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))]
        cuda_sources = [str(path) for path in sorted(Path("csrc/cuda").glob("*.cu"))]
        nvcc, cuda_major, cuda_libraries = find_cuda(torch)
        rules = NINJA.format(
            cxx=CXX,
            abi=ABI,
            cxxflags=os.environ.get("CXXFLAGS", ""),
            nvcc=nvcc,
            include=shlex.join(["-isystem", f"{torch}/include", "-isystem", sysconfig.get_path("include")]),
            # keep paths of this machine out of the binary
            map=shlex.quote(f"-fmacro-prefix-map={torch}/include/="),
            # libstdc++ first: torch exports some of its symbols, but not the same ones in each release
            libraries=shlex.join([f"-L{torch}/lib", "-lstdc++", "-lc10", "-ltorch_cpu"]),
        )
        # The CUDA kernels are a separate library, so that _C also loads under a torch for another CUDA or without CUDA.
        libraries = {"_C.abi3.so": ("cxx", sources, [])}
        if nvcc:
            libraries[f"_cuda{cuda_major}.abi3.so"] = ("cuda", cuda_sources, cuda_libraries)
        edges = []
        for name, (rule, files, flags) in libraries.items():
            edges += [f"build {BUILD}/{file}.o: {rule} {file}" for file in files]
            edges += [f"build {BUILD}/{name}: link {' '.join(f'{BUILD}/{file}.o' for file in files)}"]
            edges += [f"  cuda = {shlex.join(flags)}\n"]
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / "build.ninja").write_text("\n".join([rules, *edges]))
        if subprocess.run([sys.executable, "-m", "ninja", "-f", f"{BUILD}/build.ninja"]).returncode:
            raise CompileError("mae_fast: csrc does not compile; the compiler's message is above")
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        for name in libraries:
            copy_library(BUILD / name, folder)

    def copy_extensions_to_source(self) -> None:  # for editable installs and build_ext --inplace
        super().copy_extensions_to_source()
        for library in Path(self.build_lib, "mae_fast").glob("_cuda*.abi3.so"):
            copy_library(library, Path("mae_fast"))


if not HAS_COMPILER and not {"sdist", "egg_info", "dist_info"} & set(sys.argv):
    warn("no C++ compiler: mae_fast is installed without compiled kernels, and runs the slower eager reference")

setup(
    ext_modules=[Extension("mae_fast._C", sources=[], py_limited_api=True)] if HAS_COMPILER else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if HAS_COMPILER else {},
)
