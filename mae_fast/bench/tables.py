"""Tables and plots of benchmark results."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from .case import MASKED
from .contenders import BASELINES, PREDICT
from .formats import cell, markdown_table, new_figure

Results = dict[str, dict[str, Any]]  # by case, as returned by ``engine.run``
SWEPT = {
    "batch": "batch size",
    "image_size": "image size, pixels",
    "mask_ratio": "mask ratio",
}
COLORS = {name: f"C{i}" for i, name in enumerate(("mae_fast", *BASELINES, "mae_fast drop-in", "mae_fast CUDA graph"))}


def markdown(results: Results) -> str:
    """A table of all cases, with notes about missing contenders, machines and methods."""
    head = ["", "step, ms", "20 to 80 %", "images/s", "memory above weights, MiB", "peak, MiB", "share of the bound"]
    head.append("speedup of `mae_fast`")
    lines = []
    for title, entry in results.items():
        lines.append([f"**{title}**", *[""] * 7])
        rows = entry["rows"]
        for name, row in rows.items():
            low, high = np.quantile(row["rounds ms"], [0.2, 0.8])
            share = row.get("MFU", row.get("products / step"))
            faster = rows["mae_fast"].get(f"vs {name}")
            lines.append(
                [
                    name, number(row["ms"]), f"{number(low)} to {number(high)}", number(row["images/s"]),
                    cell(row, "above", 2**20, ".0f"), cell(row, "peak", 2**20, ".0f"),
                    "" if share is None else f"{share:.0%}", "" if faster is None else f"{faster:.2f}x",
                ]
            )  # fmt: skip
        lines += [[name, *["-"] * 7] for name in entry["missing"]]
    notes = [f"- {title}: {n}: {why}" for title, entry in results.items() for n, why in entry["missing"].items()]
    if any(PREDICT in name for entry in results.values() for name in entry["rows"]):
        notes.append(
            "- `mae_fast predict 0.5`: our step with `--predict-ratio 0.5`, which trains differently from the full "
            "step. The baselines have no such option and run the full step."
        )
    notes += dict.fromkeys(f"- {conditions(entry)}" for entry in results.values())
    notes.append(
        "- Times are medians. Each contender runs in its own process; they take turns, and are timed only if their "
        "results agree with eager torch in fp32. Speedup: median of the ratios of each round. Bound: on a GPU, its "
        "peak (MFU); on a CPU, the time of the matrix products of our step alone."
    )
    return "\n".join([markdown_table(head, lines), "", *notes, ""])


def conditions(entry: dict[str, Any]) -> str:
    """The machine, versions and commit of a result, as text."""
    machine, versions = entry["machine"], entry["versions"]
    packages = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    what = machine["gpu" if entry["cell"]["device"] == "cuda" else "cpu"]
    return f"{what}, {machine['capability']}, {machine['threads']} threads; {packages}; commit {entry['commit']}"


def number(value: float) -> str:
    """A number with three significant digits, or more before the decimal point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(results: Results, folder: Path) -> list[Path]:
    """Write speedup.png, and one plot for each setting with several values, such as batch.png."""
    measured = {title: entry for title, entry in results.items() if entry["rows"]}
    if not measured:
        return []
    figures = {"speedup": speedups(measured)} | {x.replace("_", "-"): lines(measured, x) for x in SWEPT}
    files = []
    for name, figure in figures.items():
        if figure:
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=120)
    return files


