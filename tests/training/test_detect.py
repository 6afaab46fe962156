"""Detection end to end: metrics against pycocotools, exact resuming, several processes, errors."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from coco_files import annotated, scenes, write_scenes, write_split
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from support import command, one_thread  # noqa: F401

from mae_fast.data.coco import Coco, fitted
from mae_fast.data.loader import LoaderConfig
from mae_fast.errors import UserError
from mae_fast.training.config import DETECT_PRESETS, DetectConfig
from mae_fast.training.distributed import DistContext
from mae_fast.training.run_dir import PLACE
from mae_fast.training.tasks.dense import of_run
from mae_fast.training.tasks.detect import (
    Detection,
    _format_figures,
    answers,
    detect,
    evaluate,
    results_of,
    score,
)
from mae_fast.weights.create import load_run as of_other_run
from mae_fast.weights.run_reader import find_checkpoint
from mae_fast.weights.trained import DETECTION

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = DistContext(torch.device("cpu"))
SMALL = {
    "input_size": 32, "batch_size": 4, "epochs": 2, "num_workers": 0, "device": "cpu", "dtype": "fp32", "log_every": 1,
    "save_every": 1, "drop_path": 0.2, "eval_every": 2,
}  # fmt: skip


def config(data, run, **changes):
    return DetectConfig(**{**DETECT_PRESETS["tiny"], **SMALL, "data_path": data, "output_dir": run, **changes})


def words(data, run, *more, **changes):
    flags = {"data_path": data, "output_dir": run, **SMALL, **changes}
    return ["detect", "--preset=tiny", *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()), *more]


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def tensors(run):
    found = find_checkpoint(run)
    return {
        f"{file} {k}": x
        for file in ("model", "optim")
        for k, x in load_file(found.path / f"{file}.safetensors").items()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data"), train=8, val=3)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run of two epochs of two steps with drop path."""
    path = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(77)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in all tests: the bits depend on it
    detect(config(data, path, ema_decay=0.5))
    torch.set_num_threads(threads)
    return path


def test_a_run_logs_its_schedule_and_metrics(run):
    lines = log(run)
    trained = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert [line["train_lr"] for line in trained] == pytest.approx([0, 5e-4, 1e-3, 1e-3])  # the decay comes later
    assert all(0 < line["train_loss"] < 10 for line in trained)
    (figures,) = [line for line in lines if "val_box_ap" in line]
    kinds = [f"val_{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50")]
    assert set(figures) == {*PLACE, *kinds, *(f"{kind}_ema" for kind in kinds)}
    assert all(0 <= figures[kind] <= 100 for kind in kinds)


