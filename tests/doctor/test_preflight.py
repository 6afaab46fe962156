"""``mae-fast doctor VERB FLAGS``: its findings about a training command, and the error of its memory estimate."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import command
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mae_fast
from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.sources import open_source
from mae_fast.doctor import preflight
from mae_fast.doctor.findings import Finding
from mae_fast.doctor.memory_estimate import (
    Activations,
    PersistentMemory,
    _Live,
    activations,
    make_fake,
    persistent_memory,
)
from mae_fast.errors import UserError
from mae_fast.training.config import PretrainConfig
from mae_fast.training.optim import adamw
from mae_fast.training.tasks.pretrain import Pretraining

MIB, GIB = 2**20, 2**30


def write_images(folder, count):
    """Write ``count`` JPEGs of 32 x 32 pixels to two class folders."""
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), i % 256, np.uint8)).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        write_images(folder / split, 16)
    return folder


def tiny(images, **flags):
    """A configuration of the tiny model."""
    tiny = {"model": "mae_vit_tiny_patch4", "input_size": 32, "batch_size": 8, "image_decoder": "pil"}
    return PretrainConfig(data_path=images, output_dir="nowhere", **tiny, **flags)


@pytest.fixture
def line(images, tmp_path, monkeypatch, capsys):
    """Runs ``mae-fast doctor VERB`` with the tiny preset and ``flags``."""
    monkeypatch.setenv("COLUMNS", "400")  # so that each row is one line

    def run(verb, *flags, data=images):
        common = ("--preset", "tiny", "--data-path", data, "--output-dir", tmp_path / "run", "--image-decoder", "pil")
        return command(monkeypatch, capsys, "doctor", verb, *common, *flags)

    return run


def row(text, what):
    """The result, verdict and fix of a row."""
    (cells,) = [cells for x in text.splitlines() if (cells := x.split("│")[1:-1]) and cells[0].strip() == what]
    return [cell.strip() for cell in cells[1:]]


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "linprobe", "train-dvae"])
def test_command_that_can_run(line, tmp_path, images, verb):
    result = line(verb, "--batch-size", 4, "--accum-iter", 2, "--epochs", 70)
    assert result.returncode == 0, result.stdout
    found, verdict, fix = row(result.stdout, "images")
    assert (found, verdict, fix) == (f"16 of 2 classes in {images / 'train'}", "ok", "")
    found, verdict, _ = row(result.stdout, "sample")
    assert (found.startswith("16 headers are valid; Pillow decodes "), verdict) == (True, "ok")
    assert int(re.search(r"decodes (\d+) images/s", found)[1]) > 50  # the images are tiny
    assert row(result.stdout, "steps")[0] == "2 per epoch, 140 in total, of 8 images per process"
    assert row(result.stdout, "memory")[1] == row(result.stdout, "disk")[1] == "ok"
    assert "activations 0.0" in row(result.stdout, "memory")[0]
    if verb != "pretrain":
        assert row(result.stdout, "validation")[0] == f"16 images in {images / 'val'}"
    assert "problems: 0, " in result.stdout
    assert not (tmp_path / "run").exists()


def test_missing_images(line, tmp_path):
    result = line("pretrain", data=tmp_path / "nowhere")
    assert result.returncode == 1
    assert row(result.stdout, "command") == [
        f"image folder {tmp_path / 'nowhere'} does not exist", "problem", "give a folder of images or of class folders"
    ]  # fmt: skip
    assert "problems: 1, " in result.stdout


def test_fewer_images_than_a_step(line):
    result = line("pretrain", "--batch-size", 8, "--accum-iter", 3)
    assert result.returncode == 1
    found, verdict, fix = row(result.stdout, "steps")
    assert "16 images, fewer than one step of 24" in found
    assert (verdict, fix) == ("problem", "lower --batch-size or --accum-iter")
    assert row(result.stdout, "images")[1] == row(result.stdout, "memory")[1] == "ok"  # the other checks still run


def test_unusable_images(line, tmp_path):
    write_images(tmp_path / "some", 8)
    for i in (2, 5):
        (tmp_path / "some" / f"class{i % 2}" / f"{i}.jpg").write_bytes(b"no image")
    result = line("pretrain", "--batch-size", 4, data=tmp_path / "some")
    found, verdict, fix = row(result.stdout, "sample")
    assert found.startswith("2 of 8 images ")
    assert "'class0/2.jpg' (not an image: no known image format), ..." in found
    assert (verdict, result.returncode) == ("problem", 1)
    assert f"mae-fast data check {tmp_path / 'some'}" in fix
    result = line("pretrain", "--batch-size", 4, "--max-bad-fraction", 0.25, data=tmp_path / "some")
    assert (row(result.stdout, "sample")[1], result.returncode) == ("note", 0)
    about = {"fingerprint": open_source(tmp_path / "some").fingerprint, "channels": 3}
    listed = {"index": 1, "reason": "broken", "detail": ""}  # class0/2.jpg
    (tmp_path / "some/bad.jsonl").write_text(f"{json.dumps(about)}\n{json.dumps(listed)}\n")
    result = line("pretrain", "--batch-size", 4, data=tmp_path / "some")
    assert row(result.stdout, "bad images")[0].startswith("1 ")
    assert re.search("1 of 7 images .*'class1/5.jpg'", row(result.stdout, "sample")[0])


def test_too_few_images_for_a_memory_estimate(line, tmp_path):
    write_images(tmp_path / "two", 2)
    result = line("pretrain", "--batch-size", 2, data=tmp_path / "two")
    assert result.returncode == 0
    assert row(result.stdout, "disk")[1] == "ok"
    assert row(result.stdout, "memory") == [
        "unknown: 2 images are too few for an estimate", "note", "run the command with --dry-run to measure it"
    ]  # fmt: skip


def test_no_memory_estimate_with_cached_features(line):
    result = line("linprobe", "--batch-size", 4, "--cache-features")
    assert "--cache-features" in row(result.stdout, "memory")[0]


def test_missing_decoder(line, monkeypatch):
    """The other checks use the installed decoder."""
    monkeypatch.setattr(preflight, "choose_decoder", lambda *_: ("pil", "DALI is not installed"))
    result = line("pretrain", "--batch-size", 4, "--image-decoder", "dali")
    assert row(result.stdout, "loader")[0] == "--image-decoder dali: DALI is not installed"
    assert (row(result.stdout, "memory")[1], result.returncode) == ("ok", 1)


def test_missing_packages_of_evaluation(images):
    class Evaluated(Pretraining):
        def evaluation(self):
            raise UserError("figures need a package", "pip install it")

    config = tiny(images)
    found = {f.what: f for f in preflight.preflight(config, Evaluated)}
    assert found["validation"] == Finding("validation", "figures need a package", "pip install it", bad=True)
    assert found["memory"].verdict == "ok"


def test_more_workers_than_cores(line):
    result = line("pretrain", "--batch-size", 4, "--num-workers", 999)
    found, verdict, fix = row(result.stdout, "loader")
    assert found.startswith("pil, 999 workers on")
    assert (verdict, fix) == ("note", f"--num-workers {preflight.cores()}")


DALI = "pip install 'mae_fast[dali]'"


@pytest.mark.parametrize(
    ("decoder", "there", "row"),
    [
        ("auto", "pil", ("pil, 1 worker on 4 cores; why", f"to decode JPEG in half the time: {DALI}")),
        ("dali", "pil", ("--image-decoder dali: why", f"{DALI}, or leave --image-decoder dali out", True)),
        ("pil", "pil", ("pil, 1 worker on 4 cores",)),
        ("auto", "dali", ("dali, 1 worker on 4 cores",)),
    ],
)
def test_decoders(monkeypatch, decoder, there, row):
    monkeypatch.setattr(preflight, "choose_decoder", lambda _: (there, "why"))
    monkeypatch.setattr(preflight, "cores", lambda: 4)
    config = PretrainConfig(data_path="x", output_dir="y", image_decoder=decoder, num_workers=1)
    task = SimpleNamespace(pixels=PixelFormat())
    assert list(preflight._loader(config, task, torch.device("cpu"))) == [Finding("loader", *row)]


def test_dali_is_not_suggested_for_pixels_that_it_cannot_decode(monkeypatch):
    for name in ("nvidia", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(preflight, "cores", lambda: 4)
    config = PretrainConfig(data_path="x", output_dir="y", num_workers=1)
    for pixels, decoder in (PixelFormat(), "dali"), (PixelFormat(channels=8, dtype="uint16"), "pil"):
        task = SimpleNamespace(pixels=pixels)
        assert list(preflight._loader(config, task, torch.device("cpu"))) == [
            Finding("loader", f"{decoder}, 1 worker on 4 cores")
        ]
        prefetched = preflight._bytes_of_prefetched_batches(config, task, (32, 32), torch.device("cuda"))
        assert bool(prefetched) == (decoder == "pil")


@pytest.mark.parametrize(
    ("decoder", "device", "batches"), [("pil", "cpu", 8), ("pil", "cuda", 8), ("dali", "cpu", 8), ("dali", "cuda", 0)]
)
def test_prefetched_batches_count_as_memory(decoder, device, batches):
    config = PretrainConfig(data_path="x", output_dir="y", image_decoder=decoder, num_workers=4, batch_size=128)
    task = SimpleNamespace(pixels=PixelFormat())
    found = preflight._bytes_of_prefetched_batches(config, task, (224, 160), torch.device(device))
    assert found == batches * 128 * 224 * 160 * 3


def test_workers_are_suggested_on_a_gpu(monkeypatch):
    monkeypatch.setattr(preflight, "cores", lambda: 4)
    config = PretrainConfig(data_path="x", output_dir="y", image_decoder="pil", num_workers=0)
    (found,) = preflight._loader(config, SimpleNamespace(pixels=PixelFormat()), torch.device("cuda"))
    assert (found.verdict, found.fix) == ("note", "--num-workers 4")


@pytest.mark.parametrize(
    ("asked", "can", "unit", "step", "verdict", "words"),
    [
        ("auto", True, True, "eager", "ok", "with AMX or AVX512_BF16: bf16"),
        ("auto", False, False, "eager", "ok", "without AMX or AVX512_BF16: fp32"),
        ("fp32", True, True, "eager", "ok", "fp32 (--dtype fp32)"),
        ("bf16", False, False, "eager", "problem", "bf16 (--dtype bf16), slower than fp32"),
        ("auto", True, False, "eager", "note", "bf16, but our kernels cannot use it"),
        ("auto", True, True, "cuda-graph", "note", "without CUDA graphs, steps are eager"),
    ],
)
def test_device(monkeypatch, asked, can, unit, step, verdict, words):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: can)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(preflight, "has_matrix_unit", lambda: unit)
    found = preflight._device(
        PretrainConfig(data_path="x", output_dir="y", dtype=asked, execution=step), torch.device("cpu")
    )
    assert (found.verdict, found.found.endswith(words)) == (verdict, True), found


def test_output_folder(monkeypatch, tmp_path):
    def found(path):
        return list(preflight._output(PretrainConfig(data_path="x", output_dir=path)))

    (tmp_path / "file").touch()
    assert found(tmp_path / "a/b/c") == []
    assert [f.found for f in found(tmp_path / "file/run")] == [f"{tmp_path / 'file'} is a file"]
    monkeypatch.setattr(os, "access", lambda path, how: path != tmp_path)
    assert [f.verdict for f in found(tmp_path / "new")] == ["problem"]


def test_existing_run_must_match_the_command(line, tmp_path, images):
    flags = {"batch_size": 8, "epochs": 1, "warmup_epochs": 0, "num_workers": 0, "image_decoder": "pil"}
    mae_fast.pretrain(preset="tiny", data_path=images, output_dir=tmp_path / "run", **flags)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    same, other = line("pretrain", *words), line("pretrain", *words, "--lr=9e-4")
    assert (same.returncode, row(same.stdout, "run")[1]) == (0, "ok")
    found, verdict, _ = row(other.stdout, "run")
    assert (other.returncode, verdict) == (1, "problem")
    assert "lr: 0.0015 in the run, 0.0009 now" in found


def test_disk_space(monkeypatch, tmp_path):
    """Two checkpoints are kept while the third is written. Existing checkpoints count as free, as they are replaced."""
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=250))
    config = PretrainConfig(data_path="x", output_dir=tmp_path / "run")
    assert [preflight._disk(config, size).bad for size in (83, 84)] == [False, True]
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000001/model.safetensors").write_bytes(bytes(50))
    assert [preflight._disk(config, size).bad for size in (100, 101)] == [False, True]
    assert "free some space" in preflight._disk(config, 101).fix


PERSISTENT = PersistentMemory(weights=GIB, gradients=GIB, state=2 * GIB, averages=0, saved=3 * GIB)
TRANSIENT = Activations(fixed=GIB, per_image=GIB)


def fitted(room, persistent=PERSISTENT, **flags):
    config = PretrainConfig(data_path="x", output_dir="y", **{"batch_size": 12, **flags})
    return preflight.fits("memory", config, persistent, TRANSIENT, {"process": GIB}, round(room * GIB))


def test_fits():
    """18 GiB are needed. Up to 0.85 of the available memory is ok."""
    fits = fitted(18 / 0.85 + 0.01)
    assert (fits.verdict, fits.fix) == ("ok", "")
    assert fits.found == (
        "estimated 18.00 GiB of 21.19 GiB: process 1.00, weights 1.00, gradients 1.00, optimizer 2.00, "
        "activations 13.00"
    )
    assert "averages 1.00, activations" in fitted(99, replace(PERSISTENT, averages=GIB)).found
    assert fitted(18 / 0.85 - 0.01).verdict == "note"
    assert fitted(18.01).verdict == "note"
    assert fitted(17.99).verdict == "problem"


SMALLER_MODEL = "use a smaller model, more memory, or several processes with --strategy fsdp"


@pytest.mark.parametrize(
    ("images", "flags", "fix"),
    [
        (11.5, {}, "--batch-size 6 --accum-iter 2, or --grad-checkpointing"),
        (5.5, {}, "--batch-size 4 --accum-iter 3, or --grad-checkpointing"),
        (5.5, {"accum_iter": 2, "grad_checkpointing": True}, "--batch-size 4 --accum-iter 6"),
        (8.5, {"accum_iter": 2}, "--batch-size 8 --accum-iter 3, or --grad-checkpointing"),
        (5.5, {"crops_per_image": 3}, "--batch-size 3 --accum-iter 4, or --grad-checkpointing"),
        (1.01, {}, "--batch-size 1 --accum-iter 12, or --grad-checkpointing"),
        (0.9, {}, "--grad-checkpointing"),
        (0.9, {"grad_checkpointing": True}, SMALLER_MODEL),
        (-1.1, {}, SMALLER_MODEL),
    ],
)
def test_suggested_batch_size_keeps_the_images_per_step(images, flags, fix):
    assert fitted((6 + images) / 0.85, **flags).fix == fix


def two_layers(frozen=False, inputs=4, hidden=8):
    """Two linear layers without biases. ``frozen``: the first layer is frozen."""
    model = nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, 1, bias=False))
    model[0].requires_grad_(not frozen)
    return model


def a_task(model):
    """A task with the attributes that the estimate reads."""
    return SimpleNamespace(
        model=model,
        optimizer=lambda lr, dtype: adamw(model, lr, 0.1, dtype),
        loss=lambda model, x, other: model(x).sum(),
    )


@pytest.mark.parametrize("averages", [False, True])
def test_persistent_memory(averages):
    task = a_task(two_layers(frozen=True))
    found = persistent_memory(task, make_fake(task.model), bf16=False, averages=averages)
    state = 2 * 32 + 4  # two averages and a step of the second layer
    assert found == PersistentMemory(160, 32, state, 32 * averages, 160 + state + 32 * averages)


@pytest.mark.native
def test_persistent_memory_includes_bf16_copies():
    """Only matrices have bf16 copies, not biases."""
    task = a_task(nn.Linear(4, 8))
    state = [persistent_memory(task, make_fake(task.model), bf16=bf16, averages=False).state for bf16 in (False, True)]
    assert state == [2 * 160 + 2 * 4, 2 * 160 + 2 * 4 + 2 * 32]


@pytest.mark.parametrize("frozen", [False, True])
def test_activations_of_linear_layers(frozen):
    """The peak contains x, the hidden values, and the gradient of the hidden values."""
    task = a_task(two_layers(frozen, inputs=100, hidden=1000).eval())
    x = {n: (torch.zeros(n, 100), torch.zeros(())) for n in (1000, 3000)}
    found = activations(task, make_fake(task.model), x, bf16=False)
    values = 100 + 1000 + (0 if frozen else 1000)
    assert abs(found.per_image / 4 - values) < 10
    assert found.of(50) == round(found.fixed + 50 * found.per_image)
    assert task.model.training


def test_activations_exclude_weight_gradients():
    task = a_task(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6))))
    found = activations(task, make_fake(task.model), {n: (torch.zeros(n, 64), None) for n in (1, 2)}, bf16=False)
    assert found.fixed <= 2 * 64 * 64 * 4  # at most one weight gradient, before it is accumulated


def test_only_live_allocations_are_counted():
    with FakeTensorMode():
        before = torch.empty(1000)
        with _Live() as live:
            first = torch.empty(100)
            view = first.view(10, 10)
            before.add_(1)
            before.view(10, 100)
            del first
            assert (live.now, live.most) == (400, 400)
            del view
            second = torch.empty(50)
            assert (live.now, live.most) == (200, 400)
            live.leave_out(second)
            live.leave_out(before)
            assert live.now == 0
            del second
            assert live.now == 0


def test_missing_estimate_is_reported(images, monkeypatch):
    """If an op reads values of tensors, as in a detector, the step cannot be traced."""

    def needs_values(self, model, images, other):
        return images.float().mean() * float(images.sum())

    monkeypatch.setattr(Pretraining, "loss", needs_values)
    config = tiny(images)
    found = {f.what: f for f in preflight.preflight(config, Pretraining)}
    assert found["memory"].found.startswith("unknown: ")
    assert found["memory"].fix == "run the command with --dry-run to measure it"
    assert found["disk"].verdict == "ok"


@pytest.mark.parametrize(("flag", "less"), [("grad_checkpointing", 0.75), ("dtype", 0.75)])
def test_suggested_flags_reduce_memory(images, flag, less, monkeypatch):
    seen = []
    monkeypatch.setattr(preflight, "fits", lambda *args: seen.append(args[3]) or Finding("", ""))
    for value in ({"dtype": "fp32", "grad_checkpointing": False}, {"dtype": "bf16", "grad_checkpointing": True}):
        config = tiny(images, **{"dtype": "fp32", "grad_checkpointing": False, flag: value[flag]})
        preflight.preflight(config, Pretraining)
    assert seen[1].per_image < less * seen[0].per_image


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train",), "got 'train'"),
        (("finetune", "--eval-only"), "--eval-only"),
        (("finetune", "--eval"), "--eval-only"),
    ],
)
def test_other_verbs_and_eval_only_are_refused(monkeypatch, capsys, words, message):
    result = command(monkeypatch, capsys, "doctor", *words)
    assert (result.returncode, message in result.stderr) == (2, True)


def test_flags_of_evaluation_during_training_are_accepted(line):
    result = line("pretrain", "--val-loss", "--eval-every", "2", "--eval-data", "/nowhere")
    assert "/nowhere" in result.stderr + result.stdout


def test_wrong_flags_give_the_error_of_the_verb(line):
    result = line("pretrain", "--no-such-flag")
    assert (result.returncode, "no-such-flag" in result.stderr) == (2, True)


def test_errors_of_training_become_problems_with_a_fix():
    found = Finding.refused("x", UserError("that is wrong (see; there)", "do this"))
    assert (found.found, found.fix, found.bad) == ("that is wrong (see; there)", "do this", True)
    assert Finding.refused("x", UserError("that is wrong")).found == "that is wrong"


MEASURED = """
import json, sys, tempfile
from mae_fast.cli import main
from mae_fast.memory import resident
from mae_fast.doctor import preflight

