"""The study on Fashion-MNIST: its training and tuning images, its jobs, and its report."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import one_thread  # noqa: F401

from mae_fast.data.masks import sampler
from mae_fast.data.sources import labelled
from mae_fast.errors import UserError
from mae_fast.studies import study as module
from mae_fast.studies.study import (
    CROPS,
    MAE,
    PENALTIES,
    PIXELS,
    RATES,
    ROWS,
    SCRATCH,
    EncodedImages,
    Plan,
    Recipe,
    Study,
    run_study,
)
from mae_fast.studies.study_report import collect, compared_table, page, recipes_table, sooner_table, write_report

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(
    unlabelled=8, tuning=2, labels=(2, 4), seeds=(0, 1), epochs=8, compared_epochs=16, steps=2, ablated_labels=2,
    long_labels=(2,), long_steps=9,    speed_rounds=1, speed_images=2, speed_epochs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for shade, name in enumerate(("bag", "coat")):
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (28, 28), dtype=np.uint8) + 120 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(root / "data" / split / name / f"{i:02}.png")
    return root


@pytest.fixture
def study(images, tmp_path):
    (tmp_path / "data").symlink_to(images / "data")
    small = {"batch_size": 4, "device": "cpu", "dtype": "fp32", "image_decoder": "pil"}
    made = Study(tmp_path, PLAN, tuple(small.items()))
    made.prepare()
    return made


@pytest.fixture
def runs(monkeypatch):
    """Records the configurations of runs without training. ``runs.accuracy`` sets the accuracy of a run."""
    found = SimpleNamespace(configs=[], accuracy=lambda config: 50.0)

    def run(config):
        found.configs.append(config)
        return SimpleNamespace(metrics={"val_acc1": found.accuracy(config)})

    monkeypatch.setattr(module.api, "run", run)
    return found


def files(folder):
    return {path.resolve() for path in folder.rglob("*.png")}


def test_masks_of_every_row_can_be_drawn(study):
    """The images have 7 x 7 patches. Grid masks cannot keep a quarter of them."""
    for table in ROWS:
        for row in study.rows(table):
            config = study.base.changed(**row.settings)
            assert sampler(config.mask_sampling, (7, 7), config.mask_ratio), row.name


def test_training_tuning_and_test_images_are_disjoint(study):
    pool, tuning, test = files(study.pool / "train"), files(study.pool / "val"), files(study.data / "val")
    assert (len(pool), len(tuning), len(test)) == (16, 4, 10)
    assert not pool & tuning
    assert not (pool | tuning) & test
    for count in PLAN.labels:
        for seed in PLAN.seeds:
            few = study.few(count, seed)
            assert len(files(few / "train")) == 2 * count
            assert files(few / "train") <= pool
            assert files(few / "val") == tuning
    assert files(study.few(2, 0) / "train") != files(study.few(2, 1) / "train")


def test_recipe_is_chosen_on_tuning_images_and_tested_with_all_seeds(study, runs):
    def accuracy(config):
        if config.eval_only:
            return 10.0 + config.seed
        score = {0.08: 0, 0.5: 5}[config.scale[0]] + {3e-4: 0, 1e-3: 2, 3e-3: 4}[config.lr]
        return 50.0 + score - (config.epochs > 2)  # more steps do not help

    runs.accuracy = accuracy
    found = study.compare(MAE, 2)
    assert found["chosen"] == {"lr": 3e-3, "crops": "0.5 to 1", "steps": PLAN.steps}
    assert found["accuracies"] == [10.0, 11.0]
    assert [each["accuracy"] for each in found["tried"]] == [52.0, 57.0, 55.0, 59.0, 58.0]
    tuned = [config for config in runs.configs if not config.eval_only]
    assert all(config.data_path == study.few(2, config.seed) for config in tuned)
    assert [config.seed for config in tuned[:-2]] == [0] * 5
    tested = [config for config in runs.configs if config.eval_only]
    assert [(config.data_path, config.seed) for config in tested] == [(study.data, 0), (study.data, 1)]
    assert all(config.weights == study.pretrained(config.seed) for config in runs.configs)
    assert all(config.layer_decay == 0.75 for config in runs.configs)


def test_training_from_scratch_has_no_layer_decay_and_may_take_more_steps(study, runs):
    runs.accuracy = lambda config: 50.0 + config.epochs
    assert study.compare(SCRATCH, 4)["chosen"]["steps"] == PLAN.longer * PLAN.steps
    assert all((config.weights, config.layer_decay) == (None, 1.0) for config in runs.configs)


def test_long_training_from_scratch_uses_the_chosen_recipe(study, runs):
    chosen = Recipe(RATES[2], next(iter(CROPS)), 2)
    study.result("x").parent.mkdir()
    study.result(f"finetune-{SCRATCH}-2").write_text(json.dumps({"chosen": chosen._asdict()}))
    found = study.test_long(2)
    assert found["chosen"] == chosen._replace(steps=PLAN.long_steps)._asdict()
    assert found["accuracies"] == [50.0, 50.0]
    trained = [config for config in runs.configs if not config.eval_only]
    assert [(config.seed, config.epochs, config.lr, config.weights) for config in trained] == [
        (seed, PLAN.long_steps, RATES[2], None) for seed in PLAN.seeds
    ]


def test_logistic_regression_uses_only_the_labelled_images(study):
    train = labelled(study.pool)[0]
    labels = torch.tensor(train.labels)
    chosen = files(study.few(2, 1) / "train")
    drawn = torch.tensor([(train.root / name).resolve() in chosen for name in train.names])
    # Images that are not chosen have the features of the other class.
    features = torch.where(drawn, labels, 1 - labels)[:, None].float() + torch.randn(len(labels), 3) * 0.01
    tested = (torch.tensor([[0.0, 0, 0], [1.0, 1, 1]]), torch.tensor([0, 1]))
    encoded = EncodedImages(train, (features, labels), tested, tested)
    assert encoded.score(2, 1, 1.0, tested) == 100
    assert encoded.score(2, 0, 1.0, tested) < 100 or files(study.few(2, 0) / "train") == chosen


def test_features_depend_on_start_and_seed(study, monkeypatch):
    monkeypatch.setattr(module, "load_encoder", lambda weights: weights)
    assert study.encoder(MAE, 1) == (study.pretrained(1), module.mean_tokens)
    images = torch.randint(256, (2, 28, 28, 3), dtype=torch.uint8)
    features = []
    for seed in (0, 0, 1):
        loaded, function = study.encoder(SCRATCH, seed)
        features.append(function(loaded.model, images))
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])
    loaded, function = study.encoder(PIXELS, 0)
    assert torch.equal(function(loaded.model, images), images[..., 0].flatten(1).float())


def test_the_linear_comparison_has_all_starts(study):
    untrained, pixels = study.compare_linear(SCRATCH), study.compare_linear(PIXELS)
    for found in (untrained, pixels):
        assert list(found) == ["2", "4"]
        for each in found.values():
            assert each["chosen"] in PENALTIES
            assert len(each["tried"]) == len(PENALTIES)
            assert len(each["accuracies"]) == len(PLAN.seeds)
    assert pixels["4"]["accuracies"] == [100.0, 100.0]  # a shade for each class


def test_each_row_is_pretrained_finetuned_and_probed(study):
    found = study.train_row({"epochs": 1, "warmup_epochs": 0.5, "mask_ratio": 0.5}, "half")
    assert found["images"] == 16
    assert [len(found[verb]) for verb in ("finetune", "linprobe")] == [2, 1]
    run = study.directory / "runs" / "half-seed0"
    assert json.loads((run / "config.json").read_text())["mask_ratio"] == 0.5
    assert list((run / "checkpoints").iterdir())
    tuned = study.directory / "runs" / "row-half-seed1"
    assert json.loads((tuned / "config.json").read_text())["weights"] == str(run)
    assert not (tuned / "checkpoints").exists()
    assert study.measure_speed({}, "default") > 0


def test_each_row_has_one_job_with_its_dependencies(study):
    jobs = {job.path.stem: job for job in study.jobs()}
    assert len(jobs) == len(study.jobs())
    assert {"row-default", "row-epochs-16", "row-mask-ratio-0.9", "row-encoder-mask-token", "linear-MAE"} <= jobs.keys()
    assert [jobs[f"pretrained-seed{seed}"].args for seed in PLAN.seeds] == [
        ({"epochs": PLAN.compared_epochs}, seed) for seed in PLAN.seeds
    ]
    needed = {study.result(f"pretrained-seed{seed}") for seed in PLAN.seeds}
    assert jobs[f"row-epochs-{PLAN.compared_epochs}"].after == (study.result("pretrained-seed0"),)  # the same run
    waiting = {name for name, job in jobs.items() if job.after and not name.startswith("row-")}
    assert waiting == {"linear-MAE", "finetune-MAE-2", "finetune-MAE-4", "finetune-random, long-2"}
    assert jobs["finetune-random, long-2"].after == (study.result("finetune-random-2"),)
    assert all(set(jobs[name].after) == needed for name in waiting if "long" not in name)


def test_report_contains_the_finished_results(study, caplog):
    result = study.directory / "results"
    result.mkdir()
    tried = [
        Recipe(RATES[1], crops, 2)._asdict() | {"accuracy": x} for crops, x in zip(CROPS, (60.0, 70.0), strict=True)
    ]
    tried += [{**tried[1], "lr": RATES[0], "accuracy": 65.0}, {**tried[1], "steps": 6, "accuracy": 71.0}]
    compared = {"accuracies": [70.0, 72.0], "chosen": {**tried[3]}, "tried": tried}
    study.result("finetune-MAE-2").write_text(json.dumps(compared))
    linear = {"2": {"accuracies": [80.0, 80.0], "tried": {"1": 79.0, "10": 81.0}, "chosen": 10.0}}
    study.result("linear-raw pixels").write_text(json.dumps(linear))
    row = {"finetune": [60.0, 62.0], "linprobe": [75.0], "images": 128, "penalty": 1.0}
    study.result("row-default").write_text(json.dumps(row))
    study.result("speed-default-round0").write_text("64.0")
    study.result("row-crops-per-image-2").write_text(json.dumps(row))
    study.result("speed-crops-per-image-2-round0").write_text("64.0")
    write_report(study)
    found = collect(study)
    assert json.loads((study.directory / "study.json").read_text()) == json.loads(json.dumps(found))
    text = (study.directory / "study.md").read_text()
    assert "| fine-tuned, MAE | 71.0 +- 1.4 | - |" in compared_table(found)
    assert "| logistic regression, raw pixels | 80.0 +- 0.0 | - |" in compared_table(found)
    assert (
        "| MAE, 2 labels | 0.08 to 1, erasing: 60.0; **0.5 to 1: 70.0** | 0.0003: 65.0; **0.001: 70.0** "
        "| 2: 70.0; **6: 71.0** |"
    ) in recipes_table(found)
    assert "| plain training | 128 | 64 | 2 s | 61.0 +- 1.4 | 75.0 |" in sooner_table(found)
    assert "| --crops-per-image 2 | 256 | 64 | 4 s | 61.0 +- 1.4 | 75.0 |" in sooner_table(found)
    assert "| mask ratio | **0.75** (default) | 61.0 +- 1.4 | 75.0 | 84.9 | 73.5 |" in text
    assert "| mask ratio | 0.9 | - | - | 83.0 | 66.1 |" in text
    assert text == page(found, ["accuracy.png", "schedule.png", "mask-ratio.png"])
    for name in ("accuracy", "schedule", "mask-ratio"):
        assert Image.open(study.directory / f"{name}.png").width > 500


def test_failed_jobs_are_named_after_the_report(study, monkeypatch):
    monkeypatch.setattr(Study, "jobs", lambda self: [])
    monkeypatch.setattr(Study, "measure_speed", lambda *args: 1 / 0)
    with pytest.raises(UserError, match=r"failed jobs: speed-default-round0, "):
        run_study(study.directory, study, processes=0)
    assert (study.directory / "study.md").exists()


def test_measure_does_not_train(study, monkeypatch):
    monkeypatch.setattr(Study, "jobs", lambda self: pytest.fail("trains"))
    speeds = iter(range(1, 100))
    monkeypatch.setattr(Study, "measure_speed", lambda *args: next(speeds))
    for first in (1, 1 + len(study.sooner())):
        run_study(study.directory, study, processes=0, measure=True)
        assert json.loads(study.result("speed-default-round0").read_text()) == first
