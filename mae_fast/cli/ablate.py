"""The verb that runs the paper's ablations."""

import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from ..errors import UserError, block
from .images import at_least
from .old_names import current_flags

Table = Literal[
    "decoder-depth", "decoder-width", "mask-token", "target", "augmentation", "mask-sampling", "mask-ratio", "schedule",
    "partial", "all", "speed",
]  # fmt: skip
Preset = Literal["tiny", "base", "large", "huge"]
OURS = ("--preset", "--data-path", "--output-dir", "--seed", "--weights", "--train-blocks")  # set for each run


def ablate(args: list[str]) -> None:
    """Run the paper's ablations: each row pre-trained, fine-tuned and probed; a table and a picture."""

    def command(
        table: tyro.conf.Positional[Table],
        output_dir: Path,
        data_path: Path | None = None,
        preset: Preset | None = None,
        seeds: tuple[int, ...] = (0,),
        rows: tuple[str, ...] | None = None,
        pretrain: str = "",
        finetune: str = "",
        linprobe: str = "",
        tokenizer: Path | None = None,
        labels: int | None = None,
        batch_size: int = 8,
        rounds: int = 5,
    ) -> None:
        """Pre-train, fine-tune and probe each row of a table of the paper; print and draw it beside the paper's.

        Run the same line again to go on: what is finished is not run again, and tables in one folder share rows.

        Args:
            table: Of the paper: 1a to 1f, Figures 5 (mask-ratio), 7 (schedule) and 9 (partial), or all of them. speed:
                Table 2, the encoder with mask tokens against without; it trains nothing and needs no images.
            output_dir: Folder of TABLE.md, TABLE.json and TABLE.png, and of all runs.
            data_path: Folder with train/ and val/, the same class folders in both.
            preset: Size of the model and its recipes; large, the paper's, if not given, and for speed all of the
                paper's.
            seeds: Each row is run with each.
            rows: Names of the rows to run; all if not given.
            pretrain: Flags of 'mae-fast pretrain' for all rows, in one word: "--epochs 100 --batch-size 128".
            finetune: Flags of 'mae-fast finetune' for all rows.
            linprobe: Flags of 'mae-fast linprobe' for all rows.
            tokenizer: Of the target's dVAE row: a run of 'mae-fast train-dvae', or a file of the published DALL-E
                encoder's weights; if not given, one is trained.
            labels: Labelled images per class to fine-tune and probe with; all if not given.
            batch_size: Images of the steps that are measured.
            rounds: How often each is measured.
        """
        at_least(batch_size=(batch_size, 1), rounds=(rounds, 1))
        if output_dir.exists() and not output_dir.is_dir():
            raise UserError(f"--output-dir {output_dir} is a file", "give a folder")
        if table == "speed":
            from ..studies.cost import MeasureOptions, speed

            speed([preset] if preset else ["base", "large", "huge"], output_dir, MeasureOptions(batch_size, rounds))
            return
        if data_path is None:
            raise UserError(f"{table} trains", "give --data-path, a folder with train/ and val/")
        if missing := [name for name in ("train", "val") if not (data_path / name).is_dir()]:
            raise UserError(
                f"--data-path {data_path} has no {' and no '.join(missing)}",
                "give a folder with train/ and val/",
            )
        if rows and table == "all":
            raise UserError("--rows names rows of one table, got all", "give a table")
        if not seeds or len({*seeds}) < len(seeds) or min(seeds) < 0:
            raise UserError(
                f"--seeds {' '.join(map(str, seeds))} cannot be used", "give at least one, none below 0, and each once"
            )
        if labels is not None:
            at_least(labels=(labels, 1))
        preset = preset or "large"
        # The paper's default row: pixels as they are, though its sizes' presets follow the published command.
        flags = {
            "pretrain": ["--no-norm-pix-loss", *_words("pretrain", pretrain)],
            "finetune": _words("finetune", finetune),
            "linprobe": _words("linprobe", linprobe),
        }
        words = ["--preset", preset, "--data-path", str(data_path), "--output-dir", str(output_dir)]
        base = _checked(words, flags)
        from ..studies.ablate import Study
        from ..studies.cost import MeasureOptions
        from ..studies.paper import PAPER

        options = MeasureOptions(batch_size, rounds, base.device, base.dtype)
        study = Study(_run, preset, base, output_dir, seeds, flags, labels, tokenizer, options)
        chosen = {name: study.rows(name, rows) for name in (PAPER if table == "all" else [table])}
        outcomes = [(name, outcome) for name, each in chosen.items() for outcome in study.table(name, each)]
        if failed := [f"{name} {outcome.row.name}" for name, outcome in outcomes if outcome.failed]:
            error = UserError(f"rows that failed: {', '.join(failed)}", "run the same line again to try them again")
            print(block(error, "mae-fast ablate"), file=sys.stderr)
            sys.exit(1)

    tyro.cli(command, prog="mae-fast ablate", args=_joined(args))


def _joined(args: list[str]) -> list[str]:
    """``--pretrain WORDS`` as one word: tyro takes words that begin with dashes for flags."""
    words: list[str] = []
    for word in args:
        if words and words[-1] in ("--pretrain", "--finetune", "--linprobe"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _run(verb: str, words: list[str]) -> None:
    from . import VERBS

    print(f"\n$ mae-fast {verb} {shlex.join(words)}", flush=True)
    VERBS[verb](words)


def _checked(words: list[str], flags: dict[str, list[str]]) -> Any:
    """The configuration of the default row's pre-training; all verbs' flags are read, so that a wrong one is told of
    before anything is trained."""
    from .flags import parse

    base, *_ = [parse(verb, [*words, *flags[verb]]) for verb in ("pretrain", "finetune", "linprobe")]
    return base


def _words(verb: str, flags: str) -> list[str]:
    try:
        words = current_flags(shlex.split(flags))
    except ValueError as error:
        raise UserError(f"--{verb} {flags!r}: {error}") from error
    if taken := [word for word in words if word.split("=")[0].replace("_", "-") in OURS]:
        raise UserError(f"--{verb} {flags!r}: {taken[0]} is set for each run", "leave it out")
    return words
