"""The package without ``[train]``, in an environment with only its dependencies."""

import re
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import pytest

from mae_fast.errors import TRAIN_PACKAGES

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib")  # of Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distributions(names):
    """The distributions ``names`` and their dependencies on this platform, by name."""
    found, left = {}, [re.match(r"[\w.-]+", name)[0] for name in names]
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        required = [line for line in found[name].requires or () if "extra ==" not in line]
        left += [re.match(r"[\w.-]+", line)[0] for line in required]
    return found


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The Python interpreter of an environment with links to these packages and to this one."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in distributions(PROJECT["dependencies"]).values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    (site / "mae_fast").symlink_to(ROOT / "mae_fast")
    return folder / "bin" / "python"


def run(core, *words):
    return subprocess.run([core, "-I", *words], capture_output=True, text=True)


def test_core_dependencies_and_train_dependencies():
    names = {extra: [re.match(r"[\w.-]+", line)[0] for line in lines]
             for extra, lines in PROJECT["optional-dependencies"].items()}  # fmt: skip
    core = [re.match(r"[\w.-]+", line)[0] for line in PROJECT["dependencies"]]
    assert sorted(core) == ["huggingface_hub", "numpy", "safetensors", "torch"]
    assert sorted(names["train"]) == sorted({"PIL": "pillow"}.get(name, name) for name in TRAIN_PACKAGES)


def test_environment_has_no_training_packages(core):
    code = f"import importlib.util as u; print(*[name for name in {TRAIN_PACKAGES} if u.find_spec(name)])"
    result = run(core, "-c", code)
    assert result.stdout == "filelock\n", result.stderr  # torch needs it, too


def test_drop_in_module_works_without_training_packages(core, tmp_path):
    code = f"""
import os, torch
os.chdir({str(tmp_path)!r})
import mae_fast as models_mae, mae_fast as models_vit
import mae_fast.ops
from mae_fast.models import DenseEncoder, SimpleFeaturePyramid
from mae_fast.weights.convert_files import convert_files
from mae_fast.weights.export import save_program
from mae_fast.weights.metadata import *
from pathlib import Path

model = models_mae.mae_vit_tiny_patch4()
images = torch.rand(2, 3, 32, 32)
loss, pred, mask = model(images, mask_ratio=0.75)
loss.backward()
model.loss(images).backward()
maps = DenseEncoder(model.eval(), layers=(0, 3), window=None)(images)
model.save_pretrained("folder")
again = models_mae.MaskedAutoencoderViT.from_pretrained("folder")
assert torch.equal(again.cls_token, model.cls_token)
classifier = models_mae.create_model("vit_tiny_patch4", "folder", num_classes=3, global_pool=True)
assert classifier(images).shape == (2, 3)
torch.save({{"model": model.state_dict()}}, "weights.pth")
assert torch.equal(models_mae.create_model("mae_vit_tiny_patch4", "weights.pth").cls_token, model.cls_token)
from mae_fast.weights.convert import convert
convert(model.state_dict(), "ours", "transformers")
save_program(model, Path("encoder.pt2"), "encoder", 0.75)
"""
    result = run(core, "-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "words", [["-m", "mae_fast", "pretrain", "--help"], ["-c", "from mae_fast.__main__ import main; main()"]]
)
def test_command_line_names_the_packages_to_install(core, words):
    result = run(core, *words)
    assert result.returncode == 2
    error, hint = result.stderr.splitlines()
    assert re.fullmatch(r"error: \w+ is required but not installed", error)
    assert hint == "hint: pip install 'mae_fast[train]'"


def test_training_functions_name_the_packages_to_install(core):
    code = """
import mae_fast
from mae_fast.errors import UserError
try:
    mae_fast.pretrain(data_path="images", output_dir="run")
except UserError as error:
    print(error.hint)
"""
    result = run(core, "-c", code)
    assert result.stdout == "pip install 'mae_fast[train]'\n", result.stderr