def speedups(results: Results) -> Any:
    """A bar for each baseline of each case: the speedup of ours, with the 20th to 80th percentile."""
    bars = [
        (title, name, entry["rows"]["mae_fast"])
        for title, entry in results.items()
        for name in entry["rows"]
        if name in BASELINES
    ]
    figure = new_figure(8, 1.2 + 0.28 * len(bars) + 0.3 * len(results))
    axis = figure.subplots()
    y, ticks, last = 0.0, [], None
    for title, name, ours in bars:
        y += 1.0 if title == last else 1.9
        if title != last:
            axis.text(0, y - 0.75, title, fontsize=9, fontweight="bold", va="center")
        last = title
        value, (low, high) = ours[f"vs {name}"], ours[f"spread vs {name}"]
        error = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.barh(y, value, 0.75, xerr=error, color=COLORS[name], capsize=2, error_kw={"elinewidth": 1})
        axis.text(max(value, high), y, f" {value:.2f}x", va="center", fontsize=8)
        ticks.append((y, name))
    axis.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_ylim(y + 0.7, 0.6)
    axis.margins(x=0.1)
    axis.set_xlabel("speedup of mae_fast (bar: median over rounds; line: 20th to 80th percentile)")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def lines(results: Results, x: str) -> Any:
    """Plot time or rate, and memory, over the setting ``x``: one panel for each case with several values of ``x``.

    Returns:
        The figure; None if no case has several values.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for entry in results.values():
        case = entry["cell"]
        panels.setdefault(panel_title(case, x), []).append(entry)
    panels = {name: swept(entries, x) for name, entries in panels.items()}
    panels = {name: entries for name, entries in panels.items() if len(entries) > 1}
    if not panels:
        return None
    figure = new_figure(1 + 4.6 * len(panels), 7)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for (name, entries), (upper, lower) in zip(panels.items(), axes.T, strict=True):
        contenders = dict.fromkeys(itertools.chain.from_iterable(entry["rows"] for entry in entries))
        for contender in contenders:
            timed = [entry for entry in entries if contender in entry["rows"]]
            rows = [entry["rows"][contender] for entry in timed]
            places = [entry["cell"][x] for entry in timed]
            per_image = np.array([np.quantile(row["rounds ms"], [0.5, 0.2, 0.8]) for row in rows])
            per_image /= np.array([[entry["cell"]["batch"]] for entry in timed])
            value, low, high = (1e3 / per_image if x == "batch" else per_image).T
            error = np.stack([value - np.minimum(low, high), np.maximum(low, high) - value])
            style = {"color": COLORS.get(contender, "C9"), "marker": "o", "markersize": 4}
            label = f"{contender}{growth(places, value) if x == 'image_size' else ''}"
            upper.errorbar(places, value, error, capsize=2, label=label, **style)
            lower.plot(places, [row["above"] / 2**20 for row in rows], **style)
        if x != "batch":
            places = [entry["cell"][x] for entry in entries]
            counted = np.array([entry["flops per image"] for entry in entries])
            first = entries[0]["rows"]["mae_fast"]["ms"] / entries[0]["cell"]["batch"]
            label = f"FLOPs{growth(places, counted) if x == 'image_size' else ''}"
            upper.plot(places, counted / counted[0] * first, linestyle=":", color="black", label=label)
        for axis in (upper, lower):
            ticks = sorted({entry["cell"][x] for entry in entries})
            if x != "mask_ratio":
                axis.set_xscale("log", base=2)
            if x == "image_size":
                axis.set_yscale("log", base=2)
                axis.yaxis.set_major_formatter("{x:g}")
            else:
                axis.set_ylim(bottom=0)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.set_xlabel(SWEPT[x])
            axis.grid(alpha=0.3)
        upper.set_title(name, fontsize=10)
        upper.legend(fontsize=8)
    axes[0][0].set_ylabel("images/s" if x == "batch" else "ms per image (bars: 20th to 80th percentile)")
    axes[1][0].set_ylabel("memory above weights and gradients, MiB")
    return figure


def panel_title(case: dict[str, Any], x: str) -> str:
    """The title of a case, without the setting on the x axis."""
    words = [case["task"], case["model"]]
    words += [f"batch {case['batch']}"] if x != "batch" else []
    words += [case["dtype"]]
    words += [f"{case['image_size']} px"] if x != "image_size" else []
    words += [f"mask {case['mask_ratio']:g}"] if x != "mask_ratio" and case["task"] in MASKED else []
    return " ".join(words)


def swept(entries: list[dict[str, Any]], x: str) -> list[dict[str, Any]]:
    """One entry for each value of ``x``, in increasing order."""
    one: dict[Any, dict[str, Any]] = {entry["cell"][x]: entry for entry in entries}
    return [one[key] for key in sorted(one)]


def growth(x: list[float], y: np.ndarray) -> str:
    """The exponent of a power law fitted to y(x), as text for a label."""
    if len(x) < 2:
        return ""
    slope = np.polyfit([math.log(v) for v in x], np.log(y), 1)[0]
    return f" ~ side^{slope:.1f}"
