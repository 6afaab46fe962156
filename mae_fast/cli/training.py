"""Verbs that train, and look into training."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import tyro

from ..errors import UserError
from .old_names import current_flags


def pretrain(args: list[str]) -> None:
    """Pre-train a masked autoencoder; run the same line again to resume."""
    config = parse("pretrain", args)
    from ..training.tasks.pretrain import pretrain

    pretrain(config)


def finetune(args: list[str]) -> None:
    """Fine-tune a classifier, all blocks or the last ones; run the same line again to resume."""
    _classify("finetune", args)


def linprobe(args: list[str]) -> None:
    """Train a linear classifier on frozen features."""
    _classify("linprobe", args)


def train_dvae(args: list[str]) -> None:
    """Train a discrete VAE, whose tokens 'pretrain --target dvae' predicts."""
    config = parse("train-dvae", args)
    from ..training.tasks.dvae import train_dvae

    train_dvae(config)


def segment(args: list[str]) -> None:
    """Train semantic segmentation on an encoder, from images and masks."""
    _dense("segment", args)


def detect(args: list[str]) -> None:
    """Train detection and instance segmentation on an encoder, from COCO files."""
    _dense("detect", args)


def _dense(verb: str, args: list[str]) -> None:
    config = parse(verb, args)
    from importlib import import_module

    module = import_module(f"mae_fast.training.tasks.{verb}")
    (module.evaluate if config.eval_only else getattr(module, verb))(config)


def _check_eval_only(config: Any) -> None:
    if (config.predictions or config.ema) and not config.eval_only:
        raise UserError("--predictions and --ema are for --eval-only", "add it")
    if config.predictions and not config.predictions.absolute().parent.is_dir():
        raise UserError(f"--predictions {config.predictions}: its folder does not exist", "make it, or give another")


def _classify(verb: str, args: list[str]) -> None:
    config = parse(verb, args)
    from ..training.tasks import classifier, classify

    if config.eval_only:
        classifier.evaluate(config)
    else:
        (classify.linprobe if verb == "linprobe" else classify.finetune)(config)


def parse(verb: str, args: list[str]) -> Any:
    """The configuration that the flags of a training verb give."""
    from ..training import config as c

    kind, presets, weights = {
        "pretrain": (c.PretrainConfig, c.PRESETS, "--init"),
        "finetune": (c.FinetuneConfig, c.FINETUNE_PRESETS, "--weights"),
        "linprobe": (c.LinprobeConfig, c.LINPROBE_PRESETS, "--weights"),
        "segment": (c.SegmentConfig, c.SEGMENT_PRESETS, "--weights"),
        "detect": (c.DetectConfig, c.DETECT_PRESETS, "--weights"),
        "train-dvae": (c.DvaeConfig, c.DVAE_PRESETS, None),
    }[verb]
    aliases = {}
    if verb in ("finetune", "linprobe"):
        aliases = {"finetune": "weights", "eval": "eval-only", "cls_token": "no-global-pool"}
        if any(_renamed(word, aliases) == "--eval-only" for word in args):
            aliases["resume"] = "weights"  # so the published scripts call what is evaluated
    config = _config(kind, presets, verb, args, weights, aliases)
    if weights == "--weights":
        _check_eval_only(config)
    return config


def _config(
    kind: Any,
    presets: dict[str, dict[str, Any]],
    verb: str,
    args: list[str],
    instead_of_resume: str | None = None,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """The configuration that ``args`` ask for; the published scripts' flags are understood, too.

    Args:
        presets: by name, what sets other defaults.
        instead_of_resume: the flag that takes weights, if the verb has one.
        aliases: published names of flags, and ours.
    """
    import argparse

    # The preset sets the defaults of the other flags, so it is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", const="")
    for name in ("job_dir", "resume", *NO_LONGER):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="")
    given = [_renamed(word, aliases) for word in current_flags(args)]
    chosen, args = first.parse_known_args(given)
    if chosen.resume:
        raise UserError(
            f"--resume {chosen.resume}: a run resumes by itself when its line is run again",
            "leave the flag out"
            + (f", or, to start from a file's weights, use {instead_of_resume}" if instead_of_resume else ""),
        )
    if chosen.job_dir:
        args = [*args, "--output-dir", chosen.job_dir]
    idle = [f"--{name}" for name in NO_LONGER if getattr(chosen, name) is not None]
    if idle:
        print(f"mae-fast: note: nothing to do for {', '.join(idle)}: torchrun starts processes", file=sys.stderr)
    if chosen.preset is not None and chosen.preset not in presets:
        raise UserError(f"--preset {chosen.preset} is unknown", f"known are {', '.join(presets)}")
    fields = kind.model_fields
    defaults: dict[str, Any] = {n: tyro.MISSING if f.is_required() else f.default for n, f in fields.items()}
    return tyro.cli(
        kind,
        prog=f"mae-fast {verb}",
        description=f"{kind.__doc__} --preset {{{','.join(presets)}}} sets the defaults below.",
        args=args,
        default=kind.model_construct(**{**defaults, **presets.get(chosen.preset or "", {})}),
    )


def _renamed(word: str, aliases: Mapping[str, str]) -> str:
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--")
    if name == flag:
        return word
    for published, ours in aliases.items():
        if name.replace("-", "_") == published:
            return f"--{ours}{equals}{value}"
    return word


# Flags of the published scripts, accepted so that their command lines run.
NO_LONGER = (
    "start_epoch", "pin_mem", "no_pin_mem", "world_size", "local_rank", "dist_on_itp", "dist_url", "nodes", "ngpus",
    "timeout", "partition", "use_volta32", "comment", "dist_eval", "nb_classes",
)  # fmt: skip


def debug_step(args: list[str]) -> None:
    """Compute a skipped step again, image by image, and show what in it is not finite."""

    def command(dump: tyro.conf.Positional[Path], device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
        """Take the images, masks and weights of a step that was left out, and look for what is not finite.

        Args:
            dump: A file of the run's not_finite/: step-00001234.json.
            device: Where to compute; auto: cuda if there is one.
        """
        from ..doctor.replay import replay

        if not replay(dump, device):
            sys.exit(1)

    tyro.cli(command, prog="mae-fast debug-step", args=args)
