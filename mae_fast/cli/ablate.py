"""The verb that runs the paper's ablations."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError, block
from .checks import at_least
from .groups import parse_verb, readable
from .old_names import current_flags

Table = Literal[
    "decoder-depth", "decoder-width", "mask-token", "target", "augmentation", "mask-sampling", "mask-ratio", "schedule",
    "partial", "all", "speed",
]  # fmt: skip
Preset = Literal["tiny", "base", "large", "huge"]
# Flags that ``ablate`` sets for each run.
OURS = ("--preset", "--data-path", "--output-dir", "--seed", "--weights", "--train-blocks")


@dataclass
@readable
class TrainingFlags:
    """"""

    data_path: Path | None = None
    """Folder with train/ and val/, which contain the same class folders."""
    labels: int | None = None
    """Labelled images per class for fine-tuning and probing. Default: all."""
    pretrain: str = ""
    """Flags of 'mae-fast pretrain' for all rows, as one quoted string: "--epochs 100 --batch-size 128"."""
    finetune: str = ""
    """Flags of 'mae-fast finetune' for all rows, as one quoted string."""
    linprobe: str = ""
    """Flags of 'mae-fast linprobe' for all rows, as one quoted string."""
    tokenizer: Path | None = None
    """For the dVAE row: a run of train-dvae, or the weights of the DALL-E encoder. Default: train a tokenizer."""


@dataclass
@readable
class CostFlags:
    """"""

    batch_size: int = 8
    """Images per timed step."""
    rounds: int = 5
    """Rounds; each step is timed once per round."""


@dataclass
@readable
class Ablation:
    """Run an ablation of the paper: pre-train, fine-tune and probe each row, and compare with the paper's results.

    Example: mae-fast ablate mask-ratio --data-path images --preset tiny --output-dir runs/ablations

    Run the same command again to continue: finished runs are not repeated, and tables in one folder share runs.
    """

    table: tyro.conf.Positional[Table]
    """Tables 1a to 1f, Figures 5 (mask-ratio), 7 (schedule), 9 (partial), all of these, or Table 2 (speed)."""
    output_dir: Path
    """Folder for TABLE.md, TABLE.json, TABLE.png and all runs."""
    training: Annotated[TrainingFlags, tyro.conf.arg(name="training")]
    cost: Annotated[CostFlags, tyro.conf.arg(name="step time")]
    preset: Preset | None = None
    """Model size and recipes. Default: large, as in the paper; for table 'speed': base, large and huge."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds; each row is run with each seed."""
    rows: tuple[str, ...] | None = None
    """Names of the rows to run. Default: all rows."""

    def check(self) -> None:
        """Raise ``UserError`` if a flag is out of range or conflicts with another one."""
        at_least(batch_size=(self.cost.batch_size, 1), rounds=(self.cost.rounds, 1))
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise UserError(f"--output-dir {self.output_dir} is a file", "give a folder")
        if self.table == "speed":
            return
        data, labels, seeds = self.training.data_path, self.training.labels, self.seeds
        if data is None:
            raise UserError(f"ablate {self.table} needs --data-path", "give a folder with train/ and val/")
        if missing := [name for name in ("train", "val") if not (data / name).is_dir()]:
            raise UserError(
                f"--data-path {data} has no {' and no '.join(missing)}", "give a folder with train/ and val/"
            )
        if self.rows and self.table == "all":
            raise UserError("--rows selects rows of one table, but the table is all", "name a table instead of all")
        if not seeds or len({*seeds}) < len(seeds) or min(seeds) < 0:
            raise UserError(
                f"--seeds {' '.join(map(str, seeds))} is invalid", "give one or more different numbers, 0 or larger"
            )
        if labels is not None:
            at_least(labels=(labels, 1))


def ablate(args: list[str]) -> None:
    """Run an ablation of the paper: pre-train, fine-tune and probe each row; write a table and a plot."""
    flags = parse_verb(Ablation, "ablate", _join_quoted(args))
    flags.check()
    if flags.table == "speed":
        from ..studies.cost import MeasureOptions, speed

        presets: list[str] = [flags.preset] if flags.preset else ["base", "large", "huge"]
        speed(presets, flags.output_dir, MeasureOptions(flags.cost.batch_size, flags.cost.rounds))
        return
    if failed := _train(flags):
        error = UserError(f"failed rows: {', '.join(failed)}", "run the same command again to retry them")
        print(block(error, "mae-fast ablate"), file=sys.stderr)
        sys.exit(1)


def _train(flags: Ablation) -> list[str]:
    """Train all rows and write the tables. Returns the names of the failed rows."""
    from ..training.config import PretrainConfig
    from .flags import parse

    preset, given = flags.preset or "large", flags.training
    # The default row of the paper does not normalise pixels. The presets do, like the published command.
    words = {
        "pretrain": ["--no-norm-pix-loss", *_split_quoted("pretrain", given.pretrain)],
        "finetune": _split_quoted("finetune", given.finetune),
        "linprobe": _split_quoted("linprobe", given.linprobe),
    }
    common = ["--preset", preset, "--data-path", str(given.data_path), "--output-dir", str(flags.output_dir)]
    # Parse the flags of all verbs before training, so that a wrong flag is reported immediately.
    configs = {verb: parse(verb, [*common, *flags]) for verb, flags in words.items()}
    base = configs.pop("pretrain")
    assert isinstance(base, PretrainConfig)
    from ..studies.ablate import Study
    from ..studies.cost import MeasureOptions
    from ..studies.paper import PAPER

    options = MeasureOptions(flags.cost.batch_size, flags.cost.rounds, base.device, base.dtype)
    study = Study(preset, base, configs, flags.output_dir, flags.seeds, words, given.labels, given.tokenizer, options)
    chosen = {name: study.rows(name, flags.rows) for name in (PAPER if flags.table == "all" else [flags.table])}
    outcomes = [(name, outcome) for name, rows in chosen.items() for outcome in study.table(name, rows)]
    return [f"{name} {outcome.row.name}" for name, outcome in outcomes if outcome.failed]


def _join_quoted(args: list[str]) -> list[str]:
    """Write ``--pretrain FLAGS`` as ``--pretrain=FLAGS``: tyro rejects a separate value that begins with a dash."""
    words: list[str] = []
    for word in args:
        if words and words[-1] in ("--pretrain", "--finetune", "--linprobe"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _split_quoted(verb: str, flags: str) -> list[str]:
    """The single flags in the quoted string of ``--VERB``."""
    try:
        words = current_flags(shlex.split(flags))
    except ValueError as error:
        raise UserError(f"--{verb} {flags!r}: {error}", "check the quotes") from error
    if ours := [word for word in words if word.split("=")[0].replace("_", "-") in OURS]:
        flag = ours[0].split("=")[0]
        raise UserError(f"--{verb} {flags!r}: 'mae-fast ablate' sets {flag} itself", f"leave {flag} out")
    return words
