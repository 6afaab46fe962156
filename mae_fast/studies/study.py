"""The study on Fashion-MNIST: MAE against training from scratch, the paper's ablations, and shorter pre-training."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import api
from ..data.sources import Source, labelled
from ..errors import UserError
from ..evaluation.encoding import LoadOptions, gather, usable_images
from ..evaluation.logistic import fit_logistic
from ..training.config import FinetuneConfig, PretrainConfig
from ..training.run_dir import read_log
from ..training.task import use_bf16
from ..weights.create import LoadedModel, create_model, load_encoder
from .ablate import Row, rows_of
from .common import few_labels, link_into, shuffled
from .fashion_mnist import build_fashion_mnist
from .jobs import Job, run_jobs
from .paper import Published

logger = logging.getLogger(__name__)

# Cached images of 28 pixels load so fast that worker processes would only add overhead.
LOADING = {"input_size": 28, "num_workers": 0, "cache": True, "log_every": 50}
PRETRAINING = {"norm_pix_loss": True, "batch_size": 128, "warmup_epochs": 1}
MAE, SCRATCH, LONG_SCRATCH, PIXELS = "MAE", "random", "random, long", "raw pixels"
LAYER_DECAY = {MAE: 0.75, SCRATCH: 1.0, LONG_SCRATCH: 1.0}  # no decay when training from scratch, as in the paper
RATES = (3e-4, 1e-3, 3e-3)
CROPS: dict[str, dict[str, Any]] = {
    "0.08 to 1, erasing": {"scale": (0.08, 1.0), "reprob": 0.25},
    "0.5 to 1": {"scale": (0.5, 1.0), "reprob": 0.0},
}
PENALTIES = (0.1, 1.0, 10.0, 100.0)  # of the logistic regression, 1 / C
# The rows of the paper's tables in this study.
ROWS: dict[str, tuple[str, ...]] = {
    "schedule": ("1", "2", "4", "8", "16"),
    "mask-ratio": ("0.1", "0.3", "0.5", "0.75", "0.9"),
    "mask-token": ("with", "without"),
    "mask-sampling": ("random-75", "block-50", "block-75"),  # no grid: 7 x 7 patches cannot be split into equal cells
    "target": ("pixel", "pixel-norm", "pca"),
    "augmentation": ("none", "crop-fixed", "crop", "crop-jitter"),
    "decoder-depth": ("1", "2", "4"),
    "decoder-width": ("48", "96", "192"),
}
SOONER: dict[str, dict[str, Any]] = {
    "plain training": {},
    "--epochs 16": {"epochs": 16},
    "--epochs 32": {"epochs": 32},
    "--predict-ratio 0.5": {"predict_ratio": 0.5},
    "--predict-ratio 0.25": {"predict_ratio": 0.25},
    "--resolution-schedule 16:0.4,20:0.3,28:0.3": {"resolution_schedule": "16:0.4,20:0.3,28:0.3"},
    "--crops-per-image 2": {"crops_per_image": 2},
    "--crops-per-image 4": {"crops_per_image": 4},
}


@dataclass(frozen=True)
class Plan:
    """The size of the study.

    Attributes:
        unlabelled: images per class for pre-training. The labelled images are a subset.
        tuning: images per class for choosing hyperparameters; used neither for training nor for testing.
        labels: labelled images per class for fine-tuning.
        seeds: random seeds of pre-training, of the choice of labelled images, and of fine-tuning.
        epochs: epochs of pre-training in the ablations.
        compared_epochs: epochs of pre-training in the comparison with training from scratch.
        longest: largest number of epochs of pre-training.
        steps: steps of fine-tuning.
        longer: also train ``longer`` times the steps with the best learning rate.
        long_labels: labelled images per class for which training from scratch also takes ``long_steps`` steps.
        long_steps: steps of training from scratch that take as long as pre-training and fine-tuning together.
        ablated_labels: labelled images per class for fine-tuning in the ablations.
        ablated_seeds: random seeds of fine-tuning in the ablations. Pre-training uses the first of ``seeds``.
        speed_rounds: measurements of each speed, over ``speed_epochs`` epochs of ``speed_images`` images per class.
    """

    unlabelled: int = 1280
    tuning: int = 300
    labels: tuple[int, ...] = (10, 25, 100, 1000)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 8
    compared_epochs: int = 16
    longest: int = 32
    steps: int = 400
    longer: int = 3
    long_labels: tuple[int, ...] = (25, 100)
    long_steps: int = 5000
    ablated_labels: int = 25
    ablated_seeds: tuple[int, ...] = (0, 1)
    speed_rounds: int = 5
    speed_images: int = 128
    speed_epochs: int = 8


class Recipe(NamedTuple):
    """The hyperparameters of fine-tuning that are chosen: learning rate, a key of ``CROPS``, number of steps."""

    lr: float
    crops: str
    steps: int

    @property
    def folder(self) -> str:
        """The folder name of runs with this recipe."""
        return f"lr{self.lr:g}-crops{CROPS[self.crops]['scale'][0]:g}-steps{self.steps}"


@dataclass(frozen=True)
class Study:
    """The runs of the study, in ``directory``.

    Attributes:
        changes: flags of all runs, for tests.
    """

    directory: Path
    plan: Plan = Plan()
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def pool(self) -> Path:
        """A folder with the images for pre-training in train/ and the tuning images in val/."""
        return self.directory / "images" / "pool"

    @property
    def base(self) -> PretrainConfig:
        """The default row of the ablations."""
        flags = {**LOADING, **PRETRAINING, "epochs": self.plan.epochs, **dict(self.changes)}
        return PretrainConfig.with_preset("tiny", data_path=self.pool, output_dir=self.directory, **flags)

    def prepare(self) -> None:
        """Make the datasets, as links to the images in ``data``."""
        if not self.data.exists():
            build_fashion_mnist(self.data)
        plan = self.plan
        for folder in sorted((self.data / "train").iterdir()):
            names = shuffled(sorted(path.name for path in folder.iterdir()), 0, folder.name)
            for split, part in (
                ("val", names[: plan.tuning]),
                ("train", names[plan.tuning : plan.tuning + plan.unlabelled]),
            ):
                for name in part:
                    link_into(self.pool / split / folder.name, folder / name)
        for count in plan.labels:
            for seed in plan.seeds:
                few_labels(self.pool, self.few(count, seed), count, seed)

    def few(self, count: int, seed: int) -> Path:
        """A folder with ``count`` labelled images per class in train/ and the tuning images in val/."""
        return self.directory / "images" / f"labels-{count}-seed{seed}"

    def result(self, name: str) -> Path:
        return self.directory / "results" / f"{name}.json"

    def jobs(self) -> list[Job]:
        """All jobs, the most important first."""
        plan = self.plan
        compared = {"epochs": plan.compared_epochs}
        pretrained = [
            Job(self.result(f"pretrained-seed{seed}"), self.pretrain, (compared, seed)) for seed in plan.seeds
        ]
        after = tuple(job.path for job in pretrained)
        jobs = list(pretrained)
        for start, needed in ((MAE, after), (SCRATCH, ()), (PIXELS, ())):
            jobs.append(Job(self.result(f"linear-{start}"), self.compare_linear, (start,), needed))
        for count in plan.labels:
            for start, needed in ((SCRATCH, ()), (MAE, after)):
                jobs.append(Job(self.result(f"finetune-{start}-{count}"), self.compare, (start, count), needed))
        long = []
        for count in plan.long_labels:
            needed = (self.result(f"finetune-{SCRATCH}-{count}"),)
            long.append(Job(self.result(f"finetune-{LONG_SCRATCH}-{count}"), self.test_long, (count,), needed))
        length, ratio, *others = (self.rows(table) for table in ROWS)
        rows = [*length, *ratio, *self.sooner(), *(row for table in others for row in table)]
        trained = [
            Job(
                self.result(f"row-{row.folder}"), self.train_row, (row.settings, row.folder),
                after[:1] if row.settings == compared else (),  # the row uses that run
            )
            for row in {row.folder: row for row in rows}.values()
        ]  # fmt: skip
        return [*jobs, *long[:1], *trained, *long[1:]]

    def rows(self, table: str) -> list[Row]:
        """The rows of a table, a key of ``ROWS``."""
        rows = [row for row in rows_of(table, self.base, Path()) if row.name in ROWS[table]]
        if table == "schedule":
            longest = self.plan.longest
            rows.append(Row(str(longest), f"{longest} epochs", Published(), {"epochs": longest}))
        return rows

    def sooner(self) -> list[Row]:
        """The rows of the table of shorter pre-training."""
        return [Row(name, name, Published(), settings) for name, settings in SOONER.items()]

    def pretrain(self, settings: dict[str, Any], seed: int, folder: str = "compared") -> str:
        """Pre-train with ``settings``. Returns the folder of the run."""
        run = self.directory / "runs" / f"{folder}-seed{seed}"
        api.run(self.base.changed(**settings, seed=seed, output_dir=run))
        return str(run)

    def pretrained(self, seed: int) -> str:
        """The pre-training run of the comparison with training from scratch."""
        return str(self.directory / "runs" / f"compared-seed{seed}")

    def weights(self, start: str, seed: int) -> str | None:
        """The initial weights of fine-tuning; None: random weights."""
        return self.pretrained(seed) if start == MAE else None

    def finetuning(
        self, run: Path, start: str, weights: str | None, count: int, seed: int, recipe: Recipe
    ) -> FinetuneConfig:
        """The configuration of a fine-tuning run."""
        images = count * len([*(self.data / "train").iterdir()])
        batch = min(images, 32 if images <= 1000 else 64)
        epochs = -(-recipe.steps // (images // batch))
        flags = {
            **LOADING, "layer_decay": LAYER_DECAY[start], "lr": recipe.lr, **CROPS[recipe.crops], "batch_size": batch,
            "epochs": epochs, "warmup_epochs": epochs / 10, "eval_every": epochs, "weights": weights, "seed": seed,
            **dict(self.changes),
        }  # fmt: skip
        return FinetuneConfig.with_preset("tiny", data_path=self.few(count, seed), output_dir=run, **flags)

    def compare(self, start: str, count: int) -> dict[str, Any]:
        """Fine-tune from ``start`` with ``count`` labels per class: choose the recipe, then test it with all seeds.

        The recipe is chosen with the first seed and the tuning images, one hyperparameter at a time: first the crops,
        then the learning rate, then the steps.
        """
        plan = self.plan
        tried: dict[Recipe, float] = {}

        def best(recipes: Iterable[Recipe]) -> Recipe:
            for recipe in recipes:
                if recipe not in tried:
                    tried[recipe] = self.tune(start, count, plan.seeds[0], recipe)[1]
            return max(tried, key=lambda recipe: tried[recipe])

        chosen = best(Recipe(RATES[1], crops, plan.steps) for crops in CROPS)
        chosen = best(chosen._replace(lr=lr) for lr in RATES)
        chosen = best([chosen._replace(steps=plan.longer * plan.steps)])
        found = self.test_recipe(start, count, chosen)
        for recipe in tried:
            discard_checkpoints(self.folder(start, count, plan.seeds[0], recipe))
        return {**found, "tried": [{**recipe._asdict(), "accuracy": x} for recipe, x in tried.items()]}

    def test_long(self, count: int) -> dict[str, Any]:
        """Train from scratch for ``long_steps``, with the learning rate and crops chosen by ``compare``, and test."""
        chosen = json.loads(self.result(f"finetune-{SCRATCH}-{count}").read_text())["chosen"]
        return self.test_recipe(LONG_SCRATCH, count, Recipe(**{**chosen, "steps": self.plan.long_steps}))

    def test_recipe(self, start: str, count: int, recipe: Recipe) -> dict[str, Any]:
        """Fine-tune with ``recipe`` and test, for each seed."""
        accuracies = [self.test(self.tune(start, count, seed, recipe)[0]) for seed in self.plan.seeds]
        for seed in self.plan.seeds:
            discard_checkpoints(self.folder(start, count, seed, recipe))
        return {"accuracies": accuracies, "chosen": recipe._asdict(), "tried": []}

    def tune(self, start: str, count: int, seed: int, recipe: Recipe) -> tuple[FinetuneConfig, float]:
        """Fine-tune. Returns the configuration, and top-1 on the tuning images in per cent."""
        folder = self.folder(start, count, seed, recipe)
        config = self.finetuning(folder, start, self.weights(start, seed), count, seed, recipe)
        return config, api.run(config).metrics["val_acc1"]

    def folder(self, start: str, count: int, seed: int, recipe: Recipe) -> Path:
        """The folder of a fine-tuning run."""
        return self.directory / "runs" / f"finetune-{start}-{count}-{recipe.folder}-seed{seed}"

    def test(self, config: FinetuneConfig) -> float:
        """Top-1 of a finished run on the test images, in per cent."""
        found = api.run(config.changed(eval_only=True, data_path=self.data))
        return float(found.metrics["val_acc1"])

    def compare_linear(self, start: str) -> dict[str, Any]:
        """Test a logistic regression on frozen features, for each number of labels and each seed.

        The penalty is chosen with the first seed and the tuning images.
        """
        found: dict[str, Any] = {str(count): {"accuracies": []} for count in self.plan.labels}
        for seed in self.plan.seeds:
            encoded = self.encode(*self.encoder(start, seed))
            for count in self.plan.labels:
                one = found[str(count)]
                if "chosen" not in one:
                    one["tried"] = {f"{p:g}": encoded.score(count, seed, p, encoded.tuning) for p in PENALTIES}
                    one["chosen"] = max(PENALTIES, key=lambda p: one["tried"][f"{p:g}"])
                one["accuracies"].append(encoded.score(count, seed, one["chosen"], encoded.test))
        return found

    def encoder(self, start: str, seed: int) -> tuple[LoadedModel, Callable[[Any, Tensor], Tensor]]:
        """A model, and a function that computes features [N, D] from the model and images [N, H, W, C]."""
        if weights := self.weights(start, seed):
            return load_encoder(weights), mean_tokens
        torch.manual_seed(seed)
        model = create_model(self.base.model, img_size=self.base.input_size).eval()
        return LoadedModel(model), mean_tokens if start == SCRATCH else first_channel

    def encode(self, loaded: LoadedModel, features: Callable[[Any, Tensor], Tensor]) -> "EncodedImages":
        """The features of all images."""
        train, tuning = labelled(self.pool)
        _, test = labelled(self.data)
        options = LoadOptions(batch_size=500)

        def encoded(source: Source) -> Iterator[tuple[Tensor, ...]]:
            for batch in usable_images(loaded, source, options, crop_pct=1.0):
                assert batch.labels is not None
                yield features(loaded.model, batch.images), batch.labels

        with torch.no_grad():
            return EncodedImages(train, *(gather(encoded(source), len(source)) for source in (train, tuning, test)))

    def train_row(self, settings: dict[str, Any], folder: str) -> dict[str, Any]:
        """Pre-train a row of an ablation. Returns its accuracies after fine-tuning and of the logistic regression."""
        plan, base = self.plan, self.base
        seed, configs = plan.seeds[0], []
        if settings == {"epochs": plan.compared_epochs}:
            folder = "compared"
        weights = self.pretrain(settings, seed, folder)
        recipe = Recipe(RATES[1], list(CROPS)[1], plan.steps)
        for tuned in plan.ablated_seeds:
            run = self.directory / "runs" / f"row-{folder}-seed{tuned}"
            configs.append(self.finetuning(run, MAE, weights, plan.ablated_labels, tuned, recipe))
            api.run(configs[-1])
        accuracies = [self.test(config) for config in configs]
        encoded = self.encode(load_encoder(weights), mean_tokens)
        count = plan.labels[-1]
        scores = {p: encoded.score(count, seed, p, encoded.tuning) for p in PENALTIES}
        penalty = max(PENALTIES, key=lambda p: scores[p])
        for config in configs:
            discard_checkpoints(config.output_dir)
        epochs = settings.get("epochs", base.epochs)
        return {
            "finetune": accuracies,
            "linprobe": [encoded.score(count, seed, penalty, encoded.test)],
            "penalty": penalty,
            "images": epochs * len(encoded.source),
        }

    def measure_speed(self, settings: dict[str, Any], folder: str) -> float:
        """Crops per second of a short pre-training run, including data loading."""
        few = self.directory / "images" / "speed"
        run = self.directory / "runs" / f"speed-{folder}"
        shutil.rmtree(run, ignore_errors=True)
        few_labels(self.pool, few, self.plan.speed_images)
        flags = {"epochs": self.plan.speed_epochs, "data_path": few, "output_dir": run, "log_every": 1}
        api.run(self.base.changed(**settings | flags))
        rates: dict[str, list[float]] = {}  # by image size: after each step, the mean rate up to that step
        for entry in read_log(run):
            rates.setdefault(str(entry.get("img_size")), []).append(entry["images_per_s"])
        shutil.rmtree(run)
        return sum(map(len, rates.values())) / sum(len(each) / each[-1] for each in rates.values())

    def speed_jobs(self) -> list[Job]:
        """The speed measurements of shorter pre-training. The rows take turns."""
        return [
            Job(self.result(f"speed-{row.folder}-round{turn}"), self.measure_speed, (row.settings, row.folder))
            for turn in range(self.plan.speed_rounds)
            for row in self.sooner()
        ]


@dataclass(frozen=True)
class EncodedImages:
    """Features [N, D] and labels [N] of the training, tuning and test images.

    Attributes:
        source: the training images.
    """

    source: Source
    train: tuple[Tensor, ...]
    tuning: tuple[Tensor, ...]
    test: tuple[Tensor, ...]

    def score(self, count: int, seed: int, penalty: float, tested: tuple[Tensor, ...]) -> float:
        """Top-1 on ``tested``, in per cent, of a logistic regression on ``count`` labelled images per class.

        The labelled images are those of ``common.few_labels``.
        """
        names: dict[str, list[str]] = {}
        for name in self.source.names:
            folder, _, file = name.rpartition("/")
            names.setdefault(folder, []).append(file)
        chosen = {
            f"{folder}/{file}" for folder, x in names.items() for file in shuffled(sorted(x), seed, folder)[:count]
        }
        places = [i for i, name in enumerate(self.source.names) if name in chosen]
        features, labels = (x[places] for x in self.train)
        model = fit_logistic(features, labels, len(self.source.classes), penalty)
        return (model.predict(tested[0]) == tested[1]).double().mean().item() * 100


def mean_tokens(model: Any, images: Tensor) -> Tensor:
    """The mean of the patch tokens after the last norm, [N, D], computed in the dtype of training."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=use_bf16("auto", images.device)):
        tokens: Tensor = model.forward_features(images, pool="mean")
    return tokens.float()


def first_channel(model: Any, images: Tensor) -> Tensor:
    """The pixels of grey images, [N, H * W]."""
    return images[..., 0].flatten(1).float()


def discard_checkpoints(run: Path) -> None:
    """Delete the checkpoints of a run that has been tested."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def run_study(directory: Path, study: Study | None = None, processes: int | None = None, measure: bool = False) -> None:
    """Run or continue the study in ``directory``, and write its tables and plots.

    Args:
        processes: number of training processes, with one thread each; None: the number of cores.
        measure: only measure the images per second again; do not train.

    Raises:
        UserError: if jobs failed. The tables contain all other results.
    """
    from .study_report import write_report

    study = study or Study(directory)
    failed = []
    if not measure:
        study.prepare()
        failed = run_jobs(study.jobs(), count_cores() if processes is None else processes)
    else:
        for job in study.speed_jobs():
            job.path.unlink(missing_ok=True)
    failed += run_jobs(study.speed_jobs(), min(1, 1 if processes is None else processes))
    write_report(study)
    if failed:
        raise UserError(f"failed jobs: {', '.join(failed)}", "run the same command again to retry them")


def count_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
