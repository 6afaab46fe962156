"""Tables and plots of benchmark results."""

import sys
from dataclasses import asdict

import pytest

from mae_fast.bench import tables
from mae_fast.bench.case import Case
from mae_fast.errors import UserError

MACHINE = {"cpu": "EPYC", "capability": "AVX2", "threads": 2, "python": "3", "torch": "2", "gpu": None}


def row(*ms, **more):
    return {"ms": ms[0], "images/s": 1e3 / ms[0], "rounds ms": [*ms], "above": 3 << 20, "peak": 900 << 20, **more}


def entry(case, flops=1e9, missing=None, **rows):
    return {
        "cell": asdict(case), "machine": MACHINE, "versions": {"torch": "2.14", "xformers": None}, "commit": "abc",
        "rows": {name.replace("_timm", " timm"): one for name, one in rows.items()}, "missing": missing or {},
        "flops per image": flops, "rounds": 3,
    }  # fmt: skip


def results(*cases, **of):
    ours = row(200.0, 100.0, 300.0, **{"vs reference": 1.5, "spread vs reference": [1.2, 1.9], "products / step": 0.75})
    return {str(case): entry(case, **{"mae_fast": ours, "reference": row(312.3, 300.0, 330.0), **of}) for case in cases}


CASE = Case("train", "tiny", 4, "fp32", 32)


def test_markdown_table():
    missing = {"transformers": "transformers is not installed: pip install transformers"}
    found = results(CASE) | {"empty": entry(CASE, missing={"mae_fast": "its process died"})}
    found[str(CASE)]["missing"] = missing
    lines = tables.markdown(found).splitlines()
    assert lines[2] == f"| **{CASE}** |" + "  |" * 7
    assert lines[3] == "| mae_fast | 200 | 140 to 260 | 5 | 3 | 900 | 75% |  |"
    assert lines[4] == "| reference | 312 | 305 to 323 | 3.2 | 3 | 900 |  | 1.50x |"
    assert lines[5] == "| transformers | - | - | - | - | - | - | - |"
    assert lines[6:8] == ["| **empty** |" + "  |" * 7, "| mae_fast | - | - | - | - | - | - | - |"]
    assert lines[9] == f"- {CASE}: transformers: {missing['transformers']}"
    assert lines[10] == "- empty: mae_fast: its process died"
    assert lines[11] == "- EPYC, AVX2, 2 threads; torch 2.14; commit abc"
    assert lines[12].startswith("- Times are medians")
    assert {line.count("|") for line in lines[:8]} == {9}


def test_a_note_explains_steps_with_a_predict_ratio(tmp_path):
    several = (CASE, Case("train", "tiny", 8, "fp32", 32))
    found = results(*several, **{"mae_fast predict 0.5": row(100.0, 90.0, 110.0)})
    notes = [line for line in tables.markdown(found).splitlines() if "predict 0.5`" in line]
    assert len(notes) == 1
    assert "`--predict-ratio 0.5`" in notes[0]
    assert "predict" not in tables.markdown(results(CASE))
    assert {file.name for file in tables.draw(found, tmp_path)} == {"speedup.png", "batch.png"}


def test_each_machine_and_commit_is_listed_once():
    """For results of a GPU, the GPU is listed instead of the CPU."""
    found = results(CASE, Case("infer", "tiny", 4, "fp32", 32), Case("infer", "tiny", 4, "fp32", 32, device="cuda"))
    found["infer tiny batch 4 fp32 on cuda"]["machine"] = MACHINE | {"gpu": "H100"}
    found["later"] = found[str(CASE)] | {"commit": "def"}
    lines = tables.markdown(found).splitlines()
    assert [line.split(",")[0] for line in lines if "commit" in line] == ["- EPYC", "- H100", "- EPYC"]
    assert [line.split()[-1] for line in lines if "commit" in line] == ["abc", "abc", "def"]


def test_mfu_is_the_share_of_the_bound_on_a_gpu():
    ours = row(1.0, **{"MFU": 0.5})
    assert "| 50% |" in tables.markdown({"a": entry(CASE, mae_fast=ours)})