estimates, fits = [], preflight.fits
def spy(what, config, persistent, transient, also, available):
    parts = persistent.weights + persistent.gradients + persistent.state + transient.of(config.batch_size)
    estimates.append(also["process"] + parts)
    return fits(what, config, persistent, transient, also, available)
preflight.fits = spy

def run(*words):
    sys.argv = ["mae-fast", *words]
    main()

peaks = []
with tempfile.TemporaryDirectory() as folder:
    flags = ["--preset", "tiny", "--data-path", sys.argv[1], "--image-decoder", "pil", "--num-workers", "0"]
    lines = [["pretrain", *flags, "--output-dir", f"{folder}/{n}", "--batch-size", n] for n in ("16", "256")]
    for line in lines:
        run("doctor", *line)
    for line in lines:
        run(*line, "--epochs", "2")
        peaks.append(resident("VmHWM"))
print(json.dumps([estimates, peaks]))
"""


def test_estimate_is_close_to_the_measured_peak(tmp_path):
    """On 2 AVX512_BF16 cores, the estimate was between 2 % below and 9 % above the peak of eight kinds of steps.

    For more images of a tiny model, the estimated difference was 10 to 15 % too small, because it excludes buffers of
    libraries. With torch 2.10, it was 25 to 31 % too small.
    """
    close = 0.35 if torch.__version__ < "2.11" else 0.25
    write_images(tmp_path, 256)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    result = subprocess.run([sys.executable, "-c", MEASURED, tmp_path], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    estimates, peaks = json.loads(result.stdout.splitlines()[-1])
    assert peaks[1] - peaks[0] > 100 * MIB
    assert estimates[1] - estimates[0] == pytest.approx(peaks[1] - peaks[0], rel=close)
    for estimate, peak in zip(estimates, peaks, strict=True):
        assert estimate == pytest.approx(peak, rel=0.15)
