"""The command line: wrong input gives an error and a hint, exit status 2 and no traceback; no file is lost."""

import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import command

from mae_fast.cli import VERBS
from mae_fast.cli.flags import EXAMPLES, parse
from mae_fast.console import show_messages


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs a command in this process. An unexpected exception fails the test."""
    return partial(command, monkeypatch, capsys)


Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / f"{i}.jpg")
    return root


# By mistake: the words after ``--preset tiny --output-dir RUN``, and what the output must contain.
BAD_PRETRAINING = {
    "missing folder": (["--data-path", "{tmp}/nowhere"], "does not exist"),
    "empty folder": (["--data-path", "{tmp}"], "no images"),
    "file for a folder": (["--data-path", "{images}/0.jpg"], "is not a folder"),
    "fewer images than a batch": (["--data-path", "{images}"], "fewer than one step of 32"),
    "size and patch": (["--data-path", "{images}", "--input-size", "30"], "multiple of the patch size"),
    "unknown model": (["--data-path", "{images}", "--model", "resnet50"], "known are mae_vit_base"),
    "no removed patch": (["--data-path", "{images}", "--mask-ratio", "1e-17"], "no removed patch"),
    "no visible patch": (["--data-path", "{images}", "--mask-ratio", "0.99"], "no visible patch"),
    "mask ratio above 1": (["--data-path", "{images}", "--mask-ratio", "75"], "--mask-ratio 75"),
    "mask ratio of nan": (["--data-path", "{images}", "--mask-ratio", "nan"], "--mask-ratio nan"),
    "zero batch": (["--data-path", "{images}", "--batch-size", "0"], "--batch-size 0"),
    "warm-up as long as the run": (["--data-path", "{images}", "--epochs", "1"], "--warmup-epochs 0.05"),
    "unknown flag": (["--data-path", "{images}", "--batchsize", "3"], "unknown flag --batchsize"),
    "not a number": (["--data-path", "{images}", "--epochs", "many"], "epochs"),
    "missing flag": ([], "--data-path"),
    "unknown preset": (["--data-path", "{images}", "--preset", "giant"], "base, large, huge, small, tiny16, tiny"),
    "missing weights": (["--data-path", "{images}", "--init", "{tmp}/none.pth"], "none.pth: there is no such file"),
    "published resume": (["--data-path", "{images}", "--resume", "x.pth"], "leave the flag out"),
    "no GPU": (["--data-path", "{images}", "--device", "cuda"], "use --device cpu"),
}


@pytest.mark.parametrize("case", BAD_PRETRAINING)
def test_bad_pretraining(run: Run, case: str, images: Path, tmp_path: Path) -> None:
    words, expected = BAD_PRETRAINING[case]
    (tmp_path / "in").mkdir()
    filled = [word.format(tmp=tmp_path / ("in" if case == "empty folder" else ""), images=images) for word in words]
    result = run("pretrain", "--preset", "tiny", "--output-dir", tmp_path / "run", *filled)
    assert result.returncode == 2
    assert expected in result.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_output_folder_that_is_a_file(run: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    words = ["--data-path", images, "--output-dir", tmp_path / "run", "--batch-size", "2", "--num-workers", "0"]
    result = run("pretrain", "--preset", "tiny", *words)
    assert (result.returncode, (tmp_path / "run").read_text()) == (2, "precious")
    assert "a file is in the way" in result.stderr


def test_unreadable_image(images: Path, tmp_path: Path) -> None:
    broken = tmp_path / "images"
    broken.mkdir()
    for image in images.iterdir():
        (broken / image.name).write_bytes(image.read_bytes()[: 40 if image.name == "2.jpg" else None])
    words = ["--data-path", broken, "--output-dir", tmp_path / "run", "--batch-size", "2", "--num-workers", "1"]
    line = [sys.executable, "-m", "mae_fast", "pretrain", "--preset", "tiny", *map(str, words)]
    result = subprocess.run(line, capture_output=True, text=True)  # also captures the output of worker processes
    assert result.returncode == 2
    assert "2.jpg" in result.stderr
    assert "Traceback" not in result.stderr


def test_published_command_lines_run(run: Run, images: Path, tmp_path: Path) -> None:
    """All flags of the published scripts, including those of the launcher."""
    words = f"""
        --job_dir {tmp_path}/run --ngpus 8 --nodes 8 --timeout 4320 --partition x --use_volta32 --comment y
        --batch_size 2 --epochs 800 --accum_iter 1 --model mae_vit_tiny_patch4 --input_size 32 --mask_ratio 0.75
        --norm_pix_loss --weight_decay 0.05 --blr 1.5e-4 --min_lr 0. --warmup_epochs 40 --data_path {images}
        --device cpu --seed 0 --start_epoch 0 --num_workers 0 --pin_mem --no_pin_mem --world_size 1 --local_rank -1
        --dist_on_itp --dist_url env://
    """
    result = run("pretrain", *words.split(), "--resume", "", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "800 epochs = 1600 steps of 2 images, lr 1.17e-06" in result.stdout
    assert "ignored --start_epoch, --pin_mem, " in result.stderr
    again = run("pretrain", *words.replace("_dir", "-dir").split(), "--output_dir", tmp_path / "other", "--dry-run")
    assert again.returncode == 0, again.stderr


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    for i in range(16):
        folder = root / ("train" if i < 8 else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 16 * i, np.uint8)).save(folder / f"{i}.jpg")
    return root


# The command lines in the documentation of the published scripts, for a tiny model.
PUBLISHED = {
    "finetune": (
        "--accum_iter 1 --batch_size 4 --model vit_tiny_patch4 --input_size 32 --finetune {weights} --epochs 1 "
        "--warmup_epochs 0 --blr 5e-4 --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --mixup 0.8 --cutmix 1.0 "
        "--reprob 0.25 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --dist_eval --data_path {images} --output_dir {run} "
        "--num_workers 0 --seed 0 --nb_classes 2"
    ),
    "linprobe": (
        "--batch_size 4 --model vit_tiny_patch4 --input_size 32 --cls_token --finetune {weights} --epochs 1 "
        "--warmup_epochs 0 --blr 0.1 --weight_decay 0.0 --dist_eval --data_path {images} --output_dir {run} "
        "--num_workers 0"
    ),
}


@pytest.mark.parametrize("verb", PUBLISHED)
def test_published_evaluation_lines_run(run: Run, verb: str, labelled: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from mae_fast.models.mae import build

    torch.manual_seed(0)
    save_file(build("mae_vit_tiny_patch4").state_dict(), tmp_path / "mae.safetensors")
    places = {"weights": tmp_path / "mae.safetensors", "images": labelled, "run": tmp_path / "run"}
    words = [word.format(**places) for word in PUBLISHED[verb].split()]
    result = run(verb, *words)
    assert result.returncode == 0, result.stderr
    assert "epoch 1: val_loss" in result.stdout
    assert "ignored --dist_eval" in result.stderr
    assert "no decoder" in result.stdout
    again = run(verb, *words, "--eval", "--predictions", tmp_path / "table.csv")
    assert again.returncode == 0, again.stderr
    assert "confusion matrix" in again.stdout
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 9


def test_former_names_of_verbs_and_flags_work_and_warn(run: Run, labelled: Path, tmp_path: Path) -> None:
    line = f"--preset tiny --data-path {labelled} --output-dir {tmp_path} --batch-size 4 --epochs 1 --warmup-epochs 0"
    former = "--blocks=0.5 --repeats 2 --decoder pil --step graph"
    old = run("partial", *line.split(), *former.split(), "--num-workers=0")
    assert old.returncode == 0, old.stderr
    assert "0.5 blocks of 4" in old.stdout
    for former, current in (
        ("'mae-fast partial'", "'mae-fast finetune'"),
        ("--blocks", "--train-blocks"),
        ("--repeats", "--crops-per-image"),
        ("--decoder", "--image-decoder"),
        ("--step", "--execution"),
    ):
        assert f"warning: {former} is now called {current}\n" in old.stderr
    new = "--train-blocks 0.5 --crops-per-image=2 --image-decoder=pil --execution=cuda-graph"
    again = run("finetune", *line.split(), *new.split())
    assert "is finished" in again.stdout
    assert "is now called" not in again.stderr
    assert "'mae-fast probe' is now called 'mae-fast logreg-probe'" in run("probe").stderr
    assert "missing: dump" in run("replay").stderr
    for verb in ("--help", "finetune --help"):
        assert not re.search(r"\bpartial\b|\breplay\b|--repeats|--blocks|--step|--decoder ", run(*verb.split()).stdout)


def test_former_verb_partial_trains_one_block_by_default(run: Run, labelled: Path, tmp_path: Path) -> None:
    line = f"--preset tiny --data-path {labelled} --output-dir {tmp_path} --batch-size 4 --dry-run"
    assert "1 blocks of 4" in run("partial", *line.split()).stdout
    assert " blocks of 4" not in run("finetune", *line.split()).stdout
    assert " blocks of 4" not in run("finetune", *line.split(), "--train-blocks", "all").stdout


def test_run_with_former_names_in_its_config_resumes(run: Run, labelled: Path, tmp_path: Path) -> None:
    line = f"--preset tiny --data-path {labelled} --output-dir {tmp_path} --batch-size 4 --epochs 2 --num-workers 0"
    line += " --train-blocks 1 --crops-per-image 2 --image-decoder pil"
    assert run("finetune", *line.split()).returncode == 0
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for current, former in (("train_blocks", "blocks"), ("crops_per_image", "repeats"), ("image_decoder", "decoder")):
        config[former] = config.pop(current)
    path.write_text(json.dumps(config))
    assert "is finished" in run("finetune", *line.split()).stdout
    for flag, message in (
        ("--train-blocks=2", "train_blocks: 1.0 in the run, 2.0 now"),
        ("--crops-per-image=1", "crops_per_image: 2 in the run, 1 now"),
    ):
        assert message in run("finetune", *line.split(), flag).stderr


BAD_EVALUATION = {
    "no val": ("finetune", ["--data-path", "{labelled}/train"], "train"),
    "more blocks than there are": (
        "finetune",
        ["--data-path", "{labelled}", "--train-blocks", "7"],
        "hint: give 0, 0.5",
    ),
    "a policy that timm does not have": ("finetune", ["--data-path", "{labelled}", "--aa", "trivial"], "--aa trivial"),
    "a resume flag": ("linprobe", ["--data-path", "{labelled}", "--resume", "x.pth"], "use --weights"),
    "predictions of training": ("finetune", ["--data-path", "{labelled}", "--predictions", "x.csv"], "add it"),
    "no run to evaluate": ("finetune", ["--data-path", "{labelled}", "--eval-only"], "is not a run"),
    "no such weights": ("finetune", ["--data-path", "{labelled}", "--weights", "{tmp}/x.pth"], "x.pth"),
    "what the published script evaluates": (
        "finetune",
        ["--data-path", "{labelled}", "--eval", "--resume", "{tmp}/x.pth"],
        "x.pth",
    ),
    "unknown preset": ("linprobe", ["--data-path", "{labelled}", "--preset", "giant"], "known are base"),
}


@pytest.mark.parametrize("case", BAD_EVALUATION)
def test_bad_evaluation(run: Run, case: str, labelled: Path, tmp_path: Path) -> None:
    verb, words, expected = BAD_EVALUATION[case]
    words = [word.format(labelled=labelled, tmp=tmp_path) for word in words]
    preset = [] if "--preset" in words else ["--preset", "tiny", "--batch-size", "4", "--num-workers", "0"]
    result = run(verb, *preset, "--output-dir", tmp_path / "run", *words)
    assert result.returncode == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 2
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), ("[", "is not a dump"), ("{}", "is not a dump")],
)
def test_debug_step_refuses_other_files(run: Run, tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "dump.json").write_text(content)
    result = run("debug-step", tmp_path / "dump.json")
    assert result.returncode == 2
    assert expected in result.stderr


@pytest.mark.parametrize(
    "words", [["reconstruct", "{tmp}", "--images", "{tmp}"], ["logreg-probe", "{tmp}", "--data-path", "{tmp}"]]
)
def test_folder_without_a_run(run: Run, words: list[str], tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.jpg")
    result = run(*(word.format(tmp=tmp_path) for word in words))
    assert result.returncode == 2
    assert re.search("no usable checkpoint in|no weights in the folder", result.stderr)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fly"], "pretrain, finetune"),
        (["data", "fly"], "data demo, data scenes"),
        (["data"], "data demo, data scenes"),
    ],
)
def test_unknown_verbs(run: Run, words: list[str], expected: str) -> None:
    result = run(*words)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_help_and_version(run: Run) -> None:
    overview = run("--help").stdout
    assert all(f"  {verb} " in overview for verb in VERBS)
    assert run("--version").stdout.startswith("mae_fast 0.")
    for verb in VERBS:
        result = run(verb, "--help")
        assert (result.returncode, result.stderr) == (0, ""), verb
        assert f"usage: mae-fast {verb}" in result.stdout
        assert f"\nExample: mae-fast {verb}" in result.stdout
        assert "None" not in result.stdout.replace("None:", ""), verb


@pytest.mark.parametrize("verb", EXAMPLES)
def test_examples_of_training_verbs_are_valid(verb: str) -> None:
    name, called, *flags = EXAMPLES[verb].split()
    assert (name, called) == ("mae-fast", verb)
    assert parse(verb, flags).data_path


def test_help_does_not_import_heavy_packages() -> None:
    """For all verbs, including those of ``data``."""
    code = f"""
