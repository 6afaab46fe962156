"""Verbs that train, and look into training."""

import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from ..errors import UserError


def pretrain(args: list[str]) -> None:
    """Pre-train a masked autoencoder; run the same line again to resume."""
    import argparse

    from ..training.config import PRESETS, PretrainConfig

    # The preset sets the defaults of the other flags, so it is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    for name in ("job_dir", "resume", *NO_LONGER):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="")
    chosen, args = first.parse_known_args(args)
    if chosen.resume:
        raise UserError(
            f"--resume {chosen.resume}: a run resumes by itself when its line is run again, leave the flag out; "
            "to start from a file's weights, use --init"
        )
    if chosen.job_dir:
        args = [*args, "--output-dir", chosen.job_dir]
    given = [f"--{name}" for name in NO_LONGER if getattr(chosen, name) is not None]
    if given:
        print(f"mae-fast: note: nothing to do for {', '.join(given)}: torchrun starts processes", file=sys.stderr)
    if chosen.preset is not None and chosen.preset not in PRESETS:
        raise UserError(f"--preset {chosen.preset}: known are {', '.join(PRESETS)}")
    fields = PretrainConfig.model_fields
    defaults: dict[str, Any] = {n: tyro.MISSING if f.is_required() else f.default for n, f in fields.items()}
    config = tyro.cli(
        PretrainConfig,
        prog="mae-fast pretrain",
        description=f"{PretrainConfig.__doc__} --preset {{{','.join(PRESETS)}}} sets the defaults below.",
        args=args,
        default=PretrainConfig.model_construct(**{**defaults, **PRESETS.get(chosen.preset or "", {})}),
    )
    from ..training.pretrain import pretrain

    pretrain(config)


# Flags of the published scripts, accepted so that their command lines run.
NO_LONGER = (
    "start_epoch", "pin_mem", "no_pin_mem", "world_size", "local_rank", "dist_on_itp", "dist_url", "nodes", "ngpus",
    "timeout", "partition", "use_volta32", "comment",
)  # fmt: skip


def replay(args: list[str]) -> None:
    """Run a step that was left out again, image by image, and say what in it is not finite."""

    def command(dump: tyro.conf.Positional[Path], device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
        """Take the images, masks and weights of a step that was left out, and look for what is not finite.

        Args:
            dump: A file of the run's not_finite/: step-00001234.json.
            device: Where to compute; auto: cuda if there is one.
        """
        from ..report.replay import replay

        if not replay(dump, device):
            sys.exit(1)

    tyro.cli(command, prog="mae-fast replay", args=args)
