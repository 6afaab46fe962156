"""``python -m benchmarks.readme``: writes the tables and plots of README and docs from ``benchmarks/results``.

A table is between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a key of ``TABLES``.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mae_fast.bench import tables, timing
from mae_fast.bench.case import Case
from mae_fast.bench.contenders import BASELINES
from mae_fast.bench.predict import GPUS, STEPS, predicted_seconds
from mae_fast.ops import registry
from mae_fast.studies import study_report

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
RESULTS = Path(__file__).parent / "results"
MODEL, MODEL_AMX, DATA = "model-epyc-avx512bf16", "model-xeon-amx", "data-epyc"
MACHINE = "2 CPU cores (AMD EPYC, AVX512_BF16)"  # of MODEL
OPS, OPS_GPU, MASK_TOKEN = "ops-epyc-avx2", "ops-h100", "mask-token-epyc-avx512bf16"
PROFILES = {
    "profile-epyc-avx512bf16": "AMD EPYC, AVX512_BF16, kernels of the tables above",
    "profile-xeon-avx512bf16": "Intel Xeon (Emerald Rapids), `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`",
    "profile-xeon-amx": "Intel Xeon (Emerald Rapids), AMX",
}
SOONER = "sooner-epyc-avx512bf16"
STUDY = "study-epyc-avx512bf16"  # the study.json of ``make study``

TRAINED = {
    "mae_fast": "`mae_fast`: `model.loss`, `training.optim.AdamW`",
    "mae_fast drop-in": "`mae_fast` as a drop-in: `model(imgs)`, torch's AdamW",
    "reference": "eager reference with SDPA",
    "reference compiled": "eager reference under torch.compile",
    "transformers": "transformers' ViTMAE with SDPA",
    "timm blocks": "eager reference with timm's blocks",
}
TUNED = {
    "mae_fast": "`mae_fast`: `vit_base_patch16`, `training.optim.AdamW`",
    "timm vit": "timm's `vit_base_patch16_224`, fused AdamW",
    "timm vit compiled": "timm's `vit_base_patch16_224` under torch.compile",
}
OTHERS = {
    "train base batch 16 fp32": "ViT-B/16, batch 16, fp32",
    "train large batch 8 bf16": "ViT-L/16, batch 8",
    "finetune large batch 8 bf16": "fine-tuning ViT-L/16, batch 8",
    "infer base batch 16 bf16": "encoder, all patches, ViT-B/16, batch 16",
    "infer large batch 8 bf16": "encoder, all patches, ViT-L/16, batch 8",
    "infer huge batch 4 bf16": "encoder, all patches, ViT-H/14, batch 4",
    "reconstruct base batch 16 bf16": "reconstruction, ViT-B/16, batch 16",
    "reconstruct huge batch 4 bf16": "reconstruction, ViT-H/14, batch 4",
}
GROWTH = (
    {str(Case("train", "base", n, "bf16", 224)): f"batch {n}" for n in (1, 4, 8, 16)}
    | {str(Case("train", "base", 4, "bf16", side)): f"{side} pixels, batch 4" for side in (112, 160, 320, 448)}
    | {str(Case("train", "base", 8, "bf16", 224, ratio)): f"{ratio:.0%} removed, batch 8" for ratio in (0.25, 0.5, 0.9)}
)
LOADERS = {
    "mae_fast dali": "`mae_fast`, `--image-decoder dali`",
    "mae_fast pil": "`mae_fast`, `--image-decoder pil`",
    "torchvision": "torchvision, Pillow, `DataLoader`",
    "torchvision normalised": "torchvision, normalised",
    "plain DALI": "DALI pipeline",
    "simplejpeg + torch": "simplejpeg and torch, `DataLoader`",
    "mae_fast dali, 4 crops an image": "`mae_fast`, dali, `--crops-per-image 4`",
    "mae_fast dali, cached": "`mae_fast`, dali, `--cache`",
}


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def digest(name: str) -> str:
    """The SHA-256 of a results file."""
    return hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()


def table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def steps(case: str, labels: dict[str, str], of: str = MODEL) -> str:
    rows = results(of)[case]["rows"]
    lines = []
    for name, label in labels.items():
        row = rows[name]
        faster = f"{rows['mae_fast'][f'vs {name}']:.2f}x" if not name.startswith("mae_fast") else ""
        lines.append((label, seconds(row), f"{row['above'] / 2**20:.0f} MiB", faster))
    return table(("", "step", "memory", "speedup of `mae_fast`"), lines)


def seconds(row: dict[str, Any]) -> str:
    value = row["ms"] / 1e3
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def cases(labels: dict[str, str]) -> str:
    """A table of ours against the best baseline of each case."""
    found = results(MODEL)
    lines = []
    for case, label in labels.items():
        rows = found[case]["rows"]
        ours, best = rows["mae_fast"], rows["mae_fast"]["best baseline"]
        low, high = ours[f"spread vs {best}"]
        memory = f"{ours['above'] / 2**20:.0f} vs. {rows[best]['above'] / 2**20:.0f} MiB"
        faster = f"{ours['vs best baseline']:.2f}x ({low:.2f} to {high:.2f})"
        lines.append((label, seconds(ours), f"{ours['images/s']:.3g}", memory, faster, best))
    return table(("", "step", "images/s", "memory", "speedup over the best baseline", "best baseline"), lines)


def summary() -> str:
    """A sentence about the speed and memory of pre-training."""
    rows = results(MODEL)["train base batch 16 bf16"]["rows"]
    faster = against_baselines(rows)
    memory = rows["mae_fast"]["above"] / min(row["above"] for name, row in rows.items() if name in BASELINES)
    times = {name: row["rounds ms"] for name, row in rows.items() if name in BASELINES or name == "mae_fast drop-in"}
    drop_in = [timing.ratio(times, name, "mae_fast drop-in") for name in times if name in BASELINES]
    return (
        f"On {MACHINE}, a pre-training step of ViT-B/16 (batch 16, 224 pixels, bf16) with `model.loss` and our "
        f"AdamW is {min(faster):.2f}x to {max(faster):.2f}x as fast as with eager PyTorch, torch.compile, transformers "
        f"or timm's blocks. The drop-in call `model(imgs)` with torch's AdamW is {min(drop_in):.2f}x to "
        f"{max(drop_in):.2f}x as fast. Not counting weights, gradients and optimizer state, the step needs "
        f"{memory:.2f}x the memory of the most economical baseline."
    )


def op_summary() -> str:
    """A sentence about the speed of the ops alone."""
    of = {name: [row["vs compile"] for row in results(name)["rows"]] for name in (OPS, OPS_GPU)}
    ops = [*dict.fromkeys(f"`{row['problem'].split()[0]}`" for row in results(OPS)["rows"])]
    return (
        f"The ops {', '.join(ops[:-1])} and {ops[-1]} alone are {spread(of[OPS])} as fast as torch.compile on a CPU "
        f"with AVX2. On an H100, the ratio is {spread(of[OPS_GPU])}, depending on the op."
    )


def against_baselines(rows: dict[str, dict[str, Any]]) -> list[float]:
    """The speedup over each baseline."""
    return [rows["mae_fast"][f"vs {name}"] for name in rows if name in BASELINES]


def loaders() -> str:
    rows = results(DATA)["rows"]
    lines = []
    for name, label in LOADERS.items():
        row = rows[name]
        faster = [f"{row[key]:.2f}x" if key in row else "" for key in ("vs torchvision", "vs torchvision normalised")]
        figures = f"{row['images/s']:.0f}", f"{row['first batch s']:.2f} s", f"{row['peak MiB']:.0f} MiB"
        lines.append((label, *figures, *faster))
    head = ("", "images/s", "first batch", "memory", "speedup over torchvision", "over torchvision, normalised")
    return table(head, lines)


def ops(name: str, batch: int, ms: str, eager: str, compiled: str) -> str:
    """A table of ops. ``ms``, ``eager`` and ``compiled`` are the formats of times and speedups."""
    lines = []
    for row in results(name)["rows"]:
        times = (f"{row['ms'][name]:{ms}} ms" for name in ("eager", "compile", "mae_fast"))
        lines.append((row["problem"], *times, f"{row['vs eager']:{eager}}x", f"{row['vs compile']:{compiled}}x"))
    head = (f"op, batch {batch}, 224 px, mask 0.75", "eager", "torch.compile", "mae_fast")
    return table((*head, "speedup over eager", "speedup over torch.compile"), lines)


def ratios(name: str, op: str) -> list[float]:
    """The speedup over torch.compile for each problem of the op."""
    return [row["vs compile"] for row in results(name)["rows"] if row["problem"].startswith(op + " ")]


def spread(found: list[float]) -> str:
    if not found:
        return "-"
    low, high = (f"{edge:.2g}" for edge in (min(found), max(found)))
    return f"{low}x" if low == high else f"{low}x to {high}x"


def op_list() -> str:
    head = ("op", "equivalent", "speedup over torch.compile, CPU", "H100")
    rows = []
    for op in registry.ops():
        rows.append((f"`{op.name}`", op.equals, spread(ratios(OPS, op.name)), spread(ratios(OPS_GPU, op.name))))
    return table(head, rows)


SHORT = {  # contenders, as the plot names them
    "mae_fast": "mae_fast",
    "mae_fast drop-in": "mae_fast as a drop-in",
    "reference": "eager PyTorch",
    "reference compiled": "torch.compile",
    "transformers": "transformers",
    "timm blocks": "timm's blocks",
    "timm vit": "timm",
    "timm vit compiled": "timm, torch.compile",
}


def throughput() -> dict[str, dict[str, float]]:
    """Images per second of each contender, by the title of the plot."""
    titles = {"train": "Pre-training", "finetune": "Fine-tuning"}
    found = {titles[task]: results(MODEL)[f"{task} base batch 16 bf16"]["rows"] for task in titles}
    return {title: {SHORT[name]: row["images/s"] for name, row in rows.items()} for title, rows in found.items()}


PICTURE = ROOT / "docs" / "speed.png"
# Plots of the cost of a step over batch size, image size and mask ratio.
GROWN = {x: ROOT / "docs" / f"growth-{x.replace('_', '-')}.png" for x in tables.SWEPT}


def draw(path: Path) -> None:
    """Plot ``throughput``. The metadata contains the values."""
    from matplotlib.figure import Figure

    found = throughput()
    figure = Figure(figsize=(9, 3), layout="constrained")
    figure.suptitle(f"ViT-B/16, 224 px, batch 16, bf16, on {MACHINE}: images/s, higher is better", fontsize="medium")
    for axes, (title, values) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        colours = ["C0" if name.startswith("mae_fast") else "0.75" for name in values]
        axes.bar_label(axes.barh([*values], [*values.values()], color=colours), fmt="%.2f", padding=3)
        axes.set_xlim(0, 1.15 * max(values.values()))
        axes.invert_yaxis()
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Description": json.dumps(found)})


def grown() -> str:
    """The values in the plots of ``GROWN``, as JSON."""
    found = results(MODEL)
    return json.dumps({case: {name: row["ms"] for name, row in of["rows"].items()} for case, of in found.items()})


def lower_bounds() -> str:
    """The time of a step and its lower bound on each machine."""
    lines = []
    for name, label in PROFILES.items():
        found = results(name)
        bound = found["products ms"] + found["AdamW ms"]
        times = (f"{ms / 1e3:.2f} s" for ms in (found["step ms"], bound))
        lines.append((label, *times, f"{found['floor / step']:.0%}"))
    return table(("processor, 2 cores", "step", "lower bound", "lower bound / step"), lines)


def mask_tokens() -> str:
    without = (row for row in results(MASK_TOKEN)["rows"] if not row["encoder_mask_token"])
    rows = {(row["preset"], row["decoder_depth"]): row for row in without}
    lines = []
    for preset, label in (
        ("base", "ViT-B, decoder of 8 blocks / 1 block"),
        ("large", "ViT-L, 8 / 1"),
        ("huge", "ViT-H, 8 / 1"),
    ):
        both = [rows[preset, depth] for depth in (8, 1)]
        figures = (
            " / ".join(f"{row[key]:.{digits}f}" for row in both if row[key])
            for key, digits in (("fewer_flops", 2), ("paper_fewer_flops", 1), ("faster", 2), ("paper_faster", 1))
        )
        lines.append((label, *figures))
    head = ("compared with mask tokens in the encoder", "FLOPs reduction", "paper", "step speedup", "paper")
    return table(head, lines)


STAGES = {"112": 0.4, "160": 0.3, "224": 0.3}  # a resolution schedule: shares of the epochs by image size


def sooner() -> str:
    """The times of shorter pre-training, relative to plain training."""
    found = results(SOONER)
    rows = found["predict ratios"]["train base batch 16 bf16"]["rows"]
    ours = rows["mae_fast"]
    lines = [("plain", seconds(ours), "1")]
    for ratio in ("0.5", "0.25"):
        name = f"mae_fast predict {ratio}"
        lines.append((f"`--predict-ratio {ratio}`", seconds(rows[name]), f"{ours[f'vs {name}']:.2f}"))
    sizes = [entry["rows"]["mae_fast"] for entry in found["image sizes"].values()]
    share = sum(part * row["ms"] for part, row in zip(STAGES.values(), sizes, strict=True)) / sizes[-1]["ms"]
    schedule = ",".join(f"{size}:{part}" for size, part in STAGES.items())
    steps = ", ".join(map(seconds, sizes))
    lines.append((f"`--resolution-schedule {schedule}`", steps, f"{share:.2f}"))
    best = ours["best baseline"]
    lines.append(
        (f"best baseline (`{best}`), all removed patches", seconds(rows[best]), f"{ours['vs best baseline']:.2f}")
    )
    return table(("", "step of 16 images", "time of the same epochs, relative to plain"), lines)


UNMEASURED = "Not measured yet."
PARTS = {  # parts of a step on a GPU: what runs, what limits the time
    "products": ("cuBLAS, on bf16 copies of the weights", "tensor cores, partly idle in the last wave of tiles"),
    "attention": ("Triton", "bytes in the encoder, instructions in the decoder"),
    "GELU": ("Triton `bias_gelu`", "bytes"),
    "layer norm": ("Triton `add_layer_norm`", "bytes"),
    "other": ("patches, tokens, loss", "bytes"),
    "AdamW": ("Triton, with bf16 copies and the gradient norm", "bytes"),
    "launches": ("", "1 us each"),
}


def of_gpus(part: str) -> list[dict[str, Any]]:
    """The results of a part of ``make gpu``, one per GPU. Raises ``ValueError`` if there are results of a dry run."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"gpu-*-{part}.json"))]
    if any(each["dry run"] for each in found):
        raise ValueError(f"a dry run is among the results of {part}")
    return found


