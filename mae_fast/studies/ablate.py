"""The paper's ablations: rows that differ in one setting, which are pre-trained, fine-tuned and probed."""

import json
import logging
import operator
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import api
from ..bench.formats import cell, markdown_table, new_figure
from ..bench.worker import one_line
from ..errors import UserError, first_line
from ..models.flops import Sizes
from ..training.config import DvaeConfig, PretrainConfig, RunConfig
from .common import Result, few_labels, final_figure
from .cost import Measured, MeasureOptions, Variant, measure
from .paper import PAPER, SOURCES, Published

logger = logging.getLogger(__name__)
PARTS = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0, "3/2": 3 / 2, "2": 2.0}
LINES = ("mask-ratio", "schedule", "partial")  # tables that are drawn as curves over a number, as in the paper
COSTS: dict[str, tuple[str, float, str]] = {  # by column: key, unit and format
    "GFLOPs per image": ("flops", 1e9, ".4g"),
    "FLOPs, x": ("flops_ratio", 1, ".2f"),
    "step, ms": ("ms", 1, ".1f"),
    "step, x": ("ratio", 1, ".2f"),
    "memory above weights and gradients, MiB": ("above", 2**20, ".0f"),
}
PROTOCOLS = {"finetune": "fine-tuned", "linprobe": "linear probe"}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        settings: fields of ``PretrainConfig`` that differ from the default row.
        blocks: number of blocks to fine-tune. None: fine-tune all blocks, and train a linear probe.
    """

    name: str
    label: str
    paper: Published
    settings: dict[str, Any]
    blocks: float | None = None

    @property
    def default(self) -> bool:
        """Whether this is the default row of all tables."""
        return not self.settings and self.blocks is None

    @property
    def folder(self) -> str:
        """The folder of its runs. Equal rows of different tables share a folder."""
        parts = []
        for name, value in self.settings.items():
            if not isinstance(value, Path):
                parts.append(name.replace("_", "-") + ("" if value is True else f"-{value}"))
        return "-".join(parts) or "default"


def rows_of(table: str, base: PretrainConfig, tokenizer: Path) -> list[Row]:
    """The rows of ``table``, a key of ``PAPER``.

    Args:
        base: the pre-training of the default row.
        tokenizer: run or file of a dVAE.
    """
    sizes = Sizes.of(Variant.of(base).build("meta"))
    default = base.model_dump() | {"decoder_depth": sizes.decoder_depth, "decoder_embed_dim": sizes.decoder_width}
    paper, rows = PAPER[table], []

    def add(name: str, paper_name: str, label: str = "", blocks: float | None = None, **settings: Any) -> None:
        changed = {field: value for field, value in settings.items() if value != default[field]}
        rows.append(Row(name, label or name, paper.get(paper_name, Published()), changed, blocks))

    if table == "decoder-depth":
        for blocks in (1, 2, 4, 8, 12):
            add(str(blocks), str(blocks), f"{blocks} blocks", decoder_depth=blocks)
    elif table == "decoder-width":
        for part in paper:
            width = int(sizes.decoder_width * PARTS[part])
            add(str(width), part, f"{width} wide (paper: {int(512 * PARTS[part])})", decoder_embed_dim=width)
    elif table == "mask-token":
        for name, seen in (("with", True), ("without", False)):
            add(name, name, f"encoder {name} mask tokens", encoder_mask_token=seen)
    elif table == "target":
        components = max(1, sizes.values // 8)  # 96 of 768 in the paper
        add("pixel", "pixel", "pixels", norm_pix_loss=False)
        add("pixel-norm", "pixel-norm", "pixels, normalised", norm_pix_loss=True)
        label = f"PCA, {components} of {sizes.values} coefficients"
        add("pca", "pca", label, target="pca", pca_components=components, norm_pix_loss=False)
        add("dvae", "dvae", "dVAE token", target="dvae", tokenizer=tokenizer, norm_pix_loss=False)
    elif table == "augmentation":
        labels = ("none", "crop, fixed size", "crop, random size", "crop and colour jitter")
        for name, label in zip(paper, labels, strict=True):
            add(name, name, label, augmentation=name)
    elif table == "mask-sampling":
        for name in paper:
            kind, percent = name.split("-")
            add(name, name, f"{kind}, {percent} %", mask_sampling=kind, mask_ratio=int(percent) / 100)
    elif table == "mask-ratio":
        for name in paper:
            add(name, name, mask_ratio=float(name))
    elif table == "schedule":
        for part in paper:
            epochs = max(1, round(base.epochs * PARTS[part]))
            # All rows have the same warm-up, as in the paper, but at most half of their epochs.
            warmup = min(base.warmup_epochs, epochs / 2)
            label = f"{epochs} epochs (paper: {int(800 * PARTS[part])})"
            add(str(epochs), part, label, epochs=epochs, warmup_epochs=warmup)
    else:
        for name in paper:
            tuned = float(sizes.depth if name == "all" else name)
            if name == "all" or tuned < sizes.depth:
                add(f"{tuned:g}", name, f"{tuned:g} blocks" + (" (all)" if name == "all" else ""), blocks=tuned)
    return list({row.name: row for row in reversed(rows)}.values())[::-1]  # the first of equal rows


@dataclass
class Outcome:
    """The finished runs of a row.

    Attributes:
        runs: by verb, one run per seed.
        failed: the error message if a run failed.
    """

    row: Row
    runs: dict[str, list[Path]] = field(default_factory=lambda: {verb: [] for verb in PROTOCOLS})
    failed: str | None = None

    def result(self, verb: str) -> Result | None:
        """Held-out top-1 of ``verb``'s runs."""
        runs = self.runs[verb]
        return Result([final_figure(run) for run in runs]) if runs else None


