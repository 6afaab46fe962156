"""Complete runs of the command line: the tested combinations, their data, and how each run is started and checked.

Every run is a separate process, as a user starts it. A run that hangs fails at its time limit, and the stacks of its
processes are printed. Afterwards, none of its processes may be alive.
"""

import contextlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import coco_files
import numpy as np
import pytest
import zoo
from PIL import Image

from mae_fast.data.pack import pack
from mae_fast.data.sources import open_source
from mae_fast.training.run_dir import PLACE
from mae_fast.weights.run_reader import find_checkpoint

CLASSIFIERS = ("finetune", "partial", "linprobe")
TRAINERS = ("pretrain", *CLASSIFIERS, "segment", "detect")
REPORTS = ("knn", "logreg-probe", "reconstruct")
FORMATS = {"jpeg": ("jpg",), "png": ("png",), "mixed": ("jpg", "tif", "npy")}
SAME_BYTES = ("jpeg", "shards", "dataset")  # the same files, in the same order

TRAIN_IMAGES, VAL_IMAGES, BATCH, EPOCHS = 12, 6, 4, 2
STEPS = TRAIN_IMAGES // BATCH  # in an epoch
GRACE = 5.0  # seconds within which the other processes of a run must end


class Row(NamedTuple):
    """One run. ``course``: run to the end, or also resume after the first evaluation."""

    verb: str
    data: str
    decoder: str
    workers: int
    course: str
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join([*map(str, self[:5]), *(flag.strip("-") for flag in self.flags)])

    @property
    def values(self) -> tuple[str | int, ...]:
        return self[:5]


COLUMNS: tuple[tuple[str | int, ...], ...] = (
    (*TRAINERS, *REPORTS),
    (*FORMATS, "shards", "dataset"),
    ("dali", "pil"),
    (0, 2),
    ("straight", "resumed"),
)

# Pairs of values that are not possible, with the reason.
EXCLUDED: dict[tuple[str | int, str | int], str] = {
    ("segment", "shards"): "segmentation reads a folder of images and a folder of masks",
    ("segment", "dataset"): "segmentation reads a folder of images and a folder of masks",
    ("detect", "shards"): "detection reads COCO's annotations and a folder of images",
    ("detect", "dataset"): "detection reads COCO's annotations and a folder of images",
    ("segment", "dali"): "Pillow decodes images with masks; the command line refuses DALI",
    ("detect", "dali"): "Pillow decodes images with objects; the command line refuses DALI",
    ("knn", "dali"): "evaluation always decodes with Pillow",
    ("logreg-probe", "dali"): "evaluation always decodes with Pillow",
    ("reconstruct", "dali"): "evaluation always decodes with Pillow",
    ("reconstruct", 2): "loads images in its own process; there is no --num-workers",
    ("knn", "resumed"): "trains nothing that could be resumed",
    ("logreg-probe", "resumed"): "trains nothing that could be resumed",
    ("reconstruct", "resumed"): "trains nothing that could be resumed",
}

