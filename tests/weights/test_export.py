"""Exported models equal the models, in onnxruntime and in torch, for batches of any size."""

import copy
import sys

import pytest
import torch
from support import assert_close, assert_no_worse_than_eager, command, inputs, one_thread, tiny, tiny_vit  # noqa: F401
from torch import nn

from mae_fast.errors import UserError
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw
from mae_fast.weights import convert, export
from mae_fast.weights.create import create_model
from mae_fast.weights.export import export_onnx, export_program, save_program

SHAPES = {"RGB": {}, "grey, not square": {"in_chans": 1, "img_size": (16, 24), "patch_size": (4, 8), "depth": 1}}
WHATS = ["encoder", "reconstruction", "classifier"]
OUTPUTS = {"encoder": ["tokens"], "reconstruction": ["pred", "mask"], "classifier": ["logits"]}
pytestmark = pytest.mark.usefixtures("one_thread")


def make(what, **options):
    model = tiny_vit(**options) if what == "classifier" else tiny(**options)
    with torch.no_grad():
        model.pos_embed.add_(torch.randn_like(model.pos_embed), alpha=0.1)  # with a row for the class token
    return model.eval()


def given(model, what, n):
    images, noise = inputs(model, n)
    return {"images": images} | ({"noise": noise} if what == "reconstruction" else {})


@torch.inference_mode()
def expected(model, what, images, noise=None):
    """The outputs of the model itself, computed by its ops."""
    if what == "encoder":
        return {"tokens": model.forward_features(images)}
    if what == "classifier":
        return {"logits": model(images)}
    _, pred, mask = model(images, 0.75, noise)
    return {"pred": pred, "mask": mask}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", WHATS)
def test_the_onnx_file_equals_the_model(tmp_path, what, shape):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, path = make(what, **SHAPES[shape]), tmp_path / "model.onnx"
    exact = copy.deepcopy(model).double()
    difference = export_onnx(model, path, what)
    assert 0 < difference < 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    for n in (1, 2, 5):
        batch = given(model, what, n)
        found = session.run(None, {name: x.numpy() for name, x in batch.items()})
        ours = dict(zip([output.name for output in session.get_outputs()], map(torch.from_numpy, found), strict=True))
        truth = expected(exact, what, **{name: x.double() for name, x in batch.items()})
        eager = expected(model, what, **batch)
        if what == "reconstruction":
            assert torch.equal(ours["mask"], eager["mask"])
            truth["mask"] = eager["mask"].double()
        assert_no_worse_than_eager(ours, eager, truth, torch.float32)
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}  # standard operators only
    assert {opset.domain for opset in graph.opset_import} == {""}
    assert not graph.functions
    assert [output.name for output in graph.graph.output] == OUTPUTS[what]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", WHATS)
def test_the_program_equals_the_model(tmp_path, what, shape):
    model, path = make(what, **SHAPES[shape]).double(), tmp_path / "model.pt2"
    save_program(model, path, what)
    program = torch.export.load(path)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not any("mae_fast" in target for target in targets)
    for n in (1, 2, 5):
        batch = given(model, what, n)
        found = program.module()(**batch)
        outputs = found if isinstance(found, tuple) else (found,)
        assert_close(dict(zip(OUTPUTS[what], outputs, strict=True)), expected(model, what, **batch))


def test_the_mask_ratio_of_a_reconstruction_can_be_set():
    model = tiny().eval()
    images, noise = inputs(model, 3)
    _, mask = export_program(model, "reconstruction", 0.5).module()(images=images, noise=noise)
    assert mask.sum(1).tolist() == [18, 18, 18]


