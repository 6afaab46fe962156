"""``python -m benchmarks.readme``: writes the tables of measurements in README and docs, from ``benchmarks/results``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is one of ``TABLES``.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = Path(__file__).parent / "results"
MODEL, DATA = "model-epyc-avx512bf16", "data-epyc"
OPS, OPS_GPU, MASK_TOKEN = "ops-epyc-avx2", "ops-h100", "mask-token-epyc-avx512bf16"

TRAINED = {
    "mae_fast": "`mae_fast`: `model.loss`, `training.optim.AdamW`",
    "mae_fast drop-in": "`mae_fast` as a drop-in: `model(imgs)`, torch's AdamW",
    "reference": "the eager reference with SDPA",
    "reference compiled": "the same under torch.compile",
    "transformers": "transformers' ViTMAE with SDPA",
    "timm blocks": "the reference with timm's blocks",
}
TUNED = {
    "mae_fast": "`mae_fast`: `vit_base_patch16`, `training.optim.AdamW`",
    "timm vit": "timm's `vit_base_patch16_224`, fused AdamW",
    "timm vit compiled": "the same under torch.compile",
}
OTHERS = {
    "train base batch 64 bf16": "batch 64, bf16 (against reference and transformers)",
    "train large batch 8 bf16": "ViT-L/16, batch 8, bf16 (against reference and transformers)",
    "train base batch 16 fp32": "batch 16, fp32",
    "infer base batch 16 bf16": "encoder features of all patches, batch 16, bf16",
    "reconstruct base batch 16 bf16": "reconstruction, batch 16, bf16",
}
LOADERS = {
    "mae_fast dali": "`mae_fast`, `--decoder dali`",
    "mae_fast pil": "`mae_fast`, `--decoder pil`",
    "torchvision": "torchvision, Pillow, `DataLoader`",
    "torchvision normalised": "the same, normalised",
    "plain DALI": "all of it in DALI",
    "simplejpeg + torch": "simplejpeg and torch, `DataLoader`",
    "mae_fast dali, 4 crops an image": "`mae_fast`, dali, `--repeats 4`",
    "mae_fast dali, cached": "`mae_fast`, dali, `--cache`",
}


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def cases() -> dict[str, Any]:
    """Of the models, by case; what is now called infer was once called features."""
    return {case.replace("features", "infer"): entry for case, entry in results(MODEL).items()}


def table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def steps(case: str, labels: dict[str, str]) -> str:
    rows = cases()[case]["rows"]
    lines = []
    for name, label in labels.items():
        row = rows[name]
        faster = f"{rows['mae_fast'][f'vs {name}']:.2f}x" if not name.startswith("mae_fast") else ""
        lines.append((label, seconds(row), f"{row['above'] / 2**20:.0f} MiB", faster))
    return table(("", "step", "memory", "`mae_fast` is faster"), lines)


def seconds(row: dict[str, Any]) -> str:
    value = row["ms"] / 1e3
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def other_cases() -> str:
    found = cases()
    rows = [(label, found[case]["rows"]["mae_fast"]) for case, label in OTHERS.items()]
    head = ("other cases of the pre-training run", "step", "times faster than the best rival there")
    return table(head, ((label, seconds(row), f"{row['vs best rival']:.2f}x") for label, row in rows))


def loaders() -> str:
    rows = results(DATA)["rows"]
    lines = []
    for name, label in LOADERS.items():
        row = rows[name]
        faster = [f"{row[key]:.2f}x" if key in row else "" for key in ("vs torchvision", "vs torchvision normalised")]
        figures = f"{row['images/s']:.0f}", f"{row['first batch s']:.2f} s", f"{row['peak MiB']:.0f} MiB"
        lines.append((label, *figures, *faster))
    return table(("", "images/s", "first batch", "memory", "against torchvision", "normalised"), lines)


def ops(name: str, batch: int, ms: str, eager: str, compiled: str) -> str:
    """The last three say how figures are written."""
    lines = []
    for row in results(name)["rows"]:
        times = (f"{row['ms'][who]:{ms}} ms" for who in ("eager", "compile", "mae_fast"))
        lines.append((row["problem"], *times, f"{row['vs eager']:{eager}}x", f"{row['vs compile']:{compiled}}x"))
    head = (f"op, batch {batch}, 224 px, mask 0.75", "eager", "torch.compile", "mae_fast")
    return table((*head, "against eager", "against compile"), lines)


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
    head = ("against the encoder with mask tokens", "FLOPs, times fewer", "paper", "step, times faster", "paper")
    return table(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "mask-tokens": mask_tokens,
    "train": lambda: steps("train base batch 16 bf16", TRAINED),
    "finetune": lambda: steps("finetune base batch 16 bf16", TUNED),
    "other-cases": other_cases,
    "loaders": loaders,
    "ops": lambda: ops(OPS, 32, ".2f", ".1f", ".1f"),
    "ops-gpu": lambda: ops(OPS_GPU, 256, ".3f", ".1f", ".2f"),
}


MARKED = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def rendered(text: str) -> str:
    """The text with its tables made anew."""
    return MARKED.sub(lambda match: f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
