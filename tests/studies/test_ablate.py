"""Ablations: the rows of the paper, short runs of them, and tables of known logs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import command

from mae_fast import api
from mae_fast.cli.ablate import Table, ablate
from mae_fast.cli.flags import KINDS
from mae_fast.errors import UserError
from mae_fast.studies import ablate as report
from mae_fast.studies.ablate import Outcome, Study, markdown, rows_of
from mae_fast.studies.common import final_figure
from mae_fast.studies.cost import Measured
from mae_fast.studies.paper import DEFAULT, PAPER, SOURCES, Published
from mae_fast.training.config import ClassifyConfig, DvaeConfig, PretrainConfig
from mae_fast.training.presets import PRESETS

NAMES = {
    "decoder-depth": ["1", "2", "4", "8", "12"],
    "decoder-width": ["128", "256", "512", "768", "1024"],
    "mask-token": ["with", "without"],
    "target": ["pixel", "pixel-norm", "pca", "dvae"],
    "augmentation": ["none", "crop-fixed", "crop", "crop-jitter"],
    "mask-sampling": ["random-75", "block-50", "block-75", "grid-75"],
    "mask-ratio": ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.75", "0.8", "0.9"],
    "schedule": ["100", "200", "400", "800", "1600"],
    "partial": ["0", "0.5", "1", "2", "4", "6", "12", "18", "24"],
}
DEFAULTS = {
    "decoder-depth": "8", "decoder-width": "512", "mask-token": "without", "target": "pixel", "augmentation": "crop",
    "mask-sampling": "random-75", "mask-ratio": "0.75", "schedule": "800",
}  # fmt: skip


def base(preset, **changes):
    values = {"data_path": Path("D"), "output_dir": Path("O"), **PRESETS[preset], "norm_pix_loss": False, **changes}
    return PretrainConfig(**values)


def rows(table, preset="large", **changes):
    return {row.name: row for row in rows_of(table, base(preset, **changes), Path("O/runs/dvae"))}


def settings(table, preset="large", **changes):
    return {name: row.settings for name, row in rows(table, preset, **changes).items()}


def test_rows_match_the_paper():
    assert {table: list(rows(table)) for table in PAPER} == NAMES
    for table in PAPER:
        assert all(row.paper != Published() for row in rows(table).values())
        default = [name for name, row in rows(table).items() if row.default]
        assert default == ([DEFAULTS[table]] if table in DEFAULTS else [])
        assert all((row.paper == DEFAULT) == row.default for row in rows(table).values())


def test_settings_of_rows():
    assert settings("decoder-depth")["12"] == {"decoder_depth": 12}
    assert settings("decoder-width")["768"] == {"decoder_embed_dim": 768}
    assert settings("mask-token")["with"] == {"encoder_mask_token": True}  # and the decoder keeps its depth
    assert settings("target") == {
        "pixel": {},
        "pixel-norm": {"norm_pix_loss": True},
        "pca": {"target": "pca"},  # 96 components are the default's
        "dvae": {"target": "dvae", "tokenizer": Path("O/runs/dvae")},
    }
    assert settings("mask-sampling")["block-50"] == {"mask_sampling": "block", "mask_ratio": 0.5}
    assert settings("mask-ratio")["0.4"] == {"mask_ratio": 0.4}
    assert settings("schedule") == {
        "100": {"epochs": 100}, "200": {"epochs": 200}, "400": {"epochs": 400}, "800": {}, "1600": {"epochs": 1600},
    }  # fmt: skip
    assert {name: row.blocks for name, row in rows("partial").items()}["0.5"] == 0.5
    assert all(not row.settings for row in rows("partial").values())


def test_rows_depend_on_the_model_size():
    assert settings("decoder-depth", "tiny")["2"] == {}  # its factory's
    assert settings("decoder-depth", "tiny")["8"] == {"decoder_depth": 8}
    assert list(rows("decoder-width", "tiny")) == ["24", "48", "96", "144", "192"]
    width = rows("decoder-width", "tiny")["24"]
    assert (width.label, width.paper) == ("24 wide (paper: 128)", Published(84.9, 69.1))
    assert settings("target", "tiny")["pca"] == {"target": "pca", "pca_components": 6}  # of 48 values
    assert settings("target", "huge")["pca"] == {"target": "pca", "pca_components": 73}  # of 588
    short = settings("schedule", "tiny", epochs=8)
    assert short == {
        "1": {"epochs": 1, "warmup_epochs": 0.5}, "2": {"epochs": 2}, "4": {"epochs": 4}, "8": {}, "16": {"epochs": 16},
    }  # fmt: skip
    assert list(settings("schedule", "tiny", epochs=2, warmup_epochs=0.0)) == ["1", "2", "4"]  # of those alike one
    partial = rows("partial", "tiny")
    assert list(partial) == ["0", "0.5", "1", "2", "4"]
    assert (partial["4"].paper, partial["4"].label) == (Published(84.9), "4 blocks (all)")
    assert list(rows("partial", "base")) == ["0", "0.5", "1", "2", "4", "6", "12"]
    assert rows("partial", "base")["12"].paper == Published(84.9)


def test_flags_for_all_rows_change_the_default_row():
    changed = settings("mask-ratio", mask_ratio=0.6)
    assert changed["0.6"] == {}
    assert changed["0.75"] == {"mask_ratio": 0.75}
    assert settings("target", norm_pix_loss=True)["pixel"] == {"norm_pix_loss": False}
    assert rows("target", norm_pix_loss=True)["pixel"].folder == "norm-pix-loss-False"


def study(tmp_path, run, preset="large", flags=None, pretrain=None, **options):
    """A study with the fields ``pretrain`` of pre-training and ``flags`` of the protocols."""
    paths = {"data_path": tmp_path / "D", "output_dir": tmp_path / "O"}
    protocols = {
        verb: KINDS[verb].with_preset(preset, **paths, **(flags or {}).get(verb, {}))
        for verb in ("finetune", "linprobe")
    }
    start = base(preset, **paths, **(pretrain or {}))
    return Study(preset, start, protocols, tmp_path / "O", run=run, **options)


def recorded(tmp_path, table, preset="large", **options):
    """(verb, configuration) of all runs of a table."""
    configs = []
    one = study(tmp_path, configs.append, preset, **options)
    outcomes = [one.train(row) for row in one.rows(table)]
    assert not any(outcome.failed for outcome in outcomes)
    verbs = {kind: verb for verb, kind in KINDS.items()}
    return [(verbs[type(config)], config) for config in configs]


def test_each_row_is_pretrained_finetuned_and_probed(tmp_path):
    preset, default = "tiny", base("tiny")
    for table in set(PAPER) - {"partial", "target"}:
        lines = recorded(tmp_path, table, preset, seeds=(3, 5))
        wanted = rows(table, preset)
        assert [verb for verb, _ in lines] == ["pretrain", "finetune", "linprobe"] * 2 * len(wanted)
        for i, row in enumerate(wanted.values()):
            for j, seed in enumerate((3, 5)):
                pretrain, finetune, linprobe = (config for _, config in lines[6 * i + 3 * j :][:3])
                folder = tmp_path / "O" / "runs" / f"{row.folder}-seed{seed}"
                own = {"data_path": tmp_path / "D", "output_dir": folder / "pretrain", "seed": seed}
                assert pretrain == default.model_copy(update={**row.settings, **own})
                for config, verb in ((finetune, "finetune"), (linprobe, "linprobe")):
                    assert (config.output_dir, config.weights) == (folder / verb, str(folder / "pretrain"))
                    assert (config.seed, config.data_path) == (seed, tmp_path / "D")
                    assert config.model == default.model.removeprefix("mae_")


def test_settings_of_a_row_override_flags(tmp_path):
    lines = recorded(tmp_path, "mask-ratio", "tiny", pretrain={"mask_ratio": 0.6, "decoder_depth": 3})
    trained = [config for verb, config in lines if verb == "pretrain"]
    assert [config.mask_ratio for config in trained if config.mask_ratio != 0.6] == [
        float(name) for name in NAMES["mask-ratio"] if name != "0.6"
    ]
    assert all(config.decoder_depth == 3 for config in trained)


def test_default_row_does_not_normalise_pixels(pictures, tmp_path, monkeypatch, capsys, no_clock):
    """The presets do."""
    assert PRESETS["base"]["norm_pix_loss"]
    seen = []

    def stopped(config):
        seen.append(config)
        raise UserError("enough")

    monkeypatch.setattr(api, "run", stopped)
    words = ["--preset", "base", "--data-path", pictures, "--output-dir", tmp_path]
    done = command(monkeypatch, capsys, "ablate", "target", "--rows", "pixel", "pixel-norm", *words)
    assert done.returncode == 1
    assert [config.norm_pix_loss for config in seen] == [False, True]
    found = json.loads((tmp_path / "target.json").read_text())["rows"]
    assert [row["default"] for row in found] == [True, False]


def test_tables_share_only_the_default_row(tmp_path):
    found = [config.output_dir for table in PAPER for verb, config in recorded(tmp_path, table) if verb == "pretrain"]
    default = tmp_path / "O/runs/default-seed0/pretrain"
    assert found.count(default) == len(DEFAULTS) + len(NAMES["partial"])
    others = [folder for folder in found if folder != default]
    assert len(others) == len(set(others)) == sum(map(len, NAMES.values())) - found.count(default)


def test_tokenizer_is_trained_unless_given(tmp_path):
    verbs = dict(recorded(tmp_path, "target", "tiny"))
    folder = tmp_path / "O" / "runs" / "dvae"
    assert verbs["train-dvae"] == DvaeConfig.with_preset("tiny", data_path=tmp_path / "D", output_dir=folder)
    for preset, codes in (("tiny", 256), ("base", 8192), ("large", 8192), ("huge", 8192)):
        assert dict(recorded(tmp_path, "target", preset))["train-dvae"].vocab_size == codes
    given = recorded(tmp_path, "target", "tiny", tokenizer=tmp_path / "dalle.pkl")
    assert "train-dvae" not in dict(given)
    targets = [config.tokenizer for verb, config in given if verb == "pretrain" and config.target == "dvae"]
    assert targets == [tmp_path / "dalle.pkl"]


def test_partial_finetunes_the_weights_of_the_default_row(tmp_path):
    lines = recorded(tmp_path, "partial", flags={"finetune": {"epochs": 7}})
    assert [verb for verb, _ in lines] == ["pretrain", "finetune"] * 9
    default = tmp_path / "O/runs/default-seed0"
    for (_, pretrain), (_, partial), blocks in zip(lines[::2], lines[1::2], NAMES["partial"], strict=True):
        assert pretrain.output_dir == default / "pretrain"
        assert (partial.weights, partial.train_blocks) == (str(default / "pretrain"), float(blocks))
        assert (partial.output_dir, partial.epochs) == (default / f"partial-{blocks}", 7)


def test_unknown_rows_are_refused(tmp_path):
    one = study(tmp_path, print)
    assert [row.name for row in one.rows("mask-ratio", ["0.9", "0.1"])] == ["0.1", "0.9"]
    with pytest.raises(UserError, match=r"--rows 0.95.* 0.1, 0.2"):
        one.rows("mask-ratio", ["0.1", "0.95"])


def test_numbers_of_the_paper():
    assert PAPER["decoder-depth"]["1"] == (84.8, 65.5)
    assert PAPER["decoder-width"]["2"] == (84.3, 73.1)
    assert PAPER["mask-token"]["with"] == (84.2, 59.6)
    assert PAPER["target"]["pixel-norm"] == (85.4, 73.9)
    assert PAPER["augmentation"]["none"] == (84.0, 65.7)
    assert PAPER["mask-sampling"]["block-75"] == (82.8, 63.9)
    assert PAPER["mask-ratio"]["0.1"] == (83.2, 54.6)
    assert PAPER["schedule"]["2"] == (85.1, 75.1)
    assert PAPER["partial"]["1"] == (81.0, None)
    assert DEFAULT == (84.9, 73.5)
    assert list(SOURCES) == list(PAPER)
    probes = [row.linprobe for row in PAPER["mask-ratio"].values()]
    assert max(probes) == DEFAULT.linprobe
    for table in ("schedule", "partial"):  # "improves steadily"
        tuned = [row.finetune for row in PAPER[table].values()]
        assert tuned == sorted(tuned)


MEASURED = Measured(ms=12.0, ratio=1.5, peak=3 << 20, above=2 << 20)


@pytest.fixture
def no_clock(monkeypatch):
    monkeypatch.setattr(report, "measure", lambda cases, baseline, how: dict.fromkeys(cases, MEASURED))


def logged(folder, accuracy):
    folder.mkdir(parents=True)
    entries = [{"step": 1, "val_acc1": 1.0}, {"step": 2, "val_acc1": accuracy}, {"step": 2, "train_loss": 1.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def known(tmp_path, table, accuracies, words=None):
    """The table of runs with known accuracies: by row, (fine-tuned, probed) for each seed."""
    one = study(tmp_path, print, seeds=(0, 1))
    one = replace(one, flags=words or {})
    outcomes = []
    for row in one.rows(table):
        outcome = Outcome(row, failed=None if row.name in accuracies else "it was too hard")
        for seed, values in enumerate(accuracies.get(row.name, ())):
            for verb, value in zip(("finetune", "linprobe"), values, strict=False):
                outcome.runs[verb].append(logged(tmp_path / table / row.name / f"{verb}{seed}", value))
        outcomes.append(outcome)
    return one.record(table, outcomes)


def test_table_of_known_logs(tmp_path, no_clock):
    accuracies = {"with": [(70.0, 50.0), (74.0, 52.0)], "without": [(80.0, 60.0), (80.0, 62.5)]}
    found = json.loads(json.dumps(known(tmp_path, "mask-token", accuracies, words={"pretrain": ["--epochs", "9"]})))
    seen, default = found["rows"]
    assert seen["ours"]["finetune"] == {"accuracies": [70.0, 74.0], "mean": 72.0, "deviation": pytest.approx(8**0.5)}
    assert seen["ours"]["linprobe"]["mean"] == 51
    assert seen["paper"] == {"finetune": 84.2, "linprobe": 59.6}
    assert seen["cost"]["flops_ratio"] == pytest.approx(3.23, abs=0.01)
    assert seen["settings"] == {"encoder_mask_token": True}
    assert (seen["default"], default["default"]) == (False, True)
    text = markdown(found)
    cells = "72.0 +- 2.8 | 51.0 +- 1.4 | 84.2 | 59.6 | 402.1 | 3.23 | 12.0 | 1.50 | 2"
    assert f"| encoder with mask tokens | {cells} |" in text
    default_cells = "80.0 +- 0.0 | 61.2 +- 1.8 | 84.9 | 73.5 | 124.5 | 1.00"
    assert f"| **encoder without mask tokens** (default) | {default_cells}" in text
    assert "Table 1c" in text
    assert "over seeds 0, 1" in text
    assert '--pretrain "--epochs 9"' in text
    assert "failed" not in text


def test_rows_with_missing_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "measure", lambda cases, baseline, how: dict.fromkeys(cases, "no room"))
    found = known(tmp_path, "target", {"pixel": [(70.0, 50.0)], "pca": [(71.0,)]})
    text = markdown(found)
    assert "| **pixels** (default) | 70.0 | 50.0 | 84.9 | 73.5 | 124.5 | 1.00 | - | - | - |" in text
    assert "| PCA, 96 of 768 coefficients | 71.0 | - | 84.6 | 72.3 |" in text
    assert "| pixels, normalised | - | - | 85.4 | 73.9 |" in text
    assert "- pixels, normalised: failed: it was too hard" in text
    assert "- dVAE token: failed: it was too hard" in text
    assert "- pixels: cost: no room" in text
    assert "dvae" in found["rows"][3]["cost"]["failed"]  # there is no such run


def drawn(monkeypatch, tmp_path, found):
    """The figure of a table, which must also be a valid image file."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    report.draw(found, tmp_path / "table.png")
    assert Image.open(tmp_path / "table.png").width > 500
    return figures[0].axes


