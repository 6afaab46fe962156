"""Parses the command line of a training verb into its configuration."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import field, make_dataclass
from typing import Annotated, Any, get_args

import tyro

from ..errors import UserError
from ..training import config as configs
from ..training.config import RunConfig
from .groups import flag
from .old_names import current_flags

# Flags of the published scripts that are ignored, so that published command lines run unchanged.
IGNORED = (
    "start_epoch", "pin_mem", "no_pin_mem", "world_size", "local_rank", "dist_on_itp", "dist_url", "nodes", "ngpus",
    "timeout", "partition", "use_volta32", "comment", "dist_eval", "nb_classes",
)  # fmt: skip


KINDS: dict[str, type[RunConfig]] = {
    "pretrain": configs.PretrainConfig,
    "finetune": configs.FinetuneConfig,
    "linprobe": configs.LinprobeConfig,
    "segment": configs.SegmentConfig,
    "detect": configs.DetectConfig,
    "train-dvae": configs.DvaeConfig,
}
# Our names of flags of the published scripts for fine-tuning and linear probing.
PUBLISHED = {"finetune": "weights", "eval": "eval-only", "cls_token": "no-global-pool"}
EXAMPLES = {
    "pretrain": "mae-fast pretrain --preset base --data-path imagenet --output-dir runs/base",
    "finetune": "mae-fast finetune --preset base --data-path imagenet --weights runs/base --output-dir runs/finetuned",
    "linprobe": "mae-fast linprobe --preset base --data-path imagenet --weights runs/base --output-dir runs/linprobe",
    "segment": "mae-fast segment --preset base --data-path ade20k --weights runs/base --output-dir runs/segment",
    "detect": "mae-fast detect --preset base --data-path coco --weights runs/base --output-dir runs/detect",
    "train-dvae": "mae-fast train-dvae --preset base --data-path imagenet --output-dir runs/dvae",
}


def parse(verb: str, args: list[str]) -> RunConfig:
    """The configuration for the flags of a training verb. Flags of the published scripts are accepted, too.

    Raises:
        UserError: if a flag is wrong.
        SystemExit: after ``--help``.
    """
    kind, words = KINDS[verb], current_flags(args)
    if issubclass(kind, configs.ClassifyConfig):
        words = [_our_flag(word, PUBLISHED) for word in words]
        if "--eval-only" in words:
            words = [_our_flag(word, {"resume": "weights"}) for word in words]  # the scripts' flag for the checkpoint
    preset, words = _preset(kind, _with_none(kind, words))
    parsed = tyro.cli(
        _sections(kind, kind.preset_values(preset)),
        prog=f"mae-fast {verb}",
        description=(
            f"{kind.__doc__}\n\nExample: {EXAMPLES[verb]}\n\n"
            f"The flag --preset {{{','.join(kind.presets)}}} sets the defaults of the flags below."
        ),
        args=words,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    values = {name: value for section in vars(parsed).values() for name, value in vars(section).items()}
    given = _given(words)
    return kind.with_preset(preset, **{name: value for name, value in values.items() if name in given})


def _given(words: list[str]) -> set[str]:
    """The names of the flags in ``words``. ``--no-x`` counts as both ``no_x`` and ``x``."""
    flags = [word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
    return {*flags, *(flag.removeprefix("no_") for flag in flags)}


def _preset(kind: type[RunConfig], args: list[str]) -> tuple[str | None, list[str]]:
    """The preset, and the other flags without the ignored ones."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", const="")
    for name in ("job_dir", "resume", *IGNORED):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="")
    chosen, words = first.parse_known_args(args)
    if chosen.resume:
        starts = [f"; to start from the weights in a file, use --{name}" for name in ("init", "weights")
                  if name in kind.model_fields]  # fmt: skip
        raise UserError(
            f"--resume {chosen.resume} is not supported: a run resumes when its command is run again",
            "".join(["leave the flag out", *starts]),
        )
    if chosen.job_dir:
        words += ["--output-dir", chosen.job_dir]
    if unused := [f"--{name}" for name in IGNORED if getattr(chosen, name) is not None]:
        print(f"mae-fast: note: ignored {', '.join(unused)}: not needed here", file=sys.stderr)
    return chosen.preset, words


def _our_flag(word: str, published: Mapping[str, str]) -> str:
    """``word``, with a flag of the published scripts replaced by ours."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    return f"--{published[name]}{equals}{value}" if flag.startswith("--") and name in published else word


def _with_none(kind: type[RunConfig], words: list[str]) -> list[str]:
    """``words`` with "none" replaced by tyro's spelling "None", for flags that may be None."""
    optional = {name for name, info in kind.model_fields.items() if type(None) in get_args(info.annotation)}
    found: list[str] = []
    flag = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = name.removeprefix("--").replace("-", "_")
        if equals and word.startswith("--") and value.lower() == "none" and flag in optional:
            word = f"{name}=None"
        elif word.lower() == "none" and flag in optional:
            word = "None"
        found.append(word)
    return found


def _sections(kind: type[RunConfig], defaults: Mapping[str, Any]) -> Any:
    """A dataclass with one dataclass per heading of the help, whose fields are the flags under that heading."""
    sections: list[tuple[str, Any]] = []
    for heading, names in kind.sections().items():
        fields: list[Any] = []
        for name in names:
            info = kind.model_fields[name]
            annotation = flag(info.annotation, " ".join((info.description or "").split()))
            required = info.is_required() and name not in defaults
            fields.append((name, annotation, field() if required else field(default=defaults.get(name, info.default))))
        section = make_dataclass("Section", fields, kw_only=True, namespace={"__doc__": ""})
        sections.append((heading.replace(" ", "_"), Annotated[section, tyro.conf.arg(name=heading)]))
    return make_dataclass("Flags", sections)