def test_a_resumed_run_is_the_same_to_the_bit(data, run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(find_checkpoint(again).path)
    assert find_checkpoint(again).step == 3  # in the middle of the last epoch
    torch.manual_seed(5)
    detect(config(data, again, ema_decay=0.5))
    ours, theirs = tensors(again), tensors(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line.get("train_loss") for line in log(again)] == [line.get("train_loss") for line in log(run)]
    assert [line.get("val_box_ap") for line in log(again)] == [line.get("val_box_ap") for line in log(run)]


def by_hand(data, results, kind):
    """The metrics by pycocotools on files."""
    truth = COCO(data / "annotations" / "instances_val2017.json")
    evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def test_the_command_line(data, run, tmp_path, monkeypatch, capsys):
    """Detections of any score are used, as the untrained model has few objects with high scores."""
    from mae_fast.models.detection import Detector

    made = Detector.__init__

    def eager_to_find(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.roi_heads.score_thresh = 0.0

    monkeypatch.setattr(Detector, "__init__", eager_to_find)
    written = tmp_path / "found.json"
    told = command(monkeypatch, capsys, *words(data, run, "--eval-only", f"--predictions={written}"))
    assert told.returncode == 0, told.stderr
    results = json.loads(written.read_text())
    assert f"wrote {len(results)} objects to {written}" in told.stdout
    assert len(results) > 100
    assert {x["image_id"] for x in results} == {100, 101, 102}
    assert {x["category_id"] for x in results} == {3, 7}
    for kind in ("bbox", "segm"):
        stats = by_hand(data, written, kind)
        assert stats[0] > 0
        assert f"{100 * stats[1]:.1f}" in told.stdout
    for name in ("AP, IoU 0.75", "AR, 100 objects", "disc", "square", "3 images, in percent"):
        assert name in told.stdout
    figures = evaluate(config(data, run, eval_only=True))
    assert figures == {
        f"val_{kind}_{name}": pytest.approx(100 * by_hand(data, written, coco)[i])
        for kind, coco in (("box", "bbox"), ("mask", "segm"))
        for i, name in enumerate(("ap", "ap50"))
    }
    averaged = evaluate(config(data, run, eval_only=True, ema=True))
    assert averaged != figures


def truths(val, kind="both"):
    """The ground truth as detections."""
    results = []
    for i in range(len(val)):
        for x in val.objects(i):
            runs = mask.merge(mask.frPyObjects(x["segmentation"], *val.sizes[i]))
            one = {name: x[name] for name in ("image_id", "category_id", "bbox")}
            results.append({**one, "score": 0.9, "segmentation": {**runs, "counts": runs["counts"].decode()}})
    return results


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_perfect_detections_have_an_ap_of_100(data, kind):
    val = Coco(data, "val")
    results = truths(val)
    before = json.dumps(results)
    assert score(val, [0, 1, 2], results, kind).stats[0] == pytest.approx(1)
    assert json.dumps(results) == before
    # Images that cannot be used are not evaluated.
    assert score(val, [2, 0], [x for x in results if x["image_id"] != 101], kind).stats[0] == pytest.approx(1)
    assert score(val, [0, 1, 2], [x for x in results if x["image_id"] != 101], kind).stats[0] < 0.9
    assert score(val, [0, 1, 2], [], kind).stats[0] == 0
    wrong = [{**x, "category_id": 10 - x["category_id"]} for x in results]
    assert score(val, [0, 1, 2], wrong, kind).stats[0] < 0.5


def test_figures_are_shown_by_class(data):
    val = Coco(data, "val")
    found = [x for x in truths(val) if x["category_id"] == 3]
    told = _format_figures(val, {kind: score(val, [0, 1, 2], found, kind) for kind in ("box", "mask")}, 3)
    rows = {
        row[0].strip(): [x.strip() for x in row[1:]] for row in (x.strip("│").split("│") for x in told.splitlines())
    }
    assert rows["disc"] == ["100.0", "100.0"]
    assert rows["square"] == ["0.0", "0.0"]
    assert rows["AP"] == rows["AP, IoU 0.5"] == rows["AR, 100 objects"] == ["50.0", "50.0"]
    assert rows["AP, large"] == ["-", "-"]


def test_the_area_of_a_mask_is_not_that_of_its_box(tmp_path):
    """A thin diagonal line has a small area but a large box."""
    outline = [[0, 0, 2, 0, 60, 58, 60, 60, 58, 60, 0, 2]]
    entry = {"id": 5, "file_name": "a.jpg", "height": 64, "width": 64}
    thin = {**annotated(1, 5, 7, 0, 0, 60), "segmentation": outline, "area": 200}
    write_split(tmp_path, "val", [entry], [thin])
    val = Coco(tmp_path, "val")
    stats = score(val, [0], truths(val), "mask").stats
    assert stats[3] == pytest.approx(1)  # AP of small objects
    assert stats[4] == -1
    # A missed object counts as one of the size of its mask and not of its box.
    (found,) = truths(val)
    turned = mask.encode(np.asfortranarray(mask.decode(found["segmentation"])[:, ::-1]))["counts"].decode()
    false = {**found, "score": 0.95, "segmentation": {"size": [64, 64], "counts": turned}}
    assert score(val, [0], [found, false], "mask").stats[3] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("height", "width"), [(28, 32), (64, 40), (90, 200)])
def test_detections_are_mapped_back_to_the_original_image(tmp_path, height, width):
    """Ground truth, scaled to the model's input, is mapped back to the ground truth. Masks are full boxes."""
    entry = {"id": 5, "file_name": "a.jpg", "height": height, "width": width}
    write_split(tmp_path, "val", [entry], [annotated(1, 5, 7, 3, 5, 20), annotated(2, 5, 3, width - 9, 2, 9)])
    val = Coco(tmp_path, "val")
    size = 64
    h, w = fitted(height, width, size)
    scale = torch.tensor([w / width, h / height] * 2)
    found = {
        "boxes": torch.tensor([[3.0, 5, 23, 25], [width - 9, 2, width, 11]]) * scale,
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.75, 0.5]),
        "masks": torch.ones(2, 1, 28, 28),
    }
    beside = {"boxes": [[-5.0, h + 1, 9, h + 2]], "labels": [1], "scores": [0.3], "masks": np.ones((1, 1, 28, 28))}
    if h < size:
        found = {k: torch.cat([x, torch.tensor(beside[k]).to(x.dtype)]) for k, x in found.items()}
    first, second = results_of(val, 0, found, size)
    assert first["bbox"] == pytest.approx([3, 5, 20, 20], abs=1e-4)
    assert second["bbox"] == pytest.approx([width - 9, 2, 9, 9], abs=1e-4)
    assert [(x["image_id"], x["category_id"], x["score"]) for x in (first, second)] == [(5, 7, 0.75), (5, 3, 0.5)]
    full = np.zeros((height, width), np.uint8)
    full[5:25, 3:23] = 1
    ours = mask.decode(first["segmentation"])
    assert ours.shape == full.shape
    assert abs(ours.astype(int) - full).sum() <= 4 * 21  # one pixel around the box
    del found["masks"]
    assert "segmentation" not in results_of(val, 0, found, size)[0]


