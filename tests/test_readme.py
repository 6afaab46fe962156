"""Runs the examples of the README and the guides at tiny sizes, and checks the links of the documentation."""

import json
import re
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mae_fast
from mae_fast.cli import main

ROOT = Path(mae_fast.__file__).parents[1]
GUIDES = sorted(f"docs/guides/{path.name}" for path in (ROOT / "docs" / "guides").glob("*.md"))
PREDICTION = [
    f"docs/guides/{name}.md" for name in ("fine-tuning", "segmentation", "detection", "export")
]  # in this order
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
TINY = {
    "--preset base": "--preset tiny",
    "mae_vit_base_patch16": "mae_vit_tiny_patch4",
    '"vit_base_patch16"': '"vit_tiny_patch4"',
    "2, 5, 8, 11": "0, 1, 2, 3",
    "--models base": "--models tiny",
}
QUICK = "--epochs=1 --warmup-epochs=0 --batch-size=4"
HERE = "--device=cpu"  # with the default loader, like a reader
TRAINING = ("pretrain", "finetune", "linprobe", "segment", "detect")
MORE = {
    **dict.fromkeys(TRAINING, f"{QUICK} {HERE} --dtype=fp32"),
    "bench": "--baselines eager --rounds=1 --device=cpu",
    "ablate": f"--rows random-75 --labels=2 --pretrain='{QUICK} {HERE}' --finetune='{QUICK} {HERE}' "
    f"--linprobe='{QUICK} {HERE}' --batch-size=4 --rounds=1",
}
# Examples that are not run here, with the reason.
NOT_RUN = {
    "mae-fast demo runs/demo": "tests/studies/test_demo.py",
    "mae-fast debug-step runs/base/not_finite/step-00001234.json": "tests/training/test_pretrain.py",
    "torchrun --nproc-per-node 8 -m mae_fast pretrain ...": "tests/training/test_distributed.py",
    "torchrun --nproc-per-node 8 --max-restarts 3 -m mae_fast pretrain ...": "tests/training/test_distributed.py",
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-host:29400 "
    "-m mae_fast pretrain ...": "tests/training/test_distributed.py",
    "pip install mae_fast": "tests/installed.py",
    "pip install 'mae_fast[train]'": "tests/test_core_install.py",
    "pip install torch torchvision": "make install",
    "pip install '.[train]'": "tests/test_core_install.py",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each example of a page."""
    return BLOCK.findall((ROOT / page).read_text())


def lines(page: str) -> list[str]:
    """The command lines of a page, without their comments."""
    found = [line for language, text in blocks(page) if language == "sh" for line in text.splitlines()]
    return [" ".join(line.split(" #")[0].split()) for line in found if line.strip()]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the examples use."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def picture(path: Path, side: int = 32) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)

    for split, count in (("train", 4), ("val", 2)):
        for name in "abc":
            for i in range(count):
                picture(tmp_path / "imagenet" / split / name / f"{i}.jpg")
    picture(tmp_path / "photos" / "one.jpg")
    for split in ("train", "val"):  # of two halves, the right one an object
        coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "half"}]}
        for i in range(1, 5):
            picture(tmp_path / "ade20k" / split / "images" / f"{i}.jpg", 64)
            picture(tmp_path / "coco" / f"{split}2017" / f"{i}.jpg", 64)
            mask = tmp_path / "ade20k" / split / "masks" / f"{i}.png"
            mask.parent.mkdir(exist_ok=True)
            Image.fromarray(np.repeat(np.array([[0, 1]], np.uint8), 32, 1).repeat(64, 0)).save(mask)
            coco["images"].append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 64})
            half = {"bbox": [32, 0, 32, 64], "segmentation": [[32, 0, 64, 0, 64, 64, 32, 64]], "area": 2048}
            coco["annotations"].append({"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, **half})
        annotations = tmp_path / "coco" / "annotations" / f"instances_{split}2017.json"
        annotations.parent.mkdir(exist_ok=True)
        annotations.write_text(json.dumps(coco))
    torch.manual_seed(0)
    torch.save({"model": mae_fast.mae_vit_tiny_patch4().state_dict()}, "mae_pretrain_vit_base.pth")
    return tmp_path


def run_line(line: str, monkeypatch) -> None:
    for published, tiny in TINY.items():
        line = line.replace(published, tiny)
    words = shlex.split(line)
    if "--eval-only" in words:
        words += HERE.split()
    elif "--predict" not in words and words[1] not in ("predict", "export"):
        words += shlex.split(next((MORE[word] for word in words if word in MORE), ""))
    if words[1] == "bench" and "--data-path" in words:
        words += ["--batches=4", "--num-workers=0"]
    monkeypatch.setattr(sys, "argv", words)
    main()


def test_readme(here, monkeypatch):
    torch.manual_seed(0)
    names = {
        "imgs": torch.randn(2, 3, 32, 32),
        "uint8_images": torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8),
        "noise": torch.rand(2, 64),
        "mask": (torch.arange(64) % 4 > 0).float().expand(2, 64),
        "weights": torch.rand(2, 64),
        "list_of_images": [torch.randn(3, 32, 16), torch.randn(3, 8, 24)],
    }
    ran = 0
    for language, text in blocks("README.md"):
        if language == "python":
            for published, tiny in TINY.items():
                text = text.replace(published, tiny)
            with warnings.catch_warnings():
                warnings.simplefilter("error", DeprecationWarning)
                exec(compile(text, "README.md", "exec"), names)
            ran += 1
        if language in ("python", "bibtex"):
            continue
        assert language == "sh"
        for line in text.splitlines():
            line = line.split(" #")[0].strip()
            if line.startswith("mae-fast ") and line not in NOT_RUN:
                run_line(line, monkeypatch)
                ran += 1
            elif line.startswith("make "):
                assert re.search(rf"^{line.split()[1]}:.*##", (ROOT / "Makefile").read_text(), re.M), line
            else:
                assert line in NOT_RUN, line
    assert ran >= 8
    assert names["loss"].ndim == 0
    assert [tuple(x.shape) for x in names["maps"]] == [(2, 128, 8, 8)] * 4
    for name in ("picture.png", "classes.csv", "folder", "bench/table.md"):
        assert (here / name).exists(), name


def python(page: str, word: str) -> str:
    """The Python example of a page that contains ``word``."""
    (text,) = [text for language, text in blocks(page) if language == "python" and word in text]
    return text


def test_python_of_notebooks_page(here):
    text = python("docs/guides/notebooks.md", "mae_fast.pretrain(")
    quick = 'preset="tiny", epochs=1, warmup_epochs=0, batch_size=4, device="cpu", dtype="fp32"'
    names = {}
    exec(compile(text.replace('preset="base"', quick), "notebooks.md", "exec"), names)
    assert names["run"].step == 3
    assert isinstance(names["model"], mae_fast.VisionTransformer)
    assert (here / "python.png").exists()


def test_dataset_of_own_images_page(here):
    text = python("docs/guides/own-images.md", "mae_fast.pretrain(")
    quick = 'preset="tiny", batch_size=16, device="cpu", dtype="fp32"'
    names = {}
    exec(compile(text.replace('preset="tiny"', quick), "own-images.md", "exec"), names)
    assert names["run"].step == 8


def test_loops_of_the_drop_in_page():
    text = python("docs/guides/drop-in.md", "optimizer.step()").replace("mae_vit_base_patch16", "mae_vit_tiny_patch4")
    names = {"imgs": torch.randn(2, 3, 32, 32)}
    exec(compile(text.replace("\ndisable_malloc_trim()", "\n"), "drop-in.md", "exec"), names)
    before = names["mae_fast"].mae_vit_tiny_patch4().cls_token
    assert names["loss"].ndim == 0
    assert not torch.equal(names["model"].cls_token, before)
    exec(compile(python("docs/guides/drop-in.md", "class Loss("), "drop-in.md", "exec"), names)
    assert names["Loss"](names["model"])(names["imgs"]).ndim == 0


def test_commands_of_guides(here, monkeypatch):
    # Other pages use the run of pretraining.md. The ablation must ignore the bad.jsonl that own-images.md writes.
    order = ("pretraining", "own-images", "command-line")
    pages = sorted({*GUIDES} - {*PREDICTION}, key=lambda page: ([word not in page for word in order], page))
    ran = [line for page in pages for line in lines(page) if line not in NOT_RUN]
    assert len(ran) > 4
    for line in ran:
        run_line(line, monkeypatch)
    made = "small picture.png page.html table.csv classes.csv attention.png features.npy encoder.onnx tiles"
    for name in (*made.split(), "base-for-transformers"):
        assert (here / name).exists(), name
    assert (here / "imagenet" / "train" / "bad.jsonl").exists()


def test_prediction_pages(here, monkeypatch):
    """From folders to predictions and to ONNX in onnxruntime, for each kind of model."""
    onnxruntime = pytest.importorskip("onnxruntime")
    run_line("mae-fast pretrain --preset base --data-path imagenet --output-dir runs/base", monkeypatch)
    image = Image.open("photos/one.jpg")
    names = {"image": image, "array": np.asarray(image)}
    for page in PREDICTION:
        for line in lines(page):
            run_line(line, monkeypatch)
        for language, text in blocks(page):
            if language == "python":
                for published, tiny in (TINY | {"224, 224": "32, 32"}).items():
                    text = text.replace(published, tiny)
                exec(compile(text, page, "exec"), names)
    assert names["Features"](names["classifier"])(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    assert (here / "model.onnx").exists()
    (whole,) = names["results"][:1]
    expected = torch.log(whole.probabilities)
    assert torch.allclose(torch.from_numpy(names["logits"])[0].log_softmax(0), expected, atol=1e-4)
    assert np.allclose(names["same_logits"], names["logits"], atol=1e-4)
    assert names["labels"].shape == (32, 32)
    predictor = mae_fast.load("runs/segments")
    pixels, _ = predictor.preprocessing((here / "photos" / "one.jpg").read_bytes())
    session = onnxruntime.InferenceSession("segmentation.onnx")
    (logits,) = session.run(None, {"images": pixels[None]})
    with torch.inference_mode():
        assert torch.allclose(torch.from_numpy(logits), predictor.model(torch.from_numpy(pixels)[None]), atol=1e-4)


def test_excluded_examples_exist():
    there = {line for page in ("README.md", "docs/index.md", *GUIDES) for line in lines(page)}
    assert {*NOT_RUN} <= there
    for who in NOT_RUN.values():
        assert who == "make install" or (ROOT / who).exists()


def test_slurm_example(monkeypatch):
    """With a replacement of submitit that records its calls."""
    from types import ModuleType, SimpleNamespace

    submitit, calls = ModuleType("submitit"), SimpleNamespace()

    class SlurmExecutor:
        def __init__(self, folder):
            calls.folder = folder

        def update_parameters(self, **parameters):
            calls.parameters = parameters

        def submit(self, job):
            calls.job = job

    submitit.SlurmExecutor = SlurmExecutor
    submitit.helpers = SimpleNamespace(DelayedSubmission=lambda job: job)
    monkeypatch.setitem(sys.modules, "submitit", submitit)
    text = python("docs/guides/several-gpus.md", "submitit")
    names = {}
    exec(compile(text, "several-gpus.md", "exec"), names)
    line = calls.job.line
    assert line[:6] == ["torchrun", "--nproc-per-node", "gpu", "-m", "mae_fast", "pretrain"]
    asked = []
    waits = SimpleNamespace(pid=0, terminate=lambda: asked.append("terminate"))
    calls.job.process = waits
    monkeypatch.setattr(names["os"], "waitpid", lambda pid, options: asked.append("wait"))
    again = calls.job.checkpoint()
    assert asked == ["terminate", "wait"]
    assert again.line == line


def test_links():
    """The target of every link, file or heading, exists."""
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if link.startswith("http"):
                continue
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in anchors, f"{page.name}: {link}"
