"""The tables and plots of the study on Fashion-MNIST."""

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

COMPARED = {  # by the prefix of the result files: a label, and a label for each start
    "finetune": (
        "fine-tuned",
        {MAE: "MAE", SCRATCH: "from scratch", LONG_SCRATCH: "from scratch, same total time as MAE"},
    ),
    "linear": ("logistic regression", {MAE: "MAE", SCRATCH: "untrained encoder", PIXELS: "raw pixels"}),
}
TITLES = {
    "schedule": "epochs of pre-training", "mask-ratio": "mask ratio", "mask-sampling": "masks",
    "decoder-depth": "decoder depth", "decoder-width": "decoder width", "target": "target",
    "mask-token": "mask tokens", "augmentation": "augmentation",
}  # fmt: skip
LABELS = {"none": "centre crop, no augmentation"}
CURVES = ("schedule", "mask-ratio")  # tables that are also plotted
Found = dict[str, Any]


def write_report(study: Study) -> None:
    """Write study.json, study.md and the plots to the folder of the study, from all results so far."""
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
    """All results of a study so far, as JSON types."""

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
        "Top-1 accuracy in per cent on the 10,000 test images; mean and standard deviation over the seeds. The model "
        f"is a ViT with 4 blocks, 128 wide, and patches of 4 x 4 pixels. Machine: {here['cpu']}, torch "
        f"{here['torch']}; each run has one thread.",
        f"## MAE and training from scratch\n\nMAE is pre-trained for {plan['compared_epochs']} epochs on {total:,} "
        f"images without labels. Each of the {len(plan['seeds'])} seeds has its own pre-training, labelled images and "
        "fine-tuning.",
        compared_table(found),
        "## Chosen recipes\n\n"
        f"A recipe is chosen for each number of labels, with the first seed and {10 * plan['tuning']:,} images that "
        "are used neither for training nor for testing: first the crops, then the learning rate, then the steps. The "
        "tables show the accuracy on these images in per cent; the chosen value is bold. The layer decay is 0.75 from "
        "MAE weights; training from scratch uses none. The penalty is the factor of the squared norm of the weights, "
        "1 / C.",
        recipes_table(found),
        penalties_table(found),
        f"## Ablations\n\nUnless the row says otherwise, pre-training takes {plan['epochs']} epochs of {total:,} "
        f"images, with one seed. Fine-tuning uses {plan['ablated_labels']} labels per class and {plan['steps']} steps, "
        f"with {len(plan['ablated_seeds'])} seeds of labelled images and fine-tuning. The logistic regression uses "
        f"{plan['labels'][-1]} labels per class. The default row predicts normalised pixels, with random 75 % masks "
        "and a decoder of 2 blocks, 96 wide. Paper: ViT-L/16 on ImageNet-1K, 800 epochs, pixels not normalised. "
        "Compare the order of the rows, not their values.",
        ablations_table(found),
        "## Shorter pre-training\n\nCrops per second are those of one process with one thread, including data "
        f"loading: the median of {plan['speed_rounds']} interleaved runs. The time is that of the complete "
        "pre-training at this speed.",
        sooner_table(found),
        *(f"![{name}]({name})" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def compared_table(found: Found) -> str:
    """The accuracies of all starts and numbers of labels."""
    counts = [str(count) for count in found["plan"]["labels"]]
    lines = []
    for kind, (verb, starts) in COMPARED.items():
        for start, label in starts.items():
            results = found["compared"][kind][start]
            cells = (str(Result(results[count]["accuracies"])) if count in results else "-" for count in counts)
            lines.append([f"{verb}, {label}", *cells])
    return markdown_table(["top-1, %", *(f"{count} labels per class" for count in counts)], lines)


def recipes_table(found: Found) -> str:
    """The recipes of fine-tuning that were tried, with the chosen values in bold."""
    lines = []
    for start, label in COMPARED["finetune"][1].items():
        for count, one in found["compared"]["finetune"][start].items():
            if not one["tried"]:
                continue
            chosen, first, cells = one["chosen"], one["tried"][0], []
            for name in ("crops", "lr", "steps"):
                others = [other for other in ("crops", "lr", "steps") if other != name]
                # The values that were tried for one hyperparameter, with the others as chosen at that stage.
                stage = {"crops": first, "lr": {**first, "crops": chosen["crops"]}, "steps": chosen}[name]
                tried = {x[name]: x["accuracy"] for x in one["tried"] if all(x[key] == stage[key] for key in others)}
                ordered = tried if name == "crops" else dict(sorted(tried.items()))
                texts = (
                    _bold(f"{value}: {accuracy:.1f}", value == chosen[name]) for value, accuracy in ordered.items()
                )
                cells.append("; ".join(texts))
            lines.append([f"{label}, {count} labels", *cells])
    return markdown_table(["start, labels per class", "crop scale", "learning rate", "steps"], lines)


def penalties_table(found: Found) -> str:
    """The penalties of the logistic regression that were tried, with the chosen one in bold."""
    lines = []
    for start, label in COMPARED["linear"][1].items():
        for count, one in found["compared"]["linear"][start].items():
            tried = (_bold(f"{p}: {x:.1f}", float(p) == one["chosen"]) for p, x in one["tried"].items())
            lines.append([f"{label}, {count} labels", "; ".join(tried)])
    return markdown_table(["features, labels per class", "penalty"], lines)


def _bold(text: str, chosen: bool) -> str:
    return f"**{text}**" if chosen else text


def ablations_table(found: Found) -> str:
    """The rows of all ablations, with the results of the paper."""
    lines = []
    for table, rows in found["tables"].items():
        for row in rows:
            label = f"**{row['label']}** (default)" if row["default"] else row["label"]
            paper = ("-" if row["paper"][verb] is None else f"{row['paper'][verb]:.1f}" for verb in PROTOCOLS)
            lines.append([TITLES[table], label, *_accuracies(row), *paper])
    head = ["ablation", "row", "fine-tuned", "logistic regression", "paper: fine-tuned", "paper: linear probe"]
    return markdown_table(head, lines)


def sooner_table(found: Found) -> str:
    """Accuracy and time of shorter pre-training."""
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
    """Plot the comparison and the tables in ``CURVES``. Returns the names of the files.

    Args:
        prefix: prefix of the names.
        options: keyword arguments of matplotlib's ``savefig``.
    """
    names = [f"{prefix}{name}.png" for name in ("accuracy", *CURVES)]
    draw_compared(found, folder / names[0], **options)
    for table, name in zip(CURVES, names[1:], strict=True):
        draw({"table": table, "rows": found["tables"][table]}, folder / name, **options)
    return names


def draw_compared(found: Found, path: Path, **options: Any) -> None:
    """Plot the accuracy over the labels per class, in one panel for fine-tuning and one for the logistic regression.

    The curves show the mean, the bars one standard deviation, the dots the single seeds.
    """
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