def test_bad_images_are_left_out_of_the_figures(data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "val2017" / "001.jpg").write_bytes(b"no image")
    task = Detection(config(root, tmp_path / "run", max_bad_fraction=0.5), ALONE)
    task.model.eval()
    assert [i for i, _ in answers(task.model, task.val, task.config, ALONE)] == [0, 2]
    with pytest.raises(UserError, match="1 of 3 images cannot be used"):
        list(answers(task.model, task.val, config(root, tmp_path / "run"), ALONE))


def test_dropped_annotations_are_logged_at_the_start(data, tmp_path, caplog):
    images, annotations = scenes(8)
    shutil.copytree(data, tmp_path / "data")
    write_split(tmp_path / "data", "train", images, [*annotations, {**annotations[0], "id": 99, "category_id": 1}])
    Detection(config(tmp_path / "data", tmp_path / "run"), ALONE)
    (message,) = caplog.messages
    assert message.endswith("left out 1 of 17 annotations (unknown category: 1)")


def test_faster_rcnn_on_a_frozen_encoder(data, tmp_path):
    from mae_fast.training.tasks.dense import DenseTask

    changes = {"masks": False, "freeze_encoder": True, "epochs": 1, "warmup_epochs": 0, "window": 3}
    task = Detection(config(data, tmp_path, **changes), ALONE)
    assert isinstance(task, DenseTask)
    before = {name: x.clone() for name, x in task.model.state_dict().items()}
    trained = {id(p) for group in task.optimizer(1e-3, None).param_groups for p in group["params"]}
    for name, p in task.model.named_parameters():
        assert (id(p) in trained) == (not name.startswith("backbone.net.")), name
    assert task.title == "vit_tiny_patch4, Faster R-CNN of 2 classes"
    torch.manual_seed(0)
    detect(config(data, tmp_path / "run", **changes))
    found, model = of_run(tmp_path / "run", False, DETECTION, "detect")
    classes = found.state["classes"]
    assert classes == ["disc", "square"]
    assert not model.training
    assert model.backbone.net.window == 3
    assert not model.roi_heads.has_mask()
    same = {name: torch.equal(x, before[name]) for name, x in model.state_dict().items() if "norm1.weight" not in name}
    assert not any(same[name] for name in same if name.startswith("roi_heads") and name.endswith("weight"))
    (figures,) = [line for line in log(tmp_path / "run") if "val_box_ap" in line]
    assert set(figures) == {*PLACE, "val_box_ap", "val_box_ap50"}
    assert set(evaluate(config(data, tmp_path / "run", eval_only=True))) == {"val_box_ap", "val_box_ap50"}