def test_bar_plot(tmp_path, monkeypatch, no_clock):
    accuracies = {"with": [(70.0, 50.0), (74.0, 52.0)], "without": [(80.0, 60.0)]}
    axes = drawn(monkeypatch, tmp_path, known(tmp_path, "mask-token", accuracies))
    panels = {axis.get_title(): axis for axis in axes if axis.get_title()}
    assert list(panels) == ["fine-tuned", "linear probe"]
    heights = [sorted(bar.get_height() for bar in axis.patches) for axis in axes]
    assert sorted(heights) == [[51, 60], [59.6, 73.5], [72, 80], [84.2, 84.9]]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["with", "without\n(default)"]
    for axis in axes:
        low, high = axis.get_ylim()
        assert all(low < bar.get_height() < high for bar in axis.patches)


@pytest.mark.parametrize(("table", "scale"), [("mask-ratio", "linear"), ("schedule", "log"), ("partial", "linear")])
def test_line_plot(tmp_path, monkeypatch, no_clock, table, scale):
    names = NAMES[table][1:]
    found = known(tmp_path, table, {name: [(50.0 + i, 30.0 + i)] for i, name in enumerate(names)})
    axes = drawn(monkeypatch, tmp_path, found)
    assert len([axis for axis in axes if axis.get_title()]) == (1 if table == "partial" else 2)
    ours, paper = (next(a for a in axes if a.get_ylabel().startswith(who)).lines[0] for who in ("ours", "paper"))
    assert ours.get_xdata().tolist() == [float(name) for name in names]
    assert ours.get_ydata().tolist() == [50.0 + i for i in range(len(names))]
    assert paper.get_xdata().tolist() == [float(name) for name in NAMES[table]]
    assert paper.get_ydata().tolist() == [row.finetune for row in PAPER[table].values()]
    assert axes[0].get_xscale() == scale


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for colour in range(3):
            folder = root / split / "rgb"[colour]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[..., colour] += 60
                Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
    return root