def gpu_steps() -> str:
    """A table of all training steps that were measured on a GPU."""
    lines = []
    for found in of_gpus("kernels"):
        for row in found.get("step", []):
            beside = f"{row['predicted ms']:.1f} ms" if "predicted ms" in row else ""
            name = f"`mae_fast`, {row['execution']}"
            lines.append((found["device"], *gpu_step(row["model"], row["batch"], name, row), beside))
    for found in of_gpus("baselines"):
        for plan, rows in found.items():
            if plan.startswith("train "):
                _, model, _, batch, *_ = plan.replace(",", "").split()
                steps = (gpu_step(model, batch, name, row) for name, row in rows.items())
                lines += [(found["device"], *step, "") for step in steps]
    head = ("GPU", "model", "batch", "", "step", "images/s", "MFU", "predicted minimum")
    return table(head, lines) if lines else UNMEASURED


def gpu_step(model: str, batch: object, name: str, row: dict[str, Any]) -> tuple[str, ...]:
    mfu = f"{row['MFU']:.1%}" if row.get("MFU") else ""
    return model, str(batch), name, f"{row['ms']:.1f} ms", f"{row['images/s']:.0f}", mfu


def gpu_parts() -> str:
    """The time of the parts of a ViT-B/16 step: predicted for an H100, and measured on other GPUs."""
    predicted = predicted_seconds("ViT-B/16", GPUS["H100 SXM"])
    wanted = ("base", 256, "eager")
    rows = [(found["device"], row) for found in of_gpus("kernels") for row in found.get("step", [])]
    steps = [pair for pair in rows if (pair[1]["model"], pair[1]["batch"], pair[1]["execution"]) == wanted]
    lines = []
    for part, (what, limit) in PARTS.items():
        launches, moved = STEPS["ViT-B/16"].get(part, (0, 0.0))
        counted = (str(launches), f"{moved / 1e9:.1f}") if launches else ("", "")
        measured = (f"{row['ms by part'].get(part, 0):.1f}" for _, row in steps)
        lines.append((part, what, *counted, f"{predicted[part] * 1e3:.1f}", limit, *measured))
    total = f"**{sum(predicted.values()) * 1e3:.1f}**"
    lines.append(("all", "", "", "", total, "", *(f"{row['ms']:.1f}" for _, row in steps)))
    columns = ("part", "what runs", "launches", "GB", "predicted minimum, ms, H100", "limited by")
    return table((*columns, *(f"measured ms, {gpu}" for gpu, _ in steps)), lines)