import contextlib, io, sys
from mae_fast.cli import main
for verb in {[[], *([verb] for verb in VERBS), *(["data", verb] for verb in ("demo", "check", "pack"))]}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        sys.argv = ["mae-fast", *verb, "--help"]
        main()
    assert not {{"torch", "numpy", "PIL", "timm", "matplotlib"}} & sys.modules.keys(), verb
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("line", "limit"), [("--help", 2), ("pretrain --help", 6)])
def test_help_is_quick(line: str, limit: float, tmp_path: Path) -> None:
    """Compares the CPU time with that of importing tyro and pydantic, each the smallest of several runs."""
    # Installed packages have byte code. Here, only the first run compiles.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}

    def seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    imports, took = [], []
    while len(took) < 3 or (len(took) < 10 and min(took) > limit * min(imports)):
        imports.append(seconds("-c", "import tyro, pydantic"))
        took.append(seconds("-m", "mae_fast", *line.split()))
    assert min(took) < limit * min(imports), (took, imports)


@pytest.mark.parametrize(("level", "shown"), [("debug", True), ("", False), ("nonsense", False)])
def test_environment_variable_sets_the_log_level(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, shown: bool
) -> None:
    logger = logging.getLogger("mae_fast")
    before = logger.level
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setenv("MAE_FAST_LOG_LEVEL", level)
    show_messages()
    logger.debug("all names")
    logger.setLevel(before)
    assert capsys.readouterr().out == "all names\n" * shown