def test_the_encoder_starts_from_the_given_weights(data, tmp_path):
    from safetensors.torch import save_file

    from mae_fast.models.mae import build

    torch.manual_seed(3)
    weights = build("mae_vit_tiny_patch4").state_dict()
    save_file(weights, tmp_path / "mae.safetensors")
    task = Detection(config(data, tmp_path / "run", weights=str(tmp_path / "mae.safetensors")), ALONE)
    for name in ("blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "patch_embed.proj.weight", "cls_token"):
        assert torch.equal(task.model.state_dict()[f"backbone.net.{name}"], weights[name]), name
    assert task.state["model"]["encoder"] == "vit_tiny_patch4"
    assert task.schedule == "step"


def test_the_loss_is_the_sum_of_torchvision_losses(data, tmp_path):
    task = Detection(config(data, tmp_path / "run"), ALONE)
    batch = next(task.batches(task.source, LoaderConfig(size=task.size, batch_size=2)))
    images, targets = task.inputs(batch, 3)
    with torch.no_grad():
        loss = task.loss(task.model, images, targets)
        task.inputs(batch, 3)
        losses = task.model(images, targets)
    assert len(losses) == 5
    assert loss.item() == pytest.approx(sum(x.item() for x in losses.values()), rel=1e-5)


def test_two_processes_train_one_run(data, run, tmp_path):
    """Steps have the same images and metrics cover all images. Losses differ, because other boxes are sampled."""
    line = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "-m", "mae_fast", *words(data, tmp_path / "two", batch_size=2, ema_decay=0.9),
    ]  # fmt: skip
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = ([x["train_loss"] for x in log(path) if "train_loss" in x] for path in (tmp_path / "two", run))
    assert ours == pytest.approx(theirs, rel=0.35)
    (figures,) = [line for line in log(tmp_path / "two") if "val_box_ap" in line]
    # The averaged weights are still close to random, with detections everywhere.
    alone = evaluate(config(data, tmp_path / "two", eval_only=True, ema=True))
    assert alone == {name: pytest.approx(figures[f"{name}_ema"]) for name in alone}
    assert all(x > 0 for x in alone.values())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"execution": "compile"},
            "--execution compile: detection supports only eager",
        ),
        ({"execution": "cuda-graph"}, "--execution cuda-graph"),
        ({"image_decoder": "dali"}, "--image-decoder dali does not support images with masks or objects; leave it out"),
        ({"crops_per_image": 2}, "--crops-per-image 2"),
        ({"input_size": 40}, "--input-size 40: the image size must be a multiple of 4 patches of 4 pixels, got 40"),
        ({"batch_size": 9}, "fewer than one step of 9"),
        ({"model": "resnet50"}, "--model resnet50"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unsupported_settings_are_errors(data, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        detect(config(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_classes_are_refused(data, run, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    others = [{"id": 3, "name": "disc"}, {"id": 7, "name": "cube"}]
    write_split(tmp_path / "data", "val", *scenes(3, seed=1), others)
    told = r"val2017 has classes that .* does not have: cube; .* 2 classes: disc, square; classes are matched by name"
    with pytest.raises(UserError, match=told):
        detect(config(tmp_path / "data", tmp_path / "run"))
    with pytest.raises(UserError, match=told):
        evaluate(config(tmp_path / "data", run, eval_only=True))


def test_categories_are_matched_by_name(data, run, tmp_path):
    """Categories may have other ids in another order, and lack a class of the model, which is then ignored."""
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for entry in content["categories"]:
        entry["id"] = 90 - entry["id"]
    for entry in content["annotations"]:
        entry["category_id"] = 90 - entry["category_id"]
    path.write_text(json.dumps(content))
    found = {
        "boxes": torch.tensor([[1.0, 1, 9, 9]] * 2),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.8]),
    }

    def categories():
        val = Coco(tmp_path / "data", "val")
        val.match_classes(["disc", "square"], "run")
        return [result["category_id"] for result in results_of(val, 0, found, 64)]

    assert [names[90 - number] for number in categories()] == ["disc", "square"]
    before = evaluate(config(data, run, eval_only=True))
    assert evaluate(config(tmp_path / "data", run, eval_only=True)) == pytest.approx(before)
    content["categories"] = [entry for entry in content["categories"] if entry["name"] == "square"]
    kept = content["categories"][0]["id"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == kept]
    path.write_text(json.dumps(content))
    assert categories() == [kept]
    evaluate(config(tmp_path / "data", run, eval_only=True))


def test_evaluation_without_a_suitable_run_is_an_error(data, run, tmp_path):
    with pytest.raises(UserError, match="no usable checkpoint"):
        evaluate(config(data, tmp_path / "none", eval_only=True))
    with pytest.raises(UserError, match="its folder does not exist"):
        evaluate(config(data, run, eval_only=True, predictions=tmp_path / "no" / "x.json"))
    with pytest.raises(UserError, match="cannot build the model"):
        of_other_run(run)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    state = find_checkpoint(other).path / "state.json"
    state.write_text(state.read_text().replace('"detection"', '"segmentation"'))
    manifest = state.with_name("manifest.json")
    listed = json.loads(manifest.read_text())
    listed["state.json"] = {
        "size": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(listed))
    with pytest.raises(UserError, match="is a run of segmentation; give a run of 'mae-fast detect'"):
        of_run(other, False, DETECTION, "detect")
