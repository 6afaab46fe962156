"""The ops of this package: every folder with an ``op.py`` is an op."""

import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec


@dataclass(frozen=True)
class Op:
    """One op. Its kernels are registered with torch's dispatcher."""

    name: str
    """Name of the folder."""
    schemas: tuple[str, ...]
    """Names that ``op.py`` defines in the dispatcher, without "mae_fast::". The first one is the op itself. Empty for
    an op that only calls others."""
    has_triton_kernels: bool
    equals: str
    """What the op replaces, from the line "Equals: ..." of the docstring of ``op.py``."""


@cache
def ops() -> tuple[Op, ...]:
    """All ops, sorted by name. The call imports them."""
    package = __name__.rpartition(".")[0]
    modules = pkgutil.iter_modules(import_module(package).__path__, f"{package}.")
    return tuple(_op(module.name) for module in modules if module.ispkg and find_spec(f"{module.name}.op"))


def _op(package: str) -> Op:
    module = import_module(f"{package}.op")
    schemas = re.findall(r'library\.define\(\s*"mae_fast::(\w+)"', inspect.getsource(module))
    equals = re.search(r"^Equals: (.+)\.$", module.__doc__ or "", re.MULTILINE)
    return Op(
        name=package.rpartition(".")[2],
        schemas=tuple(schemas),
        has_triton_kernels=find_spec(f"{package}.triton_kernels") is not None,
        equals=equals[1] if equals else "",
    )