@dataclass(frozen=True)
class Study:
    """The settings that all tables of an output folder share.

    Attributes:
        base: the default row's pre-training.
        protocols: the configurations of "finetune" and "linprobe". Data, weights, seed and output folder are replaced
            for each run.
        flags: the flags that were given for these configurations, by verb; for the notes under the tables.
        labels: labelled images per class for fine-tuning and probing; None: all.
        tokenizer: run or file of a dVAE; None: train one if it is needed.
        run: trains a configuration, unless its run is finished.
    """

    preset: str
    base: PretrainConfig
    protocols: dict[str, RunConfig]
    output: Path
    seeds: tuple[int, ...] = (0,)
    flags: dict[str, list[str]] = field(default_factory=dict)
    labels: int | None = None
    tokenizer: Path | None = None
    options: MeasureOptions = field(default_factory=MeasureOptions)
    run: Callable[[RunConfig], Any] = field(default_factory=lambda: api.run)

    def rows(self, table: str, names: Iterable[str] | None = None) -> list[Row]:
        """The rows of ``table`` with these names, or all rows.

        Raises:
            UserError: if there is no row of that name.
        """
        rows = rows_of(table, self.base, self.tokenizer or self.output / "runs" / "dvae")
        names = [row.name for row in rows] if names is None else list(names)
        if unknown := set(names) - {row.name for row in rows}:
            has = ", ".join(row.name for row in rows)
            raise UserError(f"--rows {' '.join(sorted(unknown))}: unknown row of {table}", f"choose from {has}")
        return [row for row in rows if row.name in names]

    def train(self, row: Row) -> Outcome:
        """Run all verbs of a row. An error ends the row; it is logged, not raised."""
        outcome = Outcome(row)
        try:
            for seed in self.seeds:
                for verb, folder in self._train(row, seed):
                    outcome.runs[verb].append(folder)
        except Exception as error:  # of any type, so that the other rows still run
            outcome.failed = _message(error)
            logger.warning("row %s failed: %s", row.name, outcome.failed)
        return outcome

    def _train(self, row: Row, seed: int) -> Iterable[tuple[str, Path]]:
        data = self.base.data_path
        if row.settings.get("target") == "dvae" and self.tokenizer is None:
            self._run(DvaeConfig.with_preset(self.preset, data_path=data, output_dir=row.settings["tokenizer"]))
        runs = self.output / "runs" / f"{row.folder}-seed{seed}"
        weights = runs / "pretrain"
        if self.labels:
            data = few_labels(data, self.output / f"labels-{self.labels}", self.labels)
        self._run(self.base.changed(**row.settings, output_dir=weights, seed=seed))
        same = {"data_path": data, "weights": str(weights), "seed": seed}
        if row.blocks is not None:
            folder = runs / f"partial-{row.blocks:g}"
            self._run(self.protocols["finetune"].changed(**same, output_dir=folder, train_blocks=row.blocks))
            yield "finetune", folder
            return
        for verb in PROTOCOLS:
            self._run(self.protocols[verb].changed(**same, output_dir=runs / verb))
            yield verb, runs / verb

    def _run(self, config: RunConfig) -> None:
        logger.info("\n%s", config.output_dir)
        self.run(config)

    def table(self, name: str, rows: Iterable[Row]) -> list[Outcome]:
        """Train the rows of table ``name``, measure their steps, and write the table, its JSON and its picture."""
        outcomes = [self.train(row) for row in rows]
        if os.environ.get("RANK", "0") == "0":  # under torchrun, only one process writes
            found = self.record(name, outcomes)
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            text = markdown(found)
            (self.output / f"{name}.md").write_text(text)
            logger.info("%swrote %s.md and .json", text, self.output / name)
            try:
                draw(found, self.output / f"{name}.png")
            except UserError as error:
                logger.warning("%s", error)
        return outcomes

    def record(self, name: str, outcomes: list[Outcome]) -> dict[str, Any]:
        """The table as JSON."""
        from ..bench.timing import machine

        costs = {} if name == "partial" else self.costs([outcome.row for outcome in outcomes])
        rows = []
        for outcome in outcomes:
            row = outcome.row
            ours: dict[str, Any] = {}
            for verb in PROTOCOLS:
                result = outcome.result(verb)
                ours[verb] = result and {
                    "accuracies": result.accuracies, "mean": result.mean, "deviation": result.deviation,
                }  # fmt: skip
            rows.append(
                {
                    "name": row.name, "label": row.label, "default": row.default, "runs": row.folder,
                    "settings": {key: str(x) if isinstance(x, Path) else x for key, x in row.settings.items()},
                    "ours": ours, "paper": row.paper._asdict(), "cost": costs.get(row.name), "failed": outcome.failed,
                }
            )  # fmt: skip
        return {
            "table": name, "source": SOURCES[name], "preset": self.preset, "data": str(self.base.data_path),
            "labels": self.labels, "seeds": self.seeds, "flags": self.flags, "machine": machine(),
            "measured": asdict(self.options), "rows": rows,
        }  # fmt: skip

    def costs(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """For each row, the FLOPs, time and memory of a training step; ``failed`` says why a figure is missing."""
        found: dict[str, dict[str, Any]] = {}
        cases = {"": Variant.of(self.base)}
        flops = cases[""].flops()
        for row in rows:
            try:
                case = Variant.of(self.base.model_copy(update=row.settings))
                found[row.name] = {"flops": case.flops(), "flops_ratio": case.flops() / flops}
                cases[row.name] = case
            except Exception as error:  # of any type, so that the table is still written
                found[row.name] = {"failed": _message(error)}
        measured = measure(cases, "", self.options)
        for name, one in measured.items():
            if name:
                found[name] |= asdict(one) if isinstance(one, Measured) else {"failed": one}
        return found


def _message(error: Exception) -> str:
    return first_line(error) if isinstance(error, UserError) else one_line(error)


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown, with notes below."""
    partial = table["table"] == "partial"
    verbs = ["finetune"] if partial else list(PROTOCOLS)
    head = ["top-1, %", *(PROTOCOLS[verb] for verb in verbs), *(f"paper: {PROTOCOLS[verb]}" for verb in verbs)]
    if not partial:
        head += COSTS
    lines = []
    for row in table["rows"]:
        cells = []
        for verb in verbs:
            one = row["ours"][verb]
            cells.append("-" if one is None else str(Result(one["accuracies"])))
        cells += [cell(row["paper"], verb, form=".1f") for verb in verbs]
        if not partial:
            cells += [cell(row["cost"], *figure) for figure in COSTS.values()]
        lines.append([f"**{row['label']}** (default)" if row["default"] else row["label"], *cells])
    return "\n".join([markdown_table(head, lines), "", *notes(table), ""])


def notes(table: dict[str, Any]) -> list[str]:
    """The notes under a table: failures, and how the figures were measured."""
    partial = table["table"] == "partial"
    lines = []
    for row in table["rows"]:
        lines += [f"- {row['label']}: failed: {row['failed']}"] if row["failed"] else []
        if row["cost"] and "failed" in row["cost"] and row["cost"]["failed"] != row["failed"]:
            lines.append(f"- {row['label']}: cost: {row['cost']['failed']}")
    seeds = table["seeds"]
    listed = ", ".join(map(str, seeds))
    spread = f"mean and standard deviation over seeds {listed}" if len(seeds) > 1 else f"seed {listed}"
    labels = f"{table['labels']} labels per class, " if table["labels"] else ""
    lines.append(
        f"- Ours: held-out top-1 of preset {table['preset']} on {table['data']}, {labels}{spread}. As in the paper, "
        "the default row does not normalise pixels; the presets base, large and huge do."
    )
    flags = [f'--{verb} "{shlex.join(words)}"' for verb, words in table["flags"].items() if words]
    lines += [f"- Flags of all rows: {' '.join(flags)}"] if flags else []
    lines.append(
        f"- Paper ({table['source']}): ViT-L/16 on ImageNet-1K, 800 epochs. Compare the order of the rows, not their "
        "values."
    )
    if partial:
        lines.append(
            "- N blocks are the last N blocks; 0.5 is the MLP of the last block. All rows start from the weights of "
            "the default row."
        )
    else:
        options, here = table["measured"], table["machine"]
        lines.append(
            "- FLOPs: training FLOPs of the published model, without a tokenizer. Step: forward and backward pass of "
            f"{options['batch_size']} images, without data loading and optimizer, on {here['gpu'] or here['cpu']}; "
            f"median of {options['rounds']} rounds, interleaved with the step of the default row. x: ratio to the "
            "default row."
        )
    return lines


def draw(table: dict[str, Any], path: Path, **options: Any) -> None:
    """Draw a panel for each protocol: our accuracy on the left axis, the paper's on the right axis.

    Args:
        options: keyword arguments of matplotlib's ``savefig``.
    """
    name, rows = table["table"], table["rows"]
    verbs = ["finetune"] if name == "partial" else list(PROTOCOLS)
    figure = new_figure(5.5 * len(verbs), 4)
    panels = figure.subplots(1, len(verbs), squeeze=False)[0]
    lines = name in LINES
    places = [float(row["name"]) for row in rows] if lines else [float(i) for i in range(len(rows))]
    for panel, verb in zip(panels, verbs, strict=True):
        ours = [(x, row["ours"][verb]) for x, row in zip(places, rows, strict=True) if row["ours"][verb]]
        paper = [(x, row["paper"][verb]) for x, row in zip(places, rows, strict=True) if row["paper"][verb] is not None]
        theirs = panel.twinx()
        for axis, values, errors, color, shift, label in (
            (panel, [(x, one["mean"]) for x, one in ours], [one["deviation"] for _, one in ours], "C0", -0.2, "ours"),
            (theirs, paper, [0.0] * len(paper), "C1", 0.2, "paper"),
        ):
            axis.set_ylabel(f"{label}: top-1, %", color=color)
            axis.tick_params(axis="y", colors=color)
            if not values:
                continue
            x, y = [x for x, _ in values], [y for _, y in values]
            if lines:
                axis.errorbar(x, y, errors if any(errors) else None, capsize=3, marker="o", color=color)
            else:
                axis.bar([x + shift for x in x], y, 0.38, yerr=errors if any(errors) else None, capsize=3, color=color)
                low, high = min(map(operator.sub, y, errors)), max(map(operator.add, y, errors))
                room = high - low + 0.5
                axis.set_ylim(low - room, high + room / 4)
        if name == "schedule":
            panel.set_xscale("log", base=2)
        # The tick labels of a curve have room for numbers only, so a dotted line marks the default.
        names = [row["name"] if lines or not row["default"] else f"{row['name']}\n(default)" for row in rows]
        panel.set_xticks(places, names, minor=False, rotation=60 if lines else 0)
        for place, row in zip(places, rows, strict=True):
            if lines and row["default"]:
                panel.axvline(place, linestyle=":", color="grey")
        panel.set_xlabel({"partial": "blocks fine-tuned", "schedule": "epochs"}.get(name, name.replace("-", " ")))
        panel.set_title(PROTOCOLS[verb])
    figure.savefig(path, dpi=110, **options)