def test_the_program_has_a_copy_of_the_weights():
    model = tiny().eval()
    images, _ = inputs(model)
    program = export_program(model, "encoder")
    before = program.module()(images=images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(program.module()(images=images), before)


def test_half_precision_is_written_as_fp32(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = tiny(depth=1).to(torch.bfloat16)
    export_onnx(model, tmp_path / "x.onnx", "encoder")
    types = {weight.data_type for weight in onnx.load(tmp_path / "x.onnx").graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.slow
def test_large_weights_are_written_to_a_second_file(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    model = tiny(depth=1).eval()
    export_onnx(model, tmp_path / "model.onnx", "encoder")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    images, _ = inputs(model)
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.forward_features(images), rtol=1e-4, atol=1e-5)
    (tmp_path / "other.onnx.data").write_text("precious")
    with pytest.raises(UserError, match=r"other\.onnx\.data exists"):
        export_onnx(model, tmp_path / "other.onnx", "encoder")
    assert (tmp_path / "other.onnx.data").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_with_wrong_outputs_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    real = export._export

    def wrong(plain, batch):
        other = copy.deepcopy(plain)
        with torch.no_grad():
            other.mae.norm.bias.add_(0.01)
        return real(other, batch)

    monkeypatch.setattr(export, "_export", wrong)
    with pytest.raises(UserError, match="outputs of onnxruntime and torch differ by"):
        export_onnx(tiny(depth=1), tmp_path / "x.onnx", "encoder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [export_onnx, save_program])
def test_existing_files_are_not_overwritten(tmp_path, write):
    (tmp_path / "x.pt2").write_text("precious")
    with pytest.raises(UserError, match=r"x\.pt2 exists"):
        write(tiny(), tmp_path / "x.pt2", "encoder")
    assert (tmp_path / "x.pt2").read_text() == "precious"


@pytest.mark.parametrize(
    ("make_model", "what", "expected"),
    [
        (tiny, "classifier", "MaskedAutoencoderViT has no 'classifier' to export; give encoder or reconstruction"),
        (tiny_vit, "encoder", "VisionTransformer has no 'encoder' to export; give classifier"),
        (tiny, "decoder", "has no 'decoder'"),
    ],
)
def test_parts_that_a_model_does_not_have_are_refused(make_model, what, expected):
    with pytest.raises(UserError, match=expected):
        export_program(make_model(), what)


def test_models_with_replaced_layers_are_refused():
    model = tiny()
    model.blocks[0].mlp.fc1 = nn.Sequential(model.blocks[0].mlp.fc1, nn.Linear(128, 128))
    model.blocks[0].mlp.fc1.out_features = 128
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc1"):
        export_program(model, "encoder")
    with pytest.raises(UserError, match="at least 0 and below 1, got 1"):
        export_program(tiny(), "reconstruction", 1)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_onnx_packages_are_named(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"pip install 'mae_fast\[onnx\]'"):
        export_onnx(tiny(), tmp_path / "x.onnx", "encoder")


@pytest.fixture
def run(tmp_path):
    """A run of the tiny model with two blocks."""
    from mae_fast.models import build

    torch.manual_seed(0)
    made = {"name": "mae_vit_tiny_patch4", "depth": 1, "decoder_depth": 1}
    model = build(**made)
    average = {name: -p.detach() for name, p in model.named_parameters() if name == "cls_token"}
    saved = checkpoint.snapshot(7, model, adamw(model, 0.1, 0.05), {"model": made, "mask_ratio": 0.5}, average)
    checkpoint.write(tmp_path / "run" / "checkpoints", saved)
    return tmp_path / "run", model.eval()


@pytest.mark.slow
def test_the_command_exports_a_run(run, tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, model = run
    images, noise = inputs(model, 2)
    done = command(monkeypatch, capsys, "export", folder, tmp_path / "a.onnx", "--what", "reconstruction")
    assert done.returncode == 0, done.stderr
    assert f"wrote reconstruction of step-00000007 to {tmp_path}/a.onnx; " in done.stdout
    assert "onnxruntime and torch" in done.stdout
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    _, mask = session.run(None, {"images": images.numpy(), "noise": noise.numpy()})
    assert mask.sum(1).tolist() == [32, 32]  # the mask ratio of the run

    words = [folder, tmp_path / "b.pt2", "--what", "reconstruction", "--mask-ratio", 0.25]
    done = command(monkeypatch, capsys, "export", *words)
    assert done.returncode == 0, done.stderr
    pred, mask = torch.export.load(tmp_path / "b.pt2").module()(images=images, noise=noise)
    assert mask.sum(1).tolist() == [16, 16]
    torch.testing.assert_close(pred, model(images, 0.25, noise)[1], rtol=1e-4, atol=1e-5)

    done = command(monkeypatch, capsys, "export", folder, tmp_path / "c.pt2", "--what", "encoder", "--ema")
    assert done.returncode == 0, done.stderr
    model.cls_token.data.neg_()
    tokens = torch.export.load(tmp_path / "c.pt2").module()(images=images)
    torch.testing.assert_close(tokens, model.forward_features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factory", [(), ("--model", "mae_vit_tiny_patch4")])
def test_the_command_exports_weights_of_any_origin(tmp_path, monkeypatch, capsys, factory):
    model = create_model("mae_vit_tiny_patch4").eval()
    weights = {f"module.{name}": x for name, x in convert(model.state_dict(), "ours", "mmpretrain").weights.items()}
    torch.save({"state_dict": weights}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    words = [tmp_path / "x.pth", tmp_path / "x.pt2", "--what", "encoder", *factory]
    done = command(monkeypatch, capsys, "export", *words)
    assert done.returncode == 0, done.stderr
    images, _ = inputs(model, 2)
    tokens = torch.export.load(tmp_path / "x.pt2").module()(images=images)
    torch.testing.assert_close(tokens, model.forward_features(images), rtol=1e-4, atol=1e-5)


def test_the_command_works_without_onnxruntime(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = command(monkeypatch, capsys, "export", run[0], tmp_path / "a.onnx", "--what", "encoder")
    assert (done.returncode, "onnxruntime is not installed" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{run}", "{tmp}/x.tflite", "--what", "encoder"], "ends in .onnx or .pt2"),
        (["{run}", "{tmp}/x.onnx", "--what", "classifier"], "has no 'classifier'"),
        (["{run}", "{tmp}/x.pt2", "--what", "logits"], "what"),
        (["{tmp}/nowhere", "{tmp}/x.onnx", "--what", "encoder"], "there is no such file or folder"),
        (["{run}", "{run}/checkpoints/x.pt2", "--what", "reconstruction", "--mask-ratio", "2"], "got 2"),
    ],
)
def test_wrong_arguments_of_the_command_are_named(run, tmp_path, monkeypatch, capsys, words, expected):
    before = sorted(tmp_path.rglob("*"))
    done = command(monkeypatch, capsys, "export", *[word.format(run=run[0], tmp=tmp_path) for word in words])
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("what", ["encoder", "classifier"])
def test_compiled_and_plain_give_the_same_features(what):
    model = make(what, depth=1)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model.forward_features, fullgraph=True)
    images, _ = inputs(model, 3)
    with torch.inference_mode():
        found, plain, truth = compiled(images), model.forward_features(images), exact.forward_features(images.double())
    assert_no_worse_than_eager({"x": found}, {"x": plain}, {"x": truth}, torch.float32)