@pytest.mark.parametrize(("value", "text"), [(1234.6, "1235"), (99.96, "100"), (4.567, "4.57"), (0.01234, "0.0123")])
def test_numbers_have_three_digits(value, text):
    assert tables.number(value) == text


def test_bars_show_ratios_and_percentiles():
    found = results(CASE, Case("train", "tiny", 8, "fp32", 32))
    axis = tables.speedups(found).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [1.5, 1.5]
    segments = [tuple(map(tuple, line)) for c in axis.collections for line in c.get_segments()]
    assert [(a[0], b[0]) for a, b in segments] == [pytest.approx((1.2, 1.9))] * 2
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["reference", "reference"]
    labels = [text.get_text().strip() for text in axis.texts]
    assert labels == ["train tiny batch 4 fp32", "1.50x", "train tiny batch 8 fp32", "1.50x"]


def test_curves_over_the_swept_setting():
    cases = [Case("train", "tiny", batch, "fp32", 32) for batch in (16, 4, 8)]  # sorted by batch size in the plot
    found = results(*cases, Case("train", "tiny", 4, "bf16", 32), Case("infer", "tiny", 4, "fp32", 32))
    figure = tables.lines(found, "batch")
    rate, memory = figure.axes
    assert rate.get_title() == "train tiny fp32 32 px mask 0.75"
    ours, reference = (container.lines[0] for container in rate.containers)
    assert list(ours.get_xdata()) == [4, 8, 16]
    assert list(ours.get_ydata()) == pytest.approx([20, 40, 80])  # images/s at 200 ms
    assert list(reference.get_ydata()) == pytest.approx([4e3 / 312.3, 8e3 / 312.3, 16e3 / 312.3])
    [segments] = [bars.get_segments() for bars in rate.containers[0].lines[2]]
    assert sorted(y for _, y in segments[0]) == pytest.approx([4e3 / 260, 4e3 / 140])
    assert list(memory.lines[0].get_ydata()) == [3, 3, 3]
    assert tables.lines(found, "image_size") is None
    assert tables.lines(found, "mask_ratio") is None


def test_plot_over_image_size_includes_flops():
    cases = [Case("infer", "tiny", 4, "fp32", side) for side in (16, 32, 64)]
    found = {str(case): entry(case, flops=case.image_size**2, mae_fast=row(4.0 * case.image_size**3)) for case in cases}
    cost = tables.lines(found, "image_size").axes[0]
    labels = [text.get_text() for text in cost.get_legend().get_texts()]
    assert sorted(labels) == ["FLOPs ~ side^2.0", "mae_fast ~ side^3.0"]
    assert list(cost.containers[0].lines[0].get_ydata()) == pytest.approx([16**3, 32**3, 64**3])  # ms per image
    [flops] = [line for line in cost.lines if line.get_label().startswith("FLOPs")]
    assert list(flops.get_ydata()) == pytest.approx([16**3, 4 * 16**3, 16 * 16**3])


def test_missing_results_shorten_a_curve():
    found = results(*(Case("train", "tiny", 4, "fp32", 32, ratio) for ratio in (0.5, 0.75)))
    del next(iter(found.values()))["rows"]["reference"]
    cost = tables.lines(found, "mask_ratio").axes[0]
    assert [list(container.lines[0].get_xdata()) for container in cost.containers] == [[0.5, 0.75], [0.75]]


def test_plots_are_written(tmp_path):
    found = results(CASE, Case("train", "tiny", 4, "fp32", 64), Case("train", "tiny", 4, "fp32", 32, 0.5))
    found["empty"] = entry(Case("train", "tiny", 1, "fp32", 32))
    files = tables.draw(found, tmp_path)
    assert [file.name for file in files] == ["speedup.png", "image-size.png", "mask-ratio.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert tables.draw({"empty": found["empty"]}, tmp_path) == []


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'mae_fast\[report\]'"):
        tables.draw(results(CASE), tmp_path)