def gpu_plan() -> str:
    """Counted launches and bytes of a ViT-B/16 step, compared with the plan of torch.compile for the eager model."""
    plan = json.loads((ROOT / "tests" / "gpu_proof" / "plans.json").read_text())
    groups = {"products": ["products"], "attention": ["attention"], "element-wise": ["GELU", "layer norm", "other"]}
    keys = {"products": "gemm", "element-wise": "elementwise"}
    lines, ours, theirs = [], 0.0, 0.0
    for group, parts in groups.items():
        counts = [STEPS["ViT-B/16"][part] for part in parts]
        launches, planned = sum(n for n, _ in counts), plan["totals"][keys.get(group, group)]
        lines.append((f"{group} launches", str(planned["launches"]), compared(launches, planned["launches"], "d")))
        ours, theirs = ours + sum(moved for _, moved in counts), theirs + planned["bytes"]
    lines.append(("GB moved", f"{theirs / 1e9:.1f}", compared(ours / 1e9, theirs / 1e9, ".1f")))
    head = (
        "forward and backward, counted",
        f"plan of torch.compile (torch {plan['torch'].split('+')[0]})",
        "`mae_fast`",
    )
    return table(head, lines)


def compared(ours: float, theirs: float, digits: str) -> str:
    return f"{ours:{digits}} ({ours / theirs:.2f}x)"