def line(pictures, output, table, *more, size=32):
    """The arguments of 'mae-fast ablate' with runs of one step."""
    small = "--device=cpu --dtype=fp32 --num-workers=0 --image-decoder=pil"
    small += f" --warmup-epochs=0 --epochs=1 --input-size={size}"
    words = ["--data-path", pictures, "--output-dir", output, "--preset", "tiny", "--rounds", "1", *more]
    words += ["--pretrain", f"{small} --batch-size=24", "--finetune", f"{small} --batch-size=12"]
    return ["ablate", table, *map(str, words), "--linprobe", f"{small} --batch-size=12"]


def test_a_failed_row_is_reported_and_the_others_run(pictures, tmp_path, monkeypatch, capsys, no_clock):
    """A grid of 5 x 5 patches cannot be split into cells of 2 x 2, so the row of grid masks fails."""
    words = line(pictures, tmp_path, "mask-sampling", "--rows", "grid-75", "random-75", "--labels", "4", size=20)
    done = command(monkeypatch, capsys, *words)
    assert done.returncode == 1
    assert "row grid-75 failed: --mask-sampling grid: 5 x 5 patches" in done.stderr
    assert done.stderr.splitlines()[-2] == "error: failed rows: mask-sampling grid-75"
    assert "Traceback" not in done.stderr
    random, grid = json.loads((tmp_path / "mask-sampling.json").read_text())["rows"]
    runs = tmp_path / "runs" / "default-seed0"
    assert random["ours"]["finetune"]["accuracies"] == [final_figure(runs / "finetune")]
    assert random["ours"]["linprobe"]["accuracies"] == [final_figure(runs / "linprobe")]
    assert random["failed"] is None
    assert "5 x 5 patches have no grid mask" in grid["failed"]
    assert grid["ours"] == {"finetune": None, "linprobe": None}
    assert len(list((tmp_path / "labels-4" / "train").rglob("*.jpg"))) == 12
    assert Image.open(tmp_path / "mask-sampling.png").width > 500


