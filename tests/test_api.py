"""The Python functions of the tasks: flags as keywords, the same checks as the command line, runs and resuming."""

import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support import command

import mae_fast
from mae_fast import api
from mae_fast.api import DATASET, LABELLED_DATASET
from mae_fast.errors import UserError
from mae_fast.training import config as configs

QUICK = {
    "preset": "tiny", "batch_size": 4, "epochs": 1, "warmup_epochs": 0, "num_workers": 0, "device": "cpu",
    "dtype": "fp32", "image_decoder": "pil",
}  # fmt: skip
KINDS = {
    "pretrain": configs.PretrainConfig,
    "finetune": configs.FinetuneConfig,
    "linprobe": configs.LinprobeConfig,
    "segment": configs.SegmentConfig,
    "detect": configs.DetectConfig,
    "train_dvae": configs.DvaeConfig,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(12):
        folder = root / ("train" if i < 8 else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    return mae_fast.pretrain(data_path=images, output_dir=tmp_path_factory.mktemp("runs") / "mae", **QUICK)


@pytest.mark.parametrize("name", KINDS)
def test_signature_and_documentation_list_every_flag(name):
    function, fields = getattr(mae_fast, name), KINDS[name].model_fields
    parameters = inspect.signature(function).parameters
    datasets = {"pretrain": DATASET, "finetune": LABELLED_DATASET, "linprobe": LABELLED_DATASET}.get(name, {})
    assert {*parameters} == {"preset", *fields, *datasets}
    assert all(f"    {word}: {text.split()[0]}" in function.__doc__ for word, text in datasets.items())
    for flag, info in fields.items():
        default = inspect.Parameter.empty if info.is_required() else info.default
        assert parameters[flag].default == (None if flag == "data_path" and datasets else default)
        assert f"    {flag}: {info.description.split()[0]}" in function.__doc__


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_flag_is_under_one_heading_and_described(kind):
    names = [name for section in kind.sections().values() for name in section]
    assert sorted(names) == sorted(kind.model_fields)
    assert all(info.description for info in kind.model_fields.values())


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        ({"epochs": 0}, "--epochs 0", "greater than or equal to 1"),
        ({"mask_ratio": "half"}, "--mask-ratio half", "valid number"),
        ({"batchsize": 3}, "batchsize is unknown", "did you mean batch_size?"),
        ({"preset": "giant"}, "--preset giant is unknown", "known are base, large, huge, small, tiny16, tiny"),
        ({"batch_size": 6, "crops_per_image": 4}, "multiple of crops_per_image, got 6 and 4", "--batch-size 4"),
        ({"data_path": "nowhere"}, "nowhere does not exist", "give a folder"),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_wrong_flags_are_refused_as_on_the_command_line(flags, message, hint, images, tmp_path):
    with pytest.raises(UserError) as caught:
        mae_fast.pretrain(**{**QUICK, "data_path": images, "output_dir": tmp_path / "run", **flags})
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert not (tmp_path / "run").exists()


def items(count, labels):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 4000, (40, 40, 3)).astype(np.uint16) + 3000 * (i % 2) for i in range(count)]
    return [(x, f"class {i % 2}") for i, x in enumerate(pixels)] if labels else pixels


def test_training_on_a_map_style_dataset_can_be_resumed(tmp_path):
    words = {"data_name": "squares", "epochs": 4, "num_workers": 0, "save_every": 3, "device": "cpu"}
    flags = {**QUICK, **words, "batch_size": 8}
    whole = mae_fast.pretrain(data=items(16, False), output_dir=tmp_path / "whole", **flags)
    mae_fast.pretrain(data=items(16, False), output_dir=tmp_path / "half", **{**flags, "epochs": 2})
    resumed = mae_fast.pretrain(data=items(16, False), output_dir=tmp_path / "half", **flags)
    assert (whole.step, resumed.step) == (8, 8)
    recorded = json.loads((tmp_path / "whole" / "config.json").read_text())["pixel_settings"]
    assert (recorded["dtype"], recorded["mean"]) == ("uint16", pytest.approx([3500] * 3, rel=0.02))
    with pytest.raises(UserError, match="images"):
        mae_fast.pretrain(data=items(15, False), output_dir=tmp_path / "whole", **flags)
    tuned = mae_fast.finetune(
        preset="tiny", data=items(16, True), val_data=items(6, True), weights=whole, output_dir=tmp_path / "tuned",
        batch_size=8, warmup_epochs=0, **words,
    )  # fmt: skip
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["pixel_settings"] == recorded
    assert tuned.metrics["val_acc1"] >= 50