# All pairs of values occur, except excluded ones. In addition, each classifier trains on each kind of JPEG with DALI
# and two workers, because evaluation then starts worker processes while DALI's threads are alive.
ROWS = [
    Row("pretrain", "jpeg", "dali", 2, "resumed"),
    Row("pretrain", "png", "dali", 2, "straight"),
    Row("pretrain", "mixed", "pil", 0, "resumed"),
    Row("pretrain", "shards", "pil", 0, "straight"),
    Row("pretrain", "dataset", "pil", 0, "straight"),
    Row("finetune", "jpeg", "dali", 2, "straight"),
    Row("finetune", "jpeg", "dali", 0, "straight"),
    Row("finetune", "png", "pil", 2, "straight"),
    Row("finetune", "mixed", "dali", 2, "resumed"),
    Row("finetune", "shards", "dali", 2, "straight"),
    Row("finetune", "dataset", "dali", 2, "straight"),
    Row("partial", "jpeg", "dali", 2, "straight"),
    Row("partial", "png", "pil", 0, "straight"),
    Row("partial", "mixed", "dali", 2, "straight"),
    Row("partial", "shards", "dali", 2, "resumed"),
    Row("partial", "dataset", "dali", 2, "straight"),
    Row("linprobe", "jpeg", "dali", 2, "straight"),
    Row("linprobe", "png", "pil", 0, "resumed"),
    Row("linprobe", "mixed", "dali", 2, "straight"),
    Row("linprobe", "shards", "dali", 2, "straight"),
    Row("linprobe", "dataset", "dali", 2, "resumed"),
    Row("segment", "jpeg", "pil", 2, "straight"),
    Row("segment", "png", "pil", 0, "resumed"),
    Row("segment", "mixed", "pil", 0, "straight"),
    Row("detect", "jpeg", "pil", 2, "resumed"),
    Row("detect", "png", "pil", 0, "straight"),
    Row("detect", "mixed", "pil", 0, "straight"),
    Row("knn", "jpeg", "pil", 2, "straight"),
    Row("knn", "png", "pil", 0, "straight"),
    Row("knn", "mixed", "pil", 0, "straight"),
    Row("knn", "shards", "pil", 0, "straight"),
    Row("knn", "dataset", "pil", 0, "straight"),
    Row("logreg-probe", "jpeg", "pil", 2, "straight"),
    *(Row(verb, data, "pil", 0, "straight") for verb in ("logreg-probe", "reconstruct") for data in COLUMNS[1]),
    # Flags that load images differently: RandAugment in worker processes, and features of all images at the start.
    Row("finetune", "jpeg", "dali", 2, "straight", ("--aa=rand-m9-mstd0.5-inc1",)),
    Row("linprobe", "jpeg", "dali", 2, "straight", ("--cache-features",)),
]

# The rows that `make test` runs; the others need --exhaustive, as in `make torture`.
SAMPLE = {
    "pretrain-jpeg-dali-2-resumed", "pretrain-shards-pil-0-straight",
    "finetune-jpeg-dali-2-straight", "finetune-mixed-dali-2-resumed", "finetune-png-pil-2-straight",
    "finetune-jpeg-dali-2-straight-aa=rand-m9-mstd0.5-inc1",
    "partial-shards-dali-2-resumed", "partial-png-pil-0-straight",
    "linprobe-dataset-dali-2-resumed", "linprobe-mixed-dali-2-straight",
    "linprobe-jpeg-dali-2-straight-cache-features",
    "segment-jpeg-pil-2-straight", "segment-png-pil-0-resumed", "detect-jpeg-pil-2-resumed",
    "knn-jpeg-pil-2-straight", "knn-dataset-pil-0-straight",
    "logreg-probe-mixed-pil-0-straight", "reconstruct-png-pil-0-straight",
}  # fmt: skip

FIGURES = {
    "pretrain": set(),
    **{verb: {"val_loss", "val_acc1", "val_balanced_acc", "per_class"} for verb in CLASSIFIERS},
    "segment": {"val_loss", "val_miou", "val_acc", "val_macc"},
    "detect": {"val_box_ap", "val_box_ap50", "val_mask_ap", "val_mask_ap50"},
}
PRINTED = {
    "knn": rf"nearest neighbours: top-1 \d+\.\d+%, top-5 100\.00%, of {VAL_IMAGES} images",
    "logreg-probe": r"(?s)pre-trained encoder: held-out accuracy [01]\.\d{3} .*raw pixels .*: held-out accuracy [01]\.\d{3} ",  # noqa: E501
    "reconstruct": rf"{VAL_IMAGES} images, \S+, step \d+: removed patches: PSNR -?\d+\.\d+ dB; .*: -?\d+\.\d+ dB",
}


def parameters(rows: list[Row]) -> list[Any]:
    """``rows`` as test parameters. Rows outside the sample are marked exhaustive."""
    return [pytest.param(row, id=str(row), marks=() if str(row) in SAMPLE else pytest.mark.exhaustive) for row in rows]


def pairs(row: tuple[str | int, ...]) -> set[tuple[tuple[int, str | int], tuple[int, str | int]]]:
    """All pairs of values, each with the number of its column."""
    return set(itertools.combinations(enumerate(row), 2))


def possible() -> list[tuple[str | int, ...]]:
    """All rows without an excluded pair of values."""
    return [row for row in itertools.product(*COLUMNS) if not EXCLUDED.keys() & set(itertools.combinations(row, 2))]


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)


