"""The tables and plots of measurements in README and docs match ``benchmarks/results``."""

import json

import pytest
from PIL import Image

from benchmarks import readme
from mae_fast.ops import registry


def test_tables_match_the_results():
    shown = []
    for page in readme.PAGES:
        text = page.read_text()
        shown += [match[1] for match in readme.MARKED.finditer(text)]
        assert readme.rendered(text) == text, f"{page.name} is stale: make readme-tables"
    assert sorted(shown) == sorted(readme.TABLES)  # each once


def test_plots_match_the_results():
    """The metadata of each file contains the data of the plot."""
    drawn = {readme.PICTURE: json.dumps(readme.throughput())} | dict.fromkeys(readme.GROWN.values(), readme.grown())
    assert len(drawn) == 4
    study = [readme.ROOT / "docs" / f"study-{name}.png" for name in ("accuracy", "schedule", "mask-ratio")]
    drawn |= dict.fromkeys(study, readme.digest(readme.STUDY))
    for path, figures in drawn.items():
        with Image.open(path) as picture:
            assert picture.text["Description"] == figures, f"{path.name} is stale: make readme-tables"


def test_plot_shows_the_throughput_of_every_contender(tmp_path):
    found = readme.throughput()
    assert found.keys() == {"Pre-training", "Fine-tuning"}
    for values, task in zip(found.values(), ("train", "finetune"), strict=True):
        rows = readme.results(readme.MODEL)[f"{task} base batch 16 bf16"]["rows"]
        assert [*values.values()] == [row["images/s"] for row in rows.values()]
        assert [*values.values()] == pytest.approx([16e3 / row["ms"] for row in rows.values()])
    readme.draw(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 500


def test_table_of_ops_lists_every_op():
    table = readme.op_list()
    for op in registry.ops():
        assert op.equals, f"the docstring of ops/{op.name}/op.py has no line 'Equals: ....'"
        assert f"| `{op.name}` | {op.equals} |" in table
    assert readme.spread([0.957, 1.21]) == "0.96x to 1.2x"


def test_table_of_known_results(monkeypatch, tmp_path):
    page = "before\n\n<!-- table: finetune -->\nold\n<!-- end -->\n\nafter\n\n<!-- table: ops -->\n<!-- end -->\n"
    (ours, theirs, compiled) = (
        {"ms": ms, "above": mib * 2**20} for ms, mib in ((990, 10), (12345.6, 20.4), (3400, 30.6))
    )
    ours |= {"vs timm vit": 12.4705, "vs timm vit compiled": 0.5}
    rows = {"mae_fast": ours, "timm vit": theirs, "timm vit compiled": compiled}
    results = {"finetune base batch 16 bf16": {"rows": rows}}
    op = {"problem": "op X", "ms": {"eager": 2, "compile": 1.234, "mae_fast": 0.5}, "vs eager": 4, "vs compile": 2.46}
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / f"{readme.MODEL}.json").write_text(json.dumps(results))
    (tmp_path / f"{readme.OPS}.json").write_text(json.dumps({"rows": [op]}))
    assert readme.rendered(page) == (
        "before\n\n<!-- table: finetune -->\n| | step | memory | speedup of `mae_fast` |\n|---|---|---|---|\n"
        f"| {readme.TUNED['mae_fast']} | 0.99 s | 10 MiB | |\n"
        f"| {readme.TUNED['timm vit']} | 12.3 s | 20 MiB | 12.47x |\n"
        f"| {readme.TUNED['timm vit compiled']} | 3.40 s | 31 MiB | 0.50x |\n<!-- end -->\n\nafter\n\n"
        "<!-- table: ops -->\n| op, batch 32, 224 px, mask 0.75 | eager | torch.compile | mae_fast "
        "| speedup over eager | speedup over torch.compile |\n|---|---|---|---|---|---|\n"
        "| op X | 2.00 ms | 1.23 ms | 0.50 ms | 4.0x | 2.5x |\n<!-- end -->\n"
    )


