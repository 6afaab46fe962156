"""Names that start with an underscore are private to their folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mae_fast"


def private_imports(code: str, package: tuple[str, ...]) -> list[str]:
    """Private names of other folders that a module in ``package`` uses.

    Args:
        package: the module's folder, ("mae_fast", "data").
    """
    found, modules = [], set()  # imported modules of other folders, by local name
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("mae_fast")):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            origin = (*start, *(node.module or "").split(".")) if node.module else start
            for alias in node.names:
                path = (*origin, alias.name)
                is_module = (ROOT.parent / Path(*path)).with_suffix(".py").exists()
                folder = origin if is_module or (ROOT.parent / Path(*origin)).is_dir() else origin[:-1]
                if folder[: len(package)] == package or package[: len(folder)] == folder != ("mae_fast",):
                    continue
                if any(part.startswith("_") and not part.startswith("__") for part in (*origin[1:], alias.name)):
                    found.append(".".join(path))
                if is_module:
                    modules.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in modules and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append(f"{node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ..weights.create import _build", ["mae_fast.weights.create._build"]),
        ("from ..ops._autograd import x", ["mae_fast.ops._autograd.x"]),
        ("from ..weights import create\ncreate._build()", ["create._build"]),
        ("def f():\n    from mae_fast.weights.create import _build", ["mae_fast.weights.create._build"]),
        ("from .decode import _x\nfrom . import decode\ndecode._x\nfrom ..weights import create\ncreate.build", []),
    ],
)
def test_private_names_of_other_folders_are_detected(code, expected):
    assert private_imports(code, ("mae_fast", "data")) == expected


def test_no_module_uses_a_private_name_of_another_folder():
    found = {}
    for path in ROOT.rglob("*.py"):
        package = ("mae_fast", *path.parent.relative_to(ROOT).parts)
        if names := private_imports(path.read_text(), package):
            found[str(path.relative_to(ROOT))] = names
    assert found == {}
