"""The tables and pictures of the study on Fashion-MNIST."""

import json
import logging
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import api
from ..bench.formats import markdown_table, new_figure
from ..bench.timing import machine
from .ablate import PROTOCOLS, Row, draw
from .common import Result
from .study import LONG_SCRATCH, MAE, PIXELS, ROWS, SCRATCH, Study

logger = logging.getLogger(__name__)

COMPARED = {  # by the prefix of their results
    "finetune": (
        "fine-tuned",
        {MAE: "MAE", SCRATCH: "random start", LONG_SCRATCH: "random start, as long as both stages of MAE"},
    ),
    "linear": ("logistic regression", {MAE: "MAE", SCRATCH: "untrained encoder", PIXELS: "raw pixels"}),
}
TITLES = {
    "schedule": "epochs of pre-training", "mask-ratio": "mask ratio", "mask-sampling": "masks",
    "decoder-depth": "decoder depth", "decoder-width": "decoder width", "target": "target",
    "mask-token": "mask tokens", "augmentation": "augmentation",
}  # fmt: skip
LABELS = {"none": "centre crop, no augmentation"}
CURVES = ("schedule", "mask-ratio")  # drawn
Found = dict[str, Any]


def write_report(study: Study) -> None:
    """Write study.json, study.md and the pictures into the study's folder, of all results that are there."""
    found = collect(study)
    directory = study.directory
    (directory / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    pictures = draw_all(found, directory)
    weights, test = Path(study.pretrained(study.plan.seeds[0])), study.data / "val"
    if weights.exists():
        classes = sorted(test.iterdir())
        api.reconstruct(weights, [sorted(folder.iterdir())[0] for folder in classes], directory / "reconstruction.png")
        pictures.append("reconstruction.png")
    (directory / "study.md").write_text(page(found, pictures))
    logger.info("%s\nwrote %s", page(found, []), directory / "study.md")


def collect(study: Study) -> Found:
    """All results of a study, JSON; what is not finished is left out."""

    def result(name: str) -> Any:
        path = study.result(name)
        return json.loads(path.read_text()) if path.exists() else None

    plan = study.plan
    compared: Found = {"finetune": {}, "linear": {}}
    for start in COMPARED["finetune"][1]:
        each = {str(count): result(f"finetune-{start}-{count}") for count in plan.labels}
        compared["finetune"][start] = {count: one for count, one in each.items() if one}
    for start in COMPARED["linear"][1]:
        compared["linear"][start] = result(f"linear-{start}") or {}

    def row_of(row: Row) -> Found:
        one = result(f"row-{row.folder}") or {}
        ours = {verb: _summary(one[verb]) if one else None for verb in PROTOCOLS}
        speeds = [result(f"speed-{row.folder}-round{turn}") for turn in range(plan.speed_rounds)]
        speeds = [speed for speed in speeds if speed]
        return {
            "name": row.name, "label": LABELS.get(row.label, row.label), "default": row.default, "ours": ours,
            "paper": row.paper._asdict(), "images_per_s": speeds,
            "crops": one["images"] * row.settings.get("crops_per_image", 1) if one else None,
        }  # fmt: skip

    return {
        "plan": asdict(plan), "machine": machine(), "compared": compared,
        "tables": {table: [row_of(row) for row in study.rows(table)] for table in ROWS},
        "sooner": [row_of(row) for row in study.sooner()],
    }  # fmt: skip


def _summary(accuracies: list[float]) -> Found:
    result = Result(accuracies)
    return {"accuracies": accuracies, "mean": result.mean, "deviation": result.deviation}


def page(found: Found, pictures: list[str]) -> str:
    """The study as Markdown."""
    plan, here = found["plan"], found["machine"]
    total = 10 * plan["unlabelled"]
    parts = [
        "# MAE on Fashion-MNIST",
        f"Held-out top-1 in per cent on the 10,000 test images; mean and standard deviation of the seeds. ViT of 4 "
        f"blocks, 128 wide, patches of 4 x 4 pixels. Machine: {here['cpu']}, torch {here['torch']}; each run has one "
        "thread.",
        f"## MAE and random start\n\nPre-training: {plan['compared_epochs']} epochs of {total:,} images without their "
        f"labels. {len(plan['seeds'])} seeds, of pre-training, labelled images and fine-tuning.",
        compared_table(found),
        "## Chosen recipes\n\n"
        f"Recipes are chosen for each number of labels, with the first seed and {10 * plan['tuning']:,} images that "
        "are neither trained on nor tested: first the crops, then the learning rate, then the steps. Accuracy on these "
        "images in per cent; the chosen value is bold. Layer decay: 0.75 from MAE, none from random weights. Penalty: "
        "the factor of the squared norm of the weights, 1 / C.",
        recipes_table(found),
        penalties_table(found),
        f"## Ablations\n\nPre-training: {plan['epochs']} epochs of {total:,} images, one seed, unless the row says "
        f"otherwise. Fine-tuned with {plan['ablated_labels']} labels per class, {plan['steps']} steps, "
        f"{len(plan['ablated_seeds'])} seeds of labelled images and fine-tuning. Logistic regression with "
        f"{plan['labels'][-1]} labels per class. The default row predicts normalised pixels, of random 75 % masks, "
        "with a decoder of 2 blocks, 96 wide. Paper: ViT-L/16 on ImageNet-1K, 800 epochs, pixels that are not "
        "normalised; compare the order of the rows.",
        ablations_table(found),
        "## Shorter pre-training\n\nCrops per second: one process with one thread, loading included, median of "
        f"{plan['speed_rounds']} runs in turns. Time: of the whole pre-training at this speed.",
        sooner_table(found),
        *(f"![{name}]({name})" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def compared_table(found: Found) -> str:
    """Accuracies of all starts and numbers of labels."""
    counts = [str(count) for count in found["plan"]["labels"]]
    lines = []
    for kind, (verb, starts) in COMPARED.items():
        for start, label in starts.items():
            results = found["compared"][kind][start]
            cells = (str(Result(results[count]["accuracies"])) if count in results else "-" for count in counts)
            lines.append([f"{verb}, {label}", *cells])
    return markdown_table(["top-1, %", *(f"{count} labels per class" for count in counts)], lines)


def recipes_table(found: Found) -> str:
    """What fine-tuning was tried with, and what was chosen."""
    lines = []
    for start, label in COMPARED["finetune"][1].items():
        for count, one in found["compared"]["finetune"][start].items():
            if not one["tried"]:
                continue
            chosen, first, cells = one["chosen"], one["tried"][0], []
            for name in ("crops", "lr", "steps"):
                others = [other for other in ("crops", "lr", "steps") if other != name]
                # Along one hyperparameter: the others as at that stage of the choice.
                stage = {"crops": first, "lr": {**first, "crops": chosen["crops"]}, "steps": chosen}[name]
                tried = {x[name]: x["accuracy"] for x in one["tried"] if all(x[key] == stage[key] for key in others)}
                ordered = tried if name == "crops" else dict(sorted(tried.items()))
                texts = (
                    _bold(f"{value}: {accuracy:.1f}", value == chosen[name]) for value, accuracy in ordered.items()
                )
                cells.append("; ".join(texts))
            lines.append([f"{label}, {count} labels", *cells])
    return markdown_table(["start, labels per class", "crops' share of the area", "learning rate", "steps"], lines)


def penalties_table(found: Found) -> str:
    """What the logistic regression was tried with, and what was chosen."""
    lines = []
    for start, label in COMPARED["linear"][1].items():
        for count, one in found["compared"]["linear"][start].items():
            tried = (_bold(f"{p}: {x:.1f}", float(p) == one["chosen"]) for p, x in one["tried"].items())
            lines.append([f"{label}, {count} labels", "; ".join(tried)])
    return markdown_table(["features, labels per class", "penalty"], lines)


def _bold(text: str, chosen: bool) -> str:
    return f"**{text}**" if chosen else text


def ablations_table(found: Found) -> str:
    """The rows of all ablations, beside the paper's."""
    lines = []
    for table, rows in found["tables"].items():
        for row in rows:
            label = f"**{row['label']}** (default)" if row["default"] else row["label"]
            paper = ("-" if row["paper"][verb] is None else f"{row['paper'][verb]:.1f}" for verb in PROTOCOLS)
            lines.append([TITLES[table], label, *_accuracies(row), *paper])
    head = ["ablation", "row", "fine-tuned", "logistic regression", "paper: fine-tuned", "paper: linear probe"]
    return markdown_table(head, lines)


def sooner_table(found: Found) -> str:
    """Accuracy and time of the rows that train sooner."""
    lines = []
    for row in found["sooner"]:
        speed = statistics.median(row["images_per_s"]) if row["images_per_s"] else None
        crops = f"{row['crops']:,}" if row["crops"] else "-"
        time = f"{row['crops'] / speed:.0f} s" if speed and row["crops"] else "-"
        lines.append([row["label"], crops, f"{speed:.0f}" if speed else "-", time, *_accuracies(row)])
    head = ["pre-training", "crops seen", "crops/s", "time", "fine-tuned", "logistic regression"]
    return markdown_table(head, lines)


def _accuracies(row: Found) -> list[str]:
    return [str(Result(row["ours"][verb]["accuracies"])) if row["ours"][verb] else "-" for verb in PROTOCOLS]


def draw_all(found: Found, folder: Path, prefix: str = "", **options: Any) -> list[str]:
    """Draw the comparison, and the ablations over numbers; the names of the files.

    Args:
        prefix: of the names.
        options: of matplotlib's savefig.
    """
    names = [f"{prefix}{name}.png" for name in ("accuracy", *CURVES)]
    draw_compared(found, folder / names[0], **options)
    for table, name in zip(CURVES, names[1:], strict=True):
        draw({"table": table, "rows": found["tables"][table]}, folder / name, **options)
    return names


def draw_compared(found: Found, path: Path, **options: Any) -> None:
    """A panel for fine-tuning and for the logistic regression: mean accuracy over labels per class, bars of one
    deviation, a dot for each seed."""
    figure = new_figure(9, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (kind, (verb, starts)) in zip(panels, COMPARED.items(), strict=True):
        for color, (start, label) in enumerate(starts.items()):
            results = {int(count): Result(x["accuracies"]) for count, x in found["compared"][kind][start].items()}
            means, deviations = ([getattr(x, name) for x in results.values()] for name in ("mean", "deviation"))
            panel.errorbar(list(results), means, deviations, capsize=4, label=label, color=f"C{color}", marker=".")
            for count, result in results.items():
                dots = [count] * len(result.accuracies)
                panel.plot(dots, result.accuracies, ".", alpha=0.5, color=f"C{color}")
        panel.set_title(verb)
        panel.set_xscale("log")
        counts = found["plan"]["labels"]
        panel.set_xticks(counts, [f"{count:,}" for count in counts], minor=False)
        panel.minorticks_off()
        panel.set_xlabel("labels per class")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    panels[0].set_ylabel("top-1 on the test images, %")
    figure.savefig(path, dpi=100, **options)