def test_cases_compare_ours_with_the_best_baseline(monkeypatch, tmp_path):
    ours = {"ms": 500, "images/s": 123.456, "above": 10 * 2**20, "best baseline": "two", "vs best baseline": 1.204}
    ours |= {"vs one": 1.5, "vs two": 1.204, "spread vs one": [1.4, 1.6], "spread vs two": [1.1, 1.296]}
    rows = {"mae_fast": ours, "one": {"above": 30 * 2**20}, "two": {"above": 15 * 2**20}}
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / f"{readme.MODEL}.json").write_text(json.dumps({"the case": {"rows": rows}}))
    *_, line = readme.cases({"the case": "what it is"}).splitlines()
    assert line == "| what it is | 0.50 s | 123 | 10 vs. 15 MiB | 1.20x (1.10 to 1.30) | two |"


def test_summary_compares_with_baselines_only(monkeypatch, tmp_path):
    ours = {"above": 60, "vs mae_fast drop-in": 1.01, "vs reference": 1.5, "vs timm blocks": 1.126}
    rows = {
        "mae_fast": ours,
        "mae_fast drop-in": {"above": 1, "rounds ms": [10, 20, 30]},
        "reference": {"above": 100, "rounds ms": [14, 28, 90]},
        "timm blocks": {"above": 80, "rounds ms": [10, 22, 36]},
    }
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / f"{readme.MODEL}.json").write_text(json.dumps({"train base batch 16 bf16": {"rows": rows}}))
    summary = readme.summary()
    assert "1.13x to 1.50x" in summary
    assert "1.10x to 1.40x" in summary
    assert "0.75x" in summary


def test_lower_bounds_of_each_machine(monkeypatch, tmp_path):
    profile = {"products ms": 1500, "AdamW ms": 250, "step ms": 2000, "floor / step": 0.875}
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "PROFILES", {"profile-x": "a processor"})
    (tmp_path / "profile-x.json").write_text(json.dumps(profile))
    assert readme.lower_bounds().splitlines()[2] == "| a processor | 2.00 s | 1.75 s | 88% |"


def gpu_results(part, **entries):
    return {"part": part, "dry run": False, "device": "NVIDIA H200", **entries}


def test_gpu_tables_of_known_results(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_steps() == readme.gpu_attention() == readme.UNMEASURED
    assert "measured ms" not in readme.gpu_parts()
    parts = dict.fromkeys(("products", "attention", "GELU", "layer norm", "other", "AdamW"), 5.04)
    step = {"model": "base", "batch": 256, "execution": "eager", "ms": 40.06, "images/s": 6390.4, "MFU": 0.3791}
    step |= {"predicted ms": 34.4, "ms by part": parts}
    attention = {"shape": [1, 2, 3, 4], "backend": "triton", "forward ms": 0.1, "both ms": 0.25, "error": 0.0012}
    kernels = gpu_results("kernels", step=[step], attention=[attention])
    row = {"ms": 57.4, "images/s": 4460.0, "MFU": None}
    baselines = gpu_results("baselines", **{"train base batch 256 bf16, max-autotune": {"reference compiled": row}})
    for found in (kernels, baselines):
        (tmp_path / f"gpu-nvidia-h200-{found['part']}.json").write_text(json.dumps(found))
    assert readme.gpu_steps().splitlines()[2:] == [
        "| NVIDIA H200 | base | 256 | `mae_fast`, eager | 40.1 ms | 6390 | 37.9% | 34.4 ms |",
        "| NVIDIA H200 | base | 256 | reference compiled | 57.4 ms | 4460 | | |",
    ]
    assert readme.gpu_attention().splitlines()[2] == (
        "| NVIDIA H200 | 1 x 2 x 3 x 4 | triton | 0.100 ms | 0.250 ms | 1.2e-03 |"
    )
    table = readme.gpu_parts()
    assert "measured ms, NVIDIA H200" in table
    assert table.count("| 5.0 |\n") == 6
    assert table.endswith("| 40.1 |")
    assert table.count("| 0.0 |") == 1  # launches have no kernel time


def test_results_of_dry_runs_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "gpu-nvidia-h200-kernels.json").write_text(json.dumps(gpu_results("kernels") | {"dry run": True}))
    for table in ("gpu-steps", "gpu-parts", "gpu-attention"):
        with pytest.raises(ValueError, match="dry run"):
            readme.TABLES[table]()


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        readme.rendered("<!-- table: nothing -->\n<!-- end -->")