def test_second_call_continues_after_a_failure(pictures, tmp_path, monkeypatch, capsys, no_clock):
    """The probe of the second row fails in the first call. The second call trains only that probe."""
    words = line(pictures, tmp_path, "decoder-depth", "--rows", "1", "2", "--seeds", "0")

    run = api.run

    def broken(config):
        if config.output_dir.match("default-seed0/linprobe"):
            raise RuntimeError("the disk\nis on fire")
        run(config)

    with monkeypatch.context() as patch:
        patch.setattr(api, "run", broken)
        done = command(monkeypatch, capsys, *words)
    assert done.returncode == 1
    assert "row 2 failed: RuntimeError: the disk\n" in done.stderr
    one, two = json.loads((tmp_path / "decoder-depth.json").read_text())["rows"]
    assert one["failed"] is None
    assert one["ours"]["linprobe"]
    assert (two["ours"]["linprobe"], two["failed"]) == (None, "RuntimeError: the disk")
    assert two["ours"]["finetune"]

    done = command(monkeypatch, capsys, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is finished") == 5
    again = json.loads((tmp_path / "decoder-depth.json").read_text())["rows"]
    assert again[0]["ours"] == one["ours"]
    assert again[1]["ours"]["linprobe"]
    assert (tmp_path / "decoder-depth.md").read_text() in done.stdout

    done = command(monkeypatch, capsys, *line(pictures, tmp_path, "partial", "--rows", "0.5"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is finished") == 1  # the default row's pre-training
    assert (tmp_path / "runs/default-seed0/partial-0.5/log.jsonl").exists()


def test_a_signal_ends_the_study(pictures, tmp_path, monkeypatch, no_clock):
    """SystemExit after SIGTERM is not a failure of a row."""

    def stopped(config):
        raise SystemExit(143)

    monkeypatch.setattr(api, "run", stopped)
    with pytest.raises(SystemExit) as exit:
        ablate(line(pictures, tmp_path, "mask-token")[1:])
    assert exit.value.code == 143
    assert not (tmp_path / "mask-token.md").exists()


def test_all_tables(pictures, tmp_path, monkeypatch, capsys, no_clock):
    monkeypatch.setattr(report, "draw", lambda table, path: None)

    def fake(config):
        if isinstance(config, ClassifyConfig) and not config.output_dir.exists():
            logged(config.output_dir, 10.0)

    monkeypatch.setattr(api, "run", fake)
    done = command(monkeypatch, capsys, *line(pictures, tmp_path, "all"))
    assert done.returncode == 0, done.stderr
    for table in PAPER:
        found = json.loads((tmp_path / f"{table}.json").read_text())
        assert [row["name"] for row in found["rows"]] == list(rows(table, "tiny", epochs=1, warmup_epochs=0.0))
        assert all(row["ours"]["finetune"]["mean"] == 10 for row in found["rows"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mask-token", "--output-dir", "O"], "needs --data-path"),
        (["mask-token", "--output-dir", "O", "--data-path", "."], "--data-path . has no train and no val"),
        (["all", "--output-dir", "O", "--data-path", "D", "--rows", "1"], "name a table"),
        (["mask-token", "--output-dir", "O", "--data-path", "D", "--seeds", "1", "1"], "--seeds 1 1"),
        (["mask-token", "--output-dir", "O", "--data-path", "D", "--labels", "0"], "--labels"),
        (["mask-token", "--output-dir", "O", "--data-path", "D", "--pretrain", "--seed 3"], "leave --seed out"),
        (["mask-token", "--output-dir", "O", "--data-path", "D", "--finetune", "--output_dir=x"], "--output_dir out"),
        (["mask-token", "--output-dir", "O", "--data-path", "D", "--linprobe", "--epochs '3"], "No closing quotation"),
        (["mask-token", "--output-dir", "O", "--data-path", "D", "--finetune", "--epochs 3"], "warmup_epochs"),
        (["target", "--output-dir", "O", "--data-path", "D", "--rows", "clip"], "pixel, pixel-norm"),
    ],
)
def test_invalid_flags_are_refused_before_training(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "D" / split).mkdir(parents=True)
    done = command(monkeypatch, capsys, "ablate", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["D"]


def test_command_line_offers_all_tables_of_the_paper():
    assert set(Table.__args__) == {*PAPER, "all", "speed"}
