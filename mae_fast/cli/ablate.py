"""The verb that runs the paper's ablations."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..errors import UserError, block
from ..training.config import PretrainConfig
from .checks import at_least
from .flags import parse
from .old_names import current_flags

Table = Literal[
    "decoder-depth", "decoder-width", "mask-token", "target", "augmentation", "mask-sampling", "mask-ratio", "schedule",
    "partial", "all", "speed",
]  # fmt: skip
Preset = Literal["tiny", "base", "large", "huge"]
OURS = ("--preset", "--data-path", "--output-dir", "--seed", "--weights", "--train-blocks")  # set for each run


@dataclass
class Ablation:
    """Pre-train, fine-tune and probe each row of a table of the paper; print and draw it beside the paper's.

    Run the same line again to go on: what is finished is not run again, and tables in one folder share rows.
    """

    table: tyro.conf.Positional[Table]
    """Of the paper: 1a to 1f, Figures 5 (mask-ratio), 7 (schedule) and 9 (partial); all of them; speed: Table 2."""
    output_dir: Path
    """Folder of TABLE.md, TABLE.json and TABLE.png, and of all runs."""
    data_path: Path | None = None
    """Folder with train/ and val/, the same class folders in both."""
    preset: Preset | None = None
    """Size of the model and its recipes; large, the paper's, if not given, and for speed all of the paper's."""
    seeds: tuple[int, ...] = (0,)
    """Each row is run with each."""
    rows: tuple[str, ...] | None = None
    """Names of the rows to run; all if not given."""
    pretrain: str = ""
    """Flags of 'mae-fast pretrain' for all rows, in one word: "--epochs 100 --batch-size 128"."""
    finetune: str = ""
    """Flags of 'mae-fast finetune' for all rows."""
    linprobe: str = ""
    """Flags of 'mae-fast linprobe' for all rows."""
    tokenizer: Path | None = None
    """Of the target's dVAE row: a run of train-dvae, or the published DALL-E encoder's weights; else one is trained."""
    labels: int | None = None
    """Labelled images per class to fine-tune and probe with; all if not given."""
    batch_size: int = 8
    """Images of the steps that are measured."""
    rounds: int = 5
    """How often each is measured."""

    def check(self) -> None:
        """Raise ``UserError`` if a flag is wrong, or does not go together with another one."""
        at_least(batch_size=(self.batch_size, 1), rounds=(self.rounds, 1))
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise UserError(f"--output-dir {self.output_dir} is a file", "give a folder")
        if self.table == "speed":
            return
        if self.data_path is None:
            raise UserError(f"{self.table} trains", "give --data-path, a folder with train/ and val/")
        if missing := [name for name in ("train", "val") if not (self.data_path / name).is_dir()]:
            raise UserError(
                f"--data-path {self.data_path} has no {' and no '.join(missing)}", "give a folder with train/ and val/"
            )
        if self.rows and self.table == "all":
            raise UserError("--rows names rows of one table, got all", "give a table")
        seeds = self.seeds
        if not seeds or len({*seeds}) < len(seeds) or min(seeds) < 0:
            raise UserError(
                f"--seeds {' '.join(map(str, seeds))} cannot be used", "give at least one, none below 0, and each once"
            )
        if self.labels is not None:
            at_least(labels=(self.labels, 1))


def ablate(args: list[str]) -> None:
    """Run the paper's ablations: each row pre-trained, fine-tuned and probed; a table and a picture."""
    flags = tyro.cli(Ablation, prog="mae-fast ablate", args=_joined(args))
    flags.check()
    if flags.table == "speed":
        from ..studies.cost import MeasureOptions, speed

        presets: list[str] = [flags.preset] if flags.preset else ["base", "large", "huge"]
        speed(presets, flags.output_dir, MeasureOptions(flags.batch_size, flags.rounds))
        return
    if failed := _train(flags):
        error = UserError(f"rows that failed: {', '.join(failed)}", "run the same line again to try them again")
        print(block(error, "mae-fast ablate"), file=sys.stderr)
        sys.exit(1)


def _train(flags: Ablation) -> list[str]:
    """Train and tabulate all rows; the names of those that failed."""
    preset = flags.preset or "large"
    # The paper's default row: pixels as they are, though its sizes' presets follow the published command.
    words = {
        "pretrain": ["--no-norm-pix-loss", *_words("pretrain", flags.pretrain)],
        "finetune": _words("finetune", flags.finetune),
        "linprobe": _words("linprobe", flags.linprobe),
    }
    common = ["--preset", preset, "--data-path", str(flags.data_path), "--output-dir", str(flags.output_dir)]
    # Parse the flags of all verbs before training: a wrong flag ends the study at once.
    configs = {verb: parse(verb, [*common, *flags]) for verb, flags in words.items()}
    base = configs.pop("pretrain")
    assert isinstance(base, PretrainConfig)
    from ..studies.ablate import Study
    from ..studies.cost import MeasureOptions
    from ..studies.paper import PAPER

    options = MeasureOptions(flags.batch_size, flags.rounds, base.device, base.dtype)
    study = Study(preset, base, configs, flags.output_dir, flags.seeds, words, flags.labels, flags.tokenizer, options)
    chosen = {name: study.rows(name, flags.rows) for name in (PAPER if flags.table == "all" else [flags.table])}
    outcomes = [(name, outcome) for name, rows in chosen.items() for outcome in study.table(name, rows)]
    return [f"{name} {outcome.row.name}" for name, outcome in outcomes if outcome.failed]


def _joined(args: list[str]) -> list[str]:
    """``--pretrain WORDS`` as one word: tyro takes words that begin with dashes for flags."""
    words: list[str] = []
    for word in args:
        if words and words[-1] in ("--pretrain", "--finetune", "--linprobe"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _words(verb: str, flags: str) -> list[str]:
    try:
        words = current_flags(shlex.split(flags))
    except ValueError as error:
        raise UserError(f"--{verb} {flags!r}: {error}") from error
    if taken := [word for word in words if word.split("=")[0].replace("_", "-") in OURS]:
        raise UserError(f"--{verb} {flags!r}: {taken[0]} is set for each run", "leave it out")
    return words