class Images:
    """Small datasets in ``root``, each made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.of = lru_cache(None)(self._of)

    def _of(self, verb: str, data: str) -> Path:
        """The dataset for ``verb``, "segment", "detect" or "classify", in the format ``data``."""
        folder = self.root / verb / data
        {"segment": self._scenes, "detect": self._objects}.get(verb, self._labelled)(folder, data)
        return folder

    def _labelled(self, folder: Path, data: str) -> None:
        if data in ("shards", "dataset"):
            for split in ("train", "val"):
                source = open_source(self.of("classify", "jpeg") / split)
                if data == "shards":
                    assert not pack(source, folder / split, per_shard=5)
                else:
                    _save_dataset(source, folder / split)
            return
        for split, count, seed in (("train", TRAIN_IMAGES, 0), ("val", VAL_IMAGES, 100)):
            for i in range(count):
                pixels = zoo.photo(40 + 2 * (i % 3), 48, seed + i)
                pixels[..., i % 2] //= 2  # the classes differ in colour
                _save(folder / split / "ab"[i % 2] / f"{i:02}.{_format(data, i // 2)}", pixels)

    def _scenes(self, folder: Path, data: str) -> None:
        for split, count, seed in (("train", TRAIN_IMAGES, 0), ("val", VAL_IMAGES, 100)):
            for i in range(count):
                pixels = zoo.photo(40, 48, seed + i)
                _save(folder / split / "images" / f"{i:02}.{_format(data, i)}", pixels)
                _save(folder / split / "masks" / f"{i:02}.png", (pixels[..., 0] > 127).astype(np.uint8))
        (folder / "classes.txt").write_text("dark\nbright\n")

    def _objects(self, folder: Path, data: str) -> None:
        for split, count, seed in (("train", TRAIN_IMAGES, 0), ("val", VAL_IMAGES, 100)):
            images, annotations = coco_files.scenes(count, seed)
            for i, image in enumerate(images):
                image["file_name"] = f"{i:02}.{_format(data, i)}"
                _save(folder / f"{split}2017" / image["file_name"], np.asarray(image.pop("pixels")))
            coco_files.write_split(folder, split, images, annotations)


def _format(data: str, number: int) -> str:
    return FORMATS[data][number % len(FORMATS[data])]


def _save_dataset(source: Any, folder: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(source.classes))})
    images = [{"bytes": source.read(i), "path": None} for i in range(len(source))]
    rows = {"image": images, "label": list(source.labels)}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)


def words(row: Row, data: Path, weights: Path | None, output: Path) -> list[str]:
    """The command line of ``row``, which writes ``output``."""
    verb = ["finetune", "--train-blocks=1"] if row.verb == "partial" else [row.verb]
    start = [sys.executable, "-m", "mae_fast", *verb]
    if row.verb == "reconstruct":
        return [*start, str(weights), f"--images={data}", f"--output={output}.png"]
    if row.verb in REPORTS:
        return [*start, str(weights), f"--data-path={data}", f"--num-workers={row.workers}"]
    flags = {
        "preset": "tiny", "data-path": data, "output-dir": output, "device": "cpu", "dtype": "fp32", "input-size": 32,
        "batch-size": BATCH, "epochs": EPOCHS, "warmup-epochs": 1, "num-workers": row.workers, "log-every": 1,
        "save-every": STEPS,
    }  # fmt: skip
    if weights and row.verb != "pretrain":
        flags["weights"] = weights
    if row.decoder == "pil" and row.verb not in ("segment", "detect"):  # these have no other
        flags["image-decoder"] = "pil"
    return [*start, *(f"--{name}={value}" for name, value in flags.items()), *row.flags]


def alive(session: int) -> list[int]:
    """The processes of a session, parents first, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return sorted(found)


def gone(session: int, pid: int | None, seconds: float) -> bool:
    """Whether a process, or all processes of a session, end within ``seconds``."""
    deadline = time.monotonic() + seconds
    while left := alive(session):
        if pid is not None and pid not in left:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _stacks(session: int, output: Path) -> str:
    """Kill the processes of a session one by one. Before that, faulthandler writes their Python stacks."""
    found = []
    for pid in alive(session):
        before, name = output.stat().st_size, command_of(pid)
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            os.kill(pid, signal.SIGABRT)
            gone(session, pid, 3)
        lines = output.read_bytes()[before:].decode(errors="replace").splitlines()
        stack = [line for line in lines if not line.startswith("Extension modules")]
        found += [f"process {pid}: {name}", *stack[:60]]
    return "\n".join(found)


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-30:])


