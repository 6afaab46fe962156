"""Flags that several verbs share, and the parser that lists each group of flags under its own heading."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

T = TypeVar("T")
PLACEHOLDERS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


def placeholder(kind: Any) -> str | None:
    """The placeholder for values of type ``kind`` in the help; None if tyro has to choose one."""
    if kind in PLACEHOLDERS:
        return PLACEHOLDERS[kind]
    origin, args = get_origin(kind), [arg for arg in get_args(kind) if arg not in (type(None), ...)]
    if origin is Literal:
        return f"{{{','.join(map(str, args))}}}"
    if not args or None in (inner := [placeholder(arg) for arg in args]):
        return None
    return f"{inner[0]}..." if origin in (tuple, list) else "|".join(map(str, inner))


def flag(kind: Any, description: str | None = None) -> Any:
    """The annotation of a flag of type ``kind``, with a plain placeholder. A default of None is not shown."""
    inner, *given = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    metavar = next((each.metavar for each in given if getattr(each, "metavar", None)), placeholder(inner))
    return Annotated[kind, tyro.conf.arg(metavar=metavar, help=description, help_behavior_hint=_default_hint)]


def _default_hint(default: str) -> str:
    return f"(default: {default})" if default not in ("None", "", "''") else ""


def readable(target: T) -> T:
    """Apply ``flag`` to the annotations of a function or class."""
    target.__annotations__ = {
        name: kind if name == "return" else flag(kind) for name, kind in target.__annotations__.items()
    }
    return target


def parse_verb(command: Callable[..., Any], verb: str, args: list[str]) -> Any:
    """Call ``command``, a function or dataclass, with the flags in ``args``.

    A parameter that is a dataclass is a group of flags: the help lists them under the name of the group.
    """
    if inspect.isfunction(command):
        command.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(command.__doc__ or ""))  # tyro keeps these breaks
        readable(command)
    return tyro.cli(command, prog=f"mae-fast {verb}", args=args, config=(tyro.conf.OmitArgPrefixes,))


Directory = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
Device = Literal["auto", "cpu", "cuda"]
WEIGHTS_HELP = "A run, a file or folder of weights in any layout, or a name on the Hugging Face Hub."
Weights = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS", help=WEIGHTS_HELP)]
WeightsFlag = Annotated[str, tyro.conf.arg(metavar="WEIGHTS", help=WEIGHTS_HELP)]


@dataclass
@readable
class ModelFlags:
    """"""

    model: str | None = None
    """Model factory, such as mae_vit_base_patch16; needed only if the weights do not determine the model's sizes."""
    ema: bool = False
    """Load the averaged weights of a run that was trained with --ema-decay."""


@dataclass
@readable
class LoadFlags:
    """"""

    batch_size: int = 64
    """Images per batch."""
    num_workers: int = 0
    """Worker processes that load images; 0 loads them in the main process."""
    device: Device = "auto"
    """Device of the model; auto: cuda if there is a GPU."""


@dataclass
@readable
class EncodeFlags(LoadFlags):
    """"""

    max_bad_fraction: float = 0.01
    """Stop if a larger share of the images is unusable. Unusable images are left out."""


Model = Annotated[ModelFlags, tyro.conf.arg(name="model")]
Loading = Annotated[LoadFlags, tyro.conf.arg(name="loading")]
Encoding = Annotated[EncodeFlags, tyro.conf.arg(name="loading")]