@pytest.mark.parametrize(
    ("call", "words", "message"),
    [
        (mae_fast.pretrain, {"data": [1]}, "without data_name"),
        (mae_fast.pretrain, {"data": [1], "data_name": "x", "data_path": "y"}, "data and data_path are both given"),
        (mae_fast.pretrain, {"data": [1], "data_name": 5}, r"data_name: .* got 5 \(int\)"),
        (mae_fast.pretrain, {"data_name": "x", "data_path": "y"}, "data_name given without data"),
        (mae_fast.pretrain, {"data": iter([1]), "data_name": "x"}, "no __len__"),
        (mae_fast.finetune, {"data": [1], "data_name": "x"}, "without val_data"),  # is checked before labels
        (mae_fast.finetune, {"data": [1], "data_name": "x", "val_data": [1]}, "dicts with 'label'"),
        (mae_fast.segment, {"data": [1], "data_name": "x"}, "use data_path instead"),
    ],
)
def test_wrong_datasets_are_refused(call, words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        call(preset="tiny", output_dir=tmp_path / "run", **words)


def test_a_tensor_with_channels_last_is_named(tmp_path):
    tensors = [torch.zeros(64, 64, 5) for _ in range(4)]
    words = {"data_name": "x", "num_workers": 0, "device": "cpu", "in_chans": 5, "output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match=r"64 bands, expected 5.*give tensors as \[C, H, W\] and arrays as"):
        mae_fast.pretrain(preset="tiny", data=tensors, **words)
    assert not (tmp_path / "run").exists()


def test_missing_flags_are_named():
    with pytest.raises(UserError, match="missing: data_path, output_dir"):
        mae_fast.finetune(preset="tiny")


def test_result_of_a_run_has_folder_metrics_and_model(pretrained):
    assert (pretrained.output_dir / "config.json").exists()
    assert pretrained.step == 2
    assert pretrained.metrics["train_loss"] > 0
    assert [line["step"] for line in pretrained.log] == [2]
    assert pretrained.log[0]["train_loss"] == pretrained.metrics["train_loss"]
    model = pretrained.load_model()
    assert isinstance(model, mae_fast.MaskedAutoencoderViT)
    assert not model.training
    saved = mae_fast.create_model("mae_vit_tiny_patch4", pretrained.output_dir).state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items())


def test_command_line_resumes_a_run_started_from_python(images, pretrained, monkeypatch, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    line = ["pretrain", f"--data-path={images}", f"--output-dir={pretrained.output_dir}", *words]
    assert "is finished: 2 steps" in command(monkeypatch, capsys, *line).stdout


def test_finetuning_evaluation_and_reports(images, pretrained, tmp_path, caplog):
    caplog.set_level(logging.INFO, "mae_fast")
    flags = {**QUICK, "data_path": str(images), "output_dir": str(tmp_path / "tuned")}
    tuned = mae_fast.finetune(**flags, weights=pretrained, train_blocks=1)
    assert "the head starts at random" in caplog.text
    caplog.clear()
    assert mae_fast.finetune(**flags, weights=pretrained, train_blocks=1).step == 2
    assert "is finished: 2 steps" in caplog.text
    assert "the head starts at random" not in caplog.text  # evaluation does not load the initial weights
    assert "left out" not in caplog.text
    assert isinstance(tuned.load_model(), mae_fast.VisionTransformer)
    evaluated = mae_fast.finetune(**flags, eval_only=True)
    assert evaluated.metrics["val_acc1"] == tuned.metrics["val_acc1"]
    assert (evaluated.step, evaluated.output_dir) == (2, tmp_path / "tuned")
    figures = mae_fast.reconstruct(pretrained.output_dir, images, tmp_path / "x.png", mask_ratio=[0.5, 0.75])
    assert [*figures] == [0.5, 0.75]
    assert (tmp_path / "x.png").exists()
    assert mae_fast.knn(pretrained, images, k=1) == mae_fast.knn(str(pretrained.output_dir), images, k=1)


def test_scripts_need_no_main_guard_for_workers(images, tmp_path):
    """Worker processes do not execute the user's script again."""
    script = tmp_path / "script.py"
    flags = {**QUICK, "data_path": str(images), "output_dir": str(tmp_path / "run"), "num_workers": 1}
    script.write_text(f"import mae_fast\nprint('once')\nprint(mae_fast.pretrain(**{flags!r}).step)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    assert done.stdout.splitlines()[-1] == "2"


def test_export_and_convert_write_files_of_other_programs(pretrained, tmp_path):
    assert mae_fast.export(pretrained, tmp_path / "x.onnx") < 1e-4
    assert mae_fast.export(pretrained, tmp_path / "x.pt2", what="reconstruction") is None
    assert mae_fast.convert(pretrained, tmp_path / "theirs", "transformers", verify=True)
    assert {"x.onnx", "x.pt2", "theirs"} <= {path.name for path in tmp_path.iterdir()}
    for call, message in (
        (lambda: mae_fast.export(pretrained, tmp_path / "x.bin"), "unknown format '.bin'"),
        (lambda: mae_fast.export(pretrained, tmp_path / "y.onnx", what="classifier"), "has no 'classifier' to export"),
        (
            lambda: mae_fast.convert(pretrained, tmp_path / "y", "keras"),
            "--to keras: unknown layout; choose one of ours",
        ),
        (lambda: mae_fast.convert(pretrained, tmp_path / "y", "timm", from_="keras"), "--from keras: unknown layout"),
        (lambda: mae_fast.convert(pretrained, tmp_path / "y", "timm", num_heads=0), "--num-heads 0"),
        (lambda: mae_fast.convert(pretrained, tmp_path / "y", "timm", norm_eps=1), "--norm-eps 1"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_linear_probe_and_tokenizer_can_be_loaded(images, pretrained, tmp_path):
    flags = {**QUICK, "data_path": images}
    probe = mae_fast.linprobe(**flags, output_dir=tmp_path / "probe", weights=str(pretrained.output_dir))
    assert isinstance(probe.load_model().head[0], torch.nn.BatchNorm1d)
    sizes = {"hidden": 8, "vocab_size": 16}
    tokenizer = mae_fast.train_dvae(**flags, output_dir=tmp_path / "dvae", **sizes).load_model()
    assert sum(x.numel() for x in tokenizer.parameters()) > 0


def test_calls_restore_global_state(images, tmp_path):
    root, logger = logging.getLogger(), logging.getLogger("mae_fast")
    handlers, own, level = [*root.handlers], [*logger.handlers], logger.level
    root.handlers.clear()  # pytest's
    logger.handlers.clear()  # the command line's, in other tests
    try:
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        mae_fast.pretrain(data_path=images, output_dir=tmp_path / "run", **QUICK)
        assert torch.equal(torch.rand(3), expected)
        assert (logger.handlers, logger.level) == ([], level)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        root.handlers[:], logger.handlers[:] = handlers, own


def test_messages_are_shown_unless_logging_is_set_up(images, tmp_path):
    code = f"""
import logging, sys, mae_fast
if sys.argv[1] == "logging":
    logging.basicConfig(level=logging.ERROR)
mae_fast.pretrain(data_path={str(images)!r}, output_dir={str(tmp_path / "run")!r}, dry_run=True, **{QUICK})
"""
    shown, silent = (
        subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True).stdout
        for word in ("", "logging")
    )
    assert "1 epochs = 2 steps of 4 images" in shown
    assert "1 epochs = 2 steps of 4 images" not in silent


def test_an_interrupt_saves_the_run_and_raises(images, tmp_path):
    flags = {**QUICK, "data_path": images, "output_dir": tmp_path / "run", "epochs": 10_000, "log_every": 1}
    ended = threading.Event()

    def interrupt():
        log = tmp_path / "run" / "log.jsonl"
        while not ended.is_set() and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            mae_fast.pretrain(**flags)
    finally:
        ended.set()
        thread.join()
    assert [*(tmp_path / "run" / "checkpoints").glob("step-*")]


def test_waiting_threads_sleep_if_torch_is_imported_by_a_function():
    """torch reads the variable when it is imported."""
    code = """
import os, mae_fast
{first}
try:
    mae_fast.load("nowhere")
except mae_fast.errors.UserError:
    print(os.environ.get("OMP_WAIT_POLICY"))
"""
    for first, expected in (("", "PASSIVE"), ("import torch", "None")):
        words = [sys.executable, "-c", code.replace("{first}", first)]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.splitlines()[-1] == expected


def test_import_is_lazy():
    heavy = ["torch", "numpy", "pydantic", "tyro", "timm", "PIL"]
    code = f"import sys, mae_fast; print(*{{*{heavy}}} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_package_exports_every_function_of_the_api():
    for name in (*KINDS, "reconstruct", "knn", "logreg_probe", "features", "attention", "export", "convert"):
        assert getattr(mae_fast, name) is getattr(api, name)