def finish(line: list[str], output: Path, limit: float) -> str:
    """Run ``line``. It must exit in time with status 0, and leave no process behind.

    Returns the output, which is also in ``output``. Afterwards, no process of the run is alive in any case.
    """
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1"}
    with output.open("wb") as file:
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | environment,
        )
    shown = shlex.join(line)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        printed, status = output.read_text(errors="replace"), process.poll()
        if status is None:
            stacks = _stacks(process.pid, output)
            pytest.fail(
                f"{shown}\nis not done after {limit:g} s. Its output:\n{_tail(printed)}\nStacks:\n{stacks}", False
            )
        if status:
            pytest.fail(f"{shown}\nended with status {status}. Its output:\n{_tail(printed)}", False)
        if not gone(process.pid, None, GRACE):
            left = "\n".join(f"{pid}: {command_of(pid)}" for pid in alive(process.pid))
            pytest.fail(f"{shown}\nhas ended and left processes behind:\n{left}\nIts output:\n{_tail(printed)}", False)
        return printed
    finally:
        for pid in alive(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def log(run: Path) -> list[dict[str, Any]]:
    """The lines of ``log.jsonl``, without times and rates."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("images_per_s", "waiting")} for line in lines]


def check_log(verb: str, lines: list[dict[str, Any]]) -> None:
    """Every step has a line and every epoch has metrics. All values are finite, and no image is unusable."""
    steps = range(1, EPOCHS * STEPS + 1)
    trained = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in trained] == [*steps]
    assert [line["epoch"] for line in trained] == [(step - 1) // STEPS for step in steps]
    assert all(line["skipped"] == line["not_finite"] == 0 for line in trained)
    evaluated = [line for line in lines if "train_loss" not in line]
    expected = range(EPOCHS) if FIGURES[verb] else ()
    assert [(line["step"], line["epoch"]) for line in evaluated] == [((e + 1) * STEPS, e) for e in expected]
    assert all(line.keys() - {*PLACE} == FIGURES[verb] for line in evaluated)
    assert all(math.isfinite(x) for line in lines for name, x in line.items() if name != "per_class"), lines


def weights_of(run: Path) -> str:
    """SHA-256 of the weights in the last checkpoint, which must be complete."""
    found = find_checkpoint(run)
    assert found.step == EPOCHS * STEPS
    return json.loads((found.path / "manifest.json").read_text())["model.safetensors"]["sha256"]


def check_training(row: Row, line: list[str], run: Path, limit: float) -> list[dict[str, Any]]:
    """Run ``line``, resume it if the row says so, and check its output files. Returns the log."""
    printed = finish(line, run.with_suffix(".txt"), limit)
    assert f"decoded by {row.decoder}\n" in printed
    assert all(f"epoch {epoch + 1}: val_" in printed for epoch in range(EPOCHS) if FIGURES[row.verb])
    lines, weights = log(run), weights_of(run)
    check_log(row.verb, lines)
    if row.course == "resumed":
        step = (EPOCHS - 1) * STEPS
        shutil.rmtree(find_checkpoint(run).path)
        again = finish(line, run.with_suffix(".again.txt"), limit)
        assert f"resuming {run} at step {step} of {EPOCHS * STEPS}" in again
        assert (log(run), weights_of(run)) == (lines, weights)
    return lines


def check(row: Row, images: Images, weights: Path, folder: Path, limit: float) -> Any:
    """Run ``row`` and check its results. Runs on the same pixels must have equal results."""
    data = images.of(row.verb if row.verb in ("segment", "detect") else "classify", row.data)
    line = words(row, data, weights, folder / "run")
    if row.verb in TRAINERS:
        return check_training(row, line, folder / "run", limit)
    printed = finish(line, folder / "run.txt", limit)
    found = re.search(PRINTED[row.verb], printed)
    assert found, printed
    if row.verb == "reconstruct":
        with Image.open(folder / "run.png") as picture:
            assert min(picture.size) > 32
    return found[0]
