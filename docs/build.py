"""For ``make docs``: mkdocs hooks, and a griffe extension that documents flags as parameters."""

import inspect
import typing
from importlib import import_module
from typing import Any

import griffe

import mae_fast.api
from mae_fast.ops import registry


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace ``<!-- ops -->`` with the sections of all ops."""
    return markdown.replace("<!-- ops -->", "\n\n".join(described(op.name) for op in registry.ops()))


def described(op: str) -> str:
    """The section of an op: the docstring of its module, and its functions."""
    functions = inspect.getmembers(import_module(f"mae_fast.ops.{op}"), inspect.isfunction)
    members = [name for name, function in functions if "Args:" in (function.__doc__ or "")]
    options = f"{{ show_root_heading: false, show_root_toc_entry: false, members: [{', '.join(members)}] }}"
    return f"## {op}\n\n::: mae_fast.ops.{op}.op\n    options: {options}"


class FlagsAsParameters(griffe.Extension):
    """Documents functions whose keywords are the flags of a configuration. These flags are only known at run time."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.module.path == "mae_fast.api" and func.parameters and "flags" in func.parameters and func.decorators:
            text = documented(getattr(mae_fast.api, func.name))
            options = {"warn_unknown_params": False}
            func.docstring = griffe.Docstring(text, parent=func, parser="google", parser_options=options)


def documented(function: Any) -> str:
    """The docstring of a function, with the type and the default of each flag."""
    lines = (inspect.getdoc(function) or "").splitlines()
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "preset":
            continue
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {name}: "))
        kind, default = written(parameter.annotation), parameter.default
        default = "Required." if default is parameter.empty else f"Default: `{shown(default)}`."
        text = lines[at].removeprefix(f"    {name}: ").rstrip(".")
        lines[at] = f"    {name} ({kind}): {text[:1].upper()}{text[1:]}. {default}"
    return "\n".join(lines)


def written(annotation: Any) -> str:
    """A type as in source code, without module names."""
    if annotation is type(None):
        return "None"
    if typing.get_origin(annotation) is typing.Annotated:
        return written(typing.get_args(annotation)[0])
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("pathlib.", "").replace("NoneType", "None")


def shown(default: Any) -> str:
    return f'"{default}"' if isinstance(default, str) else str(default)