def gpu_attention() -> str:
    """A table of attention by each library: forward, and forward and backward, of one layer."""
    lines = []
    for found in of_gpus("kernels"):
        for row in found.get("attention", []):
            times = (f"{row[key]:.3f} ms" for key in ("forward ms", "both ms"))
            shape = " x ".join(map(str, row["shape"]))
            lines.append((found["device"], shape, row["backend"], *times, f"{row['error']:.1e}"))
    head = ("GPU", "images x heads x tokens x head size", "backend", "forward", "forward and backward", "error")
    return table(head, lines) if lines else UNMEASURED


TABLES: dict[str, Callable[[], str]] = {
    "gpu-steps": gpu_steps,
    "gpu-parts": gpu_parts,
    "gpu-plan": gpu_plan,
    "gpu-attention": gpu_attention,
    "op-list": op_list,
    "op-summary": op_summary,
    "mask-tokens": mask_tokens,
    "sooner": sooner,
    "study": lambda: study_report.compared_table(results(STUDY)),
    "study-ablations": lambda: study_report.ablations_table(results(STUDY)),
    "study-sooner": lambda: study_report.sooner_table(results(STUDY)),
    "train": lambda: steps("train base batch 16 bf16", TRAINED),
    "finetune": lambda: steps("finetune base batch 16 bf16", TUNED),
    "train-amx": lambda: steps("train base batch 16 bf16", TRAINED, MODEL_AMX),
    "finetune-amx": lambda: steps("finetune base batch 16 bf16", TUNED, MODEL_AMX),
    "other-cases": lambda: cases(OTHERS),
    "lower-bounds": lower_bounds,
    "growth": lambda: cases(GROWTH),
    "summary": summary,
    "loaders": loaders,
    "ops": lambda: ops(OPS, 32, ".2f", ".1f", ".1f"),
    "ops-gpu": lambda: ops(OPS_GPU, 256, ".3f", ".1f", ".2f"),
}


MARKED = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def rendered(text: str) -> str:
    """The text of a page with new tables."""
    return MARKED.sub(lambda match: f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    draw(PICTURE)
    study_report.draw_all(results(STUDY), ROOT / "docs", "study-", metadata={"Description": digest(STUDY)})
    model, description = results(MODEL), grown()
    for x, file in GROWN.items():
        tables.lines(model, x).savefig(file, dpi=90, metadata={"Description": description})
